"""What is asked of a running model, and what comes back piece by piece."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

import numpy as np

Finish = Literal["stop", "length", "cancelled", "deadline", "error"]


class Constraint(Protocol):
    """What may come next, for one sequence; it may be asked for a token before `advance` has been called."""

    def mask(self, left: int) -> np.ndarray | None:
        """bool [vocabulary] of the tokens allowed now; None allows all. With few tokens `left` it steers to an end."""

    def advance(self, token: int) -> None:
        """The token was chosen; raises RequestError for one that is not allowed."""

    @property
    def finished(self) -> bool:
        """Whether the text is complete and nothing may follow."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """One sequence to complete. Settings that are not sampled with stand at their neutral values."""

    prompt: Sequence[int]
    max_tokens: int = 256
    temperature: float = 1.0  # 0: the most likely token
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None  # the same seed gives the same text, whoever else is served meanwhile
    stop: Sequence[str] = ()  # strings; they are not part of what comes back
    ignore_eos: bool = False
    logprobs: int | None = None  # so many alternatives a token; None: no log-probabilities
    echo: bool = False  # log-probabilities of the prompt's tokens as well
    seconds: float | None = None  # deadline, from submission
    constraint: Constraint | None = None


class Token(NamedTuple):
    """One token. `logprob` is None for the first of a prompt; `top` has the alternatives, the most likely first."""

    id: int
    text: str
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Usage:
    """What an answer cost. `cpu_seconds` is its share of the process's, by tokens computed in each step, and `joules`
    its share of what the processor packages used meanwhile, whoever used it; None where no counter can be read."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int  # of the prompt, taken from an earlier one
    cpu_seconds: float
    joules: float | None = None

    def cost(self) -> dict[str, float]:
        """What was really measured of it, as JSON has it."""
        found = {"cpu_seconds": self.cpu_seconds} | ({} if self.joules is None else {"joules": self.joules})
        return {name: round(value, 6) for name, value in found.items()}


@dataclass(frozen=True)
class Piece:
    """What has come since the last piece: valid text (a character is never split) and the tokens behind it.

    The last piece has `finish` and `usage`. `prompt` holds the prompt's tokens, once, if they were asked for.
    """

    text: str
    tokens: tuple[Token, ...] = ()
    prompt: tuple[Token, ...] = ()
    finish: Finish | None = None
    usage: Usage | None = None
    error: str = ""
    refused: bool = False  # the error is that the request's own constraint cannot be met
