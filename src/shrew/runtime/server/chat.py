"""POST /v1/chat/completions: conversations through the model's own template, with tools, streamed or whole."""

from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import msgspec
from starlette.responses import Response

from shrew.runtime import tools
from shrew.runtime.request import Constraint, Piece, Request, Token
from shrew.runtime.server import asked
from shrew.runtime.server.constraints import constraint, tool_constraint
from shrew.runtime.server.faults import Fault, reply
from shrew.runtime.server.schema import ChatRequest, ToolChoice, plain_messages
from shrew.runtime.server.state import Served, State
from shrew.runtime.server.stream import (
    DONE,
    Meter,
    Stream,
    Understood,
    error_event,
    event,
    respond,
    usage_dict,
)


@dataclass(kw_only=True)
class Job(Understood):
    """And how it wants its answer."""

    asked: ChatRequest
    tools: list[dict[str, Any]]  # those that may be called
    mark: str = "chatcmpl"

    def scores(self, tokens: tuple[Token, ...]) -> dict[str, Any] | None:
        """Log-probabilities in the form of OpenAI's chats, if they were asked for."""
        if not self.asked.logprobs:
            return None
        return {"content": [self._score(token) for token in tokens], "refusal": None}

    def _score(self, token: Token) -> dict[str, Any]:
        top = [self._scored(number, value) for number, value in token.top]
        return {**self._scored(token.id, token.logprob), "top_logprobs": top[: self.asked.top_logprobs or 0]}

    def _scored(self, token: int, logprob: float | None) -> dict[str, Any]:
        text = self.served.text_of(token)
        known = self.served.engine.vocabulary
        bytes_ = known.content(token) if known.is_bytes else b"" if "\ufffd" in text else text.encode()
        return {"token": text, "logprob": logprob, "bytes": list(bytes_) or None}


async def chat(state: State, request: ChatRequest) -> Response | Stream:
    return await respond(state, request, understand, _events, _reply)


def understand(state: State, served: Served, request: ChatRequest) -> Job:
    """Everything that can be refused is refused here, before an answer begins."""
    count = request.n or 1
    if count > state.options.max_choices:
        raise Fault(400, f"n is {count}, and this server allows {state.options.max_choices}.", "n")
    if request.top_logprobs and not request.logprobs:
        raise Fault(400, "top_logprobs goes with logprobs = true.", "top_logprobs")
    known = _tools(request)
    messages = plain_messages(request.messages)
    if not any("developer" in source for source in served.template.sources.values()):
        messages = [{**item, "role": "system"} if item["role"] == "developer" else item for item in messages]
    text = served.template.render(messages, known or None)
    ids = asked.encode(served, text, special=False)
    if not ids:
        raise Fault(400, "The messages are empty.", "messages")
    wanted = request.max_completion_tokens or request.max_tokens
    where = "max_completion_tokens" if request.max_completion_tokens else "max_tokens"
    common = asked.settings(served, request)
    common["max_tokens"] = asked.room(served, state.options, len(ids), wanted, where)
    common["logprobs"] = (request.top_logprobs or 0) if request.logprobs else None
    common["stop"] = (*common["stop"], *served.template.stop)
    requests = []
    for seed in asked.choices(request.seed, count):
        common["seed"] = seed
        if request.tool_choice == "required" or isinstance(request.tool_choice, ToolChoice):
            name = request.tool_choice.function.name if isinstance(request.tool_choice, ToolChoice) else None
            bound: Constraint | None = tool_constraint(served, known, name, common["max_tokens"])
        else:
            bound = constraint(served, request, common["max_tokens"])
        requests.append(Request(prompt=ids, constraint=bound, **common))
    return Job(served=served, asked=request, tools=known, requests=requests, prompt_tokens=len(ids))


def _tools(request: ChatRequest) -> list[dict[str, Any]]:
    """The tools that may be called, as templates take them."""
    choice, given = request.tool_choice, request.tools or []
    if choice in ("required",) and not given:
        raise Fault(400, "tool_choice asks for a tool, and there are no tools.", "tool_choice")
    if isinstance(choice, ToolChoice):
        given = [tool for tool in given if tool.function.name == choice.function.name]
        if not given:
            raise Fault(400, f"There is no tool '{choice.function.name}' for tool_choice.", "tool_choice")
    if choice == "none":
        given = []
    return [_without_none(msgspec.to_builtins(tool)) for tool in given]


def _without_none(tool: dict[str, Any]) -> dict[str, Any]:
    return {**tool, "function": {key: value for key, value in tool["function"].items() if value is not None}}


def _reply(job: Job, parts: list[list[Piece]], meter: Meter) -> Response:
    choices = []
    for number, mine in enumerate(parts):
        found = _read(_reader(job), "".join(piece.text for piece in mine), ended=True)
        text, calls = found.text, found.calls
        message: dict[str, Any] = {"role": "assistant", "content": text or None if calls else text, "refusal": None}
        if calls:
            message["tool_calls"] = [_call(call) for call in calls]
        tokens = tuple(token for piece in mine for token in piece.tokens)
        reason = "tool_calls" if calls and mine[-1].finish == "stop" else mine[-1].finish
        choices.append({"index": number, "message": message, "logprobs": job.scores(tokens), "finish_reason": reason})
    return reply(job.object("chat.completion", choices, usage=usage_dict(meter.usages, job.prompt_tokens)))


def _reader(job: Job) -> tools.Parser | None:
    """What finds calls in the text of one choice, where there are tools to call."""
    return tools.Parser(job.served.form, job.tools) if job.tools else None


def _read(reader: tools.Parser | None, text: str, ended: bool) -> tools.Found:
    if reader is None:
        return tools.Found(text)
    found = reader.feed(text)
    rest = reader.finish() if ended else tools.Found()
    return tools.Found(found.text + rest.text, (*found.calls, *rest.calls))


def _call(call: tools.Call) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


async def _events(state: State, job: Job, pieces: AsyncIterator[tuple[int, Piece]]) -> AsyncIterator[bytes]:
    meter = Meter(job.served, state.metrics)
    with_usage = bool(job.asked.stream_options and job.asked.stream_options.include_usage)
    more = {"usage": None} if with_usage else {}
    readers = [_reader(job) for _ in job.requests]
    called = [0] * len(readers)

    def chunk(number: int, delta: dict[str, Any], tokens: tuple[Token, ...] = (), reason: str | None = None) -> bytes:
        scored = job.scores(tokens) if tokens else None
        choice = {"index": number, "delta": delta, "logprobs": scored, "finish_reason": reason}
        return event(job.object("chat.completion.chunk", [choice], **more))

    try:
        for number in range(len(readers)):
            yield chunk(number, {"role": "assistant", "content": ""})
        async with aclosing(pieces) as found:  # type: ignore[type-var]
            async for number, piece in found:
                meter.piece(piece)
                new = _read(readers[number], piece.text, ended=piece.finish is not None)
                if new.text or (piece.tokens and job.asked.logprobs):
                    yield chunk(number, {"content": new.text}, piece.tokens)
                for call in new.calls:
                    yield chunk(number, {"tool_calls": [{"index": called[number], **_call(call)}]})
                    called[number] += 1
                if piece.finish is not None:
                    reason = "tool_calls" if called[number] and piece.finish == "stop" else piece.finish
                    yield chunk(number, {}, reason=reason)
    except Exception as error:
        state.failed(error)
        yield error_event(error)
        return
    if with_usage:
        yield event(job.object("chat.completion.chunk", [], usage=usage_dict(meter.usages, job.prompt_tokens)))
    yield DONE
