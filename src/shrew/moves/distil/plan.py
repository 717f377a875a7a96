"""Which windows of the healing text a step takes, and how fast it learns."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from shrew.folder import Loaded


def rate(step: int, steps: int) -> float:
    """Share of the peak learning rate at a step: linear warm-up over a tenth of the steps, linear decay to zero."""
    return min((step + 1) / max(0.1 * steps, 1), (steps - step) / max(0.9 * steps, 1), 1.0)


@dataclass(frozen=True)
class Plan:
    """Every window once an epoch, in a seeded order. In a share of the steps, `on_policy`, the windows are but prompts
    that the student goes on from."""

    windows: list[np.ndarray]
    rows: int
    steps: int
    seed: int
    on_policy: float = 0.0

    def picked(self, step: int) -> list[int]:
        count = len(self.windows)
        return [int(self._order(place // count)[place % count])
                for place in range(step * self.rows, (step + 1) * self.rows)]  # fmt: skip

    def _order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch]).permutation(len(self.windows))

    def samples(self, step: int) -> bool:
        """Whether the student writes the text of this step itself."""
        return self.on_policy > 0 and np.random.default_rng([self.seed, step, 1]).random() < self.on_policy

    def used(self) -> list[int]:
        """Every window that some step takes as text, sorted."""
        return sorted({index for step in range(self.steps) if not self.samples(step) for index in self.picked(step)})

    def batch(self, picked: list[int], loaded: Loaded) -> tuple[Tensor, Tensor]:
        """Right-padded tokens [rows, T] and their mask."""
        return padded([self.windows[index] for index in picked], loaded)


def padded(rows: list[np.ndarray], loaded: Loaded) -> tuple[Tensor, Tensor]:
    """Right-padded tokens [rows, T] and their mask."""
    width = max(len(row) for row in rows)
    pad = loaded.tokenizer.pad_token_id
    tokens = torch.full((len(rows), width), pad if pad is not None else 0)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for place, row in enumerate(rows):
        tokens[place, : len(row)] = torch.from_numpy(row)
        mask[place, : len(row)] = 1
    return tokens, mask
