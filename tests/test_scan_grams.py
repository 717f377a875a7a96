"""The n-grams of a scan and what combines them: features, the exact fit, files, and thresholds."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shrew.errors import DataError
from shrew.scan import combine
from shrew.scan.grams import BITS, BLOCK, Grams, Rows, calls, lexed, logistic, rows, tokens

TEXTS = st.text(st.sampled_from("ab_9 \n\"'`\\()%{}/*#<fS日=+-"), max_size=60)
LANGUAGES = ["python", "c", "javascript", "ruby"]


def finding(cwe: str = "CWE-89", severity: str = "medium", tool: str = "shrew") -> Any:
    return SimpleNamespace(cwe=cwe, severity=severity, tool=tool)


@pytest.mark.parametrize(
    ("language", "text", "wanted"),
    [
        ("python", "x = 'a%s' % y  # why", ["x", "=", '"%', "%", "y"]),
        ("python", 'q(f"SELECT {a}", 0x1F)', ["q", "(", '"f{q', ",", "0", ")"]),
        ("python", '"""a\n</b>"""\nz', ['"/<', "z"]),
        ("c", "a->b /* 'x */ += 'c'; // \"d", ["a", "->", "b", "+=", '"', ";"]),
        ("javascript", "`a${b}` === c", ['"{', "==", "=", "c"]),
        ("ruby", "x 'open\ny", ["x", '"', "y"]),
    ],
)
def test_tokens(language: str, text: str, wanted: list[str]) -> None:
    assert tokens(text, language) == wanted


def test_words_of_strings_follow() -> None:
    assert lexed("q('a = %s', {'b'}) # 'c'", "python")[1] == ["''", "'a", "'=", "'%s", "''", "''", "'b", "''"]
    assert lexed(f"'{'a ' * 300}'", "c")[1] == []


def test_calls_know_what_stands_in_their_parentheses() -> None:
    found = set(calls(tokens("run(a, wrap('%s' % b), (c))", "python")))
    assert found == {("run", "a"), ("run", ","), ("run", "wrap"), ("wrap", '"%'), ("wrap", "%"), ("wrap", "b"),
                     ("wrap", '(" "% %'.replace('" ', "", 1)), ("*", '("% %'), ("run", '("% % ,'),
                     ("*", '("% % ,')}  # fmt: skip


@given(st.lists(st.tuples(TEXTS, st.sampled_from(LANGUAGES)), max_size=6))
def test_a_row_depends_on_its_text_alone(items: list[tuple[str, str]]) -> None:
    texts, languages = [item[0] for item in items], [item[1] for item in items]
    together = rows(texts, languages, 10)
    assert len(together.starts) == len(items) + 1 and together.starts[-1] == len(together.columns)
    for number, (text, language) in enumerate(items):
        mine = together.columns[together.starts[number] : together.starts[number + 1]]
        assert mine.tolist() == rows([text], [language], 10).columns.tolist() == sorted(set(mine.tolist()))
        named = tokens(text, language)
        row = [word for part in lexed(text, language) for word in part]
        grams = {tuple(row[at : at + size]) for size in (1, 2, 3) for at in range(len(row) - size + 1)}
        assert len(mine) <= len(grams) + len(set(calls(named)))
        assert (len(mine) > 0) == bool(named)
    wide = rows(texts, languages, 24)  # so many buckets that hardly two features share one
    for number, (text, language) in enumerate(items):
        named = tokens(text, language)
        row = [word for part in lexed(text, language) for word in part]
        grams = {tuple(row[at : at + size]) for size in (1, 2, 3) for at in range(len(row) - size + 1)}
        many = len(grams) + len(set(calls(named)))
        assert abs(wide.starts[number + 1] - wide.starts[number] - many) <= 1


def test_hostile_texts_take_no_time() -> None:
    for piece in ('"', '\\"', "'''a", "`", "/*", "%(", "{", "(" * 9, "a'"):
        rows([piece * (100_000 // len(piece))], ["c"])


def test_buckets_are_the_same_everywhere() -> None:
    """Not Python's hash, which differs from run to run: these numbers were written down once."""
    found = rows(["cursor.execute('SELECT %s' % name)", "x"], ["python", "c"])
    assert found.columns[found.starts[1] :].tolist() == [102285]
    assert int(found.columns.sum()) == 2408509


