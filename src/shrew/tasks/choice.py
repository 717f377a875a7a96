"""Multiple choice by likelihood: the option with the highest log-probability per byte after "QUESTION" wins.

The option is scored as " OPTION" after the question as it stands; no letter, no template, no other option is shown.
Chance is the mean of 1 / (number of options).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from shrew.folder import Loaded
from shrew.tasks import likelihood
from shrew.tasks.scores import Scores
from shrew.tasks.split import SplitTask


@dataclass(frozen=True)
class Question:
    id: str
    question: str
    options: tuple[str, ...]
    answer: int


@dataclass(frozen=True, kw_only=True)
class Choice(SplitTask):
    kind: ClassVar[str] = "choice"
    version: ClassVar[int] = 1
    metric: ClassVar[str] = "accuracy"
    splits: dict[str, list[Question]]

    def texts(self, loaded: Loaded, split: str) -> list[str]:
        return [f"{item.question} {item.options[item.answer]}" for item in self.examples(split)]

    def shown(self, example: Question) -> tuple[str, str]:
        return example.question, example.options[example.answer]

    def score(self, loaded: Loaded, split: str, reference: Loaded | None = None) -> Scores:
        """Columns: "guess" (number of the chosen option), "correct"."""
        likelihood.check_causal(loaded, self.label)
        items: Sequence[Question] = self.examples(split)
        pairs = [(item.question, f" {option}") for item in items for option in item.options]
        size = np.array([len(option.encode()) for _, option in pairs])
        found = likelihood.continuations(loaded, pairs) / size
        ends = np.cumsum([len(item.options) for item in items])
        guess = np.array([int(part.argmax()) for part in np.split(found, ends[:-1])])
        correct = (guess == np.array([item.answer for item in items])).astype(np.float64)
        chance = float(np.mean([1 / len(item.options) for item in items]))
        columns = {"guess": guess, "correct": correct}
        answers = tuple(item.options[number] for item, number in zip(items, guess, strict=True))
        return Scores(self.label, split, self.metric, [item.id for item in items], columns, chance, answers=answers)
