"""Tool calls: the forms in which models write them, found in the text while it streams, or demanded by a grammar.

A form is a row of FORMS: the tag before a call, the tag behind it, and the key that its arguments stand under. Which
one a model knows is read off its chat template; a model without any is told about the tools in plain words.
"""

import json
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shrew.errors import RequestError

MOST = 128  # tools of one request
CALL_CHARACTERS = 200_000  # a call that is longer is given as text


class ToolError(RequestError):
    """Tools that are not described as OpenAI's interface describes them."""


@dataclass(frozen=True)
class Form:
    """How a model writes a call. With `end` "" a call is the rest of the answer, and without `begin` all of it."""

    begin: tuple[str, ...]
    end: str
    arguments: str
    before: str  # what stands before the JSON of a call that is demanded
    after: str
    marks: tuple[str, ...]  # a template of this form holds all of these


FORMS = {
    "mistral": Form(("[TOOL_CALLS]",), "", "arguments", "[TOOL_CALLS] [", "]", ("[TOOL_CALLS]",)),
    "hermes": Form(("<tool_call>",), "</tool_call>", "arguments", "<tool_call>\n", "\n</tool_call>", ("<tool_call>",)),
    "llama": Form(("<|python_tag|>", ""), "", "parameters", "", "", ('"parameters"', "ipython")),
}
PLAIN = "hermes"  # of a model whose template knows no tools


@dataclass(frozen=True)
class Call:
    """One call that was found; `arguments` is JSON text."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class Found:
    """What a piece of output holds: text for the user, and calls that are complete."""

    text: str = ""
    calls: tuple[Call, ...] = ()


def format_of(source: str | None) -> str:
    """The form in which a model with this chat template writes its calls."""
    for name, form in FORMS.items():
        if source and all(mark in source for mark in form.marks):
            return name
    return PLAIN


def functions(tools: Any) -> dict[str, Any]:
    """The schemas of the arguments by the tools' names; raises ToolError for tools that are described otherwise."""
    if not isinstance(tools, list | tuple) or len(tools) > MOST:
        raise ToolError(f"'tools' is no list of at most {MOST} tools.")
    found: dict[str, Any] = {}
    for tool in tools:
        given = tool.get("function") if isinstance(tool, Mapping) else None
        function: Mapping[str, Any] = given if isinstance(given, Mapping) else {}
        name = function.get("name")
        if not isinstance(name, str) or not re.fullmatch(r"[\w.:-]{1,128}", name):
            raise ToolError('a tool is no {"type": "function", "function": {"name": ..., "parameters": ...}}.')
        given = function.get("parameters") or {"type": "object", "properties": {}}
        if not isinstance(given, Mapping):
            raise ToolError(f"the parameters of the tool '{name}' are no JSON Schema.")
        schema: dict[str, Any] = {**given}
        if not schema.get("properties") and not schema.keys() - {"type", "properties", "required", "description"}:
            schema.setdefault("additionalProperties", False)
        found[name] = schema
    return found


def demanded(form: str, tools: Sequence[Mapping[str, Any]], name: str | None = None) -> list[tuple[str, Any, str]]:
    """What an answer that must be a call (of the tool called `name`) may be: text before, JSON Schema, text after."""
    known = functions(tools)
    if name is not None and name not in known:
        raise ToolError(f"there is no tool '{name}' to choose; there are: {', '.join(known) or 'none'}.")
    parts = []
    for each in known if name is None else [name]:
        schema = dict(known[each])
        shared = {key: schema.pop(key) for key in ("$defs", "definitions") if key in schema}
        call = {"type": "object", "properties": {"name": {"const": each}, FORMS[form].arguments: schema},
                "required": ["name", FORMS[form].arguments], **shared}  # fmt: skip
        parts.append((FORMS[form].before, call, FORMS[form].after))
    return parts