@settings(max_examples=25)
@given(st.integers(0, 2**32 - 1), st.floats(0.1, 100))
def test_the_fit_is_the_minimum(seed: int, cost: float) -> None:
    """The loss is strictly convex: where its gradient is nothing there is no lower place. Slow dense gradient."""
    draw = np.random.default_rng(seed)
    dense = draw.random((30, 16)) < 0.3
    truth = (draw.random(30) < 0.4).astype(float)
    truth[:2] = 0, 1
    starts = np.concatenate([[0], np.cumsum(dense.sum(1))])
    each = cost * draw.uniform(0.5, 2, 30)
    weights, bias = logistic(Rows(starts, np.nonzero(dense)[1]), truth, each, 16, 1e-9)
    table = dense / np.sqrt(np.maximum(dense.sum(1, keepdims=True), 1))
    off = each * (1 / (1 + np.exp(-(table @ weights + bias))) - truth)
    np.testing.assert_allclose(weights + table.T @ off, 0, atol=1e-5)
    assert off.sum() == pytest.approx(0, abs=1e-5)
    small, free = combine._newton(table, truth, each, np.zeros(16, bool))
    np.testing.assert_allclose([*small, free], [*weights, bias], atol=1e-4)
    bounded = draw.random(16) < 0.6
    held, free = combine._newton(table, truth, each, bounded)
    off = each * (1 / (1 + np.exp(-(table @ held + free))) - truth)
    slope, resting = held + table.T @ off, bounded & (held == 0)
    assert (held[bounded] >= 0).all() and (slope[resting] > -1e-5).all() and off.sum() == pytest.approx(0, abs=1e-5)
    np.testing.assert_allclose(slope[~resting], 0, atol=1e-5)


def toy(count: int = 40) -> tuple[list[str], list[int]]:
    texts = [f"def f{n}(a):\n    return {'eval' if n % 2 else 'int'}(a + {n})" for n in range(count)]
    return texts, [n % 2 for n in range(count)]


def test_a_file_gives_the_same_logits(tmp_path: Path) -> None:
    texts, labels = toy()
    made = Grams.fit(texts, labels, ["python"] * 40)
    logits = made.score(texts, ["python"] * 40)
    assert (logits[1::2] > 0).all() and (logits[::2] < 0).all() and logits.dtype == np.float32
    for name in ("a.npz", "b.npz"):
        made.save(tmp_path / name)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    assert (tmp_path / "a.npz").stat().st_size < 1.1 * 2**BITS
    same = Grams.load(tmp_path / "a.npz")
    assert same.score(texts, ["python"] * 40).tolist() == logits.tolist() and same.bits == BITS
    assert same.score(texts[:1], ["python"])[0] == logits[0] and len(same.score([], [])) == 0
    assert same.score([""], ["c"])[0] == pytest.approx(made.bias)
    with pytest.raises(DataError, match="texts of both kinds"):
        Grams.fit(texts, [1] * 40, ["python"] * 40)


