"""The server over real sockets: what OpenAI's clients read, every kind of bad client, and the end of it."""

import asyncio
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scripted import Script, ScriptedEngine, says

from shrew.__main__ import main
from shrew.runtime.request import Piece, Request, Usage
from shrew.runtime.server import Options, Served, State, application, wire

CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
    "{% if tools %}{{ tools | tojson }}{% endif %}<|assistant|>"
)
USER = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def folder(tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("served")
    tiny_tokenizer.save_pretrained(path)
    (path / "chat_template.jinja").write_text(CHATML, "utf-8")
    return path


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer: Any) -> Any:
    return tiny_tokenizer.backend_tokenizer


def model_at(folder: Path, tokenizer: Any, name: str = "tiny") -> Any:
    manifest = SimpleNamespace(
        kind="causal", name=name, vocabulary=300, width=16, context=256, bos=0, eos=(1,), pad=2, labels=None
    )
    return SimpleNamespace(path=folder, manifest=manifest, tokenizer=tokenizer)


class Live:
    """A server in a thread of this process, at a free port."""

    def __init__(self, folder: Path, tokenizer: Any, engine: ScriptedEngine, names: tuple[str, ...], **given: Any):
        self.options = Options(host="127.0.0.1", port=0, **given)
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


@pytest.fixture(scope="module")
def start(folder: Path, tokenizer: Any) -> Any:
    @contextmanager
    def started(
        script: Script | None = None, delay: float = 0.0, names: tuple[str, ...] = ("tiny",), **given: Any
    ) -> Iterator[Live]:
        live = Live(folder, tokenizer, ScriptedEngine(tokenizer, script, delay), names, **given)
        live.thread.start()
        live.wait(lambda: live.server.started)
        try:
            yield live
        finally:
            live.server.should_exit = True
            live.thread.join(20)
            assert not live.thread.is_alive()
            for item in (live.client, *live.opened):
                item.close()
            live.state.close()

    return started


@pytest.fixture(scope="module")
def live(start: Any) -> Iterator[Live]:
    with start() as found:
        yield found


@pytest.fixture(scope="module")
def client(live: Live) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=live.url + "/v1", api_key="none", max_retries=0) as found:
        yield found


# --- what clients read -----------------------------------------------------------------------------------------------


def test_the_official_client_chats(client: openai.OpenAI) -> None:
    found = client.chat.completions.create(model="tiny", messages=USER, logprobs=True, top_logprobs=2, n=2, seed=1)
    assert [choice.message.content for choice in found.choices] == ["hello world"] * 2
    assert [choice.finish_reason for choice in found.choices] == ["stop"] * 2
    scored = found.choices[0].logprobs.content
    assert "".join(token.token for token in scored) == "hello world"
    assert [token.logprob for token in scored] == [-0.5] * len(scored)
    assert [len(token.top_logprobs) for token in scored] == [2] * len(scored)
    usage = found.usage
    assert usage.completion_tokens == 2 * len(scored)
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.cpu_seconds == pytest.approx(0.002 * len(scored))


def test_the_official_client_streams(client: openai.OpenAI) -> None:
    options: Any = {"include_usage": True}
    chunks = list(client.chat.completions.create(model="tiny", messages=USER, stream=True, stream_options=options))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "hello world"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens > 0
    assert all(chunk.usage is None for chunk in chunks[:-1])
    plain = list(client.completions.create(model="tiny", prompt="a", stream=True, max_tokens=50))
    assert "".join(chunk.choices[0].text for chunk in plain) == "hello world"


def test_what_is_asked_reaches_the_engine(client: openai.OpenAI, live: Live) -> None:
    client.chat.completions.create(
        model="tiny", messages=USER, temperature=0.3, top_p=0.9, seed=7, stop=["x", "y"], logit_bias={"5": -3},
        presence_penalty=0.5, frequency_penalty=-0.5, max_completion_tokens=4, n=2,
        extra_body={"top_k": 7, "min_p": 0.05, "repetition_penalty": 1.2, "ignore_eos": True},
    )  # fmt: skip
    first, second = live.engine.requests[-2:]
    assert {first.seed, second.seed} == {7, 8}
    assert (first.temperature, first.top_p, first.stop, first.logit_bias) == (0.3, 0.9, ("x", "y"), {5: -3.0})
    assert (first.presence_penalty, first.frequency_penalty, first.max_tokens) == (0.5, -0.5, 4)
    assert (first.top_k, first.min_p, first.repetition_penalty, first.ignore_eos) == (7, 0.05, 1.2, True)
    text = live.engine.tokenizer.decode(first.prompt, skip_special_tokens=False)
    assert text == "<|user|>Hi<|assistant|>"
    assert 0 < first.seconds <= live.options.timeout


