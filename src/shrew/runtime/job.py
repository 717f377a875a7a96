"""One request on its way through the engine: what was fed, what is next, and when it ends."""

import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import numpy as np

from shrew.runtime.answer import PAUSE, Answer, End, Scored
from shrew.runtime.manifest import Manifest
from shrew.runtime.prefix import Block
from shrew.runtime.request import Finish, Usage
from shrew.runtime.sampling import Sampler, Top, log_probabilities
from shrew.runtime.text import Vocabulary, Watch

FOREVER = float("inf")
Embedding = tuple[np.ndarray, Usage]  # of a text, float32 [width], and what it cost


class Job:
    """A request, its tokens so far, and its row of states. For the engine's thread."""

    def __init__(
        self, answer: Answer, notify: Callable[[], Any] | None, room: int, future: "Future[Embedding] | None" = None
    ) -> None:
        """`room`: tokens that fit after the prompt. With a `future` it is there for its hidden states, not to go on."""
        request = answer.request
        self.answer, self.request, self.notify, self.future = answer, request, notify, future
        self.text = [int(token) for token in request.prompt]  # prompt and answer
        self.prompt = len(self.text)
        self.left = min(request.max_tokens, room)
        self.born = time.monotonic()
        self.deadline = FOREVER if request.seconds is None else self.born + request.seconds
        self.row = -1
        self.fed = 0  # tokens of the text that the states stand after
        self.cached = 0
        self.cpu = 0.0
        self.joules: float | None = None  # of the processor packages, where they count
        self.charged = 0.0  # CPU-seconds that joules were told for
        self.kept: Block | None = None  # the end of what the prefixes hold of this text
        self.plain_next = False  # the next token is to be computed by a single step
        self._scored: list[tuple[int, float | None, Top]] = [(self.text[0], None, ())]
        self.hidden = np.zeros(0)  # the sum so far
        self.raw = b""  # the prompt, as prefixes are looked for
        self.sampler: Sampler
        self._watch: Watch | None = None
        self._told = 0.0

    def begin(self, vocabulary: Vocabulary, manifest: Manifest) -> None:
        """Before the first call; what takes memory is made only now."""
        self.sampler = Sampler(self.request, manifest.vocabulary)
        self.raw = np.asarray(self.text, np.int64).tobytes()
        if self.future is not None:
            self.hidden = np.zeros(manifest.width)
        if self.request.stop:
            self._watch = Watch(vocabulary, self.request.prompt, self.request.stop)

    @property
    def made(self) -> int:
        return len(self.text) - self.prompt

    @property
    def needs_all(self) -> bool:
        """Whether every token of the prompt gives something, so that none may come from a prefix."""
        return self.request.echo or self.future is not None

    @property
    def target(self) -> int:
        """Tokens of the prompt to be computed before the first step, which takes the last one."""
        return self.prompt - (self.future is None)

    def tell(self, last: bool = False) -> None:
        """That there is something new, unless that was told just now and more will come. Who cannot be told is gone."""
        if self.notify is None:
            return
        now = time.monotonic()
        if last or now >= self._told + PAUSE:
            self._told = now
            try:
                self.notify()
            except Exception:
                self.notify = None
                self.answer.cancel()

    def choose(self, logits: np.ndarray) -> tuple[int, float | None, Top]:
        """The next token by the logits [vocabulary]. Raises what the constraint raises, RequestError for NaN."""
        token = self.sampler.pick(self.sampler.shape(logits, self.left))
        return self.scored_as(token, logits)

    def scored_as(self, token: int, logits: np.ndarray) -> tuple[int, float | None, Top]:
        """A chosen token with its log-probability if that is asked for."""
        if self.request.logprobs is None:
            return token, None, ()
        logprob, top = log_probabilities(logits[None], [token], self.request.logprobs)[0]
        return token, logprob, top

    def give(self, logits: np.ndarray, hidden: np.ndarray) -> None:
        """What a call on the prompt gave, by rows from `fed` on, if it was asked for."""
        if self.request.echo:
            tokens = self.text[self.fed + 1 : self.fed + 1 + len(logits)]
            found = log_probabilities(logits, tokens, self.request.logprobs or 0)
            self._scored += [(token, *scores) for token, scores in zip(tokens, found, strict=True)]
        if self.future is not None:
            self.hidden += hidden.sum(axis=0, dtype=np.float64)

    def show_prompt(self) -> None:
        """Give out the prompt's log-probabilities if they were asked for; they are complete."""
        if self.request.echo:
            self.answer.put(Scored(tuple(self._scored)))
            self._scored = []

    def add(self, token: int, logprob: float | None, top: Top, eos: frozenset[int]) -> tuple[Finish | None, bool]:
        """Take on the next token and give it out: how the text ends with it, if it does, and whether that is by a stop
        string. Raises what the constraint raises."""
        self.text.append(token)
        self.left -= 1
        if token in eos and not self.request.ignore_eos:
            return "stop", False
        if not self.sampler.is_plain:
            self.sampler.note(token)
        constraint = self.request.constraint
        if constraint is not None:
            constraint.advance(token)
        self.answer.put((token, logprob, top))
        if self._watch is not None and self._watch.feed(token):
            return "stop", True
        if constraint is not None and constraint.finished:
            return "stop", False
        return ("length", False) if self.left < 1 else (None, False)

    @property
    def usage(self) -> Usage:
        return Usage(self.prompt, self.made, self.cached, self.cpu, self.joules)

    def end(self, finish: Finish, stopped: bool, error: str, refused: bool) -> None:
        self.answer.end(End(finish, self.usage, stopped, error, refused))
