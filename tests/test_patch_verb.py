"""`shrew patch`: what it says of a text is so, in the terminal, as JSON and as a page; bad input ends in a sentence."""

import io
import json
import re
import sys
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from shrew import folder
from shrew.__main__ import main
from shrew.blocks.conv import ConvSpec
from shrew.blocks.mlp import MlpSpec
from shrew.blocks.model import ModelSpec, build
from shrew.blocks.patches import show
from shrew.blocks.patches.boundaries import SpaceSpec
from shrew.blocks.patches.page import page
from shrew.blocks.patches.show import PatchSpec, cut
from shrew.blocks.patches.shown import Shown, counts, plain, sentence, signs
from shrew.data import byte_tokenizer

TEXT = "The cat — größer — sat\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    made = build(
        ModelSpec(pattern="C", layers=1, width=16, vocabulary=257, mixers={"C": ConvSpec()}, ffn=MlpSpec(hidden=16)),
        bos_token_id=256, eos_token_id=256,
    ).eval()  # fmt: skip
    with torch.no_grad():
        for weight in made.parameters():
            weight.mul_(8)
    path = tmp_path_factory.mktemp("bytes") / "tiny"
    folder.save(folder.Loaded(made, byte_tokenizer(), dtype=torch.float32), path)
    return path


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = main(["patch", *words])
    out, err = capsys.readouterr()
    return code, out, err


def test_patches_are_the_text_again_and_as_long_as_asked(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, TEXT, "--model", str(model), "--size", "3", "--json")
    found = json.loads(out)
    assert code == 0
    for part in found["patches"]:
        assert part["text"] == TEXT.encode()[part["start"] : part["end"]].decode("utf-8", "backslashreplace")
    assert [part["start"] for part in found["patches"]][:2] == [0, 1]
    assert [part["end"] for part in found["patches"][:-1]] == [part["start"] for part in found["patches"][1:]]
    assert found["patches"][-1]["end"] == found["bytes"] == len(TEXT.encode()) == len(found["entropies"])
    assert abs(found["mean"] - 3) < 0.3
    above = [at for at, value in enumerate(found["entropies"]) if at < 2 or value > found["rule"]["threshold"]]
    assert [part["start"] for part in found["patches"]] == above


def test_the_terminal_shows_every_byte_under_its_bar(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, TEXT, "--model", str(model), "--rule", "space")
    lines = out.splitlines()
    assert code == 0
    assert "Patches end with the space-like byte behind a word." in out
    assert "\x1b" not in out  # not a terminal
    at = lines.index("The cat —·· grö·ß·er —·· sat⏎")
    assert lines[at + 1].startswith("└└──└")
    assert cell_len(lines[at]) == cell_len(lines[at + 1]) == len(TEXT.encode())
    assert re.search(r"[▁▂▃▄▅▆▇█]", lines[at - 1])
    assert lines[-1].startswith(f"{len(TEXT.encode())} bytes in ")


def test_rules_and_limits_are_said(model: Path) -> None:
    def told(**flags: Any) -> str:
        return sentence(cut(TEXT.encode(), PatchSpec(model=str(model), **flags)))

    assert told(rule="static", size=6) == "A patch every 6 bytes."
    assert told(rule="space", shortest=2, longest=4).endswith("behind a word, at least 2 and at most 4 bytes each.")
    assert told(threshold=1.5) == "Patches start where the entropy of the next byte is above 1.500 nats."
    assert told(rule="monotonic", threshold=0.25, reset=True) == (
        "Patches start where the entropy rises by more than 0.250 nats, or a line does."
    )
    assert "and has risen by more than 0.100, fitted to a mean of 3 bytes." in told(rule="combined", rise=0.1, size=3)
    assert counts(cut(b"a", PatchSpec(rule="static"))) == "1 byte in 1 patch, 1.00 bytes each on average"


