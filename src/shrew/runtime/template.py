"""Chat templates: how a conversation becomes the text that a model was trained to continue.

A folder's template is `chat_template.jinja`, `additional_chat_templates/NAME.jinja`, or `chat_template` in
`tokenizer_config.json` (one, or several by name). It is rendered as `transformers.apply_chat_template` renders it, in a
sandbox that ends (shrew.runtime.sandbox). Jinja is imported when the first template is rendered.
"""

import json
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from shrew.errors import FolderError, RequestError
from shrew.runtime.tools import told

Message = Mapping[str, Any]

SECONDS = 2.0
SOURCE_BYTES = 100_000  # of a template; to compile a million takes Python most of a minute
OUTPUT = 4_000_000  # characters of one rendering
REASONING = ("reasoning_content", "thinking", "reasoning")  # the names of one thing; templates read the first
TAG = "CONTINUE_FINAL_MESSAGE_TAG "
SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

PLAIN_ROLES = {"system": "System", "developer": "System", "user": "User", "assistant": "Assistant", "tool": "Tool"}
PLAIN_STOP = ("\nUser:", "\nSystem:", "\nTool:", "\nAssistant:")
PLAIN_NOTE = 'no chat template in this folder: the chat is put as lines "User: ..." and "Assistant: ..."'


class TemplateError(RequestError):
    """A template that cannot be rendered, or that refuses these messages."""


@dataclass(frozen=True)
class ChatTemplate:
    """The templates of one folder by name ("default", "tool_use", ...); none of them: plain lines."""

    sources: Mapping[str, str] = field(default_factory=dict)
    special: Mapping[str, str] = field(default_factory=dict)  # bos_token and its like, as templates name them

    @property
    def plain(self) -> bool:
        """Whether the folder has no template. `PLAIN_NOTE` says it to the user."""
        return not self.sources

    @property
    def stop(self) -> tuple[str, ...]:
        """Strings that end an answer, beside the model's own end token."""
        return PLAIN_STOP if self.plain else ()

    def source(self, tools: bool = False, name: str | None = None) -> str:
        """The template's text: the one of that name, or the one for tools if they are given, or the default."""
        for wanted in ("tool_use" if tools else "default", "default") if name is None else (name,):
            if wanted in self.sources:
                return self.sources[wanted]
        if name is None and len(self.sources) == 1:
            return next(iter(self.sources.values()))
        known = ", ".join(sorted(self.sources)) or "none"
        raise TemplateError(f"there is no chat template '{name or 'default'}' in this folder; there are: {known}.")

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        documents: Sequence[Mapping[str, Any]] | None = None,
        name: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        seconds: float = SECONDS,
        **variables: Any,
    ) -> str:
        """The text of a conversation, ready to be encoded without adding special tokens. Where the template knows no
        tools, what there is to call is said in the system message.

        Raises TemplateError for a template that is wrong, too slow or too long, and where it refuses the messages.
        """
        source = "" if self.plain else self.source(bool(tools), name)
        if tools and "tools" not in source:
            messages, tools = told(messages, tools), None
        prepared = _prepare(messages)
        if continue_final_message:
            add_generation_prompt = False
            final = _tag_last(prepared)
        if self.plain:
            text = _plain(prepared, add_generation_prompt)
        else:
            text = self._rendered(source, seconds, {
                **self.special, **_data(variables), "messages": prepared, "tools": _data(tools),
                "documents": _data(documents), "add_generation_prompt": add_generation_prompt,
            })  # fmt: skip
        return _cut(text, final) if continue_final_message else text

    @cached_property
    def _compiled(self) -> dict[str, Any]:
        return {}

    @cached_property
    def _sandbox(self) -> Any:
        from shrew.runtime.sandbox import Sandbox  # jinja2, only where a template is used

        return Sandbox()

    def _rendered(self, source: str, seconds: float, variables: dict[str, Any]) -> str:
        import jinja2

        self._sandbox.meter.start(seconds)
        try:
            if source not in self._compiled:
                self._compiled[source] = self._sandbox.from_string(source)
            parts, length = [], 0
            for part in self._compiled[source].generate(**variables):
                self._sandbox.tick()
                length += len(part)
                if length > OUTPUT:
                    raise TemplateError(f"the chat template makes more than {OUTPUT:,} characters; use fewer messages.")
                parts.append(part)
            return "".join(parts)
        except TemplateError:
            raise
        except jinja2.TemplateSyntaxError as error:
            words = f"line {error.lineno}: {_short(error)}"
            raise TemplateError(f"the chat template is no valid Jinja ({words}).") from None
        except jinja2.exceptions.SecurityError as error:
            raise TemplateError(f"the chat template was stopped: {_short(error)}.") from None
        except jinja2.TemplateError as error:  # its own raise_exception as well
            raise TemplateError(f"the chat template refuses these messages: {_short(error)}.") from None
        except (RecursionError, MemoryError, SyntaxError):
            raise TemplateError("the chat template was stopped: it is nested too deeply or too large.") from None
        except Exception as error:  # any Python error can be provoked by a template and its messages
            words = f"{type(error).__name__}: {_short(error)}"
            raise TemplateError(f"the chat template fails on these messages ({words}).") from None


