"""Whether the lines that a detector points at are those that the repair took out."""

import functools
import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shrew import record
from shrew.scan.grams import Grams

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import scan
import scan_lines

BAD = '# {name}\ndef {name}({a}):\n    b = clean({a})\n    {q} = "SELECT " + {a}\n    log(b)\n    return db.run({q})\n'
GOOD = BAD.replace('"SELECT " + {a}', '"SELECT ?"')
ADDED = BAD.replace("    log(b)\n", "    log(b)\n    check({a})\n")


def pairs(path: Path, repaired: str = "f") -> Path:
    """Three pairs of each of three projects, and one whose repair only adds. A project that is not `repaired` has its
    members the other way round."""
    found = []
    for number in range(10):
        names = {"name": f"f{number}", "a": f"a{number}", "q": f"q{number}"}
        project = "fac"[number % 3]
        texts = [BAD.format(**names), (ADDED if number == 9 else GOOD).format(**names)]
        before, after = texts if project in "ac" or project in repaired else texts[::-1]
        found.append({"id": str(number), "before": before, "after": after, "language": "python", "cwe": "CWE-89",
                      "project": project})  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return path


@pytest.fixture(autouse=True)
def three_folds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan, "FOLDS", 3)
    monkeypatch.setattr(Grams, "fit", functools.partial(Grams.fit, bits=12))  # quicker
    assert {scan.fold_of(name, 3) for name in "fac"} == {0, 1, 2}


@given(st.integers(1, 6), st.data(), st.integers(1, 7))
def test_chance_is_the_share_of_all_orders(lines: int, data: st.DataObject, k: int) -> None:
    wrong = data.draw(st.integers(0, lines))
    orders = list(itertools.permutations([True] * wrong + [False] * (lines - wrong)))
    assert scan_lines.by_chance(wrong, lines, k) == pytest.approx(sum(any(order[:k]) for order in orders) / len(orders))


def test_comments_and_blanks_are_never_wrong() -> None:
    before = 'def f(a):\n    """Old words."""\n\n    # old\n    run(a)\n    return a\n'
    found = scan_lines.repair(before, before.replace("Old", "New").replace("old", "new").replace("run", "go"), "python")
    assert np.flatnonzero(~found.shown).tolist() == [2, 6]
    assert np.flatnonzero(found.code).tolist() == [0, 4, 5] and np.flatnonzero(found.wrong).tolist() == [4]
    assert not scan_lines.repair("a()\nb()", "check()\na()\nb()", "python").wrong.any()


def test_shares_of_functions_and_of_random_orders() -> None:
    """Two functions of four lines, one with a comment in front of it; the third one's repair only adds."""
    before = "a()\nb()\nc()\nd()"
    told = [scan_lines.repair(before, before.replace("c()", "x()"), "python"),
            scan_lines.repair("# e\n" + before, "# e\n" + before.replace("a()", "x()"), "python"),
            scan_lines.repair(before, before + "\ne()", "python")]  # fmt: skip
    effects = [(0.0, 0.0, 1.0, 0.0), (3.0, 1.0, 2.0, 1.0, -1.0), (1.0, 0.0, 0.0, 0.0)]  # read first; after three others
    found = scan_lines.figures(told, effects, np.array(["p", "q", "p"]), "t", 5)
    values = {(item.model, item.metric): item.value for item in found}
    chances = {1: 0.25, 3: 0.75, 5: 1.0}
    shares = {1: 0.5, 3: 0.5, 5: 1.0}
    for k in scan_lines.FIRST:
        assert values["random order", f"line_top_{k}"] == pytest.approx(chances[k])
        assert values["our n-grams", f"line_top_{k}"] == shares[k]
        assert values["our n-grams", f"line_top_{k}_over_random"] == pytest.approx(shares[k] - chances[k])
    assert {(item.n, item.detail["repairs_that_only_add"], item.detail["too_long"]) for item in found} == {(2, 1, 0)}
    cut = scan_lines.figures(told, [effects[0], (), ()], np.array(["p", "q", "p"]), "t", 5)
    assert {item.value for item in cut if item.metric == "line_top_5" and item.model == "our n-grams"} == {0.5}
    assert cut[0].detail["too_long"] == 1
    assert not scan_lines.figures(told[2:], effects[2:], np.array(["p"]), "t", 5)


def test_a_fold_has_no_part_in_what_its_lines_add(tmp_path: Path) -> None:
    """Its members exchanged, the weights that judge it are the same, and those that judge other folds are not."""
    data, _ = scan.read(pairs(tmp_path / "one.jsonl"), ["python"])
    turned, _ = scan.read(pairs(tmp_path / "two.jsonl", repaired=""), ["python"])
    one, two = scan.held_out_lines(data), scan.held_out_lines(turned)
    mine = data.projects == "f"
    weights = scan.fitted(data, np.flatnonzero(np.tile(~mine, 2)))
    again = scan.fitted(turned, np.flatnonzero(np.tile(~mine, 2)))
    assert weights.bias == again.bias and (weights.steps == again.steps).all()
    for place in range(data.n):
        lines = data.texts[place].split("\n")
        assert len(one[place]) == len(lines)
        if mine[place]:
            whole = float(weights.score([data.texts[place]], ["python"])[0])
            for at, effect in enumerate(one[place]):
                left = "\n".join("" if at == other else line for other, line in enumerate(lines))
                assert effect == pytest.approx(whole - float(weights.score([left], ["python"])[0]), abs=2e-4)
        else:
            assert one[place] != two[place]


def test_system_records_them(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    scan.main(["system", str(pairs(tmp_path / "pairs.jsonl")), "--samples", "5", "--records", str(path)])
    found = [item for item in record.read(path) if item.run == "scan lines"]
    values = {(item.model, item.metric): item.value for item in found}
    assert len(found) == 9 and {(item.n, item.task) for item in found} == {(9, "pairs python")}
    assert values["random order", "line_top_1"] == pytest.approx(1 / 5)
    assert values["our n-grams", "line_top_1"] == 1.0  # every repair is of the same kind