def test_echo_gives_the_scores_of_the_prompt(live: Live) -> None:
    """As lm-eval asks: lists of tokens, one token more, log-probabilities of all."""
    rows = [[5, 6, 7], [8, 9]]
    body = {"model": "tiny", "prompt": rows, "echo": True, "logprobs": 1, "max_tokens": 1, "temperature": 0, "seed": 1}
    found = live.post("/v1/completions", body).json()
    assert [choice["index"] for choice in found["choices"]] == [0, 1]
    for row, choice in zip(rows, found["choices"], strict=True):
        scores = choice["logprobs"]
        assert [len(items) for items in scores.values()] == [len(row) + 1] * 4
        assert scores["token_logprobs"][0] is None and scores["top_logprobs"][0] is None
        for value, table in zip(scores["token_logprobs"][1:], scores["top_logprobs"][1:], strict=True):
            assert value in table.values()
        assert choice["text"] == "".join(scores["tokens"])
        assert scores["text_offset"] == [len("".join(scores["tokens"][:i])) for i in range(len(row) + 1)]
    assert found["usage"]["prompt_tokens"] == 5
    only = live.post("/v1/completions", {**body, "max_tokens": 0}).json()["choices"][0]
    assert len(only["logprobs"]["tokens"]) == 3


@pytest.mark.parametrize(
    ("prompt", "rows"), [("ab", 1), (["ab", "cd"], 2), ([5, 6], 1), ([[5], [6, 7]], 2), ("", 1), (None, 1)]
)
def test_prompts_of_every_kind(live: Live, prompt: Any, rows: int) -> None:
    found = live.post("/v1/completions", {"prompt": prompt, "n": 2}).json()
    assert [choice["index"] for choice in found["choices"]] == list(range(2 * rows))


def test_embeddings(client: openai.OpenAI, live: Live) -> None:
    packed = client.embeddings.create(model="tiny", input=["a", "b b"])  # base64 on the wire
    plain = client.embeddings.create(model="tiny", input=["a", "b b"], encoding_format="float")
    for one, other in zip(packed.data, plain.data, strict=True):
        assert one.embedding == pytest.approx(other.embedding)
        assert sum(value**2 for value in one.embedding) == pytest.approx(1)
    assert live.post("/v1/embeddings", {"input": "a", "dimensions": 3}).status_code == 400


def test_tokens_there_and_back(live: Live) -> None:
    text = "def f(x): return 'é'"
    tokens = live.post("/tokenize", {"prompt": text, "add_special_tokens": False}).json()
    assert tokens["count"] == len(tokens["tokens"])
    assert live.post("/detokenize", {"tokens": tokens["tokens"]}).json() == {"prompt": text}
    info = live.get("/tokenizer_info").json()
    assert (info["eos_token"], info["bos_token"], info["pad_token"]) == ("<eos>", "<bos>", "<pad>")


