"""Orders of moves: what each comes to, which one the search keeps, and that it says why."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from test_shrink import FLAGS, light

from shrew import record
from shrew.__main__ import main
from shrew.measure.statistics import lower_bound, retention
from shrew.search import orders
from shrew.search.orders import HEALINGS, PLAIN, Contest, Order
from shrew.search.propose import BARE, Candidate, Curve, Family, Rates
from shrew.search.run import Run
from shrew.tasks import Scores

HEAL = {"name": "distil", "steps": 6, "lr": 1e-4}
QUANTIZE = {"name": "quantize", "bits": 3}
CUT = {"name": "narrow", "mlp": 0.5}


def candidate(name: str = "narrow") -> Candidate:
    return Candidate(Family(name, (CUT,), Rates(1, {}), 0.0, 0, 1.0), QUANTIZE, 3.0, 1000, 0.1)


def healed(steps: int, **more: Any) -> dict[str, Any]:
    return {**HEAL, "steps": steps, **more}


@pytest.mark.parametrize(
    ("order", "wanted"),
    [
        (PLAIN, [CUT, QUANTIZE, healed(6)]),
        (Order("x", before=1.0), [CUT, healed(6), QUANTIZE]),
        (Order("x", before=0.5), [CUT, healed(3), QUANTIZE, healed(3)]),
        (Order("x", before=0.25, loss="reverse"),
         [CUT, healed(2, loss="reverse"), QUANTIZE, healed(4, loss="reverse")]),
        (Order("x", prepare=({"name": "smooth"},)), [CUT, {"name": "smooth"}, QUANTIZE, healed(6)]),
    ],
)  # fmt: skip
def test_an_order_places_the_same_moves(order: Order, wanted: list[dict[str, Any]]) -> None:
    assert order.moves(candidate(), HEAL) == wanted
    bare = [move for move in wanted if move["name"] != "distil"]
    assert order.moves(candidate(), None) == bare
    assert sum(move.get("steps", 0) for move in wanted) == HEAL["steps"]


def contest(kept: dict[str, float], minutes: float = 0.0) -> Contest:
    """A contest whose trials keep what is said of the names of their moves, in order."""

    def finish(moves: list[dict[str, Any]], moves_again: Any, what: Candidate, full: bool) -> Any:
        assert moves is moves_again and not full
        key = " ".join(f"{move['name']}{move.get('steps', '')}{move.get('loss', '')}" for move in moves)
        share = kept.get(key)
        return None if share is None else SimpleNamespace(moves=moves, candidate=what, retention=share, bytes=10**6,
                                                          label=key)  # fmt: skip

    run: Any = SimpleNamespace(minutes=lambda: minutes, wanted=SimpleNamespace(minutes=10.0), goals={"keep": 0.98},
                               jobs=2, start=lambda moves: moves, finish=finish)  # fmt: skip
    best: Any = SimpleNamespace(moves=PLAIN.moves(candidate(), HEAL), candidate=candidate(), retention=0.98,
                                bytes=10**6, label="trial 4")  # fmt: skip
    return Contest(run, HEAL, [best])


def test_the_best_order_is_kept_and_told() -> None:
    made = contest({"narrow distil6 quantize": 0.9805, "narrow distil3 quantize distil3": 0.984,
                    "narrow quantize distil6skewed-forward": 0.983})  # fmt: skip
    for order in (*HEALINGS, HEALINGS[0]):  # the same moves are not tried twice
        made.enter((order.name, order, candidate()))
    assert made.order.name == "heal, quantize, heal"
    told = made.told()
    assert [item["text"] for item in told] == [
        "quantize, then heal: 1.00 MB keeps 98.00% after 6 steps of healing",
        "heal, then quantize: 1.00 MB keeps 98.05% after 6 steps of healing",
        "heal, quantize, heal: 1.00 MB keeps 98.40% after 6 steps of healing, so it is kept",
        "quantize, then heal by skewed KL: 1.00 MB keeps 98.30% after 6 steps of healing",
        "quantize, then heal by reverse KL: it failed",
    ]
    assert [item["kept"] for item in told] == [False, False, True, False, False]
    assert told[2]["retention"] == 0.984 and told[4]["retention"] is None


def test_orders_run_side_by_side_and_are_judged_in_turn() -> None:
    made, log = contest({"narrow distil6 quantize": 0.99}), []
    start, finish = made.run.start, made.run.finish
    made.run.start = lambda moves: log.append("start") or start(moves)  # type: ignore[method-assign, func-returns-value]
    made.run.finish = lambda *more: log.append("finish") or finish(*more)  # type: ignore[method-assign, func-returns-value]
    made.enter(*((order.name, order, candidate()) for order in HEALINGS))
    assert log == ["start"] * 2 + ["finish", "start"] * 2 + ["finish"] * 2
    assert made.order is HEALINGS[0]
    assert [item["order"] for item in made.told()] == [PLAIN.name, *(order.name for order in HEALINGS)]


def test_a_hair_is_no_reason_and_neither_is_a_late_hour() -> None:
    made = contest({"narrow distil6 quantize": 0.98 + 0.04 * 0.02})
    made.enter((HEALINGS[0].name, HEALINGS[0], candidate()))
    assert made.order is PLAIN
    late = contest({"narrow distil6 quantize": 0.99}, minutes=6.0)
    late.enter((HEALINGS[0].name, HEALINGS[0], candidate()))
    assert late.order is PLAIN
    assert "for want of time" in late.told()[1]["text"]


def test_a_cut_that_wins_stays_with_its_name() -> None:
    made = contest({"narrow quantize distil6": 0.97, "trim-vocab narrow quantize distil6": 0.99})
    both = candidate("both")
    both = Candidate(Family("both", ({"name": "trim-vocab"}, CUT), Rates(1, {}), 0.0, 0, 1.0), QUANTIZE, 3.0, 1000, 0.1)
    made.enter(("both", PLAIN, both))
    assert made.best.candidate is both and made.order is PLAIN
    assert [item["kept"] for item in made.told()] == [True, True]


def test_a_cut_out_of_reach_is_not_healed() -> None:
    curve, said = Curve(loss=1.0), list[str]()
    run: Any = SimpleNamespace(curve=curve, goals={"keep": 0.9}, say=said.append)
    items = [Candidate(Family(name, (), Rates(1, {}), 0.0, 0, 1.0), {}, 4.0, 1000, damage)
             for name, damage in (("near", 0.05), ("middle", 0.2), ("far", 0.4))]  # fmt: skip
    assert Run.in_reach(run, items) == items  # nothing is known yet
    curve.learn(items[0], 1 / 1.05, BARE)
    assert Run.in_reach(run, items) == items[:2]  # 0.11 may be lost, three times that is out of reach
    assert len(said) == 1 and "far" in said[0] and "8.0 times" in said[0]
    assert Run.in_reach(run, items, 1.0) == items[:1] and len(said) == 1
    curve.learn(items[2], 1 / 1.3, BARE)
    assert Run.in_reach(run, items) == items  # its trial came out better than its damage
    run.goals = {"keep": 0.999}
    assert Run.in_reach(run, items) == items[:1]  # the best always is, whatever is asked


def test_what_holds_holds_against_each_reference() -> None:
    """One reference is better and differs little by document, the other differs much: each has a bound of its own."""
    draw = np.random.default_rng(0)
    size = draw.integers(500, 1500, 30).astype(float)

    def scores(bits: np.ndarray) -> Scores:
        units = [str(number) for number in range(len(bits))]
        return Scores("t@1", "search", "bits_per_byte", units, {"bits": bits, "bytes": size})

    steady, rough = scores(2 * size), scores(2 * size * draw.normal(1.005, 0.03, 30))
    mine = scores(2 * size * draw.normal(1.02, 0.001, 30))
    run: Any = SimpleNamespace(task=SimpleNamespace(examples=lambda split: [None] * 30), references={"one": steady})
    kept = retention(steady, mine)
    assert kept - Run.margin(run, mine) == pytest.approx(lower_bound(steady, mine, samples=500))
    run.references = {"one": steady, "two": rough}
    bounds = [lower_bound(reference, mine, samples=500) for reference in (steady, rough)]
    assert kept - Run.margin(run, mine) == pytest.approx(min(bounds)) != bounds[0]
    assert Run.margin(run, mine) < retention(rough, mine) - bounds[1]  # which is the gap of the worse alone


def test_the_search_explains_its_order(
    trained_llama_folder: Path, stories: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """A whole run in which any gain counts and any preparation is worth a trial."""
    monkeypatch.setattr(orders, "NOTICED", -100.0)  # whatever comes last is kept
    monkeypatch.setattr(orders, "PAYS", 100.0)
    out = tmp_path / "out"
    flags = ["--keep", "0.8", "--heal", "8", *FLAGS[4:]]
    with light():
        assert main(["shrink", str(trained_llama_folder), "--text", str(stories), "--out", str(out), *flags]) == 0
    said = capsys.readouterr().err
    records = record.read(out / "records.jsonl")
    told = [item for item in records if item.metric == "order"]
    names = [item.detail["order"] for item in told]
    assert names[0] == PLAIN.name and {item.name for item in HEALINGS} <= set(names)
    assert any(name.startswith("smooth") for name in names)
    assert [item.detail["order"] for item in told if item.detail["kept"]][-1] == HEALINGS[-1].name
    kept = {item.model: item.value for item in records if item.metric == "retention" and item.task.endswith("/search")}
    tried = [item for item in told if item.value is not None]
    assert len(tried) > 3
    assert all(item.value == pytest.approx(kept[item.model], abs=1e-6) for item in tried)
    page = (out / "report.html").read_text("utf-8")
    assert "Which order pays" in page
    assert all(item.detail["text"] in said and item.detail["text"] in page.replace("&#x27;", "'") for item in told)
    moves = json.loads((out / "shrew.json").read_text("utf-8"))["moves"]
    assert all(move["loss"] == "reverse" for move in moves if move["name"] == "distil")
