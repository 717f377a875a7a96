"""A model of tokens made a model of bytes: what is copied, what is taught, going on after a kill, and refusals."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_distil import loaded_of
from test_students import TEXT, byte_tokenizer, covered, piece_tokenizer, tiny

from shrew import data, folder
from shrew.__main__ import main
from shrew.blocks.stock import adopt
from shrew.data import Document
from shrew.errors import ShrewError, UnsupportedError
from shrew.folder import Loaded
from shrew.moves import byteify
from shrew.moves.byteify import BYTES, Byteify, spelled, together
from shrew.moves.context import Context
from shrew.moves.distil.marginals import END, Said, Spelling, byte_divergence, marginals
from shrew.moves.quantize import Quantize
from shrew.tasks.text import Text

SMALL: dict[str, Any] = {"size": 3.0, "width": 16, "decoder": 1, "window": 16, "rows": 2, "teacher": 0.5}
ORIGINALS: dict[str, Callable[[], Loaded]] = {
    "bytes": lambda: tiny(byte_tokenizer(290, TEXT), num_hidden_layers=2),
    "pieces": lambda: tiny(piece_tokenizer()),
}


def context_of(loaded: Loaded, place: Path, said: list[str] | None = None, count: int = 4) -> Context:
    rows = [np.array(data.encode(loaded.tokenizer, [TEXT[number:]])[0][:60]) for number in range(count)]
    return Context(rows[:1], rows, loaded, 0, place / "cache", (said if said is not None else []).append,
                   work=place / "work")  # fmt: skip


# --- what the original says of bytes


@pytest.mark.parametrize("kind", ORIGINALS)
@torch.no_grad()
def test_the_next_byte_is_the_sum_over_the_tokens_that_agree(kind: str) -> None:
    """At every byte of 500, along the tokens that the text is cut into; and all bytes together are as probable as all
    these ways to cover the text, so no less than the tokens are."""
    loaded = ORIGINALS[kind]()
    spelling, text = Spelling(loaded.tokenizer, len(loaded.tokenizer)), (TEXT * 3)[:490] + "größer 😀\n"
    row = data.encode(loaded.tokenizer, [text])[0]
    logs = loaded.model(torch.tensor([row])).logits[0].log_softmax(-1)
    states = spelling.states(row, 0)
    assert len(states) >= 500
    assert max(len(state.ways) for state in states.values()) > 1
    assert max(len(prefix) for state in states.values() for _, prefix in state.ways) > 2
    found, possible = marginals(Said(logs, row, spelling), list(states.values()))
    found = found.masked_fill(~possible, -torch.inf)
    for place, at in enumerate(states):
        wanted = covered(logs, row, spelling, at)
        torch.testing.assert_close(found[place].double().exp(), wanted, rtol=1e-4, atol=1e-7)
    said_bytes = b"".join(spelling.content[id] for id in row)
    follow = [said_bytes[at] for at in states if at < len(said_bytes)]
    tokens = logs[range(len(row) - 1), row[1:]].sum()
    assert tokens - 1e-2 < found[range(len(follow)), follow].sum() < tokens + 50


@pytest.mark.parametrize("kind", ORIGINALS)
@torch.no_grad()
def test_bytes_and_tokens_stand_side_by_side(kind: str) -> None:
    """A model of bytes that says just what the original does has nothing to learn; one that says it a byte late has.
    The windows begin a document, and go on in the middle of one."""
    loaded = ORIGINALS[kind]()
    mine, theirs = Spelling(BYTES, len(BYTES)), Spelling(loaded.tokenizer, len(loaded.tokenizer))
    row = np.array(data.encode(loaded.tokenizer, ["the cat — " + TEXT])[0])
    for tokens, bytes_ in spelled([row, row[5:]], theirs):
        logs = loaded.model(torch.from_numpy(tokens)[None]).logits[0].log_softmax(-1)
        states = together(bytes_, tokens, mine, theirs)
        text = b"".join(theirs.content[id] for id in tokens)
        first = 1 if tokens is row else len(theirs.content[int(tokens[0])])
        assert bytes(bytes_[bytes_ < END].tolist()) == text
        assert len(states) >= len(text) - first
        said = Said(logs, tokens.tolist(), theirs)
        own = torch.full((len(bytes_), len(BYTES)), -30.0)
        own[[one.position for one, _ in states]] = marginals(said, [two for _, two in states])[0][:, : END + 1]
        both = (Said(item.log_softmax(-1), bytes_.tolist(), mine) for item in (own, own.roll(1, 0)))
        same, late = (float(byte_divergence(one, said, states, "forward", 0.1)) for one in both)
        assert same < 1e-2
        assert late > 10


# --- the move


def test_layers_are_copied_and_only_thawed_layers_learn(tmp_path: Path) -> None:
    loaded = ORIGINALS["bytes"]()
    old = adopt(loaded.model).model.layers.state_dict()
    for frozen, same in ((1.0, True), (0.5, False)):
        made = Byteify(steps=2, frozen=frozen, **SMALL).apply(loaded, replace(context_of(loaded, tmp_path), work=None))
        new = made.model.model.layers.state_dict()
        assert new.keys() == old.keys()
        assert all(torch.equal(new[name], old[name]) for name in old) == same
        assert not any(p.requires_grad for p in made.model.model.entropy.parameters())
    assert made.tokenizer is BYTES
    assert (made.model.spec.width, made.model.spec.patches.width) == (32, 16)
    assert made.model.spec.context == 64 * 3


def test_a_folder_that_measures_writes_and_shows_its_patches(
    trained_llama_folder: Path, stories: Path, apply: Callable[..., tuple[int, str]], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """The original knows these stories; what it knows, and its layers, are all of this lesson."""
    bits = {}
    texts = [json.loads(line)["text"] for line in stories.read_text().splitlines()[-12:]]
    task = Text(splits={"final": [Document(str(number), text) for number, text in enumerate(texts)]})
    for steps in (1, 60):
        asked = {**SMALL, "rows": 4, "lr": 1e-2, "teacher": 1.0, "steps": steps, "out": tmp_path / str(steps)}
        flags = [part for name, value in asked.items() for part in (f"--{name}", value)]
        code, said = apply(trained_llama_folder, "byteify", "--text", stories, *flags)
        assert code == 0, said
        loaded = folder.load(tmp_path / str(steps))
        columns = task.score(loaded, "final").columns
        bits[steps] = columns["bits"].sum() / columns["bytes"].sum()
        assert columns["bytes"].tolist() == [len(text) for text in texts]
    assert "60/60, all layers: loss" in said
    assert "0:00 left" in said
    assert bits[60] < 3.5 < 5 < bits[1]
    assert loaded.lineage["moves"][0]["name"] == "byteify"
    ids = loaded.tokenizer("<|endoftext|>The cat", return_tensors="pt")["input_ids"]
    found = loaded.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    assert loaded.tokenizer.decode(found[0, 1:]).startswith("The cat ")

    assert main(["patch", texts[0], "--model", str(tmp_path / "60"), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    ends = loaded.model.model.ends(torch.tensor([[256, *texts[0].encode()]]))[0, :-1]
    assert [part["start"] for part in shown["patches"]] == ends.nonzero()[:, 0].tolist()
    assert (shown["model"], len(shown["entropies"])) == ("60", len(texts[0]))
    above = [at for at, value in enumerate(shown["entropies"]) if value > shown["rule"]["threshold"] or at == 0]
    assert [part["start"] for part in shown["patches"]] == above
    assert main(["patch", texts[0], "--model", str(tmp_path / "60"), "--size", "3"]) == 2
    assert "cuts by its own rule; leave out --size." in capsys.readouterr().err


def test_a_run_that_was_killed_goes_on_as_if_nothing_had_been(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, move, said = ORIGINALS["bytes"](), Byteify(steps=6, rule="space", **SMALL), []
    monkeypatch.setattr(byteify, "KEEP", 2)
    whole = move.apply(loaded, context_of(loaded, tmp_path / "whole", said)).model.state_dict()
    step = byteify.Training._step

    def killed(self: Any, number: int) -> float:
        if number == 5:
            raise KeyboardInterrupt
        return step(self, number)

    context = context_of(loaded, tmp_path / "killed", said)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(byteify.Training, "_step", killed)
        move.apply(loaded, context)
    again = move.apply(loaded, context).model.state_dict()
    assert "byteify: going on from step 4." in said
    assert all(torch.equal(value, again[name]) for name, value in whole.items())
    (tmp_path / "killed" / "work" / "training.pt").write_bytes(b"half")
    assert torch.equal(move.apply(loaded, context).model.lm_head.weight, whole["lm_head.weight"])
    assert "cannot be read; starting again" in said[-2]


def test_moves_behind_it_see_the_texts_in_bytes(
    trained_llama_folder: Path, stories: Path, apply: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    """Calibrated on bytes, and healed by the original, which still reads tokens."""
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(f"""
[source]
model = "{trained_llama_folder}"
text = ["{stories}"]
window = 64
calibration = 500
healing = 2000