def test_models_health_and_metrics(client: openai.OpenAI, live: Live) -> None:
    assert [item.id for item in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").context_length == 256
    assert live.get("/health").json()["status"] == "ok"
    live.post("/v1/completions", {"prompt": "a"})
    found = live.get("/metrics")
    assert found.headers["content-type"].startswith("text/plain; version=0.0.4")
    line = re.compile(r'(# (HELP|TYPE) \w+ .*|[a-z_]+(\{\w+="[^"]*"(,\w+="[^"]*")*\})? [0-9.e+-]+)')
    assert all(line.fullmatch(row) for row in found.text.splitlines())
    assert 'shrew_requests_total{path="/v1/completions",status="200"}' in found.text
    assert 'shrew_completion_tokens_total{model="tiny"}' in found.text
    assert 'shrew_first_token_seconds_bucket{model="tiny",le="+Inf"}' in found.text


def test_several_models(start: Any) -> None:
    with start(names=("one", "two")) as live:
        assert live.post("/v1/completions", {"model": "two", "prompt": "a"}).json()["model"] == "two"
        found = live.post("/v1/completions", {"prompt": "a"})
        assert (found.status_code, found.json()["error"]["param"]) == (400, "model")


# --- errors ----------------------------------------------------------------------------------------------------------


def test_the_official_client_raises_its_own_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="There is no model 'other' here"):
        client.chat.completions.create(model="other", messages=USER)
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="tiny", messages=USER, temperature=5)
    assert caught.value.param == "temperature" and caught.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="tiny", prompt=[5] * 256)
    assert caught.value.code == "context_length_exceeded"


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        ("/v1/completions", b"{", "no JSON"),
        ("/v1/completions", b'{"prompt": "\xff"}', "no JSON in UTF-8"),
        ("/v1/completions", b'{"prompt": "\\ud800"}', "no JSON"),
        ("/v1/completions", b'{"prompt": NaN}', "no JSON"),
        ("/v1/completions", b'{"temperature": 1e999}', "temperature"),
        ("/v1/completions", b'{"max_tokens": 99999999999999999999999999}', "max_tokens"),
        ("/v1/completions", b'{"seed": ' + b"9" * 5000 + b"}", "seed"),
        ("/v1/completions", b'{"x": ' + b"[" * 100_000, "nested too deep"),
        ("/v1/completions", b'{"prompt": [1, "a"]}', "mixes"),
        ("/v1/completions", b'{"prompt": [300]}', "token id above 299"),
        ("/v1/completions", b'{"prompt": "a", "suffix": "b"}', "fill in the middle"),
        ("/v1/completions", b'{"prompt": "a", "best_of": 3}', "best_of"),
        ("/v1/completions", b'{"prompt": "a", "stop": [""]}', "stop"),
        ("/v1/completions", b'{"prompt": "a", "stop": [' + b'"a",' * 16 + b'"a"]}', "stop"),
        ("/v1/completions", b'{"prompt": "a", "n": 200}', "n:"),
        ("/v1/completions", b'{"prompt": ["a","b"], "n": 100}', "allows 128"),
        ("/v1/completions", b'{"prompt": "a", "logit_bias": {"x": 1}}', "logit_bias"),
        ("/v1/completions", b'{"prompt": "a", "logit_bias": {"999": 1}}', "logit_bias"),
        ("/v1/completions", b'{"prompt": "a", "max_tokens": 0}', "echo"),
        ("/v1/completions", b'{"prompt": "a", "regex": "a", "grammar": "b"}', "exclude"),
        ("/v1/chat/completions", b"[]", "Expected object"),
        ("/v1/chat/completions", b'{"messages": []}', "messages"),
        ("/v1/chat/completions", b'{"messages": [{"role": "king"}]}', "role"),
        ("/v1/chat/completions", b'{"messages": [{"role": "user"}]}', "no content"),
        ("/v1/chat/completions", b'{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}', "text only"),
        ("/v1/chat/completions", b'{"messages": [{"role": "user", "content": 5}]}', "content"),
        ("/v1/chat/completions", b'{"messages": [{"role":"user", "content":"a"}], "tool_choice": "required"}', "tool"),
        ("/v1/embeddings", b'{"input": []}', "input"),
        ("/v1/embeddings", b'{"input": [[]]}', "input"),
        ("/detokenize", b'{"tokens": [-1]}', "tokens"),
        ("/detokenize", b'{"tokens": [300]}', "tokens"),
        ("/tokenize", b'{"prompt": 5}', "prompt"),
    ],
)  # fmt: skip
def test_bad_requests_are_refused_in_words(live: Live, path: str, body: bytes, words: str) -> None:
    found = live.send(path, body)
    assert found.status_code == 400, found.text
    error = found.json()["error"]
    assert words in error["message"] and set(error) == {"message", "type", "param", "code"}


