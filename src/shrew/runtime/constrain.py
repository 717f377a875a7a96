"""Constrained output: JSON of a schema, a regular expression, a grammar or one of some choices, that always closes."""

from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer

from shrew.errors import UsageError
from shrew.runtime.request import Constraint


class ConstraintError(UsageError):
    """A schema, expression or grammar that cannot be used; the message says why."""


class Grammars:
    """Makes constraints for one model; one of these is made for each and shared by its requests (thread-safe)."""

    def __init__(self, tokenizer: Tokenizer, vocabulary: int, eos: Sequence[int]) -> None:
        raise NotImplementedError

    def json_schema(self, schema: Any, max_tokens: int) -> Constraint:
        """Compact JSON that fits `schema`. Raises ConstraintError, also where `max_tokens` cannot hold any answer."""
        raise NotImplementedError

    def json_object(self, max_tokens: int) -> Constraint:
        """Any JSON object, of bounded depth."""
        raise NotImplementedError

    def regex(self, pattern: str, max_tokens: int) -> Constraint:
        raise NotImplementedError

    def lark(self, grammar: str, max_tokens: int) -> Constraint:
        raise NotImplementedError

    def choice(self, options: Sequence[str], max_tokens: int) -> Constraint:
        raise NotImplementedError

    def tool_call(
        self, tools: Sequence[Mapping[str, Any]], form: str, max_tokens: int, name: str | None = None
    ) -> Constraint:
        """One call of one of `tools` (of the one called `name`), written in the form `form` of shrew.runtime.tools."""
        raise NotImplementedError
