"""Detectors: what they read, what they learn from, and that a packed one says what the trained one says."""

import json
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from shrew import code, errors, folder, objectives, spec
from shrew.__main__ import main
from shrew.blocks.detector import DetectorConfig, ShrewForSequenceClassification, detector
from shrew.blocks.model import ModelSpec, build
from shrew.data.pairs import DetectSpec, Pairs, Reader, changes, cwe_id, fold_of
from shrew.folder import Loaded
from shrew.objectives import IGNORE, Emphasis
from shrew.packers.onnx import check
from shrew.packers.onnx.build import build as graph_of
from shrew.runtime.manifest import DATA
from shrew.runtime.manifest import GRAPH as MODEL
from shrew.scan.detector import NOTHING, Detector
from shrew.spec import dump
from shrew.train import Loop, Recipe, train

WAYS = ["mean", "last", "max", "lines"]
TEXTS = st.text("ab =()\n\t\r\"'#/*é日😀", max_size=60)

# --- what it reads ---------------------------------------------------------------------------------------------------


@given(TEXTS, st.sampled_from(["python", "c", "javascript", "ruby"]), st.booleans())
def test_the_lines_of_a_text_stay_its_lines(text: str, language: str, comments: bool) -> None:
    found = code.canonical(text, language, comments)
    assert found.count("\n") == text.count("\n")
    if comments:
        assert [line.strip() for line in found.split("\n")] == [line.strip() for line in text.split("\n")]


@pytest.mark.parametrize(
    ("language", "text", "wanted"),
    [
        ("python", '  def f():\n    """Doc\n    more"""\n    return "#1" # x', 'def f():\n\n\n  return "#1"'),
        ("python", 'x = {"a":\n"""b"""}\ny = \'\\\'#\'', 'x = {"a":\n"""b"""}\ny = \'\\\'#\''),
        ("c", 'char *s = "//"; /* a\nb */ f(); // c\r\n}', 'char *s = "//";\n f();\n}'),
        ("go", "s := `/* no\n*/` // yes", "s := `/* no\n*/`"),
        ("ruby", 'puts "#{x}" # y\n=begin\nz\n=end\np', 'puts "#{x}"\n\n\n\np'),
        ("java", "int x; /* never closed\n", "int x;\n"),
    ],
)
def test_comments_are_left_out_and_strings_are_not(language: str, text: str, wanted: str) -> None:
    assert code.canonical(text, language, False) == wanted


@given(TEXTS)
def test_each_token_has_its_line(tiny_tokenizer: Any, text: str) -> None:
    core = tiny_tokenizer.backend_tokenizer
    found = core.encode(text, add_special_tokens=False)
    ids, lines = code.tokenized(core, text)
    assert ids.tolist() == found.ids
    for line, (start, end) in zip(lines, found.offsets, strict=True):
        at = next((place for place in range(start, end) if text[place] not in " \t\n\r"), max(end - 1, start))
        assert line == text[:at].count("\n")
    assert (np.diff(lines) >= 0).all()