def test_statuses(live: Live) -> None:
    assert live.get("/nowhere").status_code == 404
    assert live.get("/v1/models/nobody").status_code == 404
    refused = live.get("/v1/completions")
    assert refused.status_code == 405 and "POST" in refused.headers["allow"]
    assert live.post("/v1/completions", headers={"content-type": "text/plain"}).status_code == 415
    assert live.client.post("/v1/completions", data={"a": "b"}).status_code == 415
    assert live.send("/v1/completions", b"x", **{"content-encoding": "gzip"}).status_code == 415
    bare = live.raw(b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n\r\n")
    assert b" 411 " in bare.recv(4096)
    broken = live.raw(b"NOT HTTP\r\n\r\n")
    assert b"HTTP/1.1 400 " in (reply := broken.recv(4096)) and b'{"error":' in reply


@pytest.mark.parametrize("depth", [70, 5000])
def test_hostile_schemas_are_refused(live: Live, depth: int) -> None:
    schema = b'{"a":' * depth + b"{}" + b"}" * depth
    for body in (
        b'{"messages":[{"role":"user","content":"a"}],"response_format":{"type":"json_schema","json_schema":'
        b'{"name":"a","schema":%s}}}' % schema,
        b'{"messages":[{"role":"user","content":"a"}],"tools":[{"type":"function","function":{"name":"f",'
        b'"parameters":%s}}]}' % schema,
    ):
        found = live.send("/v1/chat/completions", body)
        assert found.status_code == 400 and "nested" in found.json()["error"]["message"]


def test_a_failing_engine_is_a_500_and_the_next_request_is_served(start: Any, capfd: Any) -> None:
    def breaks(engine: ScriptedEngine, request: Request) -> Iterator[Piece]:
        raise AssertionError("planted")

    with start(says("half an answer", "error", "The planted failure.")) as live:
        found = live.post("/v1/completions", {"prompt": "a"})
        assert (found.status_code, found.json()["error"]["message"]) == (500, "The planted failure.")
        streamed = live.post("/v1/completions", {"prompt": "a", "stream": True}).text
        assert '"error":{"message":"The planted failure."' in streamed and streamed.endswith("data: [DONE]\n\n")
        client = openai.OpenAI(base_url=live.url + "/v1", api_key="none", max_retries=0)
        with client, pytest.raises(openai.APIError, match="planted"):
            list(client.completions.create(model="tiny", prompt="a", stream=True))
        live.engine.submit = None  # type: ignore[method-assign, assignment]  # a bug of ours
        assert live.post("/v1/completions", {"prompt": "a"}).status_code == 500
        del live.engine.submit
        live.engine.script = says("well")
        assert live.post("/v1/completions", {"prompt": "a"}).json()["choices"][0]["text"] == "well"
    assert "Traceback" in capfd.readouterr().err  # whoever runs the server sees the bug


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
KEYS = ["model", "prompt", "messages", "max_tokens", "temperature", "n", "seed", "stop", "logit_bias", "stream",
        "stream_options", "response_format", "tools", "tool_choice", "logprobs", "top_logprobs", "echo", "suffix",
        "input", "encoding_format", "tokens", "regex", "role", "content", "type", "function", "best_of"]  # fmt: skip
SANE: dict[str, Any] = {"/v1/completions": {"prompt": "a"}, "/v1/chat/completions": {"messages": USER},
                        "/v1/embeddings": {"input": "a"}, "/tokenize": {"prompt": "a"},
                        "/detokenize": {"tokens": [5]}}  # fmt: skip


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(path=st.sampled_from(sorted(SANE)), changes=st.dictionaries(st.sampled_from(KEYS), json_values, max_size=3))
def test_no_json_makes_it_fail(live: Live, path: str, changes: dict[str, Any]) -> None:
    body = json.dumps({**SANE[path], **changes}).encode()  # NaN, Infinity and half characters too
    found = live.send(path, body)
    assert found.status_code in (200, 400, 404), found.text


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(path=st.sampled_from(sorted(SANE)), body=st.binary(max_size=60))
def test_no_bytes_make_it_fail(live: Live, path: str, body: bytes) -> None:
    assert live.send(path, body).status_code in (200, 400)  # b"{}" asks for something


# --- limits ----------------------------------------------------------------------------------------------------------


def test_the_key(start: Any) -> None:
    with start(key="secret") as live:
        for key in (None, "Bearer wrong", "secret", b"Bearer \xff"):
            headers = {"authorization": key} if key else {}
            assert live.post("/v1/completions", {"prompt": "a"}, headers=headers).status_code == 401
            assert live.get("/metrics", headers=headers).status_code == 401
        right = {"authorization": "Bearer secret", "host": "example.org"}
        assert live.post("/v1/completions", {"prompt": "a"}, headers=right).status_code == 200
        assert live.get("/health").status_code == 200
        client = openai.OpenAI(base_url=live.url + "/v1", api_key="wrong", max_retries=0)
        with client, pytest.raises(openai.AuthenticationError):
            client.models.list()


def test_another_sites_name_is_no_way_in(live: Live) -> None:
    assert live.get("/v1/models", headers={"host": "evil.example:8000"}).status_code == 403
    assert live.get("/v1/models", headers={"host": "LOCALHOST:99"}).status_code == 200


def test_a_large_body_is_refused_before_it_is_read(start: Any) -> None:
    with start(max_body="2KB") as live:
        head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        told = live.raw(head + b"content-length: 100000000\r\n\r\n")
        assert b" 413 " in told.recv(4096)  # not a byte of it was sent
        chunked = live.raw(head + b"transfer-encoding: chunked\r\n\r\n" + b"800\r\n" + b" " * 2048 + b"\r\n1\r\na\r\n")
        assert b" 413 " in chunked.recv(4096)
        found = live.send("/v1/completions", b" " * 100_000_000)
        assert found.status_code == 413 and found.json()["error"]["code"] == "request_too_large"
        assert live.post("/v1/completions", {"prompt": "a"}).status_code == 200


def test_slow_clients_are_cut_off(start: Any) -> None:
    with start(patience=0.3) as live:
        silent = live.raw(b"")
        dripping = live.raw(b"POST /v1/completions HT")
        again = live.raw(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\nGET /hea")
        body = live.raw(b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
                        b"content-length: 50\r\n\r\n{")  # fmt: skip
        assert live.get("/health").status_code == 200
        start_time = time.monotonic()
        assert b" 408 " in body.recv(4096)
        assert b" 200 " in again.recv(4096)
        for connection in (silent, dripping, again):
            with suppress(ConnectionResetError):
                while connection.recv(4096):
                    pass
        assert time.monotonic() - start_time < 3
        live.wait(lambda: len(live.server.server_state.connections) <= 1)


def test_a_client_that_does_not_read_is_cut_off(start: Any) -> None:
    def endless(engine: ScriptedEngine, request: Request) -> Iterator[Piece]:
        while True:
            yield Piece("x" * 100_000)
            time.sleep(0.001)

    with start(endless, patience=0.3) as live:
        body = b'{"prompt":"a","stream":true}'
        stuck = live.raw(b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
                         b"content-length: %d\r\n\r\n%s" % (len(body), body))  # fmt: skip
        live.wait(lambda: live.engine.cancelled == 1)
        live.wait(lambda: live.state.busy == 0)
        stuck.close()


def test_a_full_queue_says_when_to_come_again(start: Any) -> None:
    with start(says("word " * 3), delay=0.05, slots=1, queue=1) as live, ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: live.post("/v1/completions", {"prompt": "a"}), range(8)))
        statuses = [item.status_code for item in found]
        assert statuses.count(200) >= 2 and statuses.count(429) >= 1 and set(statuses) == {200, 429}
        late = next(item for item in found if item.status_code == 429)
        assert int(late.headers["retry-after"]) >= 1 and late.json()["error"]["type"] == "rate_limit_error"
        assert live.engine.most <= 2
        assert live.post("/v1/completions", {"prompt": "a"}).status_code == 200


