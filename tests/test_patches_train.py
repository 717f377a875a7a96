"""Models of patches from recipes: train, entropies lent, measured, described, refused in words."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shrew import errors, folder
from shrew.blocks import describe
from shrew.blocks.patches.boundaries import EntropySpec, boundaries
from shrew.blocks.patches.entropy import entropies
from shrew.blocks.patches.lend import asked
from shrew.data import Document
from shrew.packers.onnx.source import ours
from shrew.tasks.text import Text
from shrew.train import main

MIXERS = '{ A = { kind = "window", heads = 2, window = 8 } }'
LOCAL = f'{{ layers = 1, mixers = {MIXERS}, ffn = {{ kind = "mlp", hidden = 16 }} }}'
FRONT = f"""
[model.front]
kind = "patches"
width = 16
heads = 2
encoder = {LOCAL}
decoder = {LOCAL}
"""


def _recipe(place: Path, name: str, train: str = "", front: str = "") -> Path:
    path = place / f"{name}.toml"
    path.write_text(f"""
[train]
data = ["{place / "text.txt"}"]
out = "{place / name}"
tokenizer = "bytes"
length = 32
batch_tokens = 128
steps = 12
warmup = 2
lr = 0.02
threads = 1
precision = "fp32"
validation = 0.0
{train}
[model]
layers = 1
width = 24
context = 64
ffn = {{ kind = "mlp", hidden = 24 }}
mixers = {MIXERS}
{front}
""")
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, text: str) -> Path:
    """A folder with a text, a trained model of bytes and one of patches by its entropies."""
    found = tmp_path_factory.mktemp("patches")
    (found / "text.txt").write_text(text[:20_000])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(found)
        assert main([str(_recipe(found, "bytes"))]) == 0
        lent = _recipe(found, "patches", f'entropy = "{found / "bytes"}"',
                       FRONT + 'mean = 3.0\nrule = { kind = "entropy" }\n')  # fmt: skip
        assert main([str(lent)]) == 0
        assert main([str(_recipe(found, "space", "", FRONT + "[model.ngrams]\nsizes = [2, 3]\nrows = 32\n"))]) == 0
    return found


@torch.no_grad()
def test_entropies_are_lent_and_the_threshold_is_fitted(place: Path, text: str) -> None:
    oracle, loaded = folder.load(place / "bytes").model, folder.load(place / "patches")
    model = loaded.model
    held = model.model.entropy.model.state_dict()
    for name, value in folder.load(place / "bytes").model.state_dict().items():
        if not name.startswith("lm_head"):  # which is tied
            torch.testing.assert_close(held[name.removeprefix("model.")], value)
    assert oracle.spec.width == model.spec.front.entropy.width == 24
    row = torch.tensor([[256, *text[:900].encode()]])
    ends = model.model.ends(row)
    assert 2 < row.shape[1] / int(ends.sum()) < 4.5
    lengths = torch.tensor([row.shape[1]])
    wanted = boundaries(row, lengths, model.spec.front.rule, entropies(oracle, row, lengths))
    assert (ends[:, :-1] == wanted[:, 1:]).double().mean() > 0.97  # stored weights are rounded


def test_the_threshold_is_not_that_of_beginnings(place: Path, text: str) -> None:
    noise = "".join(np.random.default_rng(0).permutation(list(text[:1100])))

    def threshold(*texts: str) -> float:
        spec, _ = asked(folder.load(place / "patches").model.spec, str(place / "bytes"), texts)
        assert spec.patches is not None and isinstance(spec.patches.rule, EntropySpec)
        return spec.patches.rule.threshold

    whole, begun, noisy = threshold(text[:40_000]), threshold("", noise + text[:40_000]), threshold(noise)
    assert abs(begun - whole) < 0.1 * abs(noisy - whole)


@pytest.mark.parametrize("name", ["patches", "space"])
def test_it_is_measured_as_any_model(place: Path, name: str, text: str) -> None:
    documents = [Document("one", text[:300]), Document("two", "naïve \U0001f600\x00"), Document("none", "")]
    task = Text(splits={"final": documents})
    scores = task.score(folder.load(place / name), "final")
    assert scores.columns["bytes"].tolist() == [len(document.text.encode()) for document in documents]
    assert 1 < scores.columns["bits"].sum() / scores.columns["bytes"].sum() < 9


def test_it_writes_bytes(place: Path) -> None:
    loaded = folder.load(place / "space")
    ids = torch.tensor([[256, *b"def "]])
    found = loaded.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    assert isinstance(loaded.tokenizer.decode(found[0]), str)


def test_describe_counts_all_parts(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert describe.main([str(place / "patches.toml"), "--json"]) == 0
    of_recipe: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert describe.main([str(place / "patches"), "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert found["parameters"] == of_recipe["parameters"]
    model = folder.load(place / "patches").model
    assert found["parameters"]["total"] == sum(p.numel() for p in model.parameters())
    front = found["front"]
    assert front["entropy"] == sum(p.numel() for p in model.model.entropy.parameters())
    assert front["bytes_per_patch"] == 3.0
    assert found["sequence"][0]["flops"] == model.flops(1024)
    assert describe.main([str(place / "space")]) == 0
    shown = capsys.readouterr().out
    assert "patches" in shown
    assert "1,024 parameters of n-gram tables" in shown


@pytest.mark.parametrize(
    ("train", "front", "words"),
    [
        ('entropy = "nowhere"', "", "no patches are cut by it"),
        ("", FRONT + 'rule = { kind = "entropy" }', "name the folder of a trained model of bytes"),
        ('entropy = "nowhere"', FRONT + 'rule = { kind = "entropy" }', "no model folder at nowhere"),
        ("", FRONT + "first = 5", "byte 0 is token 0"),
    ],
)
def test_what_cannot_be_trained_is_said(place: Path, train: str, front: str, words: str,
                                        monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.chdir(place)
    with pytest.raises(errors.ShrewError, match=words):
        main([str(_recipe(place, "wrong", train, front))])


def test_a_front_of_tokens_is_refused(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    path = _recipe(place, "tokens", "", FRONT)
    path.write_text(path.read_text().replace('"bytes"', '"bpe:300"'))
    with pytest.raises(errors.SpecError, match="reads bytes: write tokenizer"):
        main([str(path)])


@pytest.mark.parametrize(
    ("move", "flags", "words"),
    [
        ("quantize", ["--bits", 4, "--group", 16], ""),
        ("prune", [], ""),
        ("drop-layers", ["--count", 1], "one stack"),
        ("upcycle", [], "several widths"),
        ("trim-vocab", [], "by their numbers"),
    ],
)
def test_moves_do_it_or_say_why_not(place: Path, apply: Any, tmp_path: Path, move: str, flags: list[Any],
                                    words: str) -> None:  # fmt: skip
    flags = [*flags, "--text", place / "text.txt"] if move != "upcycle" else flags
    code, said = apply(place / "patches", move, *flags, "--out", tmp_path / "out")
    assert (code, words in said) == (2 if words else 0, True), said
    if not words:
        model = folder.load(tmp_path / "out").model
        assert model(torch.tensor([[256, *b"a cat"]])).logits.isfinite().all()


def test_it_is_not_packed(place: Path) -> None:
    with pytest.raises(errors.UnsupportedError, match="cannot be packed"):
        ours(folder.load(place / "space"))
