"""POST /v1/completions: text after text, with the log-probabilities of the prompt (`echo`) that evaluations need."""

from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from starlette.responses import Response

from shrew.runtime.request import Piece, Request, Token
from shrew.runtime.server import asked
from shrew.runtime.server.constraints import constraint
from shrew.runtime.server.faults import Fault, reply
from shrew.runtime.server.schema import CompletionRequest
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

KIND = "text_completion"


@dataclass
class Logprobs:
    """The log-probabilities of one choice, in the form of OpenAI's completions."""

    served: Served
    offset: int = 0
    found: dict[str, list[Any]] = field(default_factory=dict)

    def take(self, tokens: tuple[Token, ...]) -> dict[str, list[Any]]:
        """The four lists for these tokens, which follow those taken before."""
        lists: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token in tokens:
            lists["tokens"].append(token.text)
            lists["token_logprobs"].append(token.logprob)
            lists["top_logprobs"].append(None if token.logprob is None else self.table(token, token.logprob))
            lists["text_offset"].append(self.offset)
            self.offset += len(token.text)
        return lists

    def table(self, token: Token, logprob: float) -> dict[str, float]:
        """Alternatives by text. Where two tokens read alike the likelier keeps the text; the chosen is always there."""
        found: dict[str, float] = {}
        for text, value in asked.alternatives(self.served, token):
            found[text] = max(value, found.get(text, value))
        if logprob not in found.values():
            found[f"token_id:{token.id}"] = logprob
        return found


@dataclass(kw_only=True)
class Job(Understood):
    """And how it wants its answer."""

    asked: CompletionRequest
    texts: list[str]  # what each choice is preceded by, if the prompt is to be echoed
    mark: str = "cmpl"


async def completions(state: State, request: CompletionRequest) -> Response | Stream:
    return await respond(state, request, understand, _events, _reply)


def understand(state: State, served: Served, request: CompletionRequest) -> Job:
    """Everything that can be refused is refused here, before an answer begins."""
    count = request.n or 1
    if request.best_of not in (None, count):
        raise Fault(400, "best_of other than n is not offered.", "best_of")
    given = asked.prompts(served, request.prompt, "prompt", state.options.max_choices)
    if count * len(given) > state.options.max_choices:
        raise Fault(400, f"n × prompts is {count * len(given)}, and this server allows {state.options.max_choices}.",
                    "n")  # fmt: skip
    if request.max_tokens == 0 and not request.echo:
        raise Fault(400, "max_tokens is 0: nothing would come back; that goes with echo only.", "max_tokens")
    common = asked.settings(served, request)
    common["logprobs"] = request.logprobs
    common["echo"] = bool(request.echo) and request.logprobs is not None
    texts, requests, total = [], [], 0
    for prompt in given:
        filled = request.suffix is not None
        ids = asked.with_suffix(served, prompt, request.suffix or "") if filled else asked.as_ids(served, prompt)
        wanted = asked.DEFAULT_TOKENS if request.max_tokens is None else request.max_tokens
        common["max_tokens"] = asked.room(served, state.options, len(ids), wanted)
        total += len(ids)
        text = ""
        if request.echo:
            text = prompt if isinstance(prompt, str) else served.tokenizer.decode(ids, skip_special_tokens=False)
        for seed in asked.choices(request.seed, count):
            common["seed"] = seed
            common["constraint"] = constraint(served, request, common["max_tokens"])
            requests.append(Request(prompt=ids, **common))
            texts.append(text)
    return Job(served=served, asked=request, texts=texts, requests=requests, prompt_tokens=total)


def _reply(job: Job, parts: list[list[Piece]], meter: Meter) -> Response:
    choices = []
    for number, mine in enumerate(parts):
        tokens = tuple(token for piece in mine for token in (*piece.prompt, *piece.tokens))
        scored = Logprobs(job.served).take(tokens) if job.asked.logprobs is not None else None
        text = job.texts[number] + "".join(piece.text for piece in mine)
        choices.append({"index": number, "text": text, "logprobs": scored, "finish_reason": mine[-1].finish})
    return reply(job.object(KIND, choices, usage=usage_dict(meter.usages, job.prompt_tokens)))


async def _events(state: State, job: Job, pieces: AsyncIterator[tuple[int, Piece]]) -> AsyncIterator[bytes]:
    meter = Meter(job.served, state.metrics)
    scores = [Logprobs(job.served) for _ in job.requests]
    with_usage = bool(job.asked.stream_options and job.asked.stream_options.include_usage)
    more = {"usage": None} if with_usage else {}
    begun = [False] * len(job.requests)
    try:
        async with aclosing(pieces) as found:  # type: ignore[type-var]
            async for number, piece in found:
                meter.piece(piece)
                text = piece.text if begun[number] else job.texts[number] + piece.text
                begun[number] = True
                tokens = (*piece.prompt, *piece.tokens)
                scored = scores[number].take(tokens) if job.asked.logprobs is not None and tokens else None
                choice = {"index": number, "text": text, "logprobs": scored, "finish_reason": piece.finish}
                yield event(job.object(KIND, [choice], **more))
    except Exception as error:
        state.failed(error)
        yield error_event(error)
        return
    if with_usage:
        yield event(job.object(KIND, [], usage=usage_dict(meter.usages, job.prompt_tokens)))
    yield DONE
