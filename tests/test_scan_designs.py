"""Which design of the linear detector a set chooses, and that the other set has no part in it."""

import functools
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shrew import record
from shrew.record import Record
from shrew.scan.grams import Grams, logistic, rows

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import choose
import scan
import scan_points

BAD = 'def {name}({a}):\n    {q} = "SELECT " + {a}\n    return db.execute({q})\n'
GOOD = 'def {name}({a}):\n    {q} = "SELECT ?"\n    return db.execute({q}, {a})\n'


def pairs(path: Path, prefix: str, count: int = 9, swapped: bool = False) -> Path:
    """Pairs of three projects whose names of variables differ."""
    found = []
    for number in range(count):
        names = {"name": f"{prefix}{number}", "a": f"a{number}{prefix}", "q": f"q{number}{prefix}"}
        one, two = BAD.format(**names), GOOD.format(**names)
        found.append({"id": f"{prefix}{number}", "before": two if swapped else one, "after": one if swapped else two,
                      "language": "python", "cwe": "CWE-89", "project": "fac"[number % 3]})  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return path


@pytest.fixture(autouse=True)
def three_folds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan, "FOLDS", 3)
    assert {scan.fold_of(name, 3) for name in "fac"} == {0, 1, 2}


def test_without_what_calls_are_given_weights_are_those_of_ngrams_alone() -> None:
    texts = [BAD.format(name=f"f{at}", a="b", q="c") for at in range(3)]
    texts += [GOOD.format(name=f"f{at}", a="b", q="c") for at in range(3)]
    labels, languages = np.repeat([1, 0], 3), ["python"] * 6
    made = Grams.fit(texts, labels, languages, bits=12, given=False)
    weights, bias = logistic(rows(texts, languages, 12), labels.astype(float), np.full(6, 10.0), 1 << 12)
    kept = made.steps * np.repeat(made.scales, len(made.steps) // len(made.scales))
    assert not kept[1 << 12 :].any() and np.abs(kept[: 1 << 12] - weights).max() <= made.scales.max() / 2 + 1e-6
    assert made.bias == pytest.approx(bias, abs=1e-6)
    assert Grams.fit(texts, labels, languages, bits=12).steps[1 << 12 :].any()


def test_the_best_of_the_menu_is_chosen_whatever_the_other_set_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Grams, "fit", functools.partial(Grams.fit, bits=10))  # quicker
    first = pairs(tmp_path / "first.jsonl", "one")
    asked = [first, "--samples", 5, "--records", tmp_path / "records.jsonl", "--on"]
    told: list[list[Any]] = []
    for turned in (False, True):
        (tmp_path / "records.jsonl").unlink(missing_ok=True)
        choose.main([*map(str, asked), str(pairs(tmp_path / "other.jsonl", "two", swapped=turned))])
        told.append(record.read(tmp_path / "records.jsonl"))
    designs = [[item for item in found if item.run == "scan designs"] for found in told]
    assert [item.value for item in designs[0]] == [item.value for item in designs[1]]
    areas = {item.model: item for item in designs[0] if item.metric == "auc"}
    best = max(item.value for item in areas.values())
    assert list(areas) == list(scan.DESIGNS)
    chosen = [item for item in areas.values() if item.detail["chosen"]]
    assert len(chosen) == 1 and chosen[0].value == best
    other = [item for item in told[0] if item.run == "scan untuned"]
    assert {item.task for item in other} == {"other python"}
    assert {item.detail["design"] for item in other if "design" in item.detail} == {chosen[0].model}
    assert {item.model for item in other} >= {"our rules", "n-grams", "n-grams + rules, as first python chose"}


