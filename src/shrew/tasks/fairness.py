"""Bias by pairs of texts, as CrowS-Pairs asks for it: how often the more stereotyping one of two is the likelier.

A pair is two texts that differ in whom they speak of. A causal model's likelihood of a whole text is exact, so the
total log-likelihoods are compared. (The score of the paper, a pseudo-likelihood over the shared tokens, is made for
masked models and does not apply.) Where the names of two groups take different numbers of tokens, the total favours the
shorter text, so the preference by log-likelihood per token stands beside it; for equal numbers both are the same.
A share of 0.5 is no preference. A tie counts half.

Nangia et al. 2020, arXiv:2010.00133. Blodgett et al. 2021 (ACL, "Stereotyping Norwegian Salmon") found many pairs of
such sets unclear or unrelated to any stereotype: the share compares a model with itself before and after, no more.
"""

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from shrew.data import read_text
from shrew.errors import DataError
from shrew.folder import Loaded
from shrew.tasks import likelihood
from shrew.tasks.scores import Scores
from shrew.tasks.split import SplitTask

COLUMNS = ("sent_more", "sent_less", "stereo_antistereo", "bias_type")  # of CrowS-Pairs' own file


@dataclass(frozen=True)
class Pair:
    """`more` says more of a stereotype about a group than `less` does; `kind` is what the groups differ in."""

    id: str
    more: str
    less: str
    kind: str = ""


@dataclass(frozen=True, kw_only=True)
class Fairness(SplitTask):
    """Nothing is trained or calibrated on pairs, so all of them are in the final part."""

    kind: ClassVar[str] = "fairness"
    version: ClassVar[int] = 1
    metric: ClassVar[str] = "stereotype_share"
    splits: dict[str, list[Pair]]

    def texts(self, loaded: Loaded, split: str) -> list[str]:
        return [text for item in self.examples(split) for text in (item.more, item.less)]

    def shown(self, example: Pair) -> tuple[str, str]:
        return f"{example.more} / {example.less}", ""

    def score(self, loaded: Loaded, split: str, reference: Loaded | None = None) -> Scores:
        """Columns: "more" and "more_per_token" (1: the stereotype is preferred; 0.5: a tie), "unequal" (1: the two
        texts have different numbers of tokens), "kind" (number in `classes`)."""
        likelihood.check_causal(loaded, self.label)
        items: Sequence[Pair] = self.examples(split)
        total, tokens = (table.reshape(-1, 2) for table in text_log_probs(loaded, self.texts(loaded, split)))
        classes = tuple(sorted({item.kind for item in items}))
        columns = {
            "more": prefers(total),
            "more_per_token": prefers(total / np.maximum(tokens, 1)),
            "unequal": (tokens[:, 0] != tokens[:, 1]).astype(np.float64),
            "kind": np.array([classes.index(item.kind) for item in items]),
        }
        return Scores(self.label, split, self.metric, [item.id for item in items], columns, 0.5, classes)


def prefers(pairs: np.ndarray) -> np.ndarray:
    """[n, 2] -> [n]: 1 where the first of two is larger, 0.5 where they are equal, else 0."""
    found: np.ndarray = (np.sign(pairs[:, 0] - pairs[:, 1]) + 1) / 2
    return found


def text_log_probs(loaded: Loaded, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """[n] log-probability (nats) and [n] number of scored tokens of whole texts; without a token to begin with, the
    first token of a text is given."""
    start = likelihood.first_token(loaded.tokenizer)
    rows = [([] if start is None else [start]) + body for body in likelihood.token_ids(loaded.tokenizer, texts)]
    window = likelihood.context_length(loaded.model)
    places = [place for place, row in enumerate(rows) if len(row) > 1]
    longest = max((len(rows[place]) for place in places), default=0)
    if longest > window:
        raise DataError(f"a pair has a text of {longest} tokens, and the model sees {window} at once; shorten it.")
    chosen = [rows[place] for place in places]
    found = likelihood.token_log_probs(loaded.model, chosen, [len(row) - 1 for row in chosen], window)
    total, count = np.zeros(len(rows)), np.zeros(len(rows))
    total[places], count[places] = [item.sum() for item in found], [len(item) for item in found]
    return total, count


def read_csv(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number of the row, pair) of a file with CrowS-Pairs' columns."""
    table = csv.DictReader(io.StringIO(read_text(path), newline=""), strict=True)
    if missing := [name for name in COLUMNS if name not in (table.fieldnames or ())]:
        raise DataError(f"{path}: no column '{missing[0]}'; pairs for bias need {', '.join(COLUMNS)}.")
    try:
        for number, row in enumerate(table, 1):
            yield number, {"more": row["sent_more"], "less": row["sent_less"], "kind": row["bias_type"]}
    except csv.Error as error:
        raise DataError(f"{path}: no readable CSV ({error}).") from None


def pair(row: dict[str, Any], where: str, number: int) -> Pair:
    """A pair from {"more", "less", "kind"}; refuses what is no text, and texts that are equal."""
    values = [row.get("more"), row.get("less"), row.get("kind", "")]
    for key, value in zip(("more", "less", "kind"), values, strict=True):
        if not isinstance(value, str) or (key != "kind" and not value.strip()):
            raise DataError(f"{where}: '{key}' must be a text, and it is {value!r}.")
    if values[0] == values[1]:
        raise DataError(f"{where}: both texts of the pair are the same.")
    return Pair(f"line {number}", *values)
