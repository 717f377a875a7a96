"""The server over real sockets, with an engine that says what it is told: what OpenAI's clients read, and errors."""

import json
import re
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scripted import Live, ScriptedEngine, official, says

from shrew.runtime.request import Piece, Request, Usage

USER = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def live(start_server: Any) -> Iterator[Live]:
    with start_server() as found:
        yield found


@pytest.fixture(scope="module")
def client(live: Live) -> Iterator[openai.OpenAI]:
    with official(live) as found:
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
    tokens = packed.usage.prompt_tokens
    costs = {"cpu_seconds": 0.5, "joules": 3.0}  # of two texts
    assert packed.usage.model_dump() == {"prompt_tokens": tokens, "total_tokens": tokens, **costs}
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
    assert client.models.retrieve("tiny").context_length == 1024
    assert live.get("/health").json()["status"] == "ok"
    live.post("/v1/completions", {"prompt": "a"})
    found = live.get("/metrics")
    assert found.headers["content-type"].startswith("text/plain; version=0.0.4")
    line = re.compile(r'(# (HELP|TYPE) \w+ .*|[a-z_]+(\{\w+="[^"]*"(,\w+="[^"]*")*\})? [0-9.e+-]+)')
    assert all(line.fullmatch(row) for row in found.text.splitlines())
    assert 'shrew_requests_total{path="/v1/completions",status="200"}' in found.text
    assert 'shrew_completion_tokens_total{model="tiny"}' in found.text
    assert 'shrew_first_token_seconds_bucket{model="tiny",le="+Inf"}' in found.text


def test_several_models(start_server: Any) -> None:
    with start_server(names=("one", "two")) as live:
        assert live.post("/v1/completions", {"model": "two", "prompt": "a"}).json()["model"] == "two"
        found = live.post("/v1/completions", {"prompt": "a"})
        assert (found.status_code, found.json()["error"]["param"]) == (400, "model")


CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Ulm"}}\n</tool_call>'
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "What it is like outside.",
        "parameters": {"type": "object", "properties": {"city": {"enum": ["Ulm", "Rom"]}}, "required": ["city"]},
    },
}


def test_calls_of_tools_are_found(start_server: Any) -> None:
    asked: Any = {"model": "tiny", "messages": USER}
    with start_server(says(f"Let me see. {CALL}{CALL}")) as live, official(live) as client:
        choice = client.chat.completions.create(**asked, tools=[WEATHER]).choices[0]
        assert choice.finish_reason == "tool_calls" and choice.message.content.strip() == "Let me see."
        calls = choice.message.tool_calls
        assert [json.loads(call.function.arguments) for call in calls] == [{"city": "Ulm"}] * 2
        assert len({call.id for call in calls}) == 2
        deltas = [c.choices[0] for c in client.chat.completions.create(**asked, tools=[WEATHER], stream=True)]
        found = [call for delta in deltas for call in delta.delta.tool_calls or ()]
        assert [(call.index, call.function.name) for call in found] == [(0, "weather"), (1, "weather")]
        assert [json.loads(call.function.arguments) for call in found] == [{"city": "Ulm"}] * 2
        assert "".join(delta.delta.content or "" for delta in deltas).strip() == "Let me see."
        assert deltas[-1].finish_reason == "tool_calls"
        prompt = live.engine.tokenizer.decode(live.engine.requests[-1].prompt, skip_special_tokens=False)
        assert '"weather"' in prompt
        for without in ({}, {"tools": [WEATHER], "tool_choice": "none"}):  # then it is text like any other
            choice = client.chat.completions.create(**asked, **without).choices[0]
            assert choice.finish_reason == "stop" and choice.message.content.endswith(CALL)
        told = [*USER, choice.message, {"role": "tool", "tool_call_id": "a", "content": "rain"}]
        assert client.chat.completions.create(**{**asked, "messages": told}).choices


# --- errors ----------------------------------------------------------------------------------------------------------


def test_the_official_client_raises_its_own_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="There is no model 'other' here"):
        client.chat.completions.create(model="other", messages=USER)
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="tiny", messages=USER, temperature=5)
    assert caught.value.param == "temperature" and caught.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="tiny", prompt=[5] * 1024)
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


def test_a_grammar_that_cannot_be_met_is_the_clients_fault(start_server: Any) -> None:
    def refuses(engine: ScriptedEngine, request: Request) -> Iterator[Piece]:
        yield Piece("half")
        yield Piece("", finish="error", usage=Usage(1, 1, 0, 0.0), error="The constraint is too complex.", refused=True)

    with start_server(refuses) as live:
        for stream in (False, True):
            found = live.post("/v1/completions", {"prompt": "a", "stream": stream})
            assert found.status_code == (200 if stream else 400)
            body = found.text.split("data: ")[-2] if stream else found.text
            error = json.loads(body)["error"]
            assert error["message"] == "The constraint is too complex." and error["type"] == "invalid_request_error"


def test_a_failing_engine_is_a_500_and_the_next_request_is_served(start_server: Any, capfd: Any) -> None:
    def breaks(engine: ScriptedEngine, request: Request) -> Iterator[Piece]:
        raise AssertionError("planted")

    with start_server(says("half an answer", "error", "The planted failure.")) as live:
        found = live.post("/v1/completions", {"prompt": "a"})
        assert (found.status_code, found.json()["error"]["message"]) == (500, "The planted failure.")
        streamed = live.post("/v1/completions", {"prompt": "a", "stream": True}).text
        assert '"error":{"message":"The planted failure."' in streamed and streamed.endswith("data: [DONE]\n\n")
        with official(live) as client, pytest.raises(openai.APIError, match="planted"):
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


@settings(max_examples=150, suppress_health_check=list(HealthCheck))
@given(path=st.sampled_from(sorted(SANE)), changes=st.dictionaries(st.sampled_from(KEYS), json_values, max_size=3))
def test_no_json_makes_it_fail(live: Live, path: str, changes: dict[str, Any]) -> None:
    body = json.dumps({**SANE[path], **changes}).encode()  # NaN, Infinity and half characters too
    found = live.send(path, body)
    assert found.status_code in (200, 400, 404), found.text


@settings(max_examples=100, suppress_health_check=list(HealthCheck))
@given(path=st.sampled_from(sorted(SANE)), body=st.binary(max_size=60))
def test_no_bytes_make_it_fail(live: Live, path: str, body: bytes) -> None:
    assert live.send(path, body).status_code in (200, 400)  # b"{}" asks for something