def test_a_damaged_file_is_one_sentence(tmp_path: Path) -> None:
    texts, labels = toy()
    good = tmp_path / "good.npz"
    Grams.fit(texts, labels, ["python"] * 40, bits=10).save(good)
    content, bad = good.read_bytes(), tmp_path / "bad.npz"
    draw = np.random.default_rng(0)
    refused = 0
    for turn in range(150):
        broken = bytearray(content if turn % 2 else content[: draw.integers(0, len(content))])
        for _ in range(turn % 2 and 3):
            broken[draw.integers(0, len(broken))] = draw.integers(0, 256)
        bad.write_bytes(broken)
        try:
            Grams.load(bad)
        except DataError as error:
            assert "\n" not in str(error) and "n-gram weights" in str(error)
            refused += 1
    assert refused > 75
    with pytest.raises(DataError, match="no such file"):
        Grams.load(tmp_path / "none.npz")
    ones = {"format": np.int64(2), "bias": np.float64(0), "scales": np.ones(4, np.float32),
            "steps": np.ones(4 * BLOCK, np.int8)}  # fmt: skip
    for change in ({"format": np.int64(1)}, {"bias": np.float64("nan")}, {"scales": np.ones(3, np.float32)},
                   {"steps": np.ones(4 * BLOCK)}, {"steps": np.array([print])}, {"steps": np.ones(2**25, np.int8)},
                   {"steps": np.ones(1000, np.int8)},
                   {"steps": np.ones(BLOCK, np.int8), "scales": np.ones(1, np.float32)}):  # fmt: skip
        arrays: Any = ones | change
        np.savez_compressed(bad, **arrays)
        with pytest.raises(DataError, match="holds no n-gram weights"):
            Grams.load(bad)


def test_what_is_combined_is_a_logistic_of_named_numbers() -> None:
    made = {"with": {"bias": -1.0, "weights": {"grams": 0.5, "detector": 2.0, "rule CWE-89": 1.0, "rule low": 0.25,
                                               "rule medium": 0.5, "rule high": 4.0, "tool unknown": 0.125}},
            "without": {"bias": 3.0, "weights": {"grams": 1.0}}}  # fmt: skip
    told = [[finding(), finding(severity="low")], [finding("", "odd", "bandit")], []]
    found = combine.combined(made, [0.5, 0.0, None], [2.0, 0.0, -99.0], told)
    wanted = [-1 + 1 + 1 + 1 + 0.75, -1 + 0.125, 3 - 30]
    assert found == pytest.approx([1 / (1 + math.exp(-value)) for value in wanted])


def test_a_combination_finds_what_helps() -> None:
    draw = np.random.default_rng(0)
    truth = (draw.random(600) < 0.5).astype(int)
    logits, grams = truth + draw.normal(0, 1, 600), draw.normal(0, 1, 600)
    found = [[finding()] if share < (0.6 if label else 0.05) else [finding("CWE-1")] if share > 0.9 else []
             for label, share in zip(truth, draw.random(600), strict=True)]  # fmt: skip
    made = combine.fit(logits.tolist(), grams.tolist(), found, truth)
    weights = made["with"]["weights"]
    assert weights["detector"] > 0.5 and abs(weights["grams"]) < 0.3 and weights["rule CWE-89"] > 0.5
    assert weights["rule CWE-1"] == 0  # spoken of the harmless ones alone, which is no excuse
    assert "detector" not in made["without"]["weights"]
    chances = combine.combined(made, logits.tolist(), grams.tolist(), found)
    assert chances.mean() == pytest.approx(truth.mean(), abs=1e-3)  # the bias is free, so the mean is met
    assert chances[truth == 1].mean() > chances[truth == 0].mean() + 0.3
    assert combine.fit(logits.tolist(), grams.tolist(), found, truth) == made
    with pytest.raises(DataError, match="both kinds"):
        combine.fit([1.0], [1.0], [[]], [1])


@given(st.lists(st.integers(0, 60), min_size=5, max_size=5))
def test_points_are_the_lowest_thresholds_allowed(counts: list[int]) -> None:
    values = np.repeat([0.0, 0.1, 0.2, 0.5, 1.0, 0.01], [*counts, 200])
    for name, point in combine.points(values).items():
        alerts = combine.POINTS[name]
        assert point["alerts_per_1000"] == pytest.approx((values >= point["threshold"]).mean() * 1000)
        lowest = min(edge for edge in (0, 0.005, 0.05, 0.15, 0.3, 0.7, 2) if (values >= edge).mean() <= alerts / 1000)
        assert (values >= point["threshold"]).sum() == (values >= lowest).sum()
    with pytest.raises(DataError, match="too few"):
        combine.points(values[:50])
