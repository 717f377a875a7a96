"""`shrew serve` as users start it, with a tiny packed model."""

import json
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from scripted import official

from shrew.__main__ import main

USER = [{"role": "user", "content": "Hi"}]


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
        self.url = f"http://127.0.0.1:{self.port}"
        self.client = httpx.Client(base_url=self.url, timeout=20)

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

    served = Process(str(pack), "--port", "0", "--draft", "lookup")
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


def test_answers_take_the_form_that_is_asked(pack: Path) -> None:
    """A model of random weights, which would write anything else."""
    schema: Any = {"type": "object", "properties": {"city": {"enum": ["Ulm", "Rom"]}, "degrees": {"type": "integer"}},
                   "required": ["city", "degrees"]}  # fmt: skip
    asked: Any = {"messages": USER, "seed": 1}
    tool: Any = {"type": "function", "function": {"name": "rain"}}  # its description must fit in 256 tokens
    served = Process(str(pack), "--port", "0")
    try:
        with official(served) as client:
            asked["model"] = client.models.list().data[0].id
            form: Any = {"type": "json_schema", "json_schema": {"name": "weather", "schema": schema}}
            for choice in client.chat.completions.create(**asked, response_format=form, n=3).choices:
                found = json.loads(choice.message.content)
                assert found["city"] in ("Ulm", "Rom") and isinstance(found["degrees"], int)
            found = client.chat.completions.create(**asked, response_format={"type": "json_object"})
            assert isinstance(json.loads(found.choices[0].message.content), dict)
            for choice in ("required", {"type": "function", "function": {"name": "rain"}}):
                found = client.chat.completions.create(**asked, tools=[tool], tool_choice=choice).choices[0]
                assert found.finish_reason == "tool_calls"
                called = found.message.tool_calls[0].function
                assert (called.name, json.loads(called.arguments)) == ("rain", {})
            for form in ({"regex": "[ab]{3}"}, {"grammar": 'start: "a" "b"'}):
                found = client.completions.create(model=asked["model"], prompt="x", extra_body=form)
                assert re.fullmatch("[ab]{2,3}", found.choices[0].text)
            form = {"type": "json_schema", "json_schema": {"name": "weather"}}
            for bad in ({"type": "nonsense"}, {"$ref": "#/nowhere"}, {"pattern": "(", "type": "string"}):
                form["json_schema"]["schema"] = bad
                with pytest.raises(openai.BadRequestError):
                    client.chat.completions.create(**asked, response_format=form)
    finally:
        assert served.end(signal.SIGTERM) == (0, "")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere"], "nowhere is not a folder"),
        (["{pack}", "{pack}"], "Two of the models are called"),
        (["{pack}", "--port", "{taken}"], "Cannot listen at 127.0.0.1 port {taken}: Address already in use; "),
        (["{pack}", "--host", "no such host"], "Cannot listen at no such host"),
        (["{pack}", "--max-body", "5 lines"], "'5 lines' is no size"),
        (["{pack}", "--max-body", "1B"], "--max-body 1B is out of range"),
        (["{pack}", "--key", "two words"], "--key must be printable"),
        (["{pack}", "--slots", "0"], "slots"),
        (["{pack}", "--draft", "nowhere"], "nowhere is not a folder"),
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
