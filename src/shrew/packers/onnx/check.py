"""Two questions, kept apart: is the graph the model, and what does the faster arithmetic that is shipped change?

Both are answered with what ONNX Runtime gives, in the plainest loop that can run a packed graph.
"""

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch

from shrew.errors import ShrewError
from shrew.packers.onnx.graph import State

TOLERANCE = 1e-3  # of a logit; more only where logits are beyond what float32 keeps to that
LARGE = 64.0
GREEDY = 200  # tokens
PROMPT = 32
WINDOW, COMPARED = 256, 2048  # tokens
ROUNDS, STEPS = 5, 24
AS_FAST = 1.05


@dataclass
class Runner:
    """One sequence at a time. `capacity` is the length of the caches."""

    session: onnxruntime.InferenceSession
    states: Sequence[State]
    capacity: int
    chunk: int
    align: int = 0

    def __post_init__(self) -> None:
        self.names = [item.name for item in self.session.get_outputs()]
        self.start()

    def start(self) -> None:
        """Forget everything."""
        self.seen = 0
        self.held = {
            state.name: np.zeros((1, *(size if isinstance(size, int) else self.capacity for size in state.shape)),
                                 state.dtype)
            for state in self.states
        }  # fmt: skip

    def feed(self, tokens: Sequence[int] | np.ndarray) -> np.ndarray:
        """float32 [tokens, vocabulary]: the logits behind each of these further tokens."""
        found, rest = [], np.asarray(tokens, np.int64)
        while len(rest):
            most = min(self.chunk, self.align - self.seen % self.align) if self.align else self.chunk
            found.append(self._call(rest[:most]))
            rest = rest[most:]
        return np.concatenate(found)

    def _call(self, tokens: np.ndarray) -> np.ndarray:
        inputs = {"tokens": tokens[None], "start": np.array([self.seen]), "wanted": np.arange(len(tokens))}
        inputs |= {f"past.{name}": value for name, value in self.held.items()}
        outputs = dict(zip(self.names, self.session.run(None, inputs), strict=True))
        self.held = {name: outputs[f"next.{name}"] for name in self.held}
        self.seen += len(tokens)
        return np.asarray(outputs["logits"])

    def greedy(self, prompt: Sequence[int], count: int) -> tuple[list[int], np.ndarray]:
        """The likeliest `count` tokens after a prompt, and the logits of prompt and tokens but for the last one."""
        self.start()
        parts, tokens = [self.feed(prompt)], []
        for _ in range(count):
            tokens.append(int(parts[-1][-1].argmax()))
            if len(tokens) < count:
                parts.append(self.feed(tokens[-1:]))
        return tokens, np.concatenate(parts)


def session(path: Path) -> onnxruntime.InferenceSession:
    """A graph on the CPU, with as many threads as torch has."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def lengths(context: int, text: Sequence[int]) -> tuple[list[int], int]:
    """The prompt and how many tokens follow it."""
    prompt = [int(token) for token in text[: max(1, min(PROMPT, context // 4))]]
    return prompt, min(GREEDY, context - len(prompt))


@torch.no_grad()
def exact(runner: Runner, model: Any, text: Sequence[int], context: int) -> dict[str, Any]:
    """The graph against the torch model of the same values: greedy tokens one by one, and every logit on the way.

    Each token is compared with the first choice of torch's whole pass over what came before it, so equal ones are
    torch's own greedy tokens. Raises ShrewError where the two differ.
    """
    prompt, count = lengths(context, text)
    tokens, logits = runner.greedy(prompt, count)
    whole = torch.tensor([prompt + tokens[:-1]])
    wanted = model(input_ids=whole).logits[0].float().numpy()
    difference, largest = float(np.abs(logits - wanted).max()), float(np.abs(wanted).max())
    limit = TOLERANCE * max(1.0, largest / LARGE)
    choices = wanted[len(prompt) - 1 :].argmax(-1)
    equal = int((choices == tokens).cumprod().sum())
    if not difference <= limit or equal < count:
        raise ShrewError(
            f"the packed graph is not the model: logits differ by {difference:.2g} (allowed {limit:.2g}), {equal} of "
            f"{count} greedy tokens are equal; nothing was written, please report it."
        )
    return {"logit_difference": difference, "largest_logit": largest, "allowed": limit, "greedy_compared": count,
            "greedy_equal": equal}  # fmt: skip


def seconds(runners: Sequence[Runner], text: Sequence[int]) -> list[float]:
    """Median seconds of a decoded token of each, taken in turns so that a busy machine is busy for all."""
    found: list[list[float]] = [[] for _ in runners]
    for _ in range(ROUNDS):
        for runner, times in zip(runners, found, strict=True):
            runner.start()
            runner.feed(text[:1])
            for _ in range(min(STEPS, runner.capacity - 1)):
                begin = time.perf_counter()
                runner.feed(text[:1])
                times.append(time.perf_counter() - begin)
    return [statistics.median(times) for times in found]


def shipped(fast: Runner, slow: Runner, text: Sequence[int], context: int) -> dict[str, Any]:
    """The graph that is shipped against the exact one on a text: KL(exact || shipped) in bits a token, share of equal
    first choices, and the place of the first greedy token that differs (None: none of them)."""
    size = min(WINDOW, context)
    tokens = np.asarray(text[:COMPARED])
    total, same, count = 0.0, 0, 0
    for first in range(0, len(tokens), size):
        piece = tokens[first : first + size]
        slow.start()
        fast.start()
        p, q = (_log_softmax(runner.feed(piece)) for runner in (slow, fast))
        total += float((np.exp(p) * (p - q)).sum())
        same += int((p.argmax(-1) == q.argmax(-1)).sum())
        count += len(piece)
    prompt, greedy = lengths(context, text)
    one, other = slow.greedy(prompt, greedy)[0], fast.greedy(prompt, greedy)[0]
    differing = next((at for at, pair in enumerate(zip(one, other, strict=True)) if pair[0] != pair[1]), None)
    return {"kl_bits": total / count / math.log(2), "top1": same / count, "tokens": count,
            "first_differing_token": differing, "greedy_compared": greedy}  # fmt: skip


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    return np.asarray(wide - np.log(np.exp(wide).sum(-1, keepdims=True)))
