"""From the engine's thread to asyncio and out: no thread and no lock for each request.

The engine's thread only wakes the event loop, which takes what has come. All sequences of one request meet in one
queue. What is left of them when the request ends, however it ends, is cancelled.
"""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import msgspec
from starlette.responses import Response

from shrew.runtime.request import Piece, Request, Usage
from shrew.runtime.server import asked
from shrew.runtime.server.faults import Fault, fault_of
from shrew.runtime.server.metrics import Metrics
from shrew.runtime.server.state import Served, State

DONE = b"data: [DONE]\n\n"
FAILED = {
    "deadline": (504, "The answer took longer than this server allows; ask for less, or raise --timeout."),
    "cancelled": (503, "The server is stopping."),
    "error": (500, "The model failed on this request."),
}


Job = TypeVar("Job", bound="Understood")


@dataclass(frozen=True)
class Stream:
    """An answer in server-sent events."""

    events: AsyncIterator[bytes]


@dataclass(kw_only=True)
class Understood:
    """A request that was understood: one engine request for each choice, and what all its answers bear."""

    served: Served
    requests: list[Request]
    prompt_tokens: int
    mark: str  # what its id begins with
    id: str = field(init=False)
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.id = f"{self.mark}-{uuid.uuid4().hex}"

    def object(self, kind: str, choices: list[Any], **more: Any) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.served.name,
            "choices": choices,
            **more,
        }


async def run(served: Served, requests: Sequence[Request], seconds: float) -> AsyncIterator[tuple[int, Piece]]:
    """The pieces of several sequences as they come, with the number of the sequence.

    Raises Fault when one of them fails, or when all of them are not done in so many seconds.
    """
    end = time.monotonic() + seconds
    queue: asyncio.Queue[tuple[int, Piece | BaseException]] = asyncio.Queue()
    width = asyncio.Semaphore(served.gate.slots)  # so that one request cannot take every place in the gate
    jobs = [
        asyncio.ensure_future(_run_one(served, number, request, queue, width, end))
        for number, request in enumerate(requests)
    ]
    try:
        left = len(jobs)
        async with asyncio.timeout(seconds + 1):  # the engine keeps the deadline itself; this is if it is stuck
            while left:
                number, piece = await queue.get()
                if isinstance(piece, BaseException):
                    raise piece
                if piece.refused:
                    raise Fault(400, piece.error)
                if piece.finish in FAILED:
                    status, message = FAILED[piece.finish]
                    raise Fault(status, piece.error or message)
                yield number, piece
                left -= piece.finish is not None
    finally:
        for job in jobs:
            job.cancel()
        await asyncio.gather(*jobs, return_exceptions=True)


async def _run_one(
    served: Served, number: int, request: Request, queue: asyncio.Queue[Any], width: asyncio.Semaphore, end: float
) -> None:
    loop, news = asyncio.get_running_loop(), asyncio.Event()

    def notify() -> None:  # called from the engine's thread
        with suppress(RuntimeError):  # the loop has ended: nobody listens any more
            loop.call_soon_threadsafe(news.set)

    try:
        async with width, served.gate.sequence():
            left = max(0.001, end - time.monotonic())
            answer = served.engine.submit(replace(request, seconds=left), notify)
            finish = None
            try:
                while finish is None:
                    await news.wait()
                    news.clear()
                    while finish is None and (piece := answer.take()) is not None:
                        queue.put_nowait((number, piece))
                        finish = piece.finish
            finally:
                if finish is None:
                    answer.cancel()
    except Exception as error:
        queue.put_nowait((number, error))


def event(content: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + msgspec.json.encode(content) + b"\n\n"


def error_event(error: BaseException) -> bytes:
    """The event that ends a stream which failed after it had begun."""
    fault = fault_of(error) or Fault(500, "The server failed; its log says more.")
    return event(fault.body()) + DONE


def usage_dict(usages: Sequence[Usage], prompts: int) -> dict[str, Any]:
    """Sums over the choices of a request; a prompt with several choices counts once. `prompts` is their tokens."""
    written = sum(item.completion_tokens for item in usages)
    cached = min(prompts, sum(item.cached_tokens for item in usages))
    return {
        "prompt_tokens": prompts,
        "completion_tokens": written,
        "total_tokens": prompts + written,
        "prompt_tokens_details": {"cached_tokens": cached},
        **cost_of(usages),
    }


def cost_of(usages: Sequence[Usage]) -> dict[str, float]:
    """What was measured of them together: processor seconds, and joules where a counter could be read."""
    joules = [item.joules for item in usages if item.joules is not None]
    return Usage(0, 0, 0, sum(item.cpu_seconds for item in usages), sum(joules) if joules else None).cost()


async def whole(job: Understood, pieces: AsyncIterator[tuple[int, Piece]], meter: "Meter") -> list[list[Piece]]:
    """All pieces of each choice."""
    parts: list[list[Piece]] = [[] for _ in job.requests]
    async with aclosing(pieces) as found:  # type: ignore[type-var]
        async for number, piece in found:
            meter.piece(piece)
            parts[number].append(piece)
    return parts


async def respond(
    state: State, request: Any, understand: Callable[..., Job],
    events: Callable[[State, Job, AsyncIterator[tuple[int, Piece]]], AsyncIterator[bytes]],
    reply: Callable[[Job, list[list[Piece]], "Meter"], Response],
) -> Response | Stream:  # fmt: skip
    """The answer of a model that completes, streamed or whole. `understand(state, served, request)` refuses all that
    can be refused, before an answer begins."""
    served = state.find(request.model)
    asked.check_causal(served)
    job = await state.call(understand, state, served, request)
    pieces = run(served, job.requests, state.options.timeout)
    if request.stream:
        return Stream(events(state, job, pieces))
    meter = Meter(served, state.metrics)
    return await state.call(reply, job, await whole(job, pieces, meter), meter)


class Meter:
    """Counts what one request uses, for its own answer and for the server's counters."""

    def __init__(self, served: Served, metrics: Metrics) -> None:
        self.served, self.metrics = served, metrics
        self.start: float | None = time.monotonic()
        self.usages: list[Usage] = []

    def piece(self, piece: Piece) -> None:
        if self.start is not None:
            seconds = time.monotonic() - self.start
            self.metrics.observe("shrew_first_token_seconds", seconds, model=self.served.name)
            self.start = None
        if piece.usage is not None:
            self.usages.append(piece.usage)
            counts: Mapping[str, float] = {
                "prompt_tokens": piece.usage.prompt_tokens,
                "cached_tokens": piece.usage.cached_tokens,
                "completion_tokens": piece.usage.completion_tokens,
                "cpu_seconds": piece.usage.cpu_seconds,
            }
            for name, count in counts.items():
                self.metrics.add(f"shrew_{name}_total", count, model=self.served.name)