class Reader(HTMLParser):
    """What a page shows in its picture, and every tag and address in it."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.letters: list[str] = []
        self.titles: list[str] = []
        self.heights: list[float] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]
        shape = dict(attrs)
        if shape.get("class") == "step":
            self.heights += [float(value) for value in re.findall(r"V([\d.]+)", shape["d"] or "")]

    def handle_data(self, data: str) -> None:
        if self.tags[-1:] == ["text"]:
            self.letters.append(data)
        if self.tags[-1:] == ["title"]:
            self.titles.append(data)


def test_the_page_holds_the_text_and_nothing_of_elsewhere(model: Path, tmp_path: Path) -> None:
    text = b'<script>alert("&")</script>\x00\xff \x1b[31m'
    shown = cut(text, PatchSpec(model=str(model), size=3))
    reader = Reader()
    reader.feed(page(shown))
    assert "script" not in reader.tags
    assert reader.addresses == []
    assert "".join(reader.letters).startswith('<script>alert("&")</script>␀\\xff␛[31m')
    bytes_told = [title for title in reader.titles if title.startswith("byte ")]
    assert len(bytes_told) == len(text)
    assert bytes_told[0] == f"byte 0: 0x3c <, {shown.entropies[0]:.3f} nats"  # type: ignore[index]
    order = sorted(range(len(text)), key=lambda at: shown.entropies[at])  # type: ignore[index]
    drawn = reader.heights[-len(text) :]  # the first are the key's
    assert all(drawn[a] >= drawn[b] for a, b in pairwise(order))  # up is a smaller y


@settings(max_examples=60)
@given(st.binary(min_size=1, max_size=80), st.sampled_from(["static", "space"]), st.integers(20, 60))
@example(b"\x00\x00\x80\x80" + "\N{BLACK RIGHT-POINTING DOUBLE TRIANGLE}".encode() + b"\x00\x80\x80", "static", 23)
def test_any_bytes_are_shown(text: bytes, rule: Any, width: int) -> None:
    found = signs(text)
    assert len(found) == len(text)
    assert not any(ord(letter) < 32 or ord(letter) == 127 for sign in found for letter in sign)
    shown = Shown(text, False, SpaceSpec(), "", [0], [0.5] * len(text), None)
    out = io.StringIO()
    show.show(shown, Console(file=out, width=width, highlight=False, markup=False))
    assert max(map(cell_len, out.getvalue().splitlines()[3:-2])) <= width
    reader = Reader()
    reader.feed(page(shown))
    assert sum(title.startswith("byte ") for title in reader.titles) == len(text)
    assert json.loads(json.dumps(plain(shown)))["bytes"] == len(text)


def test_a_long_text_is_read_in_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "long.bin").write_bytes(bytes(range(256)) * 40_000)
    code, out, _ = run(capsys, str(tmp_path / "long.bin"), "--rule", "static", "--size", "4", "--most", "64")
    assert code == 0
    assert "The first 64 bytes in 17 patches" in out


def test_bad_input_ends_in_a_sentence(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    mine = tmp_path / "mine.txt"
    mine.write_text("mine")
    for words, told in [
        ([str(mine), "--rule", "static", "--html", str(mine)], "would replace"),
        (["-"], "not a single byte"),
        ([""], "not a single byte"),
        ([str(tmp_path)], "is a folder"),
        (["text", "--model", str(tmp_path / "none")], "There is no model folder"),
        (["text", "--most", "0"], "most"),
        (["text", "--rule", "space", "--shortest", "5", "--longest", "2"], "shortest is 5 bytes and longest 2"),
        (["text", "--model", str(model), "--size", "8", "--longest", "4"], "the limits allow 1 to 4"),
    ]:
        code, out, err = run(capsys, *words)
        assert code == 2, words
        assert told in err
        assert err.startswith("shrew: ")
        assert err.count("\n") == 1
        assert out == ""
    assert mine.read_text() == "mine"
    monkeypatch.setattr(show, "SHIPPED", tmp_path / "none")
    code, _, err = run(capsys, "text")
    assert (code, "none ships here; give one with --model" in err) == (2, True)
    code, out, _ = run(capsys, "some text", "--rule", "space", "--json")
    assert (code, json.loads(out)["entropies"]) == (0, None)


def test_a_terminal_may_know_few_letters(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(stream, "ascii"))
    assert main(["patch", "größer", "--rule", "static"]) == 0
    assert b"gr" in stream.getvalue()
    assert stream.getvalue().isascii()


def test_the_model_that_ships_knows_python(capsys: pytest.CaptureFixture[str]) -> None:
    assert sum(item.stat().st_size for item in show.SHIPPED.glob("*.safetensors")) <= 300_000
    code, out, _ = run(capsys, "import os\nfor name in os.listdir(path):\n    return", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["model"] == "entropy"
    text, nats = "import os\nfor name in os.listdir(path):\n    return", found["entropies"]
    at = text.index("return")
    assert max(nats[at + 3 : at + 6]) < 0.2 < nats[at]  # after 'ret' there is little to guess
