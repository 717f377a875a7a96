"""What clients may send, as types that are checked while the JSON is read.

Unknown keys are let through, because clients send many that mean nothing here; a known key of the wrong type or out of
its range is refused with its name. Free-form parts (schemas, tools) are bounded in depth and size before anyone walks
them.
"""

import re
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct

from shrew.runtime.server.faults import Fault

DEPTH = 64  # levels of a free-form JSON value
NODES = 20_000  # and how many values it may hold

Fraction = Annotated[float, Meta(ge=0, le=1)]
Temperature = Annotated[float, Meta(ge=0, le=2)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Count = Annotated[int, Meta(ge=1, le=2**31)]
Token = Annotated[int, Meta(ge=0, le=2**31)]
Tokens = Annotated[list[Token], Meta(min_length=1)]
Bias = Annotated[float, Meta(ge=-100, le=100)]
Alternatives = Annotated[int, Meta(ge=0, le=20)]
Ending = Annotated[str, Meta(min_length=1, max_length=1024)]
Stop = Ending | Annotated[list[Ending], Meta(max_length=16)] | None
Text = Annotated[str, Meta(max_length=65536)]
T = TypeVar("T", bound="Sized")


class Sized(Struct, kw_only=True):
    """A request body. `model` may be left out where only one is served."""

    model: str | None = None


class StreamOptions(Struct):
    include_usage: bool | None = None


class JsonSchema(Struct, kw_only=True):
    name: str
    schema: dict[str, Any] | bool = {}
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(Struct, kw_only=True):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class Sampling(Sized, kw_only=True):
    """What completions and chats have in common. The last six are ours; the rest means what OpenAI says."""

    max_tokens: Count | None = None
    temperature: Temperature | None = None
    top_p: Fraction | None = None
    n: Annotated[int, Meta(ge=1, le=128)] | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: Stop = None
    logit_bias: Annotated[dict[str, Bias], Meta(max_length=1024)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    user: str | None = None
    top_k: Annotated[int, Meta(ge=-1, le=2**31)] | None = None
    min_p: Fraction | None = None
    repetition_penalty: Annotated[float, Meta(ge=0.01, le=10)] | None = None
    ignore_eos: bool | None = None
    regex: Text | None = None
    grammar: Text | None = None


class CompletionRequest(Sampling, kw_only=True):
    prompt: str | Annotated[list[str | Token | Tokens], Meta(min_length=1)] | None = None
    max_tokens: Annotated[int, Meta(ge=0, le=2**31)] | None = None
    suffix: str | None = None
    echo: bool | None = None
    logprobs: Alternatives | None = None
    best_of: Count | None = None


class Part(Struct, kw_only=True):
    """One part of a message; only text is understood."""

    type: str
    text: str | None = None


class FunctionCall(Struct, kw_only=True):
    name: str
    arguments: str


class ToolCall(Struct, kw_only=True):
    id: str
    function: FunctionCall
    type: Literal["function"] = "function"


class Message(Struct, kw_only=True):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[Part] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None


class Function(Struct, kw_only=True):
    name: Annotated[str, Meta(pattern="^[a-zA-Z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Struct, kw_only=True):
    type: Literal["function"]
    function: Function


class Named(Struct, kw_only=True):
    name: str


class ToolChoice(Struct, kw_only=True):
    type: Literal["function"]
    function: Named


class ChatRequest(Sampling, kw_only=True):
    messages: Annotated[list[Message], Meta(min_length=1, max_length=4096)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Alternatives | None = None
    tools: Annotated[list[Tool], Meta(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None


class EmbeddingRequest(Sized, kw_only=True):
    input: str | Annotated[list[str | Token | Tokens], Meta(min_length=1, max_length=2048)]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Count | None = None
    user: str | None = None


class TokenizeRequest(Sized, kw_only=True):
    prompt: str
    add_special_tokens: bool = True


class DetokenizeRequest(Sized, kw_only=True):
    tokens: list[Token]


def decode(body: bytes, kind: type[T]) -> T:
    """The request that a body says. Raises Fault 400 for whatever is wrong with it."""
    try:
        found = msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        message, _, where = str(error).partition(" - at `$")
        where = re.sub(r"\[\.\.\.\]", "[]", where.strip("`."))
        raise Fault(400, f"{where or 'body'}: {message.replace('`', '')}.", where or None) from None
    except RecursionError:
        raise Fault(400, "The JSON is nested too deep.") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Fault(400, f"The body is no JSON in UTF-8: {error}.") from None
    for where, value in free_parts(found):
        check_free(value, where)
    return found


def free_parts(request: Sized) -> list[tuple[str, Any]]:
    """The parts of a request whose shape is the client's own: schemas of the answer and of tools."""
    found: list[tuple[str, Any]] = []
    form = getattr(request, "response_format", None)
    if form is not None and form.json_schema is not None:
        found.append(("response_format.json_schema.schema", form.json_schema.schema))
    for number, tool in enumerate(getattr(request, "tools", None) or ()):
        found.append((f"tools[{number}].function.parameters", tool.function.parameters))
    return found


def check_free(value: Any, where: str) -> None:
    """Refuse a value that is deeper than DEPTH or holds more than NODES values, without recursion."""
    level, count = [value], 0
    for _ in range(DEPTH):
        count += len(level)
        if count > NODES:
            raise Fault(400, f"{where} holds more than {NODES} values; make it smaller.", where)
        below: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                below.extend(item.values())
            elif isinstance(item, list):
                below.extend(item)
        if not below:
            return
        level = below
    raise Fault(400, f"{where} is nested more than {DEPTH} levels deep; make it flatter.", where)


def plain_messages(messages: list[Message]) -> list[dict[str, Any]]:
    """Messages as chat templates take them: dicts without empty keys, the parts of a text joined."""
    found = []
    for number, message in enumerate(messages):
        content = message.content
        if isinstance(content, list):
            for part in content:
                if part.type != "text" or part.text is None:
                    raise Fault(400, f"messages[{number}] has a part of type '{part.type}'; this model reads text "
                                "only.", f"messages[{number}].content")  # fmt: skip
            content = "".join(part.text or "" for part in content)
        if content is None and not message.tool_calls:
            raise Fault(400, f"messages[{number}] has no content.", f"messages[{number}].content")
        plain: dict[str, Any] = {"role": message.role, "content": content or ""}
        if message.name is not None:
            plain["name"] = message.name
        if message.tool_call_id is not None:
            plain["tool_call_id"] = message.tool_call_id
        if message.tool_calls:
            plain["tool_calls"] = msgspec.to_builtins(message.tool_calls)
        found.append(plain)
    return found