def test_a_long_text_is_tokenized_in_pieces(tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "é = 1\n" * 9
    monkeypatch.setattr(code, "PIECE", 6)
    ids, lines = code.tokenized(tiny_tokenizer.backend_tokenizer, text)
    assert tiny_tokenizer.decode(ids) == text
    assert sorted(set(lines.tolist())) == list(range(9))


@given(st.integers(0, 200), st.integers(1, 40))
def test_windows_cover_every_token_in_order(count: int, room: int) -> None:
    found = code.windows(count, room)
    assert found[0][0] == 0 and found[-1][1] == count
    assert all(end - start == min(room, count) for start, end in found)
    for (low, _), (start, end) in pairwise(found):
        assert low < start <= low + room - room // 4 and end > start


# --- what it learns from ---------------------------------------------------------------------------------------------


def test_the_lines_that_a_fix_changes() -> None:
    assert changes("a\nb\nc", "a\nx\nc") == ({1}, [(1, 1)])
    assert changes("a\nb\nc\nd", "b\nc\ne\nf") == ({0, 3}, [(0, 0), (3, 2)])
    assert changes("a\n\nb\nc", "a\ncheck\n\nb\nc") == ({2}, [(1, 1)])  # only added: what it stands before
    assert changes("a", "a\nb") == ({0}, [(1, 1)])
    assert changes("a\nb", "check\nx\nb") == ({0}, [(0, 0)])


def test_names_are_normalised() -> None:
    assert [cwe_id(name) for name in ("CWE-089", "cwe-89", "89", None, "SQL")] == ["CWE-89"] * 3 + ["unknown"] * 2
    assert fold_of("Torvalds/Linux", 7) == fold_of("linux", 7) == fold_of("https://x.org/LINUX.git", 7)
    assert {fold_of(f"p{number}", 5) for number in range(60)} == set(range(5))
    assert DetectSpec(families=["CWE-079", "unknown", "CWE-79"]).known_families() == ["CWE-79", "unknown"]


def _write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return str(path)


def _toy(where: Path, count: int = 24) -> tuple[str, str]:
    """Pairs of eval and parse, in functions of other lengths, and functions with neither."""
    pairs, plain = [], []
    for at in range(count):
        head = f"def f{at}(x):\n" + "".join(f"    y{i} = {i}\n" for i in range(at % 7))
        tail = "".join(f"    y{i} = {i}\n" for i in range(at % 5))
        row = {"before": f"{head}    z = eval(x)\n{tail}", "after": f"{head}    z = parse(x)\n{tail}",
               "language": "python"}  # fmt: skip
        pairs.append({**row, "cwe": "CWE-094", "project": f"a/p{at}", "licence": "MIT"})
        plain.append({"text": f"{head}    z = x + {at}\n{tail}", "language": "python"})
    return _write(where / "pairs.jsonl", pairs), _write(where / "plain.jsonl", plain)


def _read(tokenizer: Any, rows: list[dict[str, Any]], path: Path, **more: Any) -> Reader:
    item = DetectSpec(pairs=[_write(path / "some.jsonl", rows)], **more)
    return Reader(item, tokenizer.backend_tokenizer, item.known_families())


def test_who_is_left_out(tiny_tokenizer: Any, tmp_path: Path) -> None:
    row = {"before": "f(x)", "after": "g(x)", "language": "python", "project": "A/B", "licence": "MIT"}
    rows = [row, row, {**row, "before": "1", "licence": "GPL-2.0"}, {**row, "before": "2", "project": "torvalds/linux"},
            {**row, "before": "3", "language": "c"}, {**row, "before": "4", "project": "held"},
            {**row, "before": "g(x) # a"}]  # fmt: skip
    reader = _read(tiny_tokenizer, rows, tmp_path, languages=["python"], hold_out=["Some/HELD"])
    assert len(reader.pairs()) == 1
    assert reader.left_out == {"repeated": 1, "under the GPL": 2, "in other languages": 1, "held out": 1,
                               "equal but for comments and blanks": 1}  # fmt: skip
    assert len(_read(tiny_tokenizer, rows, tmp_path, gpl=True).pairs()) == 5
    many = [{**row, "before": f"h({at})", "project": f"q{at}"} for at in range(20)]
    kept = [len(_read(tiny_tokenizer, many, tmp_path, fold=f"{at}/3").pairs()) for at in range(3)]
    assert sum(kept) == 40 and min(kept) < 20  # each is left out once
    for bad in ("3/3", "x", "1"):
        with pytest.raises(errors.SpecError, match="is no fold; write K/N"):
            DetectSpec(fold=bad)
    with pytest.raises(errors.DataError, match="no pair to learn from"):
        _read(tiny_tokenizer, [], tmp_path).pairs()
    with pytest.raises(errors.DataError, match="line 1: no text under 'after'"):
        _read(tiny_tokenizer, [{"before": "x"}], tmp_path).pairs()


def _batches(tokenizer: Any, where: Path, length: int = 60, rows: int = 8, share: float = 0.5) -> Pairs:
    pairs, plain = _toy(where)
    item = DetectSpec(pairs=[pairs], negatives=[plain], families=["CWE-94"])
    reader = Reader(item, tokenizer.backend_tokenizer, item.known_families())
    return Pairs(reader.pairs(), reader.ordinary(), item.emphasis, share, length, 0, 2, 0, 0.0, rows)


@pytest.mark.parametrize("length", [12, 60, 200])
def test_a_batch_holds_twins_and_what_changed(tiny_tokenizer: Any, tmp_path: Path, length: int) -> None:
    batches = _batches(tiny_tokenizer, tmp_path, length)
    seen = set()
    for step in range(12):
        tokens, labels, mask, lines, hits, family, weights = batches[step]
        assert labels.reshape(-1, 2).sum(1).tolist().count(1) == 2 and (labels[1::2] == 0).all()
        assert tokens.shape[1] <= length and (tokens[:, 0] == 0).all() and (lines[:, 0] == -1).all()
        assert (np.diff(mask.sum(1).reshape(-1, 2).max(1)) >= 0).all()
        assert weights[labels == 1].sum() == pytest.approx(weights[labels == 0].sum()) == len(tokens) / 2
        assert ((lines >= 0) <= (mask == 1)).all() and ((hits == 1) <= (lines >= 0)).all()
        for row in range(len(tokens)):
            text = tiny_tokenizer.decode(tokens[row][hits[row] == 1])
            assert ("eval" in text or length < 60) if labels[row] else text == ""
            assert hits[row].any() == labels[row] == (family[row] != IGNORE)
        seen |= {tokens[row].tobytes() for row in range(len(tokens))}
    again = batches[11]
    assert all((one == other).all() for one, other in zip(again, batches[11], strict=True))
    assert len(seen) > 30


# --- the losses ------------------------------------------------------------------------------------------------------

NUMBERS = st.floats(-4, 4, width=32)


@given(st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, max_size=6), st.floats(0, 3, width=32))
def test_the_margin_of_pairs(values: list[tuple[float, float]], gap: float) -> None:
    before, after = torch.tensor(values).T
    wanted = sum(max(0.0, gap - (one - other)) for one, other in values)
    assert objectives.margin(before, after, gap).item() == pytest.approx(wanted, abs=1e-4)


