"""The four disjoint parts of a task, and what every task shares: its name, its label and its description."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from shrew.data import Document, split_documents
from shrew.errors import DataError, nearest

SHARES = {"calibration": 0.1, "healing": 0.3, "search": 0.2, "final": 0.4}
SALT = "shrew task splits 1"


@dataclass(frozen=True, kw_only=True)
class SplitTask:
    """Base of the tasks: examples by split. `name` is what the user calls it, by default its kind."""

    kind: ClassVar[str]
    version: ClassVar[int]
    metric: ClassVar[str]
    name: str = ""
    splits: dict[str, Any]
    dropped: int = 0  # exact duplicates left out when the file was read

    @property
    def label(self) -> str:
        """Name and version, as records show it: "text@1"."""
        return f"{self.name or self.kind}@{self.version}"

    def examples(self, split: str) -> list[Any]:
        """The examples of a split, or of all splits together for "all"."""
        if split == "all":
            return [item for part in self.splits.values() for item in part]
        if split not in self.splits:
            raise DataError(f"{self.label}: no split '{split}'; {nearest(split, [*self.splits, 'all'])}")
        if not self.splits[split]:
            raise DataError(f"{self.label}: the {split} split is empty; give more examples (20 or more is sensible).")
        return list(self.splits[split])

    def shown(self, example: Any) -> tuple[str, str]:
        """What an example asks and its right answer, in words."""
        raise NotImplementedError

    def describe(self) -> str:
        """One line: how many examples each split holds."""
        total = sum(map(len, self.splits.values()))
        counts = ", ".join(f"{name} {len(part):,}" for name, part in self.splits.items())
        dropped = f"; {self.dropped:,} duplicates dropped" if self.dropped else ""
        return f"{self.label} ({self.kind}): {total:,} examples: {counts}{dropped}"


def unique(examples: Sequence[Any]) -> tuple[list[Any], int]:
    """Examples without exact repeats (ids aside), and how many were dropped."""
    kept = {tuple(value for key, value in vars(item).items() if key != "id"): item for item in reversed(examples)}
    found = list(reversed(kept.values()))
    return found, len(examples) - len(found)


def deal(examples: Sequence[Any], key: str, shares: dict[str, float], where: str) -> dict[str, list[Any]]:
    """Deal examples into splits by a hash of the text under `key`: equal texts always land in the same split."""
    if len(examples) < 2:
        raise DataError(f"{where} has {len(examples)} example; a task needs at least 2, and 100 or more to prove much.")
    texts = dict.fromkeys(getattr(item, key) for item in examples)
    parts = split_documents([Document(str(n), text) for n, text in enumerate(texts)], shares, SALT)
    home = {document.text: name for name, documents in parts.items() for document in documents}
    splits: dict[str, list[Any]] = {name: [] for name in shares}
    for item in examples:
        splits[home[getattr(item, key)]].append(item)
    return splits


