"""From the logits of one position to the next token: penalties, limits, one draw.

In this order: bias, penalties, constraint; then temperature, top-k, top-p, min-p. Log-probabilities are the model's
own, before any of it. Every request draws from a generator of its own, one number a token, so that a seed gives the
same text whoever is served beside it (as far as logits are the same: rows computed together may differ in last bits).
"""

from collections.abc import Sequence

import numpy as np

from shrew.errors import RequestError
from shrew.runtime.request import Request

Top = tuple[tuple[int, float], ...]


def greedy(logits: np.ndarray) -> int:
    """The most likely token, the first of equals. Raises RequestError where a logit is not a number."""
    best = int(logits.argmax())
    if not np.isfinite(logits[best]):
        raise RequestError("the model gave no usable probabilities here.")
    return best


def is_close(logits: np.ndarray, tie: float) -> bool:
    """Whether the second best comes within `tie` of the best."""
    best = int(logits.argmax())
    top, logits[best] = logits[best], -np.inf
    second = logits.max()
    logits[best] = top
    return bool(not top - second > tie)


def log_probabilities(logits: np.ndarray, chosen: Sequence[int], count: int) -> list[tuple[float, Top]]:
    """For each row of `logits` [rows, vocabulary]: the log-probability of the chosen token, and the `count` likeliest
    tokens with theirs."""
    most = logits.max(axis=1, keepdims=True)
    totals = most[:, 0] + np.log(np.exp(logits - most).sum(axis=1, dtype=np.float64))
    found: list[tuple[float, Top]] = []
    for row, token, total in zip(logits, chosen, totals, strict=True):
        top: Top = ()
        if count:
            first = len(row) - count
            ids = np.argpartition(row, first)[first:] if first > 0 else np.arange(len(row))
            ids = ids[np.lexsort((ids, -row[ids]))]
            top = tuple((int(id), float(row[id] - total)) for id in ids)
        found.append((float(row[token] - total), top))
    return found


class Sampler:
    """Chooses the tokens of one request. Not for several threads."""

    def __init__(self, request: Request, vocabulary: int) -> None:
        self.request, self._size = request, vocabulary
        self.is_greedy = request.temperature == 0
        self._draw = np.random.Generator(np.random.PCG64(request.seed)) if not self.is_greedy else None
        self._bias_ids = np.fromiter(request.logit_bias.keys(), np.int64, len(request.logit_bias))
        self._bias = np.fromiter(request.logit_bias.values(), np.float32, len(request.logit_bias))
        self._counts: np.ndarray | None = None  # of each token in the answer
        if request.presence_penalty or request.frequency_penalty:
            self._counts = np.zeros(vocabulary, np.int32)
        self._seen: np.ndarray | None = None  # tokens of prompt and answer
        if request.repetition_penalty != 1:
            self._seen = np.zeros(vocabulary, bool)
            self._seen[np.asarray(request.prompt)] = True
        counts = self._counts is not None or self._seen is not None
        self._changes = bool(counts or len(self._bias) or request.constraint is not None)
        self.is_plain = self.is_greedy and not self._changes and request.logprobs is None

    def draw(self) -> float:
        """A number of [0, 1)."""
        return float(self._draw.random()) if self._draw is not None else 0.0

    def shape(self, logits: np.ndarray, left: int) -> np.ndarray:
        """The logits [vocabulary] after bias, penalties and constraint, in a copy where anything changes."""
        request = self.request
        if not self._changes:
            return logits
        logits = logits.copy()
        if len(self._bias):
            logits[self._bias_ids] += self._bias
        if self._seen is not None:
            ids = np.flatnonzero(self._seen)
            found = logits[ids]
            by = np.float32(request.repetition_penalty)
            logits[ids] = np.where(found > 0, found / by, found * by)
        if self._counts is not None:
            ids = np.flatnonzero(self._counts)
            times = self._counts[ids].astype(np.float32)
            logits[ids] -= request.presence_penalty + request.frequency_penalty * times
        if request.constraint is not None and (mask := request.constraint.mask(left)) is not None:
            if mask.shape != logits.shape:
                raise RequestError(f"the constraint allows among {len(mask):,} tokens, the model has {self._size:,}.")
            logits[~mask] = -np.inf
        return logits

    def likely(self, logits: np.ndarray) -> tuple[np.ndarray | None, np.ndarray]:
        """The tokens that may be drawn (None: all) and their probabilities, float64, from shaped logits."""
        request = self.request
        most = logits.max()
        if not np.isfinite(most):
            raise RequestError("the model gave no usable probabilities here.")
        scaled = (logits - most) / np.float32(max(request.temperature, 1e-6))
        ids: np.ndarray | None = None
        if 0 < request.top_k < len(scaled):
            least = np.partition(scaled, len(scaled) - request.top_k)[len(scaled) - request.top_k]
            ids = np.flatnonzero(scaled >= least)
            scaled = scaled[ids]
        p = np.exp(scaled).astype(np.float64)
        p /= p.sum()
        if request.top_p < 1:
            # all below this threshold together weigh less than what may be left out, so only the others are sorted
            some = np.flatnonzero(p >= (1 - request.top_p) / len(p))
            some = some[np.argsort(-p[some], kind="stable")]
            some = some[: int(np.searchsorted(np.cumsum(p[some]), request.top_p)) + 1]
            ids, p = (some if ids is None else ids[some]), p[some]
        if request.min_p > 0:
            some = np.flatnonzero(p >= request.min_p * p.max())
            ids, p = (some if ids is None else ids[some]), p[some]
        return ids, p / p.sum()

    def dense(self, logits: np.ndarray) -> np.ndarray:
        """float64 [vocabulary]: the probability of each token being drawn, from shaped logits."""
        ids, p = self.likely(logits)
        if ids is None:
            return p
        full = np.zeros(len(logits))
        full[ids] = p
        return full

    def pick(self, shaped: np.ndarray) -> int:
        """The next token from shaped logits; takes one draw unless it is the most likely one anyway."""
        if self.is_greedy:
            return greedy(shaped)
        ids, p = self.likely(shaped)
        at = draw_index(p, self.draw())
        return at if ids is None else int(ids[at])

    def note(self, token: int) -> None:
        """The token was chosen. Raises what the constraint raises."""
        if self._counts is not None:
            self._counts[token] += 1
        if self._seen is not None:
            self._seen[token] = True


def draw_index(p: np.ndarray, number: float) -> int:
    """Which of the probabilities `p` (of any sum) the `number` of [0, 1) falls on; never one of zero."""
    sums = np.cumsum(p)
    at = int(np.searchsorted(sums, number * sums[-1], side="right"))
    return at if at < len(p) else int(np.flatnonzero(p)[-1])
