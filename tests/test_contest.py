"""The benchmarks' own arithmetic: budgets, branches, intervals; a whole contest of dwarfs; recall of two tokens."""

import argparse
import json
import math
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import sentences
from hypothesis import given
from hypothesis import strategies as st

from shrew import record, spec
from shrew.__main__ import main
from shrew.measure import Interval
from shrew.objectives import IGNORE
from shrew.tasks import Scores
from shrew.train import Recipe, TrainSpec, schedule, train

ROOT = Path(__file__).parents[1]
DWARF = """[model]
layers = 1
width = 16
[model.mixers.A]
kind = "attention"
heads = 2
[model.ffn]
hidden = 8
"""


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a script of benchmarks/ as it imports its neighbours."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return __import__


@pytest.fixture
def contest(bench: Any) -> Any:
    return bench("contest")


def _scores(bits: list[float], size: float = 100.0) -> Scores:
    columns = {"bits": np.array(bits), "bytes": np.full(len(bits), size)}
    return Scores("text@1", "final", "bits_per_byte", [str(n) for n in range(len(bits))], columns)


# --- budgets and branches --------------------------------------------------------------------------------------------


@given(st.floats(1e9, 1e16), st.integers(10**4, 10**8))
def test_a_branch_leaves_its_trunk_where_the_schedule_bends(budget: float, flops: int) -> None:
    steps = 5 * max(1, round(budget / (flops * 4096) / 5))  # steps_of, by its definition
    level = steps - steps // 5
    whole = TrainSpec(data=[], out="", steps=steps, decay=0.2, warmup=0)
    trunk = TrainSpec(data=[], out="", steps=level, decay=0.0, warmup=0)
    for step in {0, level // 2, level - 1}:
        assert schedule(step, whole) == schedule(step, trunk) == 1
    assert schedule(level + 1, whole) < 1 or steps == 5
    assert 0 < schedule(steps - 1, whole) <= 1


def test_steps_pay_for_the_budget(bench: Any, contest: Any) -> None:
    parts = bench("branches").PARTS
    for budget in (1e13, 3e13, 1e14):
        steps = contest.steps_of(budget, 9_000_000, 4096)
        assert steps % parts == 0
        assert abs(steps * 4096 * 9_000_000 - budget) <= 2.5 * 4096 * 9_000_000
        assert contest.level_of(steps) * parts == steps * (parts - 1)
    assert contest.steps_of(1.0, 10**9, 4096) == parts


def test_a_trunk_is_paid_once(contest: Any) -> None:
    assert contest.work_of([10.0]) == 10
    assert contest.work_of([10.0, 100.0]) == pytest.approx(80 + 2 + 20)
    assert contest.work_of([10.0, 100.0], [10.0]) == pytest.approx(72 + 20)
    assert contest.work_of([10.0], [10.0]) == contest.work_of([]) == 0


def test_the_list_of_rates_grows_where_a_best_one_is_at_its_end(contest: Any) -> None:
    assert contest.beyond([1e-3, 2e-3, 4e-3], [2e-3]) == []
    assert contest.beyond([1e-3, 2e-3, 4e-3], [2e-3, 4e-3]) == [8e-3]
    assert contest.beyond([1e-3, 2e-3, 4e-3], [1e-3, 4e-3]) == [5e-4, 8e-3]
    assert contest.beyond([1e-3], [1e-3]) == []


# --- numbers ---------------------------------------------------------------------------------------------------------


def test_scores_between_budgets_lie_on_the_line_in_logs(contest: Any) -> None:
    curve = [(1.0, _scores([200.0, 400.0])), (100.0, _scores([100.0, 100.0]))]
    assert contest.at(curve, 10.0).columns["bits"] == pytest.approx([math.sqrt(2) * 100, 200])
    assert contest.at(curve, 1.0).value() == pytest.approx(3)
    with pytest.raises(ValueError, match="outside"):
        contest.at(curve, 101.0)
    assert contest.mean([_scores([100.0, 300.0]), _scores([300.0, 300.0])]).columns["bits"].tolist() == [200, 300]


def test_noise_between_seeds_widens_an_interval(contest: Any) -> None:
    noise = contest.Noise.pooled([[1.0, 1.2], [2.0, 2.2, 2.4], [9.0]])
    assert noise.freedom == 3
    assert noise.sd == pytest.approx(math.sqrt((0.02 + 0.08) / 3))
    found = Interval(1.0, 0.9, 1.1, 10_000)
    calm = contest.Noise(0.0, 0).around(found, 1)
    assert (calm.low, calm.high) == (pytest.approx(0.9, abs=1e-4), pytest.approx(1.1, abs=1e-4))
    lucky = 2.7764 * 0.1 * math.sqrt(2 / 4)  # Student's t for 4 degrees of freedom
    assert contest.Noise(0.1, 4).around(found, 4, 4).high == pytest.approx(1 + math.hypot(0.1, lucky), abs=1e-4)
    few = contest.Noise(0.0, 0).around(Interval(1.0, 0.9, 1.1, 9), 1)
    assert few.high == pytest.approx(1 + 0.1 * 2.306 / 1.96 * math.sqrt(9 / 8), abs=1e-4)


def test_pairs_are_compared_document_by_document(contest: Any) -> None:
    rng = np.random.default_rng(0)
    easy = rng.uniform(100, 400, 40)
    here = {"a": (_scores(easy.tolist()), 3), "b": (_scores((0.9 * easy).tolist()), 1)}
    told = contest._compare(here, contest.Noise(0.0, 0), {"run": "r"}, "flops", {"budget": 1.0})
    gap = next(item for item in told if item.metric == "difference")
    assert (gap.model, gap.detail["against"], gap.detail["documents_better"]) == ("b", "a", 40)
    assert gap.value == pytest.approx(-0.1 * easy.mean() / 100)
    assert gap.low < gap.value < gap.high < 0
    table = contest.tables(told)
    assert "| arm | 1 FLOPs |" in table
    assert f"{gap.value:+.3f} ({gap.low:+.3f} to {gap.high:+.3f})" in table


# --- a whole contest -------------------------------------------------------------------------------------------------


@pytest.fixture
def args(contest: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace:
    """Two arms of some thousand parameters on made sentences, at budgets of seconds."""
    for part, books in (("train", 4), ("valid", 3)):
        (tmp_path / "text" / part).mkdir(parents=True)
        for book in range(books):
            (tmp_path / "text" / part / f"{book}.txt").write_text(sentences(1500, 10 * books + book))
    recipe = tmp_path / "dwarf.toml"
    recipe.write_text(DWARF)

    def call(self: Any, command: list[str], place: Path, lock: int) -> tuple[int, str]:
        """The program's own main, in this process: starting eight of them would cost a minute."""
        with monkeypatch.context() as patch:
            patch.chdir(place)
            patch.setattr("sys.argv", command[1:])
            return (main(command[3:]) if command[1] == "-m" else contest.main()) or 0, ""

    monkeypatch.setattr(contest.Contest, "call", call)
    return contest.parse([
        str(tmp_path / "runs"), "--text", str(tmp_path / "text"), "--arm", "thin", str(recipe),
        "--arm", "thick", str(recipe), "ffn.hidden=48",
        "--budgets", "2e8", "5e8", "--seeds", "1", "--rates", "0.003", "0.01", "0.03", "--vocabulary", "300",
        "--length", "32", "--batch-tokens", "128", "--warmup", "3", "--characters", "3000",
    ])  # fmt: skip


def _check_branches(contest: Any, plan: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trunk, copy and decay give, to the bit, the losses of a run straight through; off a later trunk too."""
    arm = plan.arms[0]
    for budget in plan.budgets:
        steps = contest.steps_of(budget, arm.flops, 128)
        (log,) = plan.place(arm, 0.01, 0).glob(f"runs/{budget:g}-*/log.jsonl")
        branched = [json.loads(line)["loss"] for line in log.read_text().splitlines()]
        table = plan.table | {"lr": 0.01, "seed": 0, "steps": steps, "decay": 0.2, "out": "straight"}
        fresh = tmp_path / f"straight-{budget:g}"
        fresh.mkdir()
        monkeypatch.chdir(fresh)
        train(spec.parse(Recipe, {"train": table, "model": arm.model}, "r.toml"))
        (log,) = fresh.glob("runs/*/log.jsonl")
        assert [json.loads(line)["loss"] for line in log.read_text().splitlines()] == branched
        assert len(branched) == steps


def test_a_contest_from_its_plan_to_its_picture(
    contest: Any, args: argparse.Namespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = contest.Contest(args)
    assert "| thin |" in plan.plan()
    assert not args.runs.exists()
    plan.prepare()
    thin, thick = plan.arms
    assert thick.parameters - thin.parameters == 3 * 16 * 40
    before = plan.remaining()
    plan.line(thin, 0.01, 0, plan.budgets)
    assert plan.remaining() < before
    kept = argparse.Namespace(**vars(args) | {"kept": tmp_path / "kept.jsonl"})
    contest.Contest(kept).prepare()
    kept.runs = tmp_path / "elsewhere"
    elsewhere = contest.Contest(kept)
    elsewhere.prepare()
    assert elsewhere.remaining() == plan.remaining()
    kept.kept.write_text(kept.kept.read_text().replace('"mark": "', '"mark": "0'))
    with pytest.raises(SystemExit, match="other text"):
        elsewhere.prepare()
    monkeypatch.setattr(contest.Contest, "call", None)  # nothing is left to do
    plan.line(thin, 0.01, 0, plan.budgets)
    _check_branches(contest, plan, tmp_path, monkeypatch)
    first = plan.result(thin, 0.01, 0, plan.budgets[0])
    assert first["steps"] == contest.steps_of(2e8, thin.flops, 128)
    assert abs(first["flops"] - 2e8) < 0.1 * 2e8
    assert first["cpu_seconds"] > 0
    assert first["bytes"] > 2 * thin.parameters
    # Rates and seeds that were not trained: as if they had been.
    for arm, better in ((thin, 1.0), (thick, 0.97)):
        for rate in plan.rates:
            for budget in plan.budgets:
                result = json.loads(json.dumps(plan.result(thin, 0.01, 0, budget)))
                for split in result["scores"].values():
                    worse = 1.0 if rate == 0.01 else 1.1
                    split["columns"]["bits"] = [bits * better * worse for bits in split["columns"]["bits"]]
                path = plan.place(arm, rate, 0) / f"{budget:g}.json"
                if not path.exists():
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_text(json.dumps(result if rate < 0.03 else {"diverged": "the loss is nan"}))
    again = contest.Contest(args)
    best = again.tune()
    assert best == {"thin": 0.01, "thick": 0.01}
    assert again.remaining() == 0
    again.run(again.lines(best))
    found = again.facts(best)
    tried = next(item for item in found if item.metric == "learning_rate")
    assert tried.detail["bits_per_byte"]["0.03"] is None
    assert not tried.detail["at_an_end"]
    gaps = [item for item in found if item.metric == "difference"]
    assert [item.detail["axis"] for item in gaps] == ["flops", "flops", "cpu_time", "cpu_time"]
    assert all(item.value < 0 for item in gaps[:2])
    assert record.Record(**vars(found[0])) == found[0]
    drawn = ET.fromstring(contest.picture(found).replace("\n", ""))
    assert "nan" not in contest.picture(found)
    assert {"thin", "thick"} <= {item.text for item in drawn.iter() if item.text}
    assert str(args.runs) not in record.lines(found).decode()


# --- recall ----------------------------------------------------------------------------------------------------------


def test_the_probes_ask_what_the_row_has_told(bench: Any) -> None:
    recall = bench("recall")
    draw = torch.Generator().manual_seed(0)
    tokens, targets = recall.recall(5, 64, draw)
    asked = targets != IGNORE
    assert asked.sum(1).tolist() == [4] * 5
    for row, wanted, where in zip(tokens.tolist(), targets.tolist(), asked.tolist(), strict=True):
        told = dict(zip(row[:8:2], row[1:8:2], strict=True))
        assert len(told) == 4
        assert all(wanted[place] == told[row[place]] for place in range(64) if where[place])
        assert not set(row[8:56]) & (set(told) | set(told.values()))
        assert {row[place] for place in range(64) if where[place]} == set(told)
    tokens, targets = recall.copy(3, 32, draw)
    assert torch.equal(tokens[:, :16], targets[:, 16:])
    assert torch.equal(tokens[:, 17:], targets[:, 16:-1])
    assert (tokens[:, 16] == recall.MARK).all()
    assert (targets[:, :16] == IGNORE).all()


def test_the_binomial_interval_is_wilsons(bench: Any) -> None:
    recall = bench("recall")
    assert recall.binomial(8, 10) == (pytest.approx(0.4902, abs=1e-4), pytest.approx(0.9433, abs=1e-4))
    assert recall.binomial(0, 50)[0] == 0
    assert recall.binomial(50, 50)[1] == pytest.approx(1)


def test_recall_is_learned_where_it_is_easy(bench: Any) -> None:
    """Rows of one pair: a few seconds are too few for more."""
    recall = bench("recall")
    words = (
        "attention --probes recall --lengths 16 32 --steps 150 --batch-tokens 512 --width 32 --answers 64 --rate 0.01"
    )
    args = recall.parse(words.split())
    told = recall.measure("recall", "attention", args, 0)
    assert told[0].value > 0.5  # one in 16 by chance
    assert told[0].low < told[0].value <= told[0].high
    assert "| attention | " in recall.table(told)
    with pytest.raises(SystemExit, match="no mixer"):
        recall.make("attentoin", 32, 64)
