"""The arithmetic of the benchmarks of models of patches: climbs, power laws, noises, probes; a study of dwarfs."""

import json
import math
import random
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import sentences
from hypothesis import given
from hypothesis import strategies as st

from shrew.data import Document
from shrew.tasks import Scores

ROOT = Path(__file__).parents[1]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a script of benchmarks/ as it imports its neighbours."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return __import__


@pytest.fixture
def patches(bench: Any) -> Any:
    return bench("patches")


def _scores(bits: list[float], size: float = 100.0) -> Scores:
    columns = {"bits": np.array(bits), "bytes": np.full(len(bits), size)}
    return Scores("text@1", "final", "bits_per_byte", [str(n) for n in range(len(bits))], columns)


# --- choosing and fitting --------------------------------------------------------------------------------------------


def test_a_climb_ends_with_a_worse_place_on_both_sides(patches: Any) -> None:
    rng = random.Random(0)
    for _ in range(200):
        values, asked = [rng.randint(0, 5) for _ in range(rng.randint(1, 9))], []

        def score(place: int, values: list[int] = values, asked: list[int] = asked) -> float:
            asked.append(place)
            return values[place]

        best = patches.climb(rng.randint(-2, 10), len(values), score)
        assert len(asked) == len(set(asked))
        assert all(values[best] <= values[place] for place in (best - 1, best + 1) if 0 <= place < len(values))
        assert {best - 1, best, best + 1} & set(range(len(values))) <= set(asked)


def test_a_law_is_what_the_points_lie_on(bench: Any) -> None:
    fits = bench("fits")
    rng = np.random.default_rng(0)
    easy = rng.uniform(0.8, 1.2, 30)

    def curve(level: float, slope: float) -> list[tuple[float, list[Scores]]]:
        return [(x, [_scores((easy * level * x**slope * 100).tolist())] * 2) for x in (1e9, 4e9, 3e10)]

    found = fits.laws({"old": curve(20, -0.05), "new": curve(80, -0.11)}, 0.0, samples=200)
    assert found["old"].slope[0] == pytest.approx(-0.05)
    assert found["new"].slope == pytest.approx(np.full(201, -0.11))  # the level alone depends on the documents
    assert found["new"].at(1e10)[0] == pytest.approx(80 * easy.mean() * 1e10**-0.11)
    place, low, high = fits.crossing(found["old"], found["new"])
    assert place == pytest.approx(math.exp(math.log(80 / 20) / 0.06))
    assert low == pytest.approx(place) == high
    noisy = fits.laws({"old": curve(20, -0.05), "new": curve(20, -0.051)}, 0.05, samples=200)
    place, low, high = fits.crossing(noisy["old"], noisy["new"])
    assert (low, high) == (None, None)
    told = fits.spread(noisy["new"].slope, 30)
    assert told.low < -0.051 < told.high
    assert fits.crossing(found["old"], found["old"])[0] is None


@given(st.lists(st.floats(0.5, 3), min_size=1, max_size=40))
def test_a_median_stands_in_its_interval(ratios: list[float]) -> None:
    from importlib import util

    place = ROOT / "benchmarks" / "fits.py"
    made: Any = util.spec_from_file_location("fits", place)
    fits = util.module_from_spec(made)
    made.loader.exec_module(fits)
    value, low, high = fits.median_ratio(ratios)
    assert min(ratios) <= low <= value <= high <= max(ratios)
    assert value == pytest.approx(float(np.median(ratios)))


def test_larger_rungs_cost_more_and_entropies_are_read_not_trained(bench: Any) -> None:
    ladder = bench("ladder")
    for arm in ladder.ARMS:
        costs = [ladder.cell(arm, rung, ladder.table(arm, rung, 5.0), 256).per_byte for rung in range(2)]
        assert costs[0] < costs[1]
    cut = ladder.cell("entropy-4.5", 1, ladder.table("entropy-4.5", 1, 5.0), 256)
    same = ladder.patches(1, {"kind": "static", "size": 1}, 4.5)
    plain = ladder.cell("static", 1, same, 256)
    oracle = ladder.whole({**ladder.ENTROPY, "context": 256, "vocabulary": 257})
    assert cut.reading - plain.reading == oracle.flops(128)
    assert cut.flops - plain.flops == oracle.flops(128)
    assert plain.flops == 3 * plain.reading
    assert cut.tables == 2 * 4 * 4096 * 24
    item = ladder.to_cost(ladder.patches(0, {"kind": "static", "size": 1}, 8.0), 256, plain.reading, name="it")
    assert item.reading == pytest.approx(plain.reading, rel=0.02)
    assert item.model["front"]["width"] == 16


# --- noise -----------------------------------------------------------------------------------------------------------


def test_noises_are_what_they_are_called(bench: Any) -> None:
    robust = bench("robust")
    text = sentences(4000, 1)
    made = {name: work(text, random.Random(0)) for name, work in robust.NOISES.items()}
    assert {name: work(text, random.Random(0)) for name, work in robust.NOISES.items()} == made
    assert len(made["drop"]) / len(text) == pytest.approx(0.9, abs=0.02)
    assert len(made["repeat"]) / len(text) == pytest.approx(1.5, abs=0.05)
    letters = [(old, new) for old, new in zip(text, made["case"], strict=True) if old.isalpha()]
    assert sum(new.isupper() for _, new in letters) / len(letters) == pytest.approx(0.5, abs=0.05)
    assert made["case"].lower() == text.lower()
    assert made["upper"] == text.upper()
    assert sorted(made["swap"]) == sorted(text)
    moved = sum(old != new for old, new in zip(text, made["swap"], strict=True))
    assert 0.1 < moved / len(text) < 0.2
    assert robust.rewritten("Az, 1", 0x430) == "\u0430\u0449, 1".replace("\u0449", chr(0x430 + 25))
    assert len({robust.rewritten(letter, 0x3B1) for letter in "abcdefghijklmnopqrstuvwxyz"}) == 26