def test_one_request_does_not_take_every_place(start: Any) -> None:
    with start(says("a b c"), delay=0.002, slots=2) as live:
        found = live.post("/v1/completions", {"prompt": ["a"] * 30, "max_tokens": 3})
        assert len(found.json()["choices"]) == 30
        assert live.engine.most <= 2


def test_the_deadline(start: Any) -> None:
    with start(says("never done " * 20), delay=0.05, timeout=0.2) as live:
        found = live.post("/v1/completions", {"prompt": "a", "max_tokens": 100})
        assert (found.status_code, found.json()["error"]["code"]) == (504, "deadline_exceeded")
        streamed = live.post("/v1/completions", {"prompt": "a", "max_tokens": 100, "stream": True})
        assert "deadline_exceeded" in streamed.text.splitlines()[-4]


def test_an_engine_that_hangs_is_no_end(start: Any) -> None:
    def stuck(engine: ScriptedEngine, request: Request) -> Iterator[Piece]:
        time.sleep(5)
        yield Piece("", finish="stop", usage=Usage(1, 0, 0, 0.0))

    with start(stuck, timeout=0.1) as live:
        begun = time.monotonic()
        assert live.post("/v1/completions", {"prompt": "a"}).status_code == 504
        assert time.monotonic() - begun < 4


