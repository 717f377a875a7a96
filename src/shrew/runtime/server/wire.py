"""The connection itself: uvicorn's, with the time limits that it does not have, and an end that waits for answers.

A client that opens a connection and says nothing, sends its headers a byte at a time or does not read what it asked
for would hold memory for ever: each has `patience` seconds. (A body that comes slowly is the app's business.)
"""

import asyncio
import math
import socket
import time
from types import FrameType
from typing import Any

import msgspec
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from shrew.errors import UsageError
from shrew.runtime.server.faults import Fault
from shrew.runtime.server.state import Options, State

HEAD = 32 * 1024  # bytes of a request's head
TICK = 0.05


class Wire(H11Protocol):
    """One connection."""

    patience = 20.0
    most = 1024

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.reading: asyncio.TimerHandle | None = None
        self.writing: asyncio.TimerHandle | None = None
        if len(self.connections) > self.most:
            transport.abort()
        else:
            self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self.reading, self.writing):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def _watch(self) -> None:
        """A request that has not come whole, or what follows an answer that did not wait for it, has its time."""
        if self.cycle is not None and not self.cycle.response_complete:
            if self.reading is not None:
                self.reading.cancel()
                self.reading = None
        elif self.reading is None and not self.transport.is_closing():
            self.reading = self.loop.call_later(self.patience, self._too_slow)

    def _too_slow(self) -> None:
        self.reading = None
        if self.cycle is None or self.cycle.response_complete:
            self.transport.abort()

    def on_response_complete(self) -> None:
        if self.reading is not None:
            self.reading.cancel()
            self.reading = None
        super().on_response_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self.writing is None:
            self.writing = self.loop.call_later(self.patience, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self.writing is not None:
            self.writing.cancel()
            self.writing = None

    def send_400_response(self, msg: str) -> None:
        body = msgspec.json.encode(Fault(400, msg).body())
        head = f"HTTP/1.1 400 Bad Request\r\nconnection: close\r\ncontent-length: {len(body)}\r\n"
        self.transport.write(head.encode() + b"content-type: application/json\r\n\r\n" + body)
        self.transport.close()


class Server(uvicorn.Server):
    """Uvicorn's, which on SIGTERM or SIGINT first lets what runs finish while what is new is refused."""

    def __init__(self, config: uvicorn.Config, state: State) -> None:
        super().__init__(config)
        self.state = state

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.force_exit = self.should_exit  # asked twice: at once
        self.should_exit = self.state.closing = True

    async def main_loop(self) -> None:
        await super().main_loop()
        self.state.closing = True
        await self._wait(self.state.options.grace)
        for task in list(self.state.tasks):
            task.cancel()
        await self._wait(1.0)

    async def _wait(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while self.state.busy and time.monotonic() < end and not self.force_exit:
            await asyncio.sleep(TICK)


def listen(options: Options) -> socket.socket:
    """The socket that was asked for; a port that was left by a killed server can be taken again at once."""
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    try:
        return socket.create_server((options.host, options.port), family=family, backlog=512)
    except (OSError, UnicodeError) as error:
        words = str(getattr(error, "strerror", None) or error).partition(" (while")[0]  # the address is said already
        raise UsageError(f"Cannot listen at {options.host} port {options.port}: {words}; choose another --port or "
                         "--host (--port 0 takes a free one).") from None  # fmt: skip


def server(app: Any, state: State) -> Server:
    """A server that has not been started."""
    options = state.options
    protocol = type("Wire", (Wire,), {"patience": options.patience, "most": options.connections})
    config = uvicorn.Config(
        app,
        http=protocol,
        ws="none",
        loop="asyncio",
        lifespan="off",
        log_config=None,
        log_level="error",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        h11_max_incomplete_event_size=HEAD,
        timeout_keep_alive=math.ceil(options.patience),  # longer than clients keep theirs, so that they close first
        timeout_graceful_shutdown=2,
    )
    return Server(config, state)