def told(messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages for a model whose template knows no tools: what there is to call is said in the system message, and
    calls stand in the text."""
    form = FORMS[PLAIN]
    lines = [json.dumps(tool["function"], ensure_ascii=False) for tool in tools]
    words = (
        "You may call these functions:\n" + "\n".join(lines) + "\nTo call one, answer with\n"
        f'{form.before}{{"name": "...", "{form.arguments}": {{...}}}}{form.after}'
    )
    done = [_written(message) for message in messages]
    if done and done[0].get("role") in ("system", "developer") and isinstance(done[0].get("content"), str):
        done[0]["content"] += "\n\n" + words
        return done
    return [{"role": "system", "content": words}, *done]


def _written(message: Mapping[str, Any]) -> dict[str, Any]:
    done = {key: item for key, item in message.items() if key != "tool_calls"}
    for call in message.get("tool_calls") or ():
        function = call.get("function", {})
        arguments = function.get("arguments", "{}")
        arguments = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        body = f'{{"name": {json.dumps(function.get("name"))}, "{FORMS[PLAIN].arguments}": {arguments}}}'
        done["content"] = (done.get("content") or "") + FORMS[PLAIN].before + body + FORMS[PLAIN].after
    return done


class Parser:
    """Takes an answer piece by piece; never gives out half a tag or half a call."""

    def __init__(self, form: str, tools: Sequence[Mapping[str, Any]]) -> None:
        self._form, self._known = FORMS[form], frozenset(functions(tools))
        self._held = ""  # not given out yet
        self._tag: str | None = None  # of the call that `_held` begins with
        self._tried = 0  # so much of it is known to hold no whole call
        self._begun = False  # whether anything but space has come
        self._called = False
        self._space = ""  # behind a call

    def feed(self, text: str) -> Found:
        """What is sure by now."""
        self._held += text
        return self._take(False)

    def finish(self) -> Found:
        """What is left when the answer has ended; an incomplete call is given as the text that it is."""
        return self._take(True)

    def _take(self, ended: bool) -> Found:
        texts: list[str] = []
        calls: list[Call] = []
        while True:
            if self._tag is None and not self._open(texts, ended):
                break
            found = self._whole_call(ended)
            if found is None:
                break
            text, made = found
            if made:
                self._called, self._space = True, ""
            else:
                self._say(texts, text)
            calls += made
            self._tag, self._tried = None, 0
        return Found("".join(texts), tuple(calls))

    def _say(self, texts: list[str], text: str) -> None:
        """Give out text; the space behind a call only when more than space follows it."""
        self._space += text
        if not self._called or self._space.strip():
            texts.append(self._space)
            self._space = ""

    def _open(self, texts: list[str], ended: bool) -> bool:
        """Give out what stands before the next tag; whether there is a call to take."""
        tags = [tag for tag in self._form.begin if tag]
        if "" in self._form.begin and not self._begun:  # the answer as a whole may be a call, if it begins like one
            start = self._held.lstrip()
            if start.startswith("{"):
                self._tag, self._begun = "", True
                return True
            if not start and not ended:
                return False
        places = [(at, tag) for tag in tags if (at := self._held.find(tag)) >= 0]
        if places:
            at, self._tag = min(places)
            self._say(texts, self._held[:at])
            self._held = self._held[at:]
            self._begun = True
            return True
        keep = 0 if ended else max((_overlap(self._held, tag) for tag in tags), default=0)
        cut = len(self._held) - keep
        self._say(texts, self._held[:cut])
        self._begun = self._begun or bool(self._held[:cut].strip())
        self._held = self._held[cut:]
        return False

    def _whole_call(self, ended: bool) -> tuple[str, list[Call]] | None:
        """The calls behind the tag and the text they turned out to be if they are none; None: not all there yet."""
        start, end = len(self._tag or ""), self._form.end
        while end and (at := self._held.find(end, max(self._tried, start))) >= 0:
            made = self._read(self._held[start:at])
            self._tried = at + len(end)  # the tag may stand in a string of the arguments
            if made:
                self._held = self._held[self._tried :]
                return "", made
        if end:
            self._tried = max(len(self._held) - len(end), self._tried, start)
        if not ended and len(self._held) <= CALL_CHARACTERS:
            return None
        text, self._held = self._held, ""
        made = self._read(text[start:]) if len(text) <= CALL_CHARACTERS else []
        return ("", made) if made else (text, [])

    def _read(self, body: str) -> list[Call]:
        """The calls that are written there; none if it is anything else."""
        if named := re.match(r"\s*([\w.:-]+)\s*(?:\[ARGS\])?\s*(?=\{)", body):  # Mistral's newer form
            body = f'{{"name": "{named[1]}", "arguments": {body[named.end() :]}}}'
        try:
            value = json.loads(body)
        except (ValueError, RecursionError):
            parts = body.split(";") if self._form.arguments == "parameters" else []
            made = [call for part in parts for call in self._read(part)] if len(parts) > 1 else []
            return made if len(made) == len(parts) else []
        made = []
        for item in value if isinstance(value, list) else [value]:
            if not isinstance(item, dict) or item.get("name") not in self._known:
                return []
            given = item.get("arguments", item.get("parameters", {}))
            given = given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)
            made.append(Call(f"call_{uuid.uuid4().hex[:24]}", item["name"], given))
        return made


def _overlap(text: str, tag: str) -> int:
    """The length of the longest end of `text` that begins `tag`."""
    return next((size for size in range(min(len(tag) - 1, len(text)), 0, -1) if text.endswith(tag[:size])), 0)
