"""What a server holds: its limits, the models with their engines, who is being answered, and what was counted."""

import asyncio
import json
import sys
import time
import traceback
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, TypeVar

from shrew import spec
from shrew.errors import UsageError, nearest
from shrew.runtime import constrain, template, tools
from shrew.runtime.server.faults import Fault, busy, fault_of
from shrew.runtime.server.metrics import Metrics
from shrew.spec import Meta, doc

Seconds = Annotated[float, Meta(gt=0, le=86400)]
T = TypeVar("T")
WORKERS = 2  # threads beside the event loop
OPEN = {"/", "/health"}  # paths that need no key
BODIES = 16  # bodies of the largest size that may be in memory at once


@dataclass(frozen=True, kw_only=True)
class Options:
    """Where a server listens and what it lets its clients do."""

    host: str = doc("address to listen at; anything but loopback should have a --key", default="127.0.0.1")
    port: Annotated[int, Meta(ge=0, le=65535)] = doc("port; 0 takes a free one and prints it", default=8000)
    key: str | None = doc("what clients send as 'Authorization: Bearer KEY' (or $SHREW_KEY)", default=None)
    slots: Annotated[int, Meta(ge=1, le=1024)] = doc("sequences computed at once, for each model", default=8)
    queue: Annotated[int, Meta(ge=0, le=65536)] = doc("requests that may wait for a slot; more get 429", default=64)
    threads: Annotated[int, Meta(ge=0, le=1024)] = doc("threads for each model; 0 asks the machine", default=0)
    draft: str | None = doc("guess ahead where one client is served: 'lookup', or a smaller packed model", default=None)
    max_tokens: Annotated[int, Meta(ge=0)] = doc("most tokens of an answer; 0: what the context holds", default=0)
    max_body: str = doc("largest request", default="4MB")
    max_choices: Annotated[int, Meta(ge=1, le=128)] = doc("most choices (n) or prompts in one request", default=128)
    timeout: Seconds = doc("seconds an answer may take, waiting included", default=600.0)
    patience: Seconds = doc("seconds a client may take to send a request, or to read what was sent", default=20.0)
    grace: Seconds = doc("seconds to finish what runs when the server is told to stop", default=30.0)
    connections: Annotated[int, Meta(ge=1)] = doc("open connections at most; more are closed", default=1024)

    @property
    def body_bytes(self) -> int:
        return spec.parse_bytes(self.max_body)

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach the address."""
        return self.host in ("localhost", "::1") or self.host.startswith("127.")


class Gate:
    """Who may use an engine: so many requests at once, so many of their sequences, in order of arrival.

    Twice the slots are let through, so that the engine has the next sequence at hand when one ends.
    """

    def __init__(self, slots: int, queue: int) -> None:
        self.slots, self.most = slots, slots + queue
        self.requests = 0
        self.places = asyncio.Semaphore(2 * slots)
        self.seconds = 1.0  # what a request takes, by the last ones

    @contextmanager
    def request(self) -> Iterator[None]:
        """One request's stay. Raises Fault 429 when the queue is full."""
        if self.requests >= self.most:
            waiting = self.requests - self.slots
            raise busy("The queue is full; try again later.", self.seconds * max(1, waiting) / self.slots)
        self.requests += 1
        start = time.monotonic()
        try:
            yield
        finally:
            self.requests -= 1
            self.seconds += 0.1 * (time.monotonic() - start - self.seconds)

    @asynccontextmanager
    async def sequence(self) -> AsyncIterator[None]:
        async with self.places:
            yield


class Served:
    """A model, its engine and what of its tokenizer's settings clients ask for."""

    def __init__(self, name: str, model: Any, engine: Any, options: Options) -> None:
        self.name, self.model, self.engine = name, model, engine
        self.manifest, self.tokenizer = model.manifest, model.tokenizer
        self.created = int(time.time())
        self.gate = Gate(options.slots, options.queue)
        listed = self.manifest.files
        self.config = tokenizer_config(Path(model.path)) if "tokenizer_config.json" in listed else {}
        self.template = template.of_folder(Path(model.path), listed)

    @cached_property
    def form(self) -> str:
        """The form in which the model writes calls of tools."""
        return tools.format_of(None if self.template.plain else self.template.source(tools=True))

    @cached_property
    def grammars(self) -> constrain.Grammars:
        """What makes constraints. Raises Fault where it is not installed."""
        try:
            return constrain.Grammars(self.tokenizer, self.manifest.vocabulary, self.manifest.eos)
        except ModuleNotFoundError as error:
            raise Fault(400, f"This server has no constrained output, because {error.name} is not installed; whoever "
                        "runs it can: pip install 'shrew[grammar]'.") from None  # fmt: skip

    def text_of(self, token: int) -> str:
        """The text of one token."""
        text: str = self.engine.vocabulary.text(token)
        return text

    def special(self, name: str) -> str | None:
        """The text of a special token, by its name: "bos_token", "eos_token", "pad_token"."""
        value = self.config.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            return text
        number = self.manifest.eos[0] if name == "eos_token" and self.manifest.eos else None
        number = self.manifest.bos if name == "bos_token" else number
        return None if number is None else self.tokenizer.id_to_token(number)


def tokenizer_config(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json, or nothing: an engine does not need it."""
    with suppress(OSError, ValueError):
        found = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
        if isinstance(found, dict):
            return found
    return {}


@dataclass
class State:
    """Everything that requests share."""

    options: Options
    models: dict[str, Served]
    metrics: Metrics = field(default_factory=Metrics)
    closing: bool = False  # told to stop: what runs goes on, what is new is refused
    busy: int = 0  # requests being answered
    bodies: int = 0  # bytes of request bodies in memory
    tasks: set[asyncio.Future[None]] = field(default_factory=set)

    pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(WORKERS, "words"))

    async def call(self, work: Callable[..., T], *given: Any) -> T:
        """Run what takes a while (tokenizing, templates, grammars) beside the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self.pool, work, *given)

    def close(self) -> None:
        """Leave the threads; what they do is bounded and nobody waits for it."""
        self.pool.shutdown(wait=False, cancel_futures=True)

    def failed(self, error: BaseException) -> None:
        """An error that ends a request: a bug is shown to the one who runs the server, what was foreseen is not."""
        if fault_of(error) is None:
            print("".join(traceback.format_exception(error)), file=sys.stderr, flush=True)

    def find(self, name: str | None) -> Served:
        """The model that a request names; with none named, the only one."""
        if name is None:
            if len(self.models) > 1:
                raise Fault(400, f"Several models are served; say which: {', '.join(self.models)}.", "model")
            return next(iter(self.models.values()))
        if name not in self.models:
            shown = name if len(name) <= 100 else name[:100] + "…"
            raise Fault(404, f"There is no model '{shown}' here; {nearest(shown, self.models)}", "model",
                        "model_not_found")  # fmt: skip
        return self.models[name]

    @contextmanager
    def hold(self, size: int) -> Iterator[None]:
        """Room for so many bytes of a body. Raises Fault 429 when others fill it."""
        if self.bodies + size > BODIES * self.options.body_bytes:
            raise busy("Too many large requests at once; try again later.", 1)
        self.bodies += size
        try:
            yield
        finally:
            self.bodies -= size


def check(options: Options) -> None:
    """Refuse what would only show later."""
    if not 1024 <= options.body_bytes <= 2**30:
        raise UsageError(f"--max-body {options.max_body} is out of range; it may be 1KB to 1GiB.")
    if options.key and (not options.key.isascii() or not options.key.isprintable() or " " in options.key):
        raise UsageError("--key must be printable ASCII without spaces, as it stands in a header.")