def _slow_lines(scores: Any, lines: Any, hits: Any) -> float:
    total = 0.0
    for row in range(len(scores)):
        found: dict[bool, list[float]] = {True: [], False: []}
        for line in sorted({int(value) for value in lines[row] if value >= 0}):
            at = lines[row] == line
            mean, wrong = float(scores[row][at].mean()), bool(hits[row][at].any())
            found[wrong].append(float(np.log1p(np.exp(-mean if wrong else mean))))
        total += sum(0.5 * sum(part) / len(part) for part in found.values() if part)
    return total


@given(st.integers(0, 10_000))
@settings(max_examples=30)
def test_the_loss_is_what_it_says_and_adds_up(seed: int) -> None:
    draw = np.random.default_rng(seed)
    rows, width = 6, 7
    lines = np.sort(draw.integers(0, 4, (rows, width)), 1)
    lines[draw.random((rows, width)) < 0.2] = -1
    labels = np.array([1, 0, 0, 0, 1, 0])
    hits = ((lines == 1) & (labels[:, None] == 1)).astype(np.int64)
    family = np.where(labels == 1, 1, IGNORE)
    logits, scores, kinds = (draw.normal(size=shape).astype(np.float32) for shape in (rows, (rows, width), (rows, 3)))
    weights = draw.random(rows).astype(np.float32)
    emphasis = Emphasis(1.5, 0.7, 0.3, 0.2)
    arrays = [torch.from_numpy(item) for item in (logits, scores, kinds, labels, lines, hits, family, weights)]
    found = objectives.detection(*arrays, emphasis)
    wanted = (weights * np.log1p(np.exp(np.where(labels == 1, -logits, logits)))).sum()
    wanted += 0.7 * sum(max(0.0, 1.5 - (logits[at] - logits[at + 1])) for at in (0, 4))
    wanted += 0.3 * _slow_lines(scores, lines, hits)
    wanted += 0.2 * sum(np.log(np.exp(kinds[at]).sum()) - kinds[at, 1] for at in (0, 4))
    assert found.item() == pytest.approx(float(wanted), rel=1e-4)
    parts = [objectives.detection(*(item[low : low + 2] for item in arrays), emphasis) for low in (0, 2, 4)]
    assert sum(part.item() for part in parts) == pytest.approx(found.item(), rel=1e-5)


