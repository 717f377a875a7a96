"""Limits of the server: keys, sizes, queues, deadlines, slow clients, clients that go, and the end of it."""

import asyncio
import json
import signal
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import httpx
import openai
import pytest
from scripted import Live, ScriptedEngine, says

from shrew.runtime.request import Piece, Request, Usage

USER = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def live(start_server: Any) -> Iterator[Live]:
    with start_server() as found:
        yield found


def test_the_key(start_server: Any) -> None:
    with start_server(key="secret") as live:
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
    assert live.get("/v1/models", headers={"host": "testserver"}).status_code == 403
    assert live.get("/v1/models", headers={"host": "LOCALHOST:99"}).status_code == 200


def test_the_address_asked_for_is_a_way_in(start_server: Any) -> None:
    with start_server(host="127.1") as live:  # a name of 127.0.0.1, as 127.0.0.2 would be an address of its own
        assert live.get("/v1/models", headers={"host": f"127.1:{live.port}"}).status_code == 200
        assert live.get("/v1/models", headers={"host": "127.2"}).status_code == 403


def test_a_body_has_one_length(live: Live) -> None:
    """A small Content-Length beside a chunked body would be all that counts among the bodies in memory."""
    head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    both = live.raw(head + b"content-length: 3\r\ntransfer-encoding: chunked\r\n\r\n3\r\n{ }\r\n0\r\n\r\n")
    assert b" 400 " in both.recv(4096)


def test_a_large_body_is_refused_before_it_is_read(start_server: Any) -> None:
    with start_server(max_body="2KB") as live:
        head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        told = live.raw(head + b"content-length: 100000000\r\n\r\n")
        assert b" 413 " in told.recv(4096)  # not a byte of it was sent
        chunked = live.raw(head + b"transfer-encoding: chunked\r\n\r\n" + b"800\r\n" + b" " * 2048 + b"\r\n1\r\na\r\n")
        assert b" 413 " in chunked.recv(4096)
        found = live.send("/v1/completions", b" " * 100_000_000)
        assert found.status_code == 413 and found.json()["error"]["code"] == "request_too_large"
        assert live.post("/v1/completions", {"prompt": "a"}).status_code == 200


def test_slow_clients_are_cut_off(start_server: Any) -> None:
    with start_server(patience=0.3) as live:
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


def test_there_are_only_so_many_connections(start_server: Any) -> None:
    with start_server(connections=2) as live:
        first, second = live.raw(b"GET /health HT"), live.raw(b"")
        live.wait(lambda: len(live.server.server_state.connections) == 2)
        with suppress(ConnectionResetError):
            assert live.raw(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n").recv(4096) == b""
        first.sendall(b"TP/1.1\r\nhost: localhost\r\n\r\n")
        assert b" 200 " in first.recv(4096)
        second.close()
        live.wait(lambda: len(live.server.server_state.connections) == 1)


def test_a_client_that_does_not_read_is_cut_off(start_server: Any) -> None:
    def endless(engine: ScriptedEngine, request: Request) -> Iterator[Piece]:
        while True:
            yield Piece("x" * 100_000)
            time.sleep(0.001)

    with start_server(endless, patience=0.3) as live:
        body = b'{"prompt":"a","stream":true}'
        stuck = live.raw(b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
                         b"content-length: %d\r\n\r\n%s" % (len(body), body))  # fmt: skip
        live.wait(lambda: live.engine.cancelled == 1)
        live.wait(lambda: live.state.busy == 0)
        stuck.close()


def test_an_embedding_whose_client_has_gone_is_cancelled(start_server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with start_server() as live:
        future: Future[Any] = Future()
        asked: list[Any] = []
        monkeypatch.setattr(live.engine, "embedding", lambda tokens: asked.append(tokens) or future)
        gone = live.raw(b"POST /v1/embeddings HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
                        b"content-length: 13\r\n\r\n" + b'{"input":"a"}')  # fmt: skip
        live.wait(lambda: asked)
        gone.close()
        live.wait(future.cancelled)
        live.wait(lambda: live.state.busy == 0)


def test_a_full_queue_says_when_to_come_again(start_server: Any) -> None:
    with start_server(says("word " * 3), delay=0.05, slots=1, queue=1) as live, ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: live.post("/v1/completions", {"prompt": "a"}), range(8)))
        statuses = [item.status_code for item in found]
        assert statuses.count(200) >= 2 and statuses.count(429) >= 1 and set(statuses) == {200, 429}
        late = next(item for item in found if item.status_code == 429)
        assert int(late.headers["retry-after"]) >= 1 and late.json()["error"]["type"] == "rate_limit_error"
        assert live.engine.most <= 2
        assert live.post("/v1/completions", {"prompt": "a"}).status_code == 200


