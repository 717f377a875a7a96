"""Tool calls: the forms in which models write them, found in the text while it streams."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Call:
    """One call that was found. `arguments` is JSON text as the model wrote it, `id` is unique in an answer."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class Found:
    """What a piece of output holds: text for the user, and calls that are complete."""

    text: str = ""
    calls: tuple[Call, ...] = ()


def format_of(source: str | None) -> str:
    """The name of the form in which a model with this chat template writes its calls."""
    raise NotImplementedError


class Parser:
    """Takes an answer piece by piece; never gives out half a tag or half a call."""

    def __init__(self, form: str, tools: Sequence[Mapping[str, Any]] = ()) -> None: ...

    def feed(self, text: str) -> Found:
        """What is sure by now."""
        raise NotImplementedError

    def finish(self) -> Found:
        """What is left when the answer has ended; an incomplete call is given as the text that it is."""
        raise NotImplementedError
