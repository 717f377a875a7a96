"""What every move is given besides the model."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np

from shrew.folder import Loaded


@dataclass(frozen=True)
class Context:
    """Texts, teacher, seed and cache of one application of moves.

    `calibration` and `healing` are int64 token-id sequences: windows of at most 512 tokens for causal models, one text
    each for classifiers; no document is in both. `teacher` is the original model. `cache` is a folder for results that
    are costly to repeat. `say` prints one plain line of progress. `labels` [len(healing)] are the classes of the
    healing texts where they are known. `work` is a folder for the finished parts of this very application, where a
    run that was killed finds them again.
    """

    calibration: list[np.ndarray]
    healing: list[np.ndarray]
    teacher: Loaded | None
    seed: int
    cache: Path
    say: Callable[[str], None]
    labels: np.ndarray | None = None
    work: Path | None = None


class Progress:
    """Says of long work how far it is, every few seconds and, if `ending`, when it is done, with the time left."""

    EVERY = 10.0  # seconds

    def __init__(self, say: Callable[[str], None], what: str, total: int, done: int = 0, ending: bool = True) -> None:
        self.say, self.what, self.total, self.first, self.ending = say, what, total, done, ending
        self.begun = self.spoken = time.monotonic()

    def __call__(self, done: int, more: str = "") -> None:
        """`done` of the total are done, at least one of them since the beginning."""
        now = time.monotonic()
        quiet = not self.ending if done == self.total else now - self.spoken < self.EVERY
        if quiet:
            return
        self.spoken = now
        left = timedelta(seconds=round((now - self.begun) / (done - self.first) * (self.total - done)))
        self.say(f"{self.what} {done}/{self.total}{more}, {left} left")
