"""The application: routes, who may come in, bodies read within limits, and every end of a request counted.

A request with a body goes through `Endpoint`: its size is checked before it is read and while it is read, it is decoded
into its schema, and its handler is cancelled as soon as the client has gone.
"""

import asyncio
import hmac
import time
from collections.abc import Awaitable, Callable
from contextlib import aclosing, suppress
from typing import Any

from starlette.responses import Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from shrew.runtime.server import plain, schema
from shrew.runtime.server.chat import chat
from shrew.runtime.server.completions import completions
from shrew.runtime.server.faults import Fault, fault_of
from shrew.runtime.server.state import OPEN, State
from shrew.runtime.server.stream import Stream, error_event

Handler = Callable[[State, Any], Awaitable[Response | Stream]]
GETS = {
    "/": plain.page,
    "/health": plain.health,
    "/metrics": plain.metrics,
    "/openapi.json": plain.openapi,
    "/tokenizer_info": plain.tokenizer_info,
    "/v1/models": plain.models,
    "/v1/models/{name:path}": plain.model,
}
POSTS: dict[str, tuple[Handler, type[schema.Sized]]] = {
    "/v1/chat/completions": (chat, schema.ChatRequest),
    "/v1/completions": (completions, schema.CompletionRequest),
    "/v1/embeddings": (plain.embeddings, schema.EmbeddingRequest),
    "/tokenize": (plain.tokenize, schema.TokenizeRequest),
    "/detokenize": (plain.detokenize, schema.DetokenizeRequest),
}
LOCAL = {"localhost", "127.0.0.1", "[::1]"}


def application(state: State) -> ASGIApp:
    routes: list[Route] = [Route(path, endpoint, methods=["GET"]) for path, endpoint in GETS.items()]
    routes += [
        Route(path, Endpoint(state, handler, kind), methods=["POST"]) for path, (handler, kind) in POSTS.items()
    ]
    return Guard(Router(routes, redirect_slashes=False), state)


class Guard:
    """Around everything: keys, hosts, the end of the server, counters, and errors that nobody foresaw."""

    def __init__(self, app: ASGIApp, state: State) -> None:
        self.app, self.state = app, state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        state, start, status = self.state, time.monotonic(), 499

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), (b"x-content-type-options", b"nosniff")]
            await send(message)

        scope["app"] = self  # so that the router raises what it refuses
        scope.setdefault("state", {})["server"] = state
        state.busy += 1
        try:
            self.check(scope)
            await self.app(scope, receive, counted)
        except Exception as error:
            state.failed(error)
            if status != 499:  # the answer has begun: the connection is cut, so that nobody takes it for whole
                raise
            await (fault_of(error) or Fault(500, "The server failed; its log says more.")).response()(
                scope, receive, counted
            )
        finally:
            state.busy -= 1
            path = _known(scope["path"])
            state.metrics.add("shrew_requests_total", path=path, status=str(status))
            state.metrics.observe("shrew_request_seconds", time.monotonic() - start, path=path)

    def check(self, scope: Scope) -> None:
        """Raises Fault for who may not come in."""
        headers = {key: value for key, value in scope["headers"] if key in (b"host", b"authorization")}
        options = self.state.options
        if self.state.closing and scope["path"] != "/metrics":
            raise Fault(503, "The server is stopping.", headers={"retry-after": "5", "connection": "close"})
        if options.key:
            given = headers.get(b"authorization", b"")
            scheme, _, key = given.partition(b" ")
            right = hmac.compare_digest(key.strip(), options.key.encode())
            if scope["path"] not in OPEN and not (right and scheme.lower() == b"bearer"):
                raise Fault(401, "The API key is missing or wrong; send 'Authorization: Bearer KEY'.",
                            headers={"www-authenticate": "Bearer"})  # fmt: skip
        elif options.is_local and (name := _host(headers.get(b"host", b""))) not in {*LOCAL, options.host}:
            # A page on the web may have its own name point at this machine, and would then be let in by the browser
            raise Fault(403, f"This server answers to localhost, not to '{name[:100]}'; start it with --key to change "
                        "that.")  # fmt: skip


