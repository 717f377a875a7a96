"""Questions with worked answers: JSONL lines of {text, rationale, answer}."""

from dataclasses import dataclass
from pathlib import Path

from shrew.data import read_jsonl
from shrew.errors import DataError

KEYS = ("text", "rationale", "answer")


@dataclass(frozen=True)
class Rationale:
    """A text, the reasons that lead from it to an answer, and the answer."""

    text: str
    rationale: str
    answer: str


def read_rationales(path: str | Path) -> list[Rationale]:
    """Every line of a file. Raises DataError with the number of the first line that is none."""
    if not Path(path).is_file():
        raise DataError(f"{path}: no such file; give JSONL with the keys {', '.join(KEYS)}.")
    found = []
    for number, row in read_jsonl(Path(path)):
        for key in KEYS:
            if not isinstance(row.get(key), str) or not row[key].strip():
                raise DataError(f"{path}, line {number}: '{key}' must be a text that is not empty.")
        found.append(Rationale(*(row[key] for key in KEYS)))
    if not found:
        raise DataError(f"{path} is empty; give JSONL with the keys {', '.join(KEYS)}.")
    return found
