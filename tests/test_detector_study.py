"""The study of detectors (benchmarks/detectors.py): a whole one of dwarfs, and its arithmetic."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shrew import code, folder, record
from shrew.blocks.detector import detector
from shrew.blocks.model import ModelSpec, build
from shrew.data.pairs import fold_of
from shrew.spec import parse
from shrew.train import TrainSpec, schedule

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))
import detectors  # noqa: E402 - as the benchmarks import each other
import long_inputs  # noqa: E402

READING = """[train]
data = ["corpus.jsonl"]
out = "trunk"
tokenizer = "tokenizer"
length = 64
batch_tokens = 128
steps = 10
lr = 4e-3
warmup = 2
decay = 0.4
validation = 0.0
[model]
layers = 2
width = 32
context = 64
tied = true
"""
MIXERS = {
    "dense": '[model.mixers.A]\nkind = "attention"\nheads = 2\n[model.ffn]\nhidden = 48\n',
    "hybrid": 'pattern = "MB"\n[model.mixers.M]\nkind = "linear"\nheads = 2\nhead_width = 16\nstate = 8\n'
    '[model.mixers.B]\nkind = "memory"\nheads = 2\nsegment = 16\n[model.ffn]\nkind = "moe"\nexperts = 2\ntop_k = 1\n'
    "hidden = 48\n",
}
TUNING = """[train]
out = "detector"
init = "starter"
optimizer = "adamw"
warmup = 2
decay = 0.7
[detect]
pooling = ["mean"]
families = ["CWE-94"]
"""


def _jsonl(path: str, rows: list[dict[str, Any]]) -> None:
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def _function(at: int, call: str) -> str:
    lines = "".join(f"    y{i} = {i}\n" for i in range(at % 5))
    return f"def f{at}(x):\n{lines}    return {call}(x)\n"


@pytest.fixture
def home(tiny_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """A folder with recipes, a corpus, 18 pairs of eval and parse, and ordinary functions of two packages; gives what
    runs a job there."""
    monkeypatch.chdir(tmp_path)
    tiny_tokenizer.save_pretrained("tokenizer")
    Path("recipes").mkdir()
    for arm, table in MIXERS.items():
        text = READING.replace("tied = true\n", "tied = true\n" + table)
        Path("recipes", f"pretrain-{arm}.toml").write_text(text, "utf-8")
    Path("recipes/detect.toml").write_text(TUNING, "utf-8")
    pairs = [{"id": f"p{at}", "before": _function(at, "eval"), "after": _function(at, "parse"), "language": "python",
              "cwe": "CWE-094", "project": f"a/q{at % 9}", "licence": "MIT"} for at in range(18)]  # fmt: skip
    _jsonl("pairs.jsonl", pairs)
    _jsonl("more.jsonl", [{**pairs[0], "project": "z/other"}, {**pairs[1], "before": "def g(x):\n    exec(x)\n"}])
    plain = [{"text": _function(at, "len"), "language": "python", "project": f"c{at % 2}"} for at in range(40)]
    _jsonl("plain.jsonl", plain)
    _jsonl("corpus.jsonl", [{"text": row["text"]} for row in plain])
    return lambda job, *words: int(detectors.main([job, "work", "pairs.jsonl", *map(str, words), "--folds", "2"]))


SMALL = ("--recipes", "recipes", "--negatives", "plain.jsonl", "--also", "more.jsonl", "--trunk-steps", "10", "--seeds",
         "2", "--steps", "6", "--length", "48", "--batch-tokens", "192", "--lr", "3e-3", "--rounds", "1")  # fmt: skip


COSTS = {"dense": 1.0, "hybrid": 2.0}


def _train(home: Any, monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """`train` where a step of the hybrid is found to cost twice one of the dense."""
    monkeypatch.setattr(detectors, "in_turns", lambda loops, rounds: {arm: COSTS[arm] for arm in loops})
    return int(home("train", *SMALL, *words))


def test_a_whole_study(home: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    _train(home, monkeypatch, "--equal-time", "--part", "0/2", "--minutes", "1e-9")
    assert "5 fine-tunings are left" in capsys.readouterr().err  # the first is always begun
    made = {path.name for path in Path("work/trunks").iterdir() if not path.name.startswith("work-")}
    assert made == {"dense-s0", "hybrid-s1", "hybrid-time-s1"}
    scored = {path.name for path in Path("work/scores").iterdir()}
    assert scored == {"dense-s0-f0.json"}
    kept = Path("work/scores/dense-s0-f0.json").stat().st_mtime_ns
    _train(home, monkeypatch, "--equal-time")
    assert len(list(Path("work/scores").iterdir())) == 3 * 2 * 2
    assert Path("work/scores/dense-s0-f0.json").stat().st_mtime_ns == kept
    told = json.loads(Path("work/scores/hybrid-s1-f0.json").read_text())
    assert (told["steps"], told["mark"], set(told["logits"])) == (6, 3, {"end", "equal time"})
    short = json.loads(Path("work/scores/hybrid-time-s0-f1.json").read_text())
    assert (short["steps"], set(short["logits"])) == (3, {"end"})
    told = {arm: json.loads(Path(f"work/trunks/{arm}/shrew.json").read_text())["recipe"]["train"]
            for arm in ("dense-s0", "dense-s1", "hybrid-s0", "hybrid-time-s1")}  # fmt: skip
    assert [item["steps"] for item in told.values()] == [10, 10, 10, 5]
    assert [item["seed"] for item in told.values()] == [0, 1, 0, 1]
    rows = [json.loads(line) for line in Path("work/logits/hybrid-s1.jsonl").read_text().splitlines()]
    assert len({(row["id"], row["member"]) for row in rows}) == len(rows) == 36
    _check_folds()
    assert home("compare", "--samples", "50", "--records", "found.jsonl") == 0
    found = {(item.model, item.metric): item for item in record.read(Path("found.jsonl"))}
    dense = [found[f"dense seed {seed}", "auc"].value for seed in (0, 1)]
    assert found["dense", "auc"].value == pytest.approx(np.mean(dense))
    over = found["hybrid", "auc_over_dense"]
    assert over.value == pytest.approx(found["hybrid", "auc"].value - found["dense", "auc"].value)
    assert over.low <= over.value <= over.high
    assert found["hybrid at equal time of fine-tuning", "auc"].detail["seeds"].keys() == {"0", "1"}
    cost = {arm: found[arm, "training_cpu_seconds"].value for arm in ("dense", "hybrid", "hybrid-time")}
    assert cost == {"dense": 16.0, "hybrid": 32.0, "hybrid-time": 16.0}
    with pytest.raises(SystemExit, match="begun with other lr"):
        _train(home, monkeypatch, "--lr", "1e-3")
    _check_packed(home)
    _check_embedded()


def _check_packed(home: Any) -> None:
    words = ("--arm", "hybrid", "--text", "plain.jsonl", "--samples", "50", "--rounds", "2", "--timed", "6")
    assert home("packed", *words, "--records", "packed.jsonl") == 0
    found = {(item.model, item.metric): item for item in record.read(Path("packed.jsonl"))}
    sizes = [found[f"hybrid {form}", "bytes"].value for form in ("bf16", "int8", "int4")]
    assert sizes[0] > sizes[1] > sizes[2]
    assert found["hybrid bf16", "auc_over_bf16"].value == found["hybrid bf16", "auc_over_bf16"].high == 0
    assert found["hybrid int8", "auc"].value == pytest.approx(found["hybrid bf16", "auc"].value, abs=0.1)
    assert found["hybrid int4", "speed_over_bf16"].n == 2


def _check_embedded() -> None:
    words = ["embedded", "work", "pairs.jsonl", "plain.jsonl", "--folds", "2", "--lengths", "160", "240",
             "--sample", "6", "--samples", "50", "--records", "long.jsonl"]  # fmt: skip
    assert long_inputs.main(words) == 0
    found = {(item.model, item.task, item.metric): item for item in record.read(Path("long.jsonl"))}
    assert {item.n for item in found.values()} == {6}
    places = ("all positions", "start", "middle", "end")
    for way in long_inputs.WAYS:
        of = [found["hybrid", f"pairs python among 160, {place}, {way}", "auc"].value for place in places]
        assert of[0] == pytest.approx(np.mean(of[1:]))
        assert way != "alone" or of[1] == of[2] == of[3] == found[
            "hybrid", "pairs python among 240, start, alone", "auc"].value  # fmt: skip
    assert sum(metric == "auc_over_dense" for _, _, metric in found) == 5 * 2 * 4
    assert long_inputs.main(words) == 0  # reads what is there


def test_a_file_in_one_pass(tiny_tokenizer: Any, tmp_path: Path, capsys: Any) -> None:
    """One pass over what fits a window is that window; pieces are not changed by what comes after them."""
    torch.manual_seed(0)
    shape = {"layers": 2, "width": 32, "vocabulary": len(tiny_tokenizer), "context": 64, "ffn": {"hidden": 48}}
    trunk = build(parse(ModelSpec, shape, "test"), bos_token_id=0, eos_token_id=1, pad_token_id=2)
    folder.save(folder.Loaded(detector(trunk, ["unknown"], ["mean"], 48, False, 0.0), tiny_tokenizer), tmp_path / "d")
    loaded = folder.load(tmp_path / "d")
    torch.nn.init.normal_(loaded.model.score.weight)
    draw = np.random.default_rng(0)
    pieces = [draw.integers(3, 250, size).tolist() for size in (20, 9, 17)]
    (one,) = long_inputs.windowed(loaded, [[token for piece in pieces for token in piece]])
    whole, best = long_inputs.at_once(loaded, pieces)
    assert whole == pytest.approx(one, abs=1e-4)
    each = [max(long_inputs.at_once(loaded, pieces[:count])[1] for count in range(1, last + 1)) for last in (1, 2, 3)]
    assert each == sorted(each) and best == pytest.approx(each[-1], abs=1e-4)
    assert long_inputs.at_once(loaded, [[5] * 400])[0]  # beyond its context
    row = draw.integers(3, 250, 130).tolist()
    cut = [long_inputs.at_once(loaded, [row[low:high]])[0] for low, high in code.windows(130, 47)]
    assert long_inputs.windowed(loaded, [pieces[0], row])[1] == pytest.approx(max(cut), abs=1e-4)
    (tmp_path / "a.py").write_text("def f(x):\n    return x\n\n\ndef g(y):\n    return eval(y)\n" * 4, "utf-8")
    for way in ("functions", "whole"):
        assert long_inputs.main(["one", str(tmp_path / "d"), str(tmp_path / "a.py"), "--way", way]) == 0
        told = json.loads(capsys.readouterr().out)
        assert told["cpu"] > 0 and told["peak"] >= told["growth"] >= 0
    picked = long_inputs.nearest([tmp_path], loaded, [20, 4000])
    assert picked[20] == picked[4000] == (tmp_path / "a.py", len(long_inputs.tokens_of(
        loaded, (tmp_path / "a.py").read_text(), "python")))  # fmt: skip


ROWS = st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=9), min_size=1, max_size=9)


@given(ROWS, st.data())
def test_a_file_holds_its_function_at_its_place(others: list[list[int]], data: Any) -> None:
    arranged = long_inputs.arranged
    total = sum(map(len, others))
    room, target = data.draw(st.integers(1, total)), [-1] * 3
    found = {position: arranged(target, others, room, position) for position in ("start", "middle", "end")}
    flat = [token for piece in others for token in piece][:room]
    for pieces in found.values():
        assert [token for piece in pieces if piece is not target for token in piece] == flat
    assert found["start"][0] is found["end"][-1] is target
    at = next(place for place, piece in enumerate(found["middle"]) if piece is target)
    before = sum(map(len, found["middle"][:at]))
    assert abs(2 * before - room) <= max(map(len, others))
    with pytest.raises(ValueError, match="1 tokens are missing"):
        arranged(target, others, total + 1, "end")


def _check_folds() -> None:
    """No fold learns from its own projects, nor from its texts under another project's name."""
    rows = [json.loads(line) for line in Path("pairs.jsonl").read_text().splitlines()]
    for fold in (0, 1):
        held = {row["before"] for row in rows if fold_of(row["project"], 2) == fold}
        read = [json.loads(line) for line in Path(f"work/fold-{fold}.jsonl").read_text().splitlines()]
        assert held and not held & {row["before"] for row in read}
        home = {row["before"]: row["project"] for row in read}
        assert all(fold_of(project, 2) != fold for project in home.values())
        assert {row["before"] for row in rows} - held <= home.keys()


