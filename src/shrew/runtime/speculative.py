"""Guessing several tokens ahead and checking them in one call: faster, and but for rounding the same text.

A guess is one sure token, from earlier text that went on from the same words or from a smaller model; or, for sampled
requests without a seed, one drawn from the smaller model's distribution. Sure guesses are checked by choosing each
token as without guessing, with the same draw, and going on while the guess was right: this is rejection sampling with a
proposal that has all its mass on one token, so the distribution stays, and so does the text of a seed. Drawn guesses go
through rejection sampling as such (Leviathan et al., arXiv:2211.17192).

Longer calls add up in another order than single steps, so logits differ in their last bits; where products round their
inputs to 8 bits (accuracy level 4) this moved the distance of the two best by up to 0.026 of the logits' deviation, in
the starter at 4 and 8 bits. Where that distance is below TIES at temperature 0, a guess is not believed: the token is
computed again by a single step, whose choice stands. That step still reads the keys and values that longer calls left
of tokens that were believed, so at that level it may, seldom, choose otherwise than where nothing was guessed.
"""

import time
from collections import Counter
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from shrew.errors import UsageError
from shrew.runtime.pack import Model
from shrew.runtime.sampling import Sampler, draw_index, greedy
from shrew.runtime.states import Runner, Snapshot, call_end

MOST = 8  # tokens guessed at once
LENGTHS = (0, 1, 2, 4, MOST)
TIES = {0: 1e-3, 4: 0.06}  # by accuracy level, in standard deviations of the logits
GRAM = 3  # tokens that must be the same for what followed them to be a guess
RECENT = 0.1  # weight of the newest measurement in a running mean
TRIES = 3  # of each number of guesses, before the fastest is chosen
PROBE = 64  # steps without guessing before it is tried again


def check_drawn(
    guesses: Sequence[int], proposed: Sequence[np.ndarray], wanted: np.ndarray, at: int, numbers: tuple[float, float]
) -> tuple[int, bool]:
    """Whether guess `at`, drawn from `proposed[at]`, stands where `wanted` (both float64 [vocabulary]) is the model's
    distribution: it and True, or another token and False. `numbers`: two draws of [0, 1)."""
    token, q = guesses[at], proposed[at]
    if numbers[0] * q[token] < wanted[token]:
        return token, True
    rest = np.maximum(wanted - q, 0)
    return draw_index(rest if rest.any() else wanted, numbers[1]), False


class Drafter(Protocol):
    def guess(self, text: Sequence[int], count: int, sampler: Sampler | None) -> tuple[list[int], list[np.ndarray]]:
        """Up to `count` tokens after `text`; with a sampler they may be drawn, and their distributions come too."""


class Lookup:
    """Guesses what followed the last GRAM tokens where they stood before, in prompt or answer."""

    def __init__(self) -> None:
        self._text: Sequence[int] = ()
        self._known = 0  # tokens of it that are indexed
        self._places: dict[tuple[int, ...], int] = {}  # n-gram -> where what followed it starts

    def guess(self, text: Sequence[int], count: int, sampler: Sampler | None) -> tuple[list[int], list[np.ndarray]]:
        if text is not self._text:  # the same one has only grown
            self._text, self._places, self._known = text, {}, 0
        # the n-gram that the text ends with is not indexed before something follows it
        for end in range(max(self._known, GRAM), len(text)):
            self._places[tuple(text[end - GRAM : end])] = end
        self._known = len(text)
        place = self._places.get(tuple(text[-GRAM:]))
        return ([], []) if place is None else (list(text[place : place + count]), [])


class Smaller:
    """Guesses what a smaller model would say, for one text at a time."""

    def __init__(self, model: Model, context: int) -> None:
        self.model = model
        self._context = min(context, model.manifest.context)
        self._runner = Runner(model, 1, self._context)
        self._fed: list[int] = []  # what the state stands after
        self._firm: tuple[int, Snapshot] | None = None  # before guesses were fed; recurrent states go back to it
        self._draw = np.random.default_rng()

    def guess(self, text: Sequence[int], count: int, sampler: Sampler | None) -> tuple[list[int], list[np.ndarray]]:
        count = min(count, self._context - len(text))
        if count < 1:
            return [], []
        self._go_back(text)
        logits = self._feed(text[len(self._fed) :])
        if self._runner.has_recurrent:
            self._firm = len(text), self._runner.save(0, 0, 0)
        guesses: list[int] = []
        proposed: list[np.ndarray] = []
        while True:
            if sampler is None:
                token = greedy(logits)
            else:
                proposed.append(sampler.dense(logits))
                token = draw_index(proposed[-1], self._draw.random())
            guesses.append(token)
            if len(guesses) == count:
                return guesses, proposed
            logits = self._feed([token])

    def _go_back(self, text: Sequence[int]) -> None:
        """Forget what is not the beginning of `text`, and at least its last token, whose logits are wanted."""
        most = min(len(self._fed), len(text) - 1)
        same = most if self._fed[:most] == list(text[:most]) else 0
        if not same:
            while same < most and self._fed[same] == text[same]:
                same += 1
        if same < len(self._fed) and self._runner.has_recurrent:
            if self._firm is not None and self._firm[0] <= same:
                same = self._firm[0]
                self._runner.restore(0, [self._firm[1]])
            else:
                same = 0
        if same == 0:
            self._runner.clear(0)
            self._firm = None
        del self._fed[same:]

    def _feed(self, tokens: Sequence[int]) -> np.ndarray:
        """Logits [vocabulary] after more tokens."""
        manifest, first, start = self.model.manifest, len(self._fed), len(self._fed)
        last = start + len(tokens)
        self._runner.reserve(last)
        while True:
            end = call_end(start, last, manifest.chunk, manifest.align)
            logits, _ = self._runner.call(0, tokens[start - first : end - first], start, int(end == last))
            self._fed += tokens[start - first : end - first]
            if end == last:
                return logits[0]
            start = end


class Pace:
    """How many tokens to guess at once: what gives most tokens a second, by what was seen so far."""

    def __init__(self) -> None:
        self._seconds: dict[int, float] = {}
        self._tries: Counter[int] = Counter()
        self._right = 0.6  # share of guesses that stand
        self._plain = 0  # steps since the last guess

    def choose(self, most: int) -> int:
        lengths = [length for length in LENGTHS if length <= most]
        for length in lengths:
            if self._tries[length] < TRIES:
                return length
        best = max(lengths, key=lambda length: self._expected(length) / self._seconds[length])
        self._plain = self._plain + 1 if best == 0 else 0
        return min(2, most) if self._plain and self._plain % PROBE == 0 else best

    def _expected(self, length: int) -> float:
        """Tokens of a call that checks so many guesses."""
        return sum(self._right**count for count in range(length + 1))

    def note(self, length: int, right: int, seconds: float) -> None:
        known = self._seconds.get(length, seconds)
        self._tries[length] += 1
        if self._tries[length] <= TRIES:  # the first ones also prepare what the others use
            self._seconds[length] = min(known, seconds)
        else:
            self._seconds[length] = known + RECENT * (min(seconds, 4 * known) - known)
        if length:
            # each guess that was looked at tells: all that were right, and the first wrong one
            seen = min(right + 1, length)
            self._right += (1 - (1 - RECENT) ** seen) * (right / seen - self._right)


class Speculator:
    """Guesses for the one sequence that runs alone, and counts how well."""

    def __init__(self, model: Model, draft: Model | str, context: int) -> None:
        """Raises UsageError for a draft that cannot stand in for the model."""
        self.drafter: Drafter
        self.draws = isinstance(draft, Model)
        if isinstance(draft, Model):
            same = draft.tokenizer.get_vocab() == model.tokenizer.get_vocab()
            if draft.manifest.kind != "causal" or draft.manifest.vocabulary != model.manifest.vocabulary or not same:
                raise UsageError(
                    f"{draft.path} cannot guess for {model.path}: they do not have the same tokens; "
                    "choose a draft with the same tokenizer, or 'lookup'."
                )
            self.drafter = Smaller(draft, context)
        elif draft == "lookup":
            self.drafter = Lookup()
        else:
            raise UsageError(f"unknown draft '{draft}'; give a packed folder, or 'lookup'.")
        self.tie = TIES.get(model.manifest.accuracy_level or 0, max(TIES.values()))
        self.pace = Pace()
        self.guessed = self.right = 0
        self._began = 0.0

    def guess(self, text: Sequence[int], most: int, sampler: Sampler) -> tuple[list[int], list[np.ndarray]]:
        """Guesses of what follows `text`; their distributions where they were drawn."""
        self._began = time.perf_counter()
        count = self.pace.choose(min(most, MOST))
        drawn = self.draws and not sampler.is_greedy and sampler.request.seed is None
        return self.drafter.guess(text, count, sampler if drawn else None) if count else ([], [])

    def note(self, guessed: int, right: int) -> None:
        """The call that checked the last guesses is done."""
        self.guessed, self.right = self.guessed + guessed, self.right + right
        self.pace.note(max((n for n in LENGTHS if n <= guessed), default=0), right, time.perf_counter() - self._began)
