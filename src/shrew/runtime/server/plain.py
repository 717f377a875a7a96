"""What is answered in one piece: models, embeddings, tokens, health, metrics, the description and the page."""

import asyncio
import base64
from collections.abc import Sequence
from typing import Any

import numpy as np
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from shrew.runtime.page import html, policy
from shrew.runtime.server import asked
from shrew.runtime.server.faults import Fault, reply
from shrew.runtime.server.metrics import metric_name
from shrew.runtime.server.openapi import describe
from shrew.runtime.server.schema import DetokenizeRequest, EmbeddingRequest, TokenizeRequest
from shrew.runtime.server.state import Served, State
from shrew.runtime.server.stream import cost_of

PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"


def _state(request: HttpRequest) -> State:
    state: State = request.state.server
    return state


def _card(served: Served) -> dict[str, Any]:
    return {
        "id": served.name,
        "object": "model",
        "created": served.created,
        "owned_by": "shrew",
        "context_length": served.manifest.context,
        "vocabulary": served.manifest.vocabulary,
        "chat": not served.template.plain,
    }


async def models(request: HttpRequest) -> Response:
    return reply({"object": "list", "data": [_card(served) for served in _state(request).models.values()]})


async def model(request: HttpRequest) -> Response:
    return reply(_card(_state(request).find(request.path_params["name"])))


async def health(request: HttpRequest) -> Response:
    """200 while new requests are taken, 503 when the server is about to end."""
    if _state(request).closing:
        raise Fault(503, "The server is stopping.")
    return reply({"status": "ok", "models": list(_state(request).models)})


async def metrics(request: HttpRequest) -> Response:
    state = _state(request)
    gauges: list[tuple[str, dict[str, str], float]] = [("shrew_requests_running", {}, state.busy)]
    for served in state.models.values():
        found = served.engine.metrics()
        gauges += [
            (f"shrew_engine_{metric_name(name)}", {"model": served.name}, float(value))
            for name, value in found.items()
            if isinstance(value, int | float)
        ]
    return Response(state.metrics.text(gauges), media_type=PROMETHEUS)


async def tokenizer_info(request: HttpRequest) -> Response:
    """The settings of a model's tokenizer, as lm-eval's remote tokenizer wants them."""
    served = _state(request).find(request.query_params.get("model"))
    special = {name: served.special(name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
    return reply({**served.config, **special, "model_max_length": served.manifest.context})


async def openapi(request: HttpRequest) -> Response:
    return reply(describe(_state(request)))


async def page(request: HttpRequest) -> Response:
    """The page, under a policy that lets it run what it holds itself and talk to this server alone."""
    text = html()
    headers = {"content-security-policy": policy(text), "referrer-policy": "no-referrer", "cache-control": "no-cache"}
    return Response(text, headers=headers, media_type="text/html")


# --- with a body -----------------------------------------------------------------------------------------------------


async def tokenize(state: State, request: TokenizeRequest) -> Response:
    served = state.find(request.model)
    ids = await state.call(asked.encode, served, request.prompt, request.add_special_tokens)
    return reply({"tokens": ids, "count": len(ids), "max_model_len": served.manifest.context})


async def detokenize(state: State, request: DetokenizeRequest) -> Response:
    served = state.find(request.model)
    asked.check_ids(served, request.tokens, "tokens")
    text = await state.call(lambda: served.tokenizer.decode(request.tokens, skip_special_tokens=False))
    return reply({"prompt": text})


async def embeddings(state: State, request: EmbeddingRequest) -> Response:
    served = state.find(request.model)
    asked.check_causal(served)
    width = served.manifest.width
    if request.dimensions not in (None, width):
        raise Fault(400, f"dimensions is {request.dimensions}, and '{served.name}' gives {width}.", "dimensions")
    rows = await state.call(_rows, state, served, request)
    vectors, usages = [], []
    for ids in rows:  # one at a time, so that one request does not take every place
        async with served.gate.sequence():
            vector, used = await asyncio.wrap_future(served.engine.embedding(ids))
            vectors.append(vector)
            usages.append(used)
    total = sum(map(len, rows))
    data = [
        {"object": "embedding", "index": number, "embedding": _written(vector, request.encoding_format)}
        for number, vector in enumerate(vectors)
    ]
    usage = {"prompt_tokens": total, "total_tokens": total, **cost_of(usages)}
    return reply({"object": "list", "data": data, "model": served.name, "usage": usage})


def _rows(state: State, served: Served, request: EmbeddingRequest) -> list[list[int]]:
    rows = []
    for item in asked.prompts(served, request.input, "input", state.options.max_choices):
        ids = asked.as_ids(served, item)
        if len(ids) > served.manifest.context:
            raise Fault(400, f"The input has {len(ids)} tokens, and '{served.name}' holds {served.manifest.context}.",
                        "input", "context_length_exceeded")  # fmt: skip
        rows.append(ids)
    return rows


def _written(vector: np.ndarray, form: str | None) -> Sequence[float] | str:
    flat = np.asarray(vector, "<f4")
    if form == "base64":
        return base64.b64encode(flat.tobytes()).decode()
    found: list[float] = flat.tolist()
    return found