def test_probes_ask_for_what_stands_in_the_book(bench: Any) -> None:
    robust = bench("robust")
    books = [Document(str(number), sentences(3000, number)) for number in range(3)]
    plain = [" ".join(book.text.split()) for book in books]
    for number, (passage, options) in enumerate(robust.questions(books, 9, random.Random(0))):
        assert passage + options[0] in plain[number % 3]
        assert len(options) == len(set(options)) == robust.OPTIONS
    asked = robust.misspelt(books, 9, random.Random(0))
    assert len(asked) == 9
    for number, (passage, right, wrong) in enumerate(asked):
        assert passage + right in plain[number % 3]
        assert sorted(right) == sorted(wrong)
        assert right != wrong
        assert right[:2] == wrong[:2]


# --- a whole study ---------------------------------------------------------------------------------------------------


def test_a_study_from_its_runs_to_its_pictures(
    patches: Any, bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for part, books in (("train", 4), ("valid", 3)):
        (tmp_path / "text" / part).mkdir(parents=True)
        for book in range(books):
            (tmp_path / "text" / part / f"{book}.txt").write_text(sentences(1500, 10 * books + book))
    ladder, robust = bench("ladder"), bench("robust")
    monkeypatch.setattr(ladder, "RUNGS", ((16, 1),))
    monkeypatch.setattr(ladder, "GRAMS", {"sizes": [2], "rows": 64})
    monkeypatch.setattr(ladder, "DECODER", 1)
    monkeypatch.setattr(ladder, "ENTROPY", ladder.ENTROPY | {"width": 16, "ngrams": {"sizes": [2], "rows": 64}})
    monkeypatch.setattr(patches, "RATES", (4e-3,))
    monkeypatch.setattr(patches, "MIDDLE", 0)
    common = [str(tmp_path / "work"), "--text", str(tmp_path / "text"), "--length", "64", "--rows", "2", "--warmup",
              "2", "--vocabularies", "270", "--seeds", "1", "--characters", "1200"]  # fmt: skip
    words = ["scaling", *common, "--arms", "bpe", "entropy-4.5", "--budgets", "1e8", "1.5e8", "--last", "2e8",
             "--plot", str(tmp_path / "it.svg")]  # fmt: skip
    found = patches.scaling(patches.parse(words))
    runs = [item for item in found if item.metric == "bits_per_byte"]
    assert {(item.model, item.detail["budget"]) for item in runs} == {
        (arm, budget) for arm in ("bpe", "entropy-4.5") for budget in (1e8, 1.5e8, 2e8)}  # fmt: skip
    told = json.loads((tmp_path / "work/entropy/told.json").read_text())
    for item in runs:
        if item.model == "entropy-4.5":
            assert item.detail["of_entropies"] == told["flops"]
            assert item.detail["patch"] > 1
        else:
            assert item.detail["flops"] == pytest.approx(item.detail["budget"], rel=0.3)
    assert {item.detail["axis"] for item in found if item.metric == "slope"} == {"flops", "cpu"}
    assert sum(item.metric == "predicted" for item in found) == 4
    assert ET.fromstring((tmp_path / "it.svg").read_text()) is not None
    monkeypatch.setattr(patches, "here", None)  # nothing is left to do
    again = patches.scaling(patches.parse(words))
    assert [item.value for item in again] == [item.value for item in found]
    args = patches.parse(["noise", str(tmp_path / "work"), "--characters", "400", "--questions", "2"])
    heard = robust.noise(args)
    assert {item.detail["text"] for item in heard if item.metric == "bits_per_byte"} >= {*robust.NOISES, "languages"}
    assert {item.detail["chance"] for item in heard if item.metric == "accuracy"} == {0.25, 0.5}
    args = patches.parse(["dynamic", str(tmp_path / "work"), "--plot", str(tmp_path / "dynamic.svg")])
    parts = robust.dynamic(args)
    assert "nan" not in (tmp_path / "dynamic.svg").read_text()
    assert all(item.value > 0 for item in parts)
    capsys.readouterr()


def test_what_a_text_costs_is_what_its_patches_cost(bench: Any) -> None:
    ladder, robust = bench("ladder"), bench("robust")
    table = ladder.patches(0, {"kind": "static", "size": 4}, 4.0) | {"context": 64, "vocabulary": 257}
    model = ladder.whole(table)
    near, patch = robust.shares(model, 64)
    assert near + patch / 4 == pytest.approx(model.flops(32), rel=1e-6)


def test_both_classes_train_and_write_alike(bench: Any) -> None:
    blt = bench("blt")
    size = blt.Size(local=16, whole=32, decoder=1, layers=1, patcher=16, heads=2, rows=64)
    pair = blt.make(size, sentences(4000, 0).encode(), 2, 48, 4.0)
    ids = next(pair.text)
    assert ids[:, 0].tolist() == [blt.BEGIN] * 2
    assert torch.equal(*(blt.decode(model.eval(), ids[:1, :20], 5) for model in pair.models.values()))
    with torch.no_grad():
        before = pair.models["ours"](ids).logits
    for name, model in pair.models.items():
        blt.train(model.train(), pair.optimizers[name], ids)
    ours, theirs = (model.eval()(ids, use_cache=False).logits for model in pair.models.values())
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    assert (ours - before).abs().max() > 1e-3