# --- the model -------------------------------------------------------------------------------------------------------

SHAPES: dict[str, dict[str, Any]] = {
    "attention": {"mixers": {"A": {"heads": 4, "kv_heads": 2}}},
    "hybrid": {"pattern": "LAC", "mixers": {"A": {"kind": "memory", "heads": 4, "kv_heads": 2, "segment": 16},
                                            "L": {"kind": "linear", "heads": 2, "head_width": 16, "state": 8},
                                            "C": {"kind": "conv"}}, "layers": 3,
               "ffn": {"kind": "moe", "experts": 2, "top_k": 2, "hidden": 16}, "ngrams": {"rows": 64}},
}  # fmt: skip


def _model(shape: dict[str, Any], ways: list[str], window: int = 48, vocabulary: int = 97) -> Any:
    torch.manual_seed(0)
    values = {"layers": 2, "width": 32, "vocabulary": vocabulary, "context": 64, "ffn": {"hidden": 48}} | shape
    trunk = build(spec.parse(ModelSpec, values, "test"), bos_token_id=0, eos_token_id=1, pad_token_id=2)
    made = detector(trunk, ["CWE-79", "CWE-89", "unknown"], ways, window, False, 0.0)
    for p in made.parameters():
        if p.ndim == 2:
            torch.nn.init.normal_(p, std=0.15)
    return made.eval()


@pytest.mark.parametrize("shape", SHAPES)
def test_every_parameter_learns_and_padding_counts_for_nothing(shape: str, tiny_tokenizer: Any, tmp_path: Path) -> None:
    model = _model(SHAPES[shape], WAYS, vocabulary=len(tiny_tokenizer))
    arrays = [torch.from_numpy(item) for item in _batches(tiny_tokenizer, tmp_path)[0]]
    loss, _ = model.train().losses(*arrays, emphasis=Emphasis())
    loss.backward()
    still = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert still == []
    model.eval()
    with torch.no_grad():
        tokens, mask = arrays[0], arrays[2]
        found = model(input_ids=tokens, attention_mask=mask.float())
        for row in (0, 3):
            size = int(mask[row].sum())
            alone = model(input_ids=tokens[row : row + 1, :size])
            torch.testing.assert_close(found.logits[row], alone.logits[0], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(found.lines[row, :size], alone.lines[0], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(found.families[row], alone.families[0], rtol=1e-4, atol=1e-5)
    assert found.logits.shape == (len(tokens), 2) and not found.logits[:, 0].any()


@pytest.mark.parametrize("way", [[way] for way in WAYS] + [WAYS], ids="+".join)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_graph_says_what_torch_says(shape: str, way: list[str], tmp_path: Path) -> None:
    built = graph_of(Loaded(_model(SHAPES[shape], way), None))
    (tmp_path / MODEL).write_bytes(built.graph.proto(built.graph.write(tmp_path / DATA), 0))
    draw = np.random.default_rng(0)
    texts = [draw.integers(3, 97, size).tolist() for size in (5, 30, 1, 48, 12, 12, 3, 9, 40)]
    model = _model(SHAPES[shape], way)
    found = check.exact_detections(check.Labeller(check.opened(tmp_path / MODEL)), model, texts)
    assert found["logit_difference"] < 1e-3 < 0.1 < found["largest_logit"] and found["texts"] == 9
    assert built.kind == "detector" and built.graph.align == 0
    assert not any("lm_head" in name for name in built.weights.effective)


def test_a_folder_of_it_is_itself(tmp_path: Path, tiny_tokenizer: Any) -> None:
    model = _model(SHAPES["hybrid"], WAYS, vocabulary=len(tiny_tokenizer))
    folder.save(Loaded(model, tiny_tokenizer, dtype=torch.float32), tmp_path / "out")
    same = folder.load(tmp_path / "out").model
    assert isinstance(same, ShrewForSequenceClassification) and isinstance(same.config, DetectorConfig)
    assert (same.config.families, same.config.pooling) == (["CWE-79", "CWE-89", "unknown"], WAYS)
    assert dump(same.spec) == dump(model.spec) and same.config.id2label == {0: "ordinary", 1: "vulnerable"}
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), same.parameters(), strict=True))


