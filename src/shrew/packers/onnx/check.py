"""Two questions, kept apart: is the graph the model, and what does the faster arithmetic that is shipped change?

Both are answered with what ONNX Runtime gives, in the plainest loop that can run a packed graph. A causal model answers
with the logits of each position, a classifier with those of each text.
"""

import math
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch

from shrew.errors import FolderError, ShrewError
from shrew.packers.onnx.graph import State
from shrew.runtime.pack import open_graph
from shrew.runtime.states import call_end

TOLERANCE = 1e-3  # of a logit; more only where logits are beyond what float32 keeps to that
LARGE = 64.0
GREEDY = 200  # tokens
PROMPT = 32
WINDOW, COMPARED = 256, 2048  # tokens
TEXTS, ROWS = 64, 8  # that a classifier gets, in all and at once
ROUNDS, STEPS = 5, 24


@dataclass
class Runner:
    """One sequence at a time. `capacity` is the length of the caches."""

    runs: onnxruntime.InferenceSession
    states: Sequence[State]
    capacity: int
    chunk: int
    align: int = 0

    def __post_init__(self) -> None:
        self.names = [item.name for item in self.runs.get_outputs()]
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
            count = call_end(self.seen, self.seen + len(rest), self.chunk, self.align) - self.seen
            found.append(self._call(rest[:count]))
            rest = rest[count:]
        return np.concatenate(found)

    def _call(self, tokens: np.ndarray) -> np.ndarray:
        inputs = {"tokens": tokens[None], "start": np.array([self.seen]), "wanted": np.arange(len(tokens))}
        inputs |= {f"past.{name}": value for name, value in self.held.items()}
        outputs = dict(zip(self.names, self.runs.run(None, inputs), strict=True))
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


def opened(path: Path, whole: bool = False) -> onnxruntime.InferenceSession:
    """A graph as the runtime opens it, with as many threads as torch has."""
    return open_graph(path, torch.get_num_threads(), whole=whole)


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
    equal = int((wanted[len(prompt) - 1 :].argmax(-1) == tokens).cumprod().sum())
    found = _close(logits, wanted, f"{equal} of {count} greedy tokens are equal", equal == count)
    return found | {"greedy_compared": count, "greedy_equal": equal}


def _close(found: np.ndarray, wanted: np.ndarray, more: str, equal: bool) -> dict[str, Any]:
    if not np.isfinite(wanted).all():
        raise FolderError("the model answers text with what is no number (infinite or NaN), so some of its weights "
                          "are far too large; is the file damaged?")  # fmt: skip
    difference, largest = float(np.abs(found - wanted).max()), float(np.abs(wanted).max())
    limit = TOLERANCE * max(1.0, largest / LARGE)
    if not difference <= limit or not equal:
        raise ShrewError(f"the packed graph is not the model: logits differ by {difference:.2g} (allowed {limit:.2g}), "
                         f"{more}; nothing was written, please report it.")  # fmt: skip
    return {"logit_difference": difference, "largest_logit": largest, "allowed": limit}


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
    """The graph that is shipped against the exact one on a text: see `_apart`; and the place of the first greedy token
    that differs (None: none of them)."""
    window, size = min(WINDOW, context), fast.chunk

    def pairs() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The logits of both, few at a time: a vocabulary may be large."""
        for first in range(0, len(text), window):
            piece = text[first : first + window]
            slow.start()
            fast.start()
            for at in range(0, len(piece), size):
                yield slow.feed(piece[at : at + size]), fast.feed(piece[at : at + size])

    found = _apart(pairs())
    prompt, count = lengths(context, text)
    tokens = zip(slow.greedy(prompt, count)[0], fast.greedy(prompt, count)[0], strict=True)
    differing = next((at for at, (a, b) in enumerate(tokens) if a != b), None)
    return {**found, "first_differing_token": differing, "greedy_compared": count}


def _apart(pairs: Iterable[tuple[np.ndarray, np.ndarray]]) -> dict[str, Any]:
    """KL(exact || shipped) in bits, mean over rows of logits, and the share of rows of equal first choice."""
    total, same, count = 0.0, 0, 0
    for exact_, shipped_ in pairs:
        p, q = _log_softmax(exact_), _log_softmax(shipped_)
        total += float((np.exp(p) * (p - q)).sum())
        same += int((p.argmax(-1) == q.argmax(-1)).sum())
        count += len(p)
    return {"kl_bits": total / count / math.log(2), "top1": same / count, "compared": count}


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    return np.asarray(wide - np.log(np.exp(wide).sum(-1, keepdims=True)))


# Classifiers


@dataclass
class Labeller:
    """A packed classifier, or a detector, whose labels are two: 0 and the logit of being vulnerable."""

    runs: onnxruntime.InferenceSession

    def logits(self, texts: Sequence[Sequence[int]]) -> np.ndarray:
        """float32 [texts, labels], of several texts at once."""
        found = np.concatenate([part for part, in self.run(["logits"], texts)])
        return found if found.ndim == 2 else np.stack([np.zeros_like(found), found], 1)

    def run(self, names: list[str], texts: Sequence[Sequence[int]]) -> Iterator[list[np.ndarray]]:
        """These outputs of the graph for several texts at once."""
        for first in range(0, len(texts), ROWS):
            rows = texts[first : first + ROWS]
            tokens = np.zeros((len(rows), max(map(len, rows))), np.int64)
            for row, text in zip(tokens, rows, strict=True):
                row[: len(text)] = text
            lengths_ = np.array([len(text) for text in rows])
            yield self.runs.run(names, {"tokens": tokens, "lengths": lengths_})


@torch.no_grad()
def exact_labels(labeller: Labeller, model: Any, texts: Sequence[Sequence[int]]) -> dict[str, Any]:
    """The graph, given several texts at once, against the torch model, given each alone. Raises ShrewError."""
    wanted = np.concatenate([model(input_ids=torch.tensor([list(text)])).logits.float().numpy() for text in texts])
    return _close(labeller.logits(texts), wanted, "of a text", True) | {"texts": len(texts)}


@torch.no_grad()
def exact_detections(labeller: Labeller, model: Any, texts: Sequence[Sequence[int]]) -> dict[str, Any]:
    """As `exact_labels`, of all that a detector says: of being vulnerable, of each family and of each token."""
    wanted: list[np.ndarray] = []
    found: list[np.ndarray] = []
    for text in texts:
        said = model(input_ids=torch.tensor([list(text)]))
        wanted.append(torch.cat([said.logits[0, 1:], said.families[0], said.lines[0]]).float().numpy())
    for logits, families, lines in labeller.run(["logits", "families", "lines"], texts):
        for row in zip(logits, families, lines, strict=True):
            size = len(texts[len(found)])
            found.append(np.concatenate([row[0][None], row[1], row[2][:size]]))
    return _close(np.concatenate(found), np.concatenate(wanted), "of a text", True) | {"texts": len(texts)}


def label_seconds(labellers: Sequence[Labeller], texts: Sequence[Sequence[int]]) -> list[float]:
    """Median seconds for a text of each, one text after the other and taken in turns."""
    found: list[list[float]] = [[] for _ in labellers]
    for text in texts[:STEPS]:
        for labeller, times in zip(labellers, found, strict=True):
            begin = time.perf_counter()
            labeller.logits([text])
            times.append(time.perf_counter() - begin)
    return [statistics.median(times) for times in found]


def shipped_labels(fast: Labeller, slow: Labeller, texts: Sequence[Sequence[int]]) -> dict[str, Any]:
    """See `_apart`."""
    return _apart([(slow.logits(texts), fast.logits(texts))])