def test_one_request_does_not_take_every_place(start_server: Any) -> None:
    with start_server(says("a b c"), delay=0.002, slots=2) as live:
        found = live.post("/v1/completions", {"prompt": ["a"] * 30, "max_tokens": 3})
        assert len(found.json()["choices"]) == 30
        assert live.engine.most <= 2


def test_the_deadline(start_server: Any) -> None:
    with start_server(says("never done " * 20), delay=0.05, timeout=0.2) as live:
        found = live.post("/v1/completions", {"prompt": "a", "max_tokens": 100})
        assert (found.status_code, found.json()["error"]["code"]) == (504, "deadline_exceeded")
        streamed = live.post("/v1/completions", {"prompt": "a", "max_tokens": 100, "stream": True})
        assert "deadline_exceeded" in streamed.text.splitlines()[-4]


def test_an_engine_that_hangs_is_no_end(start_server: Any) -> None:
    def stuck(engine: ScriptedEngine, request: Request) -> Iterator[Piece]:
        time.sleep(5)
        yield Piece("", finish="stop", usage=Usage(1, 0, 0, 0.0))

    with start_server(stuck, timeout=0.1) as live:
        begun = time.monotonic()
        assert live.post("/v1/completions", {"prompt": "a"}).status_code == 504
        assert time.monotonic() - begun < 4


def test_max_tokens_is_limited(start_server: Any) -> None:
    with start_server(max_tokens=3) as live:
        assert live.post("/v1/completions", {"prompt": "a", "max_tokens": 4}).status_code == 400
        live.post("/v1/chat/completions", {"messages": USER})
        assert live.engine.requests[-1].max_tokens == 3


# --- clients that go, and the end ------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
def test_a_dropped_connection_cancels(start_server: Any, stream: bool) -> None:
    with start_server(says("word " * 40), delay=0.02) as live:
        body = json.dumps({"prompt": ["a", "b"], "stream": stream, "max_tokens": 200}).encode()
        connection = live.raw(b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
                              b"content-length: %d\r\n\r\n%s" % (len(body), body))  # fmt: skip
        live.wait(lambda: live.engine.running == 2)
        connection.close()
        live.wait(lambda: live.engine.running == 0 and live.state.busy == 0)
        assert live.engine.cancelled == 2


def test_the_asynchronous_client_cancels(start_server: Any) -> None:
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

    with start_server(says("word " * 40), delay=0.02) as live:
        assert asyncio.run(some(live.url + "/v1")).startswith("word")
        live.wait(lambda: live.engine.running == 0)
        assert live.engine.cancelled == 1


def test_it_finishes_what_runs_and_refuses_what_is_new(start_server: Any) -> None:
    with start_server(says("word " * 8), delay=0.03) as live, ThreadPoolExecutor(1) as pool:
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
def test_it_does_not_wait_for_ever(start_server: Any, stream: bool) -> None:
    with start_server(says("word " * 100), delay=0.05, grace=0.2) as live, ThreadPoolExecutor(1) as pool:
        body = {"prompt": "a", "max_tokens": 200, "stream": stream}
        running = pool.submit(live.post, "/v1/completions", body)
        live.wait(lambda: live.engine.running == 1)
        live.server.handle_exit(signal.SIGTERM, None)
        found = running.result(5)
        assert found.status_code == (200 if stream else 503)
        assert "The server is stopping." in found.text
        live.wait(lambda: live.engine.running == 0)