def test_max_tokens_is_limited(start: Any) -> None:
    with start(max_tokens=3) as live:
        assert live.post("/v1/completions", {"prompt": "a", "max_tokens": 4}).status_code == 400
        live.post("/v1/chat/completions", {"messages": USER})
        assert live.engine.requests[-1].max_tokens == 3


# --- clients that go, and the end ------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
def test_a_dropped_connection_cancels(start: Any, stream: bool) -> None:
    with start(says("word " * 40), delay=0.02) as live:
        body = json.dumps({"prompt": ["a", "b"], "stream": stream, "max_tokens": 200}).encode()
        connection = live.raw(b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
                              b"content-length: %d\r\n\r\n%s" % (len(body), body))  # fmt: skip
        live.wait(lambda: live.engine.running == 2)
        connection.close()
        live.wait(lambda: live.engine.running == 0 and live.state.busy == 0)
        assert live.engine.cancelled == 2


def test_the_asynchronous_client_cancels(start: Any) -> None:
    async def some(url: str) -> str:
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
            stream = await client.chat.completions.create(model="tiny", messages=USER, stream=True, max_tokens=200)
            text = ""
            async for chunk in stream:
                text += chunk.choices[0].delta.content or ""
                if len(text) > 8:
                    await stream.close()
                    break
            return text

    with start(says("word " * 40), delay=0.02) as live:
        assert asyncio.run(some(live.url + "/v1")).startswith("word")
        live.wait(lambda: live.engine.running == 0)
        assert live.engine.cancelled == 1


def test_it_finishes_what_runs_and_refuses_what_is_new(start: Any) -> None:
    with start(says("word " * 8), delay=0.03) as live, ThreadPoolExecutor(1) as pool:
        running = pool.submit(live.post, "/v1/completions", {"prompt": "a", "max_tokens": 100})
        live.wait(lambda: live.engine.running == 1)
        live.server.handle_exit(signal.SIGTERM, None)
        refused = live.get("/health")
        assert refused.status_code == 503 and "retry-after" in refused.headers
        assert running.result().json()["choices"][0]["text"] == "word " * 8
        live.thread.join(5)
        assert not live.thread.is_alive()
        with pytest.raises(httpx.ConnectError):
            live.get("/health")


@pytest.mark.parametrize("stream", [True, False])
def test_it_does_not_wait_for_ever(start: Any, stream: bool) -> None:
    with start(says("word " * 100), delay=0.05, grace=0.2) as live, ThreadPoolExecutor(1) as pool:
        body = {"prompt": "a", "max_tokens": 200, "stream": stream}
        running = pool.submit(live.post, "/v1/completions", body)
        live.wait(lambda: live.engine.running == 1)
        live.server.handle_exit(signal.SIGTERM, None)
        found = running.result(5)
        assert found.status_code == (200 if stream else 503)
        assert "The server is stopping." in found.text
        live.wait(lambda: live.engine.running == 0)


# --- the verb, with a real model -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pack(tiny_llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packs") / "tiny"
    assert main(["pack", str(tiny_llama_folder), "--out", str(out)]) == 0
    return out


class Process:
    """`shrew serve` as users start it."""

    def __init__(self, *words: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "shrew", "serve", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        found = re.search(r"http://\S+:(\d+)/v1", line)
        assert found, line + self.end()[1]
        self.port = int(found[1])
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=20)

    def end(self, how: int | None = None) -> tuple[int, str]:
        """Exit code and what was written to stderr."""
        if how is not None:
            self.process.send_signal(how)
        _, errors = self.process.communicate(timeout=30)
        if hasattr(self, "client"):
            self.client.close()
        return self.process.returncode, errors


