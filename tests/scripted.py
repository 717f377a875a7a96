"""A server whose engine says what a test wants it to say, when it wants it, behind the real engine's interface."""

import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import openai

from shrew.runtime.request import Piece, Request, Token, Usage
from shrew.runtime.server import Options, Served, State, application, wire
from shrew.runtime.text import Vocabulary

CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
    "{% if tools %}{{ tools | tojson }}{% endif %}<|assistant|>"
)

Script = Callable[["ScriptedEngine", Request], Iterator[Piece]]


class ScriptedAnswer:
    def __init__(self, engine: "ScriptedEngine", request: Request, notify: Callable[[], Any] | None) -> None:
        self.engine, self.request, self.notify = engine, request, notify or (lambda: None)
        self.waiting: deque[Piece] = deque()
        self.cancelled = threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        start = time.monotonic()
        for piece in self.engine.script(self.engine, self.request):
            late = self.request.seconds is not None and time.monotonic() - start > self.request.seconds
            if self.cancelled.is_set() or late:
                finish = "cancelled" if self.cancelled.is_set() else "deadline"
                piece = Piece("", finish=finish, usage=Usage(len(self.request.prompt), 0, 0, 0.0))
            if piece.finish is not None:
                with self.engine.lock:
                    self.engine.running -= 1
                    self.engine.cancelled += piece.finish == "cancelled"
            self.waiting.append(piece)
            self.notify()
            if piece.finish is not None:
                break

    def take(self) -> Piece | None:
        return self.waiting.popleft() if self.waiting else None

    def cancel(self) -> None:
        if self.thread.is_alive():
            self.cancelled.set()


class ScriptedEngine:
    def __init__(self, tokenizer: Any, script: Script | None = None, delay: float = 0.0) -> None:
        self.vocabulary = Vocabulary(tokenizer)
        self.tokenizer, self.script, self.delay = tokenizer, script or says("hello world"), delay
        self.lock = threading.Lock()
        self.running = self.most = self.cancelled = 0
        self.requests: list[Request] = []

    def submit(self, request: Request, notify: Callable[[], Any] | None = None) -> ScriptedAnswer:
        with self.lock:
            self.requests.append(request)
            self.running += 1
            self.most = max(self.most, self.running)
        return ScriptedAnswer(self, request, notify)

    def embedding(self, tokens: list[int]) -> "Future[tuple[np.ndarray, Usage]]":
        future: Future[tuple[np.ndarray, Usage]] = Future()
        vector = np.bincount(tokens, minlength=16)[:16].astype(np.float32) + 1
        future.set_result((vector / np.linalg.norm(vector), Usage(len(tokens), 0, 0, 0.25, 1.5)))
        return future

    def metrics(self) -> dict[str, float]:
        return {"running": float(self.running)}

    def token(self, number: int) -> Token:
        return Token(number, self.vocabulary.text(number), -0.5, ((number, -0.5), (1, -2.0)))


def says(text: str, finish: str = "stop", error: str = "") -> Script:
    """Writes the text a token at a time, then ends as told."""

    def script(engine: ScriptedEngine, request: Request) -> Iterator[Piece]:
        prompt = tuple(engine.token(number) for number in request.prompt) if request.echo else ()
        if prompt:
            prompt = (Token(prompt[0].id, prompt[0].text), *prompt[1:])
        ids = engine.tokenizer.encode(text, add_special_tokens=False).ids
        written = ids[: request.max_tokens]
        for place, number in enumerate(written):
            time.sleep(engine.delay)
            token = engine.token(number)
            yield Piece(token.text, (token,), prompt if place == 0 else ())
        end = finish if len(ids) <= request.max_tokens else "length"
        usage = Usage(len(request.prompt), len(written), 0, 0.001 * len(written))
        yield Piece("", prompt=() if written else prompt, finish=end, usage=usage, error=error)  # type: ignore[arg-type]

    return script


def official(live: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=live.url + "/v1", api_key="none", max_retries=0)


def model_at(folder: Path, tokenizer: Any, name: str = "tiny") -> Any:
    manifest = SimpleNamespace(
        kind="causal",
        name=name,
        vocabulary=300,
        width=16,
        context=1024,
        bos=0,
        first=0,
        eos=(1,),
        pad=2,
        labels=None,
        files={item.name for item in folder.iterdir()},
    )
    return SimpleNamespace(path=folder, manifest=manifest, tokenizer=tokenizer)


class Live:
    """A server in a thread of this process, at a free port."""

    def __init__(self, folder: Path, tokenizer: Any, engine: ScriptedEngine, names: tuple[str, ...], **given: Any):
        self.options = Options(**{"host": "127.0.0.1", "port": 0, **given})
        self.engine = engine
        models = {name: Served(name, model_at(folder, tokenizer, name), engine, self.options) for name in names}
        self.state = State(self.options, models)
        self.socket = wire.listen(self.options)
        self.port = self.socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.server = wire.server(application(self.state), self.state)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.socket]}, daemon=True)
        self.client = httpx.Client(base_url=self.url, timeout=20)
        self.opened: list[socket.socket] = []

    def post(self, path: str, body: Any = None, **more: Any) -> httpx.Response:
        return self.client.post(path, json=body, **more)

    def send(self, path: str, body: bytes, **headers: str) -> httpx.Response:
        return self.client.post(path, content=body, headers={"content-type": "application/json", **headers})

    def get(self, path: str, **more: Any) -> httpx.Response:
        return self.client.get(path, **more)

    def raw(self, text: bytes, timeout: float = 10.0) -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", self.port), timeout)
        self.opened.append(connection)
        connection.sendall(text)
        return connection

    def wait(self, condition: Any, seconds: float = 5.0) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "it did not happen in time"
            time.sleep(0.01)
