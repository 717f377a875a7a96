"""`shrew complete` and `shrew chat`: piped, in a terminal, stopped by Ctrl-C."""

import importlib.metadata
import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import tiny_pack

from shrew.__main__ import main
from shrew.runtime.complete import harmless


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pack") / "tiny"
    tiny_pack.write(folder, context=600)
    return folder


@pytest.fixture
def run(pack: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    def run(verb: str, *words: str, given: bytes | None = None) -> tuple[int, str, str]:
        if given is not None:
            monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given), "utf-8"))
        code = main([verb, str(pack), *words])
        return code, *capfd.readouterr()

    return run


def test_it_completes_the_same_with_the_same_seed(run: Any) -> None:
    code, first, errors = run("complete", "the he", "--max-tokens", "30", "--seed", "1")
    assert (code, errors) == (0, "") and len(first) > 10
    assert run("complete", "the he", "--max-tokens", "30", "--seed", "1")[1] == first
    assert run("complete", "--max-tokens", "30", "--seed", "1", given=b"the he")[1] == first
    assert run("complete", "--stdin", "--max-tokens", "30", "--seed", "1", given=b"the he")[1] == first
    assert run("complete", "the he", "--max-tokens", "30", "--seed", "2")[1] != first


def test_json_lines_hold_the_text_and_what_it_cost(run: Any) -> None:
    plain = run("complete", "the", "--max-tokens", "20", "--temperature", "0")[1]
    code, out, _ = run("complete", "the", "--max-tokens", "20", "--temperature", "0", "--json", "--logprobs", "2")
    lines = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and "".join(line["text"] for line in lines) + "\n" == plain
    assert lines[-1]["finish"] == "length" and lines[-1]["usage"]["completion_tokens"] == 20
    tokens = [token for line in lines for token in line["tokens"]]
    assert len(tokens) == 20 and all(token["logprob"] == token["top"][0][1] for token in tokens)


def test_log_probabilities_are_shown_a_token_a_line(run: Any) -> None:
    lines = run("complete", "the", "--max-tokens", "5", "--logprobs", "1")[1].splitlines()
    assert len(lines) == 5 and all(re.match(r' +-\d+\.\d{4}  ".*" +".*" -\d', line) for line in lines), lines


def test_the_text_is_held_to_a_form(run: Any, tmp_path: Path) -> None:
    schema = tmp_path / "person.json"
    schema.write_text('{"type": "object", "properties": {"name": {"type": "string"}, "age": {"type": "integer"}}, '
                      '"required": ["name", "age"]}', "utf-8")  # fmt: skip
    found = json.loads(run("complete", "the", "--schema", str(schema), "--max-tokens", "60")[1])
    assert list(found) == ["name", "age"]
    assert re.fullmatch(r"[a-c]{3}-\d\n", run("complete", "the", "--regex", "[a-c]{3}-[0-9]")[1])
    (tmp_path / "sum.lark").write_text('start: "1" ("+" "1")*\n', "utf-8")
    assert re.fullmatch(r"1(\+1)*\n", run("complete", "the", "--grammar", str(tmp_path / "sum.lark"))[1])


@pytest.mark.parametrize(
    ("words", "given", "said"),
    [
        (["x", "--max-tokens", "0"], None, "--max-tokens must be at least 1"),
        (["x", "--stdin"], b"y", "given twice"),
        (["x", "--regex", "("], None, "unclosed group"),
        (["x", "--regex", "a", "--schema", "b"], None, "exclude each other"),
        (["x", "--schema", "missing.json"], None, "no such file"),
        (["x", "--regex", "a{50}", "--max-tokens", "9"], None, "takes 50 tokens, and max_tokens is 9"),
        (["--stdin"], b"\xff", "no UTF-8"),
        (["x" * 5000], None, "5,000 tokens and at most"),
        (["x", "--threads", "0"], None, "0 threads"),
        (["x", "--logprobs", "-1"], None, "logprobs"),
    ],
)  # fmt: skip
def test_what_cannot_be_completed(run: Any, words: list[str], given: bytes | None, said: str) -> None:
    code, out, errors = run("complete", *words, given=given)
    assert (code, out) == (2, "") and said in errors and errors.count("\n") == 1


def test_a_folder_that_is_no_pack(tmp_path: Path, capfd: Any) -> None:
    for verb in ("complete", "chat"):
        assert main([verb, str(tmp_path / "missing"), *["x"] * (verb == "complete")]) == 2
        assert "is not a folder" in capfd.readouterr().err
        assert main([verb, "model.gguf", *["x"] * (verb == "complete")]) == 2
        assert "`shrew pack model.gguf --to folder` makes a model folder" in capfd.readouterr().err
        assert main([verb, str(tmp_path / "missing"), *["x " * 300] * (verb == "complete")]) == 2
        assert "is not a folder" in capfd.readouterr().err
    assert main(["chat", "--system", "be kind " * 100, str(tmp_path / "missing")]) == 2
    assert "is not a folder" in capfd.readouterr().err


