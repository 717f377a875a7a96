"""What every move is given besides the model."""

from collections.abc import Callable
from dataclasses import dataclass
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