def test_scores_and_greedy_tokens_are_those_of_torch(pack: Path, tiny_llama_folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    served = Process(str(pack), "--port", "0")
    try:
        rows = [[5, 60, 7, 200, 31], [9, 8, 100]]
        body = {"prompt": rows, "echo": True, "logprobs": 3, "max_tokens": 8, "temperature": 0, "ignore_eos": True}
        choices = served.client.post("/v1/completions", json=body).json()["choices"]
        vector = served.client.post("/v1/embeddings", json={"input": rows[0]}).json()["data"][0]["embedding"]
    finally:
        assert served.end(signal.SIGINT) == (0, "")
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_folder).eval()
    for row, choice in zip(rows, choices, strict=True):
        with torch.inference_mode():
            whole = model.generate(torch.tensor([row]), max_new_tokens=8, min_new_tokens=8, do_sample=False)
            found = model(whole).logits[0].double().log_softmax(1)
        wanted = found[:-1].gather(1, whole[0, 1:, None])[:, 0].tolist()
        assert choice["logprobs"]["token_logprobs"][1:] == pytest.approx(wanted, abs=2e-3)
        for place, table in enumerate(choice["logprobs"]["top_logprobs"][1:]):
            assert max(table.values()) == pytest.approx(found[place].max().item(), abs=2e-3)
    with torch.inference_mode():
        hidden = model.model(torch.tensor([rows[0]])).last_hidden_state[0].mean(0)
    assert vector == pytest.approx((hidden / hidden.norm()).tolist(), abs=2e-3)


def test_it_ends_when_told_and_starts_again_after_a_kill(pack: Path) -> None:
    first = Process(str(pack), "--port", "0", "--host", "0.0.0.0")
    long = {"prompt": "a", "max_tokens": 200, "ignore_eos": True, "stream": True}
    with first.client.stream("POST", "/v1/completions", json=long) as stream:
        lines = stream.iter_lines()
        next(lines)
        first.process.send_signal(signal.SIGKILL)
        with pytest.raises(httpx.HTTPError):
            list(lines)
    code, errors = first.end()
    assert code == -signal.SIGKILL and "anyone who can reach 0.0.0.0" in errors
    again = Process(str(pack), "--port", str(first.port))
    try:
        with again.client.stream("POST", "/v1/completions", json=long) as stream:
            lines = stream.iter_lines()
            next(lines)
            again.process.send_signal(signal.SIGTERM)
            assert [line for line in lines if line][-1] == "data: [DONE]"
    finally:
        assert again.end() == (0, "")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere"], "nowhere is not a folder"),
        (["{pack}", "{pack}"], "Two of the models are called"),
        (["{pack}", "--port", "{taken}"], "Cannot listen at 127.0.0.1 port {taken}: Address already in use"),
        (["{pack}", "--host", "no such host"], "Cannot listen at no such host"),
        (["{pack}", "--max-body", "5 lines"], "'5 lines' is no size"),
        (["{pack}", "--max-body", "1B"], "--max-body 1B is out of range"),
        (["{pack}", "--key", "two words"], "--key must be printable"),
        (["{pack}", "--slots", "0"], "slots"),
    ],
)
def test_what_cannot_be_served(pack: Path, capfd: Any, words: list[str], said: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        given = {"pack": str(pack), "taken": str(taken.getsockname()[1])}
        assert main(["serve", *(word.format(**given) for word in words)]) == 2
    assert said.format(**given) in capfd.readouterr().err


def test_a_model_folder_is_packed_first(tiny_llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHREW_KEY", "from-the-environment")
    for wanted in ("packing it into", ""):
        served = Process(str(tiny_llama_folder), "--port", "0")
        found = served.client.get("/v1/models", headers={"authorization": "Bearer from-the-environment"})
        assert [item["id"] for item in found.json()["data"]] == [tiny_llama_folder.name]
        assert served.client.get("/v1/models").status_code == 401
        code, errors = served.end(signal.SIGTERM)
        assert code == 0 and (wanted in errors if wanted else errors == "")