def test_a_prompt_named_like_a_model_stays_a_prompt(pack: Path, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("it was packed")

    monkeypatch.setattr(subprocess, "run", refuse)
    assert run("complete", "starter", "--max-tokens", "1")[0] == 0


# --- chat ------------------------------------------------------------------------------------------------------------


def test_a_conversation_over_a_pipe(run: Any, tmp_path: Path) -> None:
    saved = tmp_path / "talk.jsonl"
    given = f"the he\n\n/nonsense\nin the\n/save {saved}\n/reset\n/help\nhe\n/quit\nnever\n".encode()
    code, out, errors = run("chat", "--json", "--max-tokens", "8", "--temperature", "0", "--system", "Be brief.",
                            given=given)  # fmt: skip
    answers = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and len(answers) == 3 and all(answer["usage"] for answer in answers)
    assert errors.count("no chat template") == 1 and "there is no /nonsense" in errors and "/reset " in errors
    messages = [json.loads(line) for line in saved.read_text("utf-8").splitlines()]
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user", "assistant"]
    assert [message["content"] for message in messages if message["role"] == "assistant"] == [
        answer["content"] for answer in answers[:2]]  # fmt: skip
    assert answers[1]["usage"]["prompt_tokens"] > answers[2]["usage"]["prompt_tokens"]


def test_a_conversation_that_cannot_be_saved_goes_on(run: Any) -> None:
    code, out, errors = run("chat", "--json", "--max-tokens", "4", given=b"/save /dev/null/talk\nthe he\n")
    assert code == 0 and len(out.splitlines()) == 1 and "/dev/null/talk could not be written (" in errors


def test_the_plain_pipe_prints_the_same_text(run: Any) -> None:
    words = ["--max-tokens", "8", "--temperature", "0"]
    answer = json.loads(run("chat", "--json", *words, given=b"the he\n")[1])
    assert run("chat", *words, given=b"the he")[1] == answer["content"] + "\n"


def test_the_template_of_the_folder_is_used(pack: Path, run: Any) -> None:
    template = "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    template += "{% if messages | length > 2 %}{{ raise_exception('enough') }}{% endif %}"
    before = (pack / "pack.json").read_bytes()
    (pack / "chat_template.jinja").write_text(template, "utf-8")
    tiny_pack.seal(pack, {key: value for key, value in json.loads(before).items() if key != "files"})
    try:
        code, out, errors = run("chat", "--json", "--max-tokens", "4", given=b"a\nb\n")
    finally:
        (pack / "chat_template.jinja").unlink()
        (pack / "pack.json").write_bytes(before)
    assert code == 2 and out.count("\n") == 1 and "refuses these messages: enough" in errors
    assert json.loads(out)["usage"]["prompt_tokens"] == len("<user>a")


def test_the_oldest_messages_are_forgotten_when_they_do_not_fit(run: Any) -> None:
    given = b"".join(b"x" * 150 + b"\n" for _ in range(6))
    code, out, errors = run("chat", "--json", "--max-tokens", "20", given=given)
    assert code == 0 and out.count("\n") == 6 and "2 oldest messages" in errors


def test_control_characters_of_a_model_do_not_reach_the_terminal() -> None:
    assert harmless("a\x1b[31m\x07b\tc\n\x9b2J é🙂") == "a[31mb\tc\n2J é🙂"


class Terminal:
    """A program in a terminal of its own."""

    def __init__(self, *words: str) -> None:
        self.master, inner = pty.openpty()
        self.process = subprocess.Popen([sys.executable, "-m", "shrew", *words], stdin=inner, stdout=inner,
                                        stderr=inner, env={**os.environ, "TERM": "dumb"})  # fmt: skip
        os.close(inner)
        self.seen = ""

    def wait(self, words: str, seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while words not in self.seen:
            assert time.monotonic() < end, self.seen
            if select.select([self.master], [], [], 0.1)[0]:
                try:
                    self.seen += os.read(self.master, 65536).decode("utf-8", "replace")
                except OSError:
                    break
        assert words in self.seen, self.seen
        self.seen = self.seen.partition(words)[2]

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def end(self) -> int:
        try:
            return self.process.wait(30)
        finally:
            self.process.kill()
            os.close(self.master)


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with room for far more text than a test waits for."""
    folder = tmp_path_factory.mktemp("pack") / "endless"
    tiny_pack.write(folder, context=60_000, eos=[])
    return folder


def test_a_conversation_in_a_terminal(endless: Path) -> None:
    terminal = Terminal("chat", str(endless), "--max-tokens", "50000")
    terminal.wait("/help shows the commands")
    terminal.wait("> ")
    terminal.type("/help\n")
    terminal.wait("/save FILE")
    terminal.wait("> ")
    terminal.type("the he\n")
    terminal.wait("the he")
    time.sleep(1)
    os.kill(terminal.process.pid, signal.SIGINT)
    terminal.wait("stopped")
    terminal.wait("> ")
    terminal.type("/quit\n")
    assert terminal.end() == 0


def test_ctrl_c_ends_a_completion_with_what_it_has(endless: Path) -> None:
    done = subprocess.Popen([sys.executable, "-m", "shrew", "complete", str(endless), "the", "--max-tokens", "50000",
                             "--json"], stdout=subprocess.PIPE, text=True)  # fmt: skip
    assert done.stdout is not None
    lines = [done.stdout.readline()]
    done.send_signal(signal.SIGINT)
    lines += done.stdout.readlines()
    assert done.wait(30) == 1
    assert json.loads(lines[-1])["finish"] == "cancelled" and json.loads(lines[0])["text"]
    done.stdout.close()


def test_only_what_is_used_is_imported(pack: Path) -> None:
    """Starting is most of what a short completion takes, so a plain one needs none of these."""
    blocked = ["torch", "transformers", "jinja2", "llguidance", "rich", "starlette", "onnx"]
    script = f"import sys\nfor name in {blocked}: sys.modules[name] = None\nfrom shrew.__main__ import main\n"
    script += f"sys.exit(main(['complete', {str(pack)!r}, 'the', '--max-tokens', '3']))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout


def test_a_missing_extra_is_named(pack: Path, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    monkeypatch.setattr(importlib.metadata, "requires", lambda _: ['llguidance>=1.7; extra == "grammar"'])
    code, out, errors = run("complete", "the", "--regex", "a")
    assert (code, out) == (2, "") and "pip install 'shrew[grammar]'" in errors
