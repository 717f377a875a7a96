"""Every error Shrew raises on purpose.

    ShrewError              exit 1   something failed; the message says what to do
    ├── FloorNotMet         exit 1   the search ended honestly without a model above the floor
    └── UsageError          exit 2   the user's input is at fault; nothing was written
        ├── SpecError                a recipe, spec or flag: unknown key, wrong type, out of range
        ├── DataError                a text, JSONL or parquet file that cannot be used
        ├── FolderError              a model folder that is missing, truncated, hostile or inconsistent
        ├── RequestError             what was asked of a running model cannot be served, whoever asks again
        │   └── BusyError            not now: too much is asked at once; `retry_after` seconds may help
        ├── UnsupportedError         a move or format that does not fit this architecture
        └── MissingExtraError        a verb whose optional dependencies are not installed

A message is one plain sentence or two: what is wrong, where, and what to do.
"""

import difflib
from collections.abc import Iterable


class ShrewError(Exception):
    exit_code = 1


class FloorNotMet(ShrewError):
    pass


class UsageError(ShrewError):
    exit_code = 2


class SpecError(UsageError):
    pass


class DataError(UsageError):
    pass


class FolderError(UsageError):
    pass


class RequestError(UsageError):
    pass


class BusyError(RequestError):
    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class UnsupportedError(UsageError):
    pass


class MissingExtraError(UsageError):
    pass


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint for a misspelt name: the closest known one, or all of them when none is close."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'?" if close else f"known: {', '.join(names)}."