def of_folder(folder: Path, listed: Container[str] | None) -> ChatTemplate:
    """The chat templates of a model folder (`listed` None), or of a pack, whose manifest lists what belongs to it;
    plain lines if it has none."""
    config = _read_json(folder / "tokenizer_config.json") if _is_given("tokenizer_config.json", listed) else {}
    held = config.get("chat_template")
    sources: dict[str, str] = {}
    if isinstance(held, str):
        sources["default"] = held
    elif isinstance(held, list):
        for item in held:
            if not isinstance(item, dict) or not isinstance(item.get("template"), str):
                raise FolderError(f"{folder / 'tokenizer_config.json'}: chat_template is a list that is no list of "
                                  "templates with names.")  # fmt: skip
            sources[str(item.get("name"))] = item["template"]
    elif isinstance(held, dict):
        sources = {str(name): str(text) for name, text in held.items()}
    if (alone := folder / "chat_template.jinja").is_file() and _is_given(alone.name, listed):
        sources["default"] = _read_text(alone)
    if listed is None:  # a pack has no folders in it
        sources |= {path.stem: _read_text(path)
                    for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))}  # fmt: skip
    if any(len(text) > SOURCE_BYTES for text in sources.values()):
        raise FolderError(f"{folder}: a chat template is larger than {SOURCE_BYTES:,} characters.")
    special = {}
    for name in SPECIAL:
        value = config.get(name)
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
            special[name] = value
    return ChatTemplate(sources, special)


def _is_given(name: str, listed: Container[str] | None) -> bool:
    return listed is None or name in listed


def of_text(source: str, **special: str) -> ChatTemplate:
    """A template that is not in a folder."""
    return ChatTemplate({"default": source}, special)


def _read_text(path: Path) -> str:
    try:
        with path.open(encoding="utf-8", newline="") as stream:
            return stream.read(SOURCE_BYTES + 1)
    except (OSError, UnicodeDecodeError) as error:
        raise FolderError(f"{path} cannot be read as UTF-8 text ({_short(error)}).") from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise FolderError(f"{path} is no readable JSON ({_short(error)}).") from None
    if not isinstance(value, dict):
        raise FolderError(f"{path} holds no JSON object.")
    return value


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:200].rstrip(".")


# --- messages --------------------------------------------------------------------------------------------------------


def _data(value: Any, depth: int = 0) -> Any:
    """A copy of plain data, so that a template never meets an object with methods of its own."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if depth > 100:
        raise TemplateError("the messages or tools are nested more than 100 deep.")
    if isinstance(value, Mapping):
        return {str(key): _data(item, depth + 1) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [_data(item, depth + 1) for item in value]
    return str(value)


def _prepare(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Copies without empty fields, reasoning under every name of it, arguments of calls as objects, not JSON text."""
    if not messages:
        raise TemplateError("there are no messages; give at least one.")
    prepared = []
    for at, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise TemplateError(f"message {at + 1} is no object with a 'role'.")
        held = {key: item for key, item in _data(message).items() if item is not None}
        reasoning = next((held[name] for name in REASONING if name in held), None)
        if reasoning is not None:
            held = {"thinking": reasoning, **held, "reasoning_content": reasoning}
        for call in held.get("tool_calls", ()):
            _open_arguments(call)
        prepared.append(held)
    return prepared


def _open_arguments(call: Any) -> None:
    function = call.get("function", call) if isinstance(call, dict) else None
    if isinstance(function, dict) and isinstance(function.get("arguments"), str):
        try:
            opened = json.loads(function["arguments"])
        except (ValueError, RecursionError):
            return  # what a model wrote may be no JSON; the template shows it as it is
        if isinstance(opened, dict):
            function["arguments"] = opened


def _tag_last(messages: list[dict[str, Any]]) -> str:
    """Mark the end of the last message's text, and return that text."""
    content = messages[-1].get("content")
    if isinstance(content, str):
        messages[-1]["content"] = content + TAG
        return content
    for part in reversed(content if isinstance(content, list) else []):
        if isinstance(part, dict) and isinstance(part.get("text"), str):
            text: str = part["text"]
            part["text"] = text + TAG
            return text
    raise TemplateError("the last message has no text to continue.")


def _cut(text: str, final: str) -> str:
    """The rendering up to the end of the last message."""
    at = text.rfind(TAG.strip())
    if at < 0 or final.strip() not in text:
        raise TemplateError("the chat template leaves the last message out, so it cannot be continued.")
    return text[:at] if text.startswith(TAG, at) else text[:at].rstrip()


def text_of(content: Any) -> str:
    """The text of a message's content, which is a string or a list of parts."""
    if isinstance(content, str) or content is None:
        return content or ""
    if isinstance(content, list):
        return "".join(str(part.get("text", "")) if isinstance(part, dict) else str(part) for part in content)
    return str(content)


def _plain(messages: list[dict[str, Any]], add_generation_prompt: bool) -> str:
    lines = [
        f"{PLAIN_ROLES.get(message['role'], message['role'])}: {text_of(message.get('content')).strip()}"
        if TAG not in text_of(message.get("content"))
        else f"{PLAIN_ROLES.get(message['role'], message['role'])}: {text_of(message.get('content')).lstrip()}"
        for message in messages
    ]
    return "\n".join([*lines, "Assistant:"] if add_generation_prompt else lines)