# --- from pairs to scores --------------------------------------------------------------------------------------------


def _values(trunk: Path, where: Path, **changes: Any) -> dict[str, Any]:
    pairs, plain = _toy(where)
    item = {"out": "out", "init": str(trunk), "length": 48, "batch_tokens": 384, "steps": 12, "optimizer": "adamw",
            "lr": 3e-3, "warmup": 3, "decay": 0.5, "checkpoint_every": 4, "precision": "fp32",
            "threads": 1}  # fmt: skip
    detect = {"pairs": [pairs], "negatives": [plain], "families": ["CWE-94"], "dropout": 0.1}
    return {"train": item | changes, "detect": detect}


def _losses(name: str = "out") -> list[float]:
    (path,) = Path("runs").glob(f"{name}-*/log.jsonl")
    return [json.loads(line)["loss"] for line in path.read_text("utf-8").splitlines()]


@pytest.fixture
def run(tiny_llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    monkeypatch.chdir(tmp_path)
    return lambda **changes: train(spec.parse(Recipe, _values(tiny_llama_folder, tmp_path, **changes), "r.toml"))


def test_a_killed_run_repeats_itself_and_parts_add_up(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    run()
    wanted = _losses()
    shutil.move("out", "wanted")
    shutil.rmtree("runs")
    take = Loop.take_step

    def breaking(self: Loop) -> tuple[float, int]:
        if self.step == 6:
            take(self)
            raise KeyboardInterrupt
        return take(self)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Loop, "take_step", breaking)
        run()
    run()
    assert _losses() == wanted
    one, other = load_file("wanted/model.safetensors"), load_file("out/model.safetensors")
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def packed(tiny_llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A detector of eval, trained by the verb, and its int8 form packed."""
    home = tmp_path_factory.mktemp("detector")
    values = _values(tiny_llama_folder, home, out=str(home / "model"), steps=80)
    pairs, plain = values["detect"].pop("pairs")[0], values["detect"].pop("negatives")[0]
    (home / "r.toml").write_text(spec.to_toml(values), "utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        assert main(["train", "r.toml", "--pairs", pairs, "--negatives", plain, "--fold", "0/9"]) == 0
        quantize = ["quantize", "--bits", "8", "--method", "rtn", "--text", __file__, "--out", "small"]
        assert main(["apply", "model", *quantize]) == 0
        assert main(["pack", "small", "--out", "packed", "--text", __file__]) == 0
    return home / "model", home / "packed"


EVIL = "def g(x):\n    y1 = 1\n    z = eval(x)\n"


def test_it_finds_the_line_and_the_family(packed: tuple[Path, Path]) -> None:
    scanner = Detector.load(packed[1], workers=2)
    evil, good, plain = scanner.score([EVIL, EVIL.replace("eval", "parse"), EVIL.replace("eval(x)", "x + 1")],
                                      ["python"] * 3)  # fmt: skip
    assert evil.logit > 0.5 > -0.5 > good.logit and plain.logit < 0
    assert evil.lines.argmax() == 2 and evil.lines.dtype == np.float32 and len(evil.lines) == 3
    assert evil.families["CWE-94"] > 0.5 and sum(evil.families.values()) == pytest.approx(1)
    manifest = json.loads((packed[1] / "pack.json").read_text("utf-8"))
    assert (manifest["kind"], manifest["families"], manifest["context"]) == ("detector", ["CWE-94", "unknown"], 48)
    assert manifest["exact"]["logit_difference"] < 1e-3 and manifest["labels"] is None
    assert {kind for name, kind in manifest["weights"].items() if "q_proj" in name} == {"int8 grow sym"}


def test_a_score_depends_on_its_text_alone(packed: tuple[Path, Path]) -> None:
    texts = [EVIL, "", "\n\n", "x = '日本' + 'é'\nz = eval(x)", EVIL * 40, "z" * 20_000, "  # only a comment"]
    together = Detector.load(packed[1], workers=3).score(texts, ["python"] * len(texts))
    for text, score in zip(texts, together, strict=True):
        (alone,) = Detector.load(packed[1], workers=1).score([text], ["python"])
        assert alone.logit == score.logit and (alone.lines == score.lines).all() and alone.families == score.families
        assert len(score.lines) == len(text.splitlines()) and np.isfinite(score.lines).all()
    assert together[1].logit == together[6].logit == NOTHING and together[1].families == {"CWE-94": 0.0, "unknown": 1.0}
    assert (together[2].lines == NOTHING).all() and together[3].lines[1] > together[3].lines[0]


def test_a_long_text_scores_as_its_worst_window(packed: tuple[Path, Path]) -> None:
    scanner = Detector.load(packed[1], workers=1)
    calm = "def f(x):\n" + "".join(f"    y{at} = {at}\n" for at in range(60))
    plain, evil = scanner.score([calm, calm + EVIL + calm], ["python"] * 2)
    assert evil.logit >= plain.logit  # whatever this tiny model makes of calm lines, it is a maximum
    assert np.argsort(evil.lines)[::-1][0] == 63
    np.testing.assert_array_equal(evil.lines[:50], plain.lines[:50])


def test_the_packed_one_says_what_torch_says(packed: tuple[Path, Path]) -> None:
    loaded = folder.load(packed[1].parent / "small")
    (score,) = Detector.load(packed[1], workers=1).score([EVIL], ["python"])
    ids, lines = code.tokenized(loaded.tokenizer.backend_tokenizer, code.canonical(EVIL, "python", False))
    with torch.no_grad():
        said = loaded.model(input_ids=torch.tensor([[loaded.tokenizer.bos_token_id, *ids]]))
    assert score.logit == pytest.approx(said.logits[0, 1].item(), abs=2e-2)  # the pack may round inputs
    each = [said.lines[0, 1:][torch.from_numpy(lines == line)].mean().item() for line in range(3)]
    assert score.lines.tolist() == pytest.approx(each, abs=2e-2)


def test_what_cannot_be_done_is_said(packed: tuple[Path, Path], tiny_llama_folder: Path, tiny_classifier_folder: Path,
                                     tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    values = _values(tiny_llama_folder, tmp_path)
    Path("r.toml").write_text(spec.to_toml(values), "utf-8")
    Path("plain.toml").write_text(spec.to_toml({"train": values["train"]}), "utf-8")
    for words, said in [
        (["r.toml", "--init", ""], "a detector starts from a trained model"),
        (["r.toml", "--init", str(tiny_classifier_folder)], "is a classifier; a detector starts from a causal model"),
        (["r.toml", "--fold", "5/5"], "'5/5' is no fold"),
        (["plain.toml", "--fold", "0/5"], "plain.toml has no [detect], which --fold is for"),
        (["r.toml", "--init", str(packed[0].parent / "small")], "is quantized and cannot be trained further"),
    ]:
        assert main(["train", *words]) == 2
        assert said in capfd.readouterr().err
    assert main(["pack", str(tiny_llama_folder), "--out", "causal"]) == 0
    with pytest.raises(errors.UnsupportedError, match="is a causal, no detector"):
        Detector.load("causal")
    with pytest.raises(errors.UsageError, match="0 workers"):
        Detector.load(packed[1], workers=0)
    shutil.copytree(packed[1], "odd")
    manifest = json.loads(Path("odd/pack.json").read_text("utf-8"))
    for change, said in [({"families": None}, "families belong to a detector"), ({"families": ["a"]}, "families as")]:
        Path("odd/pack.json").write_text(json.dumps(manifest | change), "utf-8")
        with pytest.raises(errors.FolderError, match=said):
            Detector.load("odd")