[[moves]]
name = "byteify"
rule = "space"
steps = 2
width = 16

[[moves]]
name = "quantize"
bits = 8
method = "gptq"

[[moves]]
name = "distil"
steps = 2
rows = 2
""")
    code, said = apply(recipe, "--out", tmp_path / "out")
    assert code == 0, said
    assert "distil 2/2: loss" in said
    loaded = folder.load(tmp_path / "out")
    assert len(loaded.packed) > 10
    assert loaded.model.spec.patches.rule.kind == "space"


def test_what_is_refused(tmp_path: Path, tiny_classifier_folder: Path) -> None:
    loaded = ORIGINALS["bytes"]()
    context = context_of(loaded, tmp_path)

    def refused(found: Loaded, match: str, context: Context = context, **settings: Any) -> None:
        with pytest.raises(ShrewError, match=match):
            Byteify(steps=1, **{**SMALL, **settings}).apply(found, context)

    refused(folder.load(tiny_classifier_folder), "only causal language models")
    refused(loaded_of("llama"), "neither byte-level nor SentencePiece")
    refused(replace(loaded, tokenizer=None), "no tokenizer.json")
    refused(tiny(BYTES), "reads bytes already")
    refused(loaded, "needs text", replace(context, healing=[]))
    refused(loaded, "no bytes to learn from", replace(context, healing=[np.array([5])]))
    refused(Quantize(bits=8, method="rtn").apply(ORIGINALS["bytes"](), context), "quantized already")
    refused(loaded, "There is no model folder", entropy=str(tmp_path / "none"))
    with pytest.raises(UnsupportedError, match="cannot be said in our blocks"):
        Byteify(steps=1).apply(gpt2(loaded.tokenizer), context)


def gpt2(tokenizer: Any) -> Loaded:
    from transformers import GPT2Config, GPT2LMHeadModel

    return Loaded(GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2)), tokenizer)