def test_twins_read_the_same(home: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _train(home, monkeypatch, "--minutes", "1e-9", "--seeds", "1")
    with Path("corpus.jsonl").open("a") as corpus:
        corpus.write('{"text": "x = 1"}\n')
    with pytest.raises(SystemExit, match=r"work was begun with other text; give another folder\."):
        _train(home, monkeypatch)
    text = Path("recipes/pretrain-hybrid.toml").read_text()
    Path("recipes/pretrain-hybrid.toml").write_text(text.replace("4e-3", "5e-3"))
    with pytest.raises(SystemExit, match=r"pretrain-hybrid.toml is no twin of pretrain-dense.toml: other lr\."):
        _train(home, monkeypatch)


@given(st.integers(10, 2000), st.floats(0.1, 0.9), st.integers(0, 50))
def test_a_run_leaves_the_level_before_it_decays(steps: int, decay: float, warmup: int) -> None:
    level = detectors.level_of(steps, decay)
    whole, trunk = (TrainSpec(data=["x"], out="", steps=count, decay=share, warmup=warmup)
                    for count, share in ((steps, decay), (level, 0.0)))  # fmt: skip
    assert all(schedule(at, whole) == schedule(at, trunk) for at in range(level))


def test_equal_time_is_never_more() -> None:
    each = {"dense": 2.0, "hybrid": 2.5}
    assert [detectors.at_equal_time(400, each, arm) for arm in each] == [400, 320]
    assert detectors.at_equal_time(1, each, "hybrid") == 1
    assert detectors.at_equal_time(400, {"dense": 1.0, "hybrid": 0.99}, "dense") == 400  # not told apart
