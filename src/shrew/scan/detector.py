"""The packed detector: how suspicious functions are, and which of their lines.

Each window of a function is a call of its own, and calls run beside each other on one core each. So nothing is padded,
what a function scores cannot depend on what else is scored, and what is held does not grow with what is scanned.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shrew import code, machine
from shrew.code import NOTHING
from shrew.errors import UnsupportedError, UsageError
from shrew.runtime import Model, load


@dataclass(frozen=True, eq=False)
class Score:
    """`logit`: of being vulnerable, as likely as not at 0 where both are as frequent. `lines`: float32, one a line of
    the text, higher is more suspicious. `families`: CWE id -> probability, if it is vulnerable; "unknown" among them.
    """

    logit: float
    lines: np.ndarray
    families: dict[str, float]


class Detector:
    """A detector that is ready; it may be used from any thread."""

    def __init__(self, model: Model, workers: int) -> None:
        self._model, self._workers = model, workers
        self._tokenizer = code.uncut(model.tokenizer)
        self._families = model.manifest.families or ()
        self._head = [] if model.manifest.first is None else [model.manifest.first]

    @classmethod
    def load(cls, folder: str | Path, workers: int | None = None) -> "Detector":
        """The detector in a packed folder. `workers`: functions scored at a time; default: what OMP_NUM_THREADS says,
        else one for each core.

        Raises FolderError for what is wrong with the folder, UnsupportedError where it holds another kind of model."""
        said = os.environ.get("OMP_NUM_THREADS", "")
        if workers is None:
            workers = int(said) if said.isdecimal() and int(said) else machine.usable_cores()
        if workers < 1:
            raise UsageError(f"{workers} workers cannot work; ask for 1 or more.")
        model = load(folder, threads=1)
        if model.manifest.kind != "detector":
            raise UnsupportedError(f"{folder} is a {model.manifest.kind}, no detector; `shrew train` makes one of a "
                                   "recipe with [detect], and `shrew pack` packs it.")  # fmt: skip
        return cls(model, workers)

    def score(self, texts: Sequence[str], languages: Sequence[str]) -> list[Score]:
        """What each text scores, whatever stands beside it."""
        order = sorted(range(len(texts)), key=lambda at: -len(texts[at]))  # the longest first, so that all end together
        with ThreadPoolExecutor(self._workers) as pool:
            found = pool.map(self._score, (texts[at] for at in order), (languages[at] for at in order))
            scores = dict(zip(order, found, strict=True))
        return [scores[at] for at in range(len(texts))]

    def _score(self, text: str, language: str) -> Score:
        manifest = self._model.manifest
        lines = np.full(code.count_lines(text), NOTHING, np.float32)
        clean = code.canonical(text, language, manifest.comments)
        tokens, where = code.tokenized(self._tokenizer, clean)
        if not len(tokens):
            return Score(NOTHING, lines, {name: float(name == "unknown") for name in self._families})
        each = np.empty(len(tokens), np.float32)
        best, families, done = -np.inf, np.zeros(len(self._families), np.float32), 0
        for start, end in code.windows(len(tokens), manifest.context - len(self._head)):
            logit, of, scores = self._judged(tokens[start:end])
            each[done:end] = scores[done - start :]  # of two windows the first one: there more came before the token
            done = end
            if logit > best:
                best, families = logit, of
        counts = np.bincount(where, minlength=len(lines))
        present = (counts > 0) & np.array([bool(line.strip()) for line in clean.split("\n")][: len(lines)])
        lines[present] = (np.bincount(where, each, len(lines)) / np.maximum(counts, 1))[present]
        shares = np.exp(families - families.max(), dtype=np.float64)
        return Score(float(best), lines, dict(zip(self._families, (shares / shares.sum()).tolist(), strict=True)))

    def _judged(self, tokens: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
        """The logit of a window, those of its families [K] and what its tokens score [n]."""
        row = np.concatenate([self._head, tokens]).astype(np.int64)[None]
        given = {"tokens": row, "lengths": np.array([row.shape[1]], np.int64)}
        logit, families, lines = self._model.graph.run(["logits", "families", "lines"], given)
        return float(logit[0]), families[0], lines[0, len(self._head) :]
