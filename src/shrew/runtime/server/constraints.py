"""What an answer must be: JSON, a schema's JSON, a regular expression, a grammar, or a call of a tool."""

from typing import Any

from shrew.runtime.request import Constraint
from shrew.runtime.server.faults import Fault
from shrew.runtime.server.schema import Sampling
from shrew.runtime.server.state import Served


def constraint(served: Served, request: Sampling, most: int) -> Constraint | None:
    """A new constraint for one choice of at most so many tokens; None where anything may come.

    Raises Fault for two constraints at once, for half a one, and (UsageError) for one that cannot be met.
    """
    form = request.response_format
    kinds = {
        "response_format": form is not None and form.type != "text",
        "regex": request.regex is not None,
        "grammar": request.grammar is not None,
    }
    wanted = [name for name, is_wanted in kinds.items() if is_wanted]
    if not wanted:
        return None
    if len(wanted) > 1:
        raise Fault(400, f"{' and '.join(wanted)} exclude each other; send one.", wanted[1])
    if request.regex is not None:
        return served.grammars.regex(request.regex, most)
    if request.grammar is not None:
        return served.grammars.lark(request.grammar, most)
    assert form is not None
    if form.type == "json_object":
        return served.grammars.json_object(most)
    if form.json_schema is None:
        raise Fault(400, "response_format of type json_schema needs a json_schema.", "response_format.json_schema")
    return served.grammars.json_schema(form.json_schema.schema, most)


def tool_constraint(served: Served, tools: list[dict[str, Any]], name: str | None, most: int) -> Constraint:
    """For one choice that must be a call of a tool, or of the one with this name."""
    return served.grammars.tool_call(tools, served.form, most, name)
