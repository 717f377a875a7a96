"""GET /openapi.json: the API's description, made from the very types that requests are checked with."""

import importlib.metadata
from typing import Any

import msgspec

from shrew.runtime.server import schema
from shrew.runtime.server.faults import KINDS
from shrew.runtime.server.state import OPEN, State

TEXT, NUMBER, COUNT = {"type": "string"}, {"type": "number"}, {"type": "integer"}
ANYTHING = {"type": "object"}


def _object(required: dict[str, Any], **optional: Any) -> dict[str, Any]:
    return {"type": "object", "required": list(required), "properties": {**required, **optional}}


def _list(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items}


USAGE = _object({"prompt_tokens": COUNT, "total_tokens": COUNT}, completion_tokens=COUNT, cpu_seconds=NUMBER,
                joules=NUMBER)  # fmt: skip
CHOICE = _object({"index": COUNT, "finish_reason": {"type": ["string", "null"]}})
MODEL = _object({"id": TEXT, "object": {"const": "model"}, "created": COUNT, "owned_by": TEXT})
FAULT = _object(
    {"error": _object({"message": TEXT, "type": TEXT, "param": {"type": ["string", "null"]}, "code": TEXT})}
)
HEAD = {"id": TEXT, "object": TEXT, "created": COUNT, "model": TEXT}
COMPLETION = _object({**HEAD, "choices": _list(CHOICE)}, usage=USAGE)

# path -> what it does, its request, its answer, whether it may stream
WITH_BODY: dict[str, tuple[str, type[schema.Sized], dict[str, Any], bool]] = {
    "/v1/chat/completions": ("Answer a conversation", schema.ChatRequest, COMPLETION, True),
    "/v1/completions": ("Go on with a text", schema.CompletionRequest, COMPLETION, True),
    "/v1/embeddings": (
        "Texts as vectors",
        schema.EmbeddingRequest,
        _object({"object": TEXT, "model": TEXT, "usage": USAGE, "data": _list(_object({"index": COUNT}))}),
        False,
    ),
    "/tokenize": ("A text as tokens", schema.TokenizeRequest, _object({"tokens": _list(COUNT), "count": COUNT}), False),
    "/detokenize": ("Tokens as a text", schema.DetokenizeRequest, _object({"prompt": TEXT}), False),
}
WITHOUT: dict[str, tuple[str, str, dict[str, Any]]] = {
    "/v1/models": ("The models", "application/json", _object({"object": TEXT, "data": _list(MODEL)})),
    "/v1/models/{name}": ("One model", "application/json", MODEL),
    "/tokenizer_info": ("The tokenizer's settings", "application/json", ANYTHING),
    "/health": ("Whether requests are taken", "application/json", _object({"status": TEXT})),
    "/metrics": ("Counters for Prometheus", "text/plain", TEXT),
    "/openapi.json": ("This description", "application/json", ANYTHING),
}


def describe(state: State) -> dict[str, Any]:
    """OpenAPI 3.1 of the server as it runs: with its key if it has one, and the names of its models."""
    options = state.options
    kinds = [kind for _, kind, _, _ in WITH_BODY.values()]
    _, components = msgspec.json.schema_components(kinds, ref_template="#/components/schemas/{name}")
    for kind in kinds:
        settings = components[kind.__name__]["properties"]
        settings["model"] = {"enum": [*state.models, None]}
        for name, most in (("max_tokens", options.max_tokens), ("max_completion_tokens", options.max_tokens),
                           ("n", options.max_choices)):  # fmt: skip
            for part in settings.get(name, {}).get("anyOf", ()):
                if most and "maximum" in part:
                    part["maximum"] = most
    components["Error"] = FAULT
    paths: dict[str, Any] = {}
    for path, (words, kind, answer, streams) in WITH_BODY.items():
        content: dict[str, Any] = {"application/json": {"schema": answer}}
        if streams:
            content["text/event-stream"] = {"schema": ANYTHING}
        body = {"application/json": {"schema": {"$ref": f"#/components/schemas/{kind.__name__}"}}}
        paths[path] = {
            "post": {
                "summary": words,
                "requestBody": {"required": True, "content": body},
                "responses": _responses(content, [400, 401, 404, 408, 411, 413, 415, 429, 500, 503, 504]),
            }
        }
    for path, (words, media, answer) in WITHOUT.items():
        paths[path] = {
            "get": {"summary": words, "responses": _responses({media: {"schema": answer}}, [400, 401, 404, 500, 503])}
        }
    paths["/v1/models/{name}"]["get"]["parameters"] = [_parameter("name", "path")]
    paths["/tokenizer_info"]["get"]["parameters"] = [_parameter("model", "query")]
    found: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "Shrew", "version": importlib.metadata.version("shrew")},
        "paths": paths,
        "components": {"schemas": components},
    }
    if options.key:
        found["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        found["security"] = [{"key": []}]
        for path in OPEN & set(paths):
            paths[path]["get"]["security"] = []
    return found


def _parameter(name: str, place: str) -> dict[str, Any]:
    return {"name": name, "in": place, "required": place == "path", "schema": TEXT}


def _responses(content: dict[str, Any], faults: list[int]) -> dict[str, Any]:
    fault = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    found: dict[str, Any] = {"200": {"description": "Done", "content": content}}
    for status in faults:
        found[str(status)] = {"description": KINDS[status][1].replace("_", " "), "content": fault}
    return found