def test_a_pair_that_stands_in_the_other_set_has_no_say(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = pairs(tmp_path / "first.jsonl", "one")
    with pytest.raises(SystemExit, match="too few projects"):
        choose.main([str(first), "--on", str(first)])
    assert "0 pairs of 0 projects (9 dropped)" in capsys.readouterr().err


def test_apart_leaves_out_the_projects_of_the_other_set(tmp_path: Path) -> None:
    data, _ = scan.read(pairs(tmp_path / "first.jsonl", "one"), ["python"])
    other, _ = scan.read(pairs(tmp_path / "other.jsonl", "two", count=1), ["python"])
    left = choose.apart(data, other)
    places = [at for at in range(data.n) if data.projects[at] not in other.projects]
    assert left.n == 6 == len(places) and left.projects.tolist() == [data.projects[at] for at in places]
    assert left.texts == [data.texts[at + half] for half in (0, data.n) for at in places]


def test_designs_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A set on which one design of the menu is made the best by hand chooses that one."""
    data, _ = scan.read(pairs(tmp_path / "first.jsonl", "one"), ["python"])
    right = "moved penalty"

    def scored(data: scan.Set, design: str) -> tuple[list[np.ndarray], np.ndarray]:
        scores = data.truth if design == right else 1 - data.truth
        return [np.where(np.tile(data.folds != fold, 2), scores, np.nan) for fold in range(scan.FOLDS)], scores

    monkeypatch.setattr(scan, "held_grams", scored)
    monkeypatch.setattr(scan, "ruled", lambda texts, languages: [[] for _ in texts])
    monkeypatch.setattr(scan, "stacked", lambda data, logits, said, inner, outer: outer)
    best, found = choose.menu(data, 5)
    of: dict[str, Record] = {item.model: item for item in found if item.metric == "auc_over_plain"}
    assert best == right and of[right].value == 1.0 and of["both"].value == 0.0


def test_few_false_alarms_and_calibration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ordinary functions like the repaired ones leave all vulnerable ones above; like the bad ones, hardly any."""
    one = pairs(tmp_path / "one.jsonl", "x")
    monkeypatch.setattr(scan, "ENOUGH", 20)
    for kind, least, most in ((GOOD, 1.0, 1.0), (BAD, 0.0, 0.25)):
        texts = [kind.format(name=f"n{number}", a=f"b{number}", q=f"r{number}") for number in range(20)]
        calm = tmp_path / "calm.jsonl"
        rows = [{"text": text, "language": "python", "project": "p"} for text in texts]
        calm.write_text("".join(json.dumps(row) + "\n" for row in rows))
        asked = ["calm", str(one), str(calm), "--samples", "20", "--records", str(tmp_path / kind[-6:-4])]
        monkeypatch.setattr(sys, "argv", ["scan_points", *asked])
        scan_points.main()
        found = {(item.model, item.metric): item for item in record.read(tmp_path / kind[-6:-4])}
        assert least <= found["n-grams + rules", "recall_at_0.05"].value <= most  # type: ignore[operator]
        assert 0 <= found["n-grams + rules", "brier"].value < 0.2  # type: ignore[operator]
    calm.write_text("")
    monkeypatch.setattr(sys, "argv", ["scan_points", *asked])
    with pytest.raises(SystemExit, match="has 0 functions"):
        scan_points.main()


def test_later_pairs_are_asked_of_what_earlier_ones_taught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert scan_points.split([2011, 2012, 2013, 2014]) == 2012
    assert scan_points.split([2011, 2011, 2011, 2014]) == 2011
    rows = [json.loads(line) for line in pairs(tmp_path / "one.jsonl", "x", 12).read_text().splitlines()]
    for number, row in enumerate(rows):
        row["cve"] = f"CVE-{2010 + number}-1" if number < 10 else None
    (tmp_path / "dated.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = ["time", str(tmp_path / "dated.jsonl"), "--language", "python", "--samples", "20"]
    monkeypatch.setattr(sys, "argv", ["scan_points", *asked, "--records", str(tmp_path / "found")])
    scan_points.main()
    found = {(item.model, item.metric): item for item in record.read(tmp_path / "found")}
    assert found["our n-grams", "auc"].n == 5
    assert found["our n-grams", "auc"].value == 1.0