def _host(header: bytes) -> str:
    name = header.decode("latin-1").lower()
    return name[: name.index("]") + 1] if name.startswith("[") and "]" in name else name.partition(":")[0]


def _known(path: str) -> str:
    """The path for the counters: there are only so many, whatever clients send."""
    if path.startswith("/v1/models/"):
        return "/v1/models/{name}"
    return path if path in GETS or path in POSTS else "other"


class Endpoint:
    """A path that takes JSON."""

    def __init__(self, state: State, handler: Handler, kind: type[schema.Sized]) -> None:
        self.state, self.handler, self.kind = state, handler, kind

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = schema.decode(await self.read(scope, receive), self.kind)
        gone = asyncio.ensure_future(_gone(receive))
        work = asyncio.ensure_future(self.answer(request, scope, receive, send))
        self.state.tasks.add(work)
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                work.cancel()
            with suppress(asyncio.CancelledError):
                await work
            if work.cancelled() and not gone.done():  # not the client but the server ends
                raise Fault(503, "The server is stopping.")
        finally:
            self.state.tasks.discard(work)
            for task in (work, gone):
                task.cancel()

    async def read(self, scope: Scope, receive: Receive) -> bytes:
        """The body, within the limits of size and time."""
        options = self.state.options
        headers = dict(scope["headers"])
        kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
        if kind != b"application/json":
            raise Fault(415, "The body must be JSON: send it with 'Content-Type: application/json'.")
        if headers.get(b"content-encoding", b"identity").lower() != b"identity":
            raise Fault(415, "Compressed bodies are not taken; send it as it is.")
        length = headers.get(b"content-length")
        if length is not None and b"transfer-encoding" in headers:  # two lengths: others in between may believe either
            raise Fault(400, "The request has both a Content-Length and a Transfer-Encoding; send one.")
        if length is None and b"transfer-encoding" not in headers:
            raise Fault(411, "The request has no body, or does not say how long it is.")
        too_large = Fault(413, f"The body is larger than the {options.max_body} that this server takes.")
        if length is not None and int(length) > options.body_bytes:
            raise too_large
        body = bytearray()
        with self.state.hold(int(length or options.body_bytes)):
            try:
                async with asyncio.timeout(options.patience):
                    while True:
                        message = await receive()
                        if message["type"] == "http.disconnect":
                            raise Fault(499, "The client has gone.")
                        body += message.get("body", b"")
                        if len(body) > options.body_bytes:
                            raise too_large
                        if not message.get("more_body", False):
                            return bytes(body)
            except TimeoutError:
                raise Fault(408, f"The body did not come within {options.patience:g} seconds.") from None

    async def answer(self, request: Any, scope: Scope, receive: Receive, send: Send) -> None:
        with self.state.find(request.model).gate.request():
            async with asyncio.timeout(self.state.options.timeout + 2):  # the engine's own deadline comes first
                found = await self.handler(self.state, request)
            if isinstance(found, Response):
                await found(scope, receive, send)
            else:
                await _send_events(found, send)


async def _send_events(stream: Stream, send: Send) -> None:
    """The events, each as it comes. A stream that fails ends with an event that says so."""
    headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache"),
               (b"x-accel-buffering", b"no")]  # fmt: skip
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    async with aclosing(stream.events) as events:  # type: ignore[type-var]
        try:
            async for part in events:
                await send({"type": "http.response.body", "body": part, "more_body": True})
        except asyncio.CancelledError:  # the client has gone and reads no more, or the server ends and says so
            await send({"type": "http.response.body", "body": error_event(Fault(503, "The server is stopping."))})
            return
    await send({"type": "http.response.body", "body": b""})


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass

