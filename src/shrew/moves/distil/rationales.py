"""Learning from worked answers: distilling step by step (Hsieh et al. 2023, arXiv:2305.02301).

Each example is two tasks that a prefix tells apart: from the text to the answer, and from the text to the reasons for
it. The reasons teach, and need not be written when the model is used. Only what is to be written counts for the loss.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from shrew import objectives
from shrew.data.rationales import read_rationales
from shrew.errors import DataError
from shrew.folder import Loaded
from shrew.moves.context import Context
from shrew.moves.distil.plan import Plan, padded
from shrew.tasks import likelihood

PREFIXES = ("predict: ", "explain: ")


@dataclass(frozen=True)
class Lesson:
    """Tokens of one task, of which those from `start` on are to be written."""

    tokens: np.ndarray
    start: int


@dataclass(frozen=True)
class Lessons:
    """Pairs of an answer and its reasons, in a plan of their own."""

    pairs: list[tuple[Lesson, Lesson]]
    plan: Plan

    def batch(self, step: int, loaded: Loaded) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens, mask and targets [2 x rows, T]; the first half of the rows are answers."""
        picked = [self.pairs[index] for index in self.plan.picked(step)]
        rows = [pair[side] for side in (0, 1) for pair in picked]
        tokens, mask = padded([row.tokens for row in rows], loaded)
        targets = torch.full_like(tokens, objectives.IGNORE)
        for place, row in enumerate(rows):
            end = len(row.tokens) - 1
            targets[place, row.start - 1 : end] = tokens[place, row.start : end + 1]
        return tokens, mask, targets


def read_lessons(path: str, loaded: Loaded, rows: int, steps: int, context: Context) -> Lessons:
    """The lessons of a file; those that are longer than the model's context are left out, with a word about it."""
    length, tokenizer = likelihood.context_length(loaded.model), loaded.tokenizer
    items = read_rationales(path)
    first, last = tokenizer.bos_token_id, tokenizer.eos_token_id
    pairs = []
    for item in items:
        pair = []
        for prefix, wanted in zip(PREFIXES, (item.answer, item.rationale), strict=True):
            given, written = likelihood.token_ids(tokenizer, [f"{prefix}{item.text}\n", wanted])
            given = [*([] if first is None else [first]), *given]
            tokens = [*given, *written, *([] if last is None else [last])]
            pair.append(Lesson(np.array(tokens, np.int64), len(given)))
        if max(len(lesson.tokens) for lesson in pair) <= length:
            pairs.append((pair[0], pair[1]))
    if not pairs:
        raise DataError(f"{path}: every line is longer than the model's context of {length} tokens; shorten them.")
    if len(pairs) < len(items):
        context.say(f"{path}: {len(items) - len(pairs)} lines are longer than {length} tokens and are left out.")
    return Lessons(pairs, Plan([pair[0].tokens for pair in pairs], rows, steps, context.seed))


def loss(logits: Tensor, targets: Tensor, weight: float) -> Tensor:
    """Mean loss of a token of the answers plus `weight` times that of a token of the reasons; logits [2 x rows, T, V]
    and targets as `Lessons.batch` gives them."""
    half = len(targets) // 2
    answer, reasons = (
        objectives.next_token(some, wanted) / (wanted != objectives.IGNORE).sum()
        for some, wanted in zip(logits.split(half), targets.split(half), strict=True)
    )
    return answer + weight * reasons
