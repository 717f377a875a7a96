"""The comparison with peers: its arithmetic, and what it says to an adapter, with a peer that only pretends."""

import argparse
import itertools
import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shrew import folder, record, spec, tasks
from shrew.folder.grids import Steps, Uniform, dequantize, encode
from shrew.moves import parse_moves
from shrew.moves.calibrate import hessians
from shrew.record import Record
from shrew.tasks import Scores

ROOT = Path(__file__).parents[1]
sys.path += [str(ROOT / "benchmarks"), str(ROOT / "benchmarks" / "peers")]

import compression  # noqa: E402
import costs  # noqa: E402
import curves  # noqa: E402
import equal  # noqa: E402
import runtime  # noqa: E402
import shares  # noqa: E402
import sources  # noqa: E402
import structure  # noqa: E402
import uniform  # noqa: E402
from peers.table import ADAPTERS, ARMS, OURS, Arm  # noqa: E402

positive = st.integers(10, 1000).map(lambda number: number / 100)  # far enough apart for logarithms to tell
clouds = st.lists(st.tuples(positive, positive), min_size=1, max_size=12).map(lambda rows: np.array(rows).T)


def _artefacts(**made: tuple[float, Any]) -> list[curves.Artefact]:
    """Artefacts of their bytes and bits by document, ten tokens each."""
    return [curves.Artefact(name, size, np.array(bits, float), np.full(len(bits), 10.0))
            for name, (size, bits) in made.items()]  # fmt: skip


# --- curves ----------------------------------------------------------------------------------------------------------


@given(clouds)
def test_the_frontier_is_what_nothing_beats(cloud: np.ndarray) -> None:
    sizes, values = cloud
    kept = curves.frontier(sizes, values)
    assert (np.diff(sizes[kept]) > 0).all() and (np.diff(values[kept]) < 0).all()
    for size, value in zip(sizes, values, strict=True):  # each point has one of the frontier that is as good or better
        assert ((sizes[kept] <= size) & (values[kept] <= value)).any()


@given(clouds, positive)
def test_a_curve_goes_through_its_points_and_never_up(cloud: np.ndarray, at: float) -> None:
    sizes, values = cloud
    kept = curves.frontier(sizes, values)
    np.testing.assert_allclose(curves.curve(sizes, values, sizes[kept]), values[kept], rtol=1e-12)
    (found,) = curves.curve(sizes, values, np.array([at]))
    assert np.isnan(found) == (at < sizes.min())
    if at >= sizes.min():  # nothing that one could have at this size is better than the curve gives
        assert found <= values[sizes <= at].min() * (1 + 1e-12)
    if at >= sizes.max():
        np.testing.assert_allclose(found, values.min())


def test_a_power_law_is_a_straight_line() -> None:
    sizes, at = np.array([8.0, 1.0, 64.0]), np.array([3.0, 20.0])
    np.testing.assert_allclose(curves.curve(sizes, 5 * sizes**-2, at), 5 * at**-2)


# --- comparing -------------------------------------------------------------------------------------------------------


def test_half_the_divergence_of_every_document_is_half_for_sure() -> None:
    draw = np.random.default_rng(0).uniform(1, 9, 30)
    peers = _artefacts(a=(100, draw), b=(200, draw / 4), c=(400, draw / 16))
    found = curves.compare(_artefacts(x=(100, draw / 2), y=(200, draw / 8), small=(50, draw)), peers)
    assert found is not None
    np.testing.assert_allclose([found.value, found.low, found.high], 0.5)
    assert [name for name, *_ in found.sizes] == ["x", "y"]  # no peer is as small as the third
    assert found.unbeaten == ["c"]  # by far the largest of ours is better than b alone


def test_what_differs_by_document_widens_the_interval() -> None:
    draw = np.random.default_rng(1).uniform(1, 9, (2, 40))
    found = curves.compare(_artefacts(x=(100, draw[0])), _artefacts(a=(100, draw[1])))
    assert found is not None
    assert found.low < found.value < found.high
    np.testing.assert_allclose(found.value, draw[0].sum() / draw[1].sum())
    (size,) = found.sizes
    np.testing.assert_allclose(size[2:], (found.value, found.low, found.high))


def test_ours_between_two_peers_is_held_against_the_line_between() -> None:
    flat = np.ones(5)
    peers = _artefacts(a=(100, flat * 8), b=(400, flat / 2), bad=(150, flat * 9))
    found = curves.compare(_artefacts(x=(200, flat * 2)), peers)
    assert found is not None
    np.testing.assert_allclose(found.value, 1)  # the geometric middle of 8 and 0.5
    assert curves.compare([], _artefacts(a=(100, flat))) is None
    assert curves.compare(_artefacts(x=(99, flat)), _artefacts(a=(100, flat))) is None


def test_intervals_are_those_of_all_resamples() -> None:
    """Four documents can be drawn in 256 ways; a sample of them must have nearly the quantiles of all, widened by
    Student's t of 3 degrees of freedom (3.182 in any table) over the normal 1.96 and by the root of 4/3."""
    draw = np.random.default_rng(2).uniform(1, 9, (3, 4))
    tokens = np.full(4, 10.0)
    found = curves.compare(_artefacts(x=(200, draw[0])), _artefacts(a=(100, draw[1]), b=(400, draw[2] / 9)), 20000)
    assert found is not None
    every = []
    for picked in itertools.product(range(4), repeat=4):
        mine, first, second = (row[list(picked)].sum() / tokens.sum() for row in (draw[0], draw[1], draw[2] / 9))
        assert first > second  # else the frontier has one point
        every.append(mine / np.sqrt(first * second))  # 200 is the geometric middle of 100 and 400
    whole = draw[0].sum() / np.sqrt(draw[1].sum() * draw[2].sum() / 9)
    np.testing.assert_allclose(found.value, whole)
    for end, share in ((found.low, 0.025), (found.high, 0.975)):
        ends = np.quantile(every, [share - 0.01, share + 0.01])
        least, most = whole * (ends / whole) ** (3.182446 / 1.96 * np.sqrt(4 / 3))
        assert least * (1 - 1e-9) <= end <= most * (1 + 1e-9)


def test_an_interval_over_23_documents_holds_the_truth_as_often_as_it_says() -> None:
    """Percentiles alone hold it too seldom."""
    draw, held = np.random.default_rng(5), []
    for _ in range(600):
        common = draw.lognormal(0, 0.5, 23)
        mine, theirs = (common * draw.lognormal(0, 0.5, 23) for _ in range(2))
        found = curves.compare(_artefacts(x=(100, mine)), _artefacts(a=(100, theirs)), 400)
        assert found is not None
        held.append(found.low <= 1 <= found.high)
    assert np.mean(held) > 0.93
    assert curves.compare(_artefacts(x=(100, [1])), _artefacts(a=(100, [2]))) is None  # one document tells of no others


# --- the table of arms -----------------------------------------------------------------------------------------------


def test_every_arm_has_an_adapter_its_requirements_and_a_name_of_its_own() -> None:
    assert len({arm.name for arm in ARMS}) == len(ARMS)
    assert {arm.peer for arm in ARMS} == set(ADAPTERS)
    for peer, name in ADAPTERS.items():
        assert (ROOT / "benchmarks" / "peers" / f"{name}_peer.py").exists()
        assert peer == OURS or (ROOT / "benchmarks" / f"requirements-{name}.txt").exists()
    for arm in ARMS:
        if arm.peer == OURS and not arm.stock:
            parse_moves(arm.settings["moves"], arm.name)
            heads = [move.get("embeddings") for move in arm.settings["moves"]]
            assert arm.alone != any(heads)  # embeddings in bf16 are what makes the second table fair


def test_a_peer_at_its_own_default_is_no_extra() -> None:
    """AutoRound's light recipe alone would be less than it recommends."""
    plain = [arm for arm in ARMS if arm.peer == "AutoRound" and not arm.extra and not arm.healed]
    light = {(arm.bits, arm.settings["group"]): arm for arm in plain if arm.settings.get("iters") == 50}
    default = {(arm.bits, arm.settings["group"]): arm for arm in plain if "iters" not in arm.settings}
    assert set(default) == {(2, 32), (3, 32), (4, 32), (4, 128)} <= set(light)
    assert all(default[shape].seconds == 4 * light[shape].seconds for shape in default)


@pytest.mark.parametrize(("flags", "verdicts"), [
    ("", 1), ("--full", 1), ("--healed", 1), ("--peers Fake,HQQ", 0), ("--bits 3,4", 0), ("--only g32", 0),
    ("--quick", 0), ("--peers " + ",".join(reversed(ADAPTERS)), 1),
])  # fmt: skip
def test_a_run_of_some_arms_gives_no_verdict(
    flags: str, verdicts: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It would stand under the same name as that of all arms, and be taken for it as the later one."""
    import torch

    task = argparse.Namespace(score=lambda *_: None)
    reference = argparse.Namespace(place=tmp_path, name="m", loaded=None, task=task)
    one = Record(run="compression", model="m", metric="cannot", value="no")
    told = Record(run="compression", model="m, Shrew", metric="kl_over_best_peer", value=0.5, low=0.4, high=0.6,
                  detail={"table": "whole file", "sizes": [], "unbeaten": []})  # fmt: skip
    for name, value in (("prepare", reference), ("outcome", {"cannot": "no"}), ("digest", "d"), ("verdicts", [told]),
                        ("fact", one)):  # fmt: skip
        monkeypatch.setattr(compression, name, lambda *_, value=value: value)
    monkeypatch.setitem(compression.ADAPTERS, "Fake", "fake")
    records = tmp_path / "records.jsonl"
    always = ["--records", str(records), "--threads", str(torch.get_num_threads())]
    monkeypatch.setattr(sys, "argv", ["compression.py", *always, *flags.split()])
    assert compression.main() == 0
    assert sum(item.metric == "kl_over_best_peer" for item in record.read(records)) == verdicts
    assert ("Nothing is said of the best peer" in capsys.readouterr().err) != bool(verdicts)


# --- an adapter that pretends ----------------------------------------------------------------------------------------

FAKE = '''
import os
from protocol import layers, load, serve, versions

def work(job):
    with open(job.folder.parent / "calls", "a") as stream:
        stream.write("x")
    if "fail" in job.settings:
        raise RuntimeError("no accelerator\\nis here")
    if "die" in job.settings:
        os._exit(3)
    assert job.rows().shape == (3, 256) and job.rows("check").shape == (2, 128)
    from safetensors.torch import save_file
    model = load(job)
    with job.timed():
        small = {}
        for name, layer in layers(model).items():
            step = layer.weight.abs().amax() / 7
            small[name + ".codes"] = (layer.weight / step).round().char()
            layer.weight.data = small[name + ".codes"] * step
        save_file(small, job.artefact / "model.safetensors")
    job.keep({name + ".weight": layer.weight for name, layer in layers(model).items()})
    job.check(model)
    return {"versions": versions("torch")}

serve(work)
'''


@pytest.fixture(scope="module")
def bench(
    tmp_path_factory: pytest.TempPathFactory, trained_llama_folder: Path, stories: Path, warm: Path
) -> Iterator[Any]:
    """A reference of the tiny llama and the arguments, with the fake among the peers."""
    tmp_path = tmp_path_factory.mktemp("compression")
    home = tmp_path / "benchmarks"
    shutil.copytree(ROOT / "benchmarks" / "peers", home / "peers")
    (home / "peers" / "fake_peer.py").write_text(FAKE, "utf-8")
    python = tmp_path / "venvs" / "fake" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to(warm / "python")
    args = argparse.Namespace(work=tmp_path / "work", venvs=tmp_path / "venvs", text=[str(stories)], bytes=3000, rows=3,
                              healing=2, threads=1, limit=120, again=False)  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compression, "HERE", home)
        patch.setitem(compression.ADAPTERS, "Fake", "fake")
        found = compression.interpreter
        patch.setattr(compression, "interpreter", lambda peer, venvs: python if peer == OURS else found(peer, venvs))
        yield compression.prepare(str(trained_llama_folder), args), args


def _calls(args: argparse.Namespace) -> int:
    """How often the fake was asked, by all tests so far."""
    return sum(len(path.read_text("utf-8")) for path in args.work.rglob("calls"))


def test_an_arm_is_made_judged_recorded_and_kept(bench: Any) -> None:
    reference, args = bench
    arm, before = Arm("Fake", "int4", 4, {"bits": 4}), _calls(args)
    found = compression.outcome(reference, arm, args)
    assert found["result"]["peak_bytes"] >= found["result"]["loaded_bytes"] > 0 and found["runtime_kl"] < 1e-4
    weights = sum(reference.linear.values())
    assert found["sizes"]["linear_bytes"] == weights < found["sizes"]["bytes"]  # the rest is the file's header
    assert compression.outcome(reference, arm, args)["scores"] == found["scores"]
    assert _calls(args) == before + 1

    loaded = folder.load(reference.source)  # the same by hand
    for name in reference.linear:
        weight = loaded.model.get_submodule(name).weight
        step = weight.data.bfloat16().abs().amax() / 7
        weight.data = ((weight.data.bfloat16() / step).round() * step).float()
    expected = reference.task.score(loaded, "final", reference.loaded)
    scores = Scores.parse(found["scores"])
    np.testing.assert_allclose(scores.columns["kl_bits"], expected.columns["kl_bits"], rtol=1e-3, atol=1e-6)

    original = reference.task.score(reference.loaded, "final")
    item = compression.fact(reference, arm, found, original)
    assert item.metric == "kl" and item.low < item.value < item.high
    assert item.value == pytest.approx(scores.ratio("kl_bits", "tokens"))
    assert item.detail["bits_per_weight"] == 8 and item.n == len(reference.task.examples("final"))
    shown = curves.table([item])
    assert f"| {item.model} | {found['sizes']['bytes']:,} | 8.00 |" in shown
    assert ElementTree.fromstring(curves.picture([item])).tag.endswith("svg")


@pytest.mark.parametrize(("settings", "words"), [({"fail": 1}, "RuntimeError: no accelerator is here"),
                                                 ({"die": 1}, "it ended without a word")])  # fmt: skip
def test_what_cannot_run_is_kept_with_its_error(bench: Any, settings: dict[str, Any], words: str) -> None:
    reference, args = bench
    arm, before = Arm("Fake", "broken", 4, settings), _calls(args)
    for _ in range(2):
        assert compression.outcome(reference, arm, args)["cannot"] == words
    assert _calls(args) == before + 1
    args = argparse.Namespace(**vars(args) | {"again": True})
    item = compression.fact(reference, arm, compression.outcome(reference, arm, args), None)
    assert _calls(args) == before + 2 and (item.metric, item.value) == ("cannot", words)
    assert f"| {item.model} | {words} |" in curves.table([item])


def test_a_peer_without_an_environment_is_told_of_and_not_kept(bench: Any) -> None:
    reference, args = bench
    assert "--install" in compression.outcome(reference, Arm("HQQ", "4-bit", 4, {}), args)["cannot"]


def test_ours_goes_the_same_way_and_is_held_against_the_peer(bench: Any) -> None:
    reference, args = bench
    peer, mine = Arm("Fake", "int4", 4, {"bits": 4}), Arm(OURS, "int8", 8, {"moves": [{"name": "quantize", "bits": 8}]})
    done = [(arm, compression.outcome(reference, arm, args)) for arm in (peer, mine)]
    assert any(item.effective.startswith("int8") for item in folder.tensors(next(args.work.rglob("artefact/model"))))
    for arm, found in done:
        assert set(found) >= {"result", "sizes", "scores", "load"}, (arm.name, found)
    done[1][1]["sizes"]["bytes"] = done[0][1]["sizes"]["bytes"] + 1
    records = list(compression.verdicts(reference, done))
    assert [item.detail["table"] for item in records] == ["whole file", *(["linear layers"] * (len(records) - 1))]
    ratio = [Scores.parse(found["scores"]).ratio("kl_bits", "tokens") for _, found in done]
    assert records[0].value == pytest.approx(ratio[1] / ratio[0]) and records[0].value < 1
    assert "No peer is better at any of them." in curves.verdict(records[0])
    assert records[0].detail["peers"] == ["Fake"]
    assert json.loads(next(args.work.rglob("importance.json")).read_text())["of"] == reference.mark[:2]


def test_importance_is_the_mean_square_of_what_comes_in(bench: Any) -> None:
    reference, _ = bench
    import torch

    seen: list[Any] = []
    layer = reference.loaded.model.model.layers[1].mlp.down_proj
    hook = layer.register_forward_pre_hook(lambda _, given: seen.append(given[0].detach()))
    with torch.no_grad():
        for row in reference.rows:
            reference.loaded.model(input_ids=torch.from_numpy(row)[None])
    hook.remove()
    expected = torch.cat([part[0] for part in seen]).square().mean(0)
    found = np.load(reference.place / "importance.npz")
    np.testing.assert_allclose(found["blk.1.ffn_down.weight"], expected, rtol=1e-4)
    assert not any(name.startswith(("token_embd", "output")) for name in found)  # as llama-imatrix leaves them out
    assert len(found) == len(reference.linear) and all(row.dtype == np.float32 for row in found.values())
    whole = hessians(reference.loaded, list(reference.rows))  # of whose diagonals these are all that is needed
    sums = compression.squares(reference)
    for name in reference.linear:
        expected = whole[f"{name}.weight"].diagonal() / reference.rows.size
        np.testing.assert_allclose(sums[f"{name}.weight"], expected, rtol=1e-4)


def test_the_recipe_of_prose_suits_every_peer() -> None:
    table = spec.read_toml(ROOT / "recipes" / "prose.toml")["model"]
    assert table["width"] % 256 == 0 and table["ffn"]["hidden"] % 256 == 0


# --- peers healed ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("symmetric", [True, False])
@given(bits=st.integers(2, 4), groups=st.integers(1, 3), seed=st.integers(0, 999), rounded=st.booleans())
def test_a_grid_is_found_again_in_dense_weights(symmetric: bool, bits: int, groups: int, seed: int, rounded: bool
                                                ) -> None:  # fmt: skip
    import torch

    draw = torch.Generator().manual_seed(seed)
    grid = Uniform(bits, 16, symmetric)
    scale = torch.rand(2, groups, generator=draw) + 0.01
    zeros = None if symmetric else torch.randint(2**bits, (2, groups), generator=draw, dtype=torch.uint8)
    codes = torch.randint(2**bits, (2, 16 * groups), generator=draw, dtype=torch.uint8)
    rows = dequantize(codes, Steps(scale, zeros), grid)
    rows = rows.bfloat16().float() if rounded else rows
    steps, away = uniform.find(rows, grid)
    again = dequantize(encode(rows, steps, grid), steps, grid)
    assert away == 0
    torch.testing.assert_close(again, rows, rtol=0, atol=2 * uniform.NEAR * float(rows.abs().max()))


def test_weights_off_every_grid_are_told() -> None:
    import torch

    rows = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    for symmetric in (True, False):
        assert uniform.find(rows, Uniform(3, 16, symmetric))[1] == 1
    assert uniform.find(torch.zeros(2, 32), Uniform(3, 16))[1] == 0


def test_a_peer_is_healed_on_its_own_grid(bench: Any) -> None:
    reference, args = bench
    heal = {"name": "distil", "steps": 8, "rows": 1, "lr": 1e-3, "teacher": 1.0}
    arm = Arm("Fake", "int4", 4, {"bits": 4}, healed=True, heal=heal, grid={"bits": 4, "group": 0, "symmetric": True})
    plain = compression.outcome(reference, replace(arm, healed=False, heal=None, grid=None), args, dense=True)
    found = compression.outcome(reference, arm, args)
    assert found["sizes"] == plain["sizes"] and found["result"]["seconds"] > plain["result"]["seconds"]
    assert compression.digest(reference, arm) != compression.digest(reference, replace(arm, heal=heal | {"steps": 9}))
    made = folder.load(reference.place / compression.digest(reference, arm) / "artefact" / "model")
    assert {made.packed[f"{name}.weight"].label() for name in reference.linear} == {"int4 grow sym"}
    start = Scores.parse(plain["scores"]).ratio("kl_bits", "tokens")
    assert Scores.parse(found["scores"]).ratio("kl_bits", "tokens") != pytest.approx(start, rel=1e-4)


# --- what results hang on --------------------------------------------------------------------------------------------


def test_code_that_an_arm_does_not_use_does_not_make_it_again() -> None:
    names = {path.relative_to(ROOT / "src" / "shrew").as_posix()
             for path in sources.reached(["shrew.moves.quantize"], compression.ASIDE)}  # fmt: skip
    assert {"moves/quantize.py", "moves/rate.py", "entropy.py", "folder/packed.py", "folder/grids.py"} <= names
    assert not [name for name in names if name.startswith(("moves/distil", "moves/__init__", "search", "tasks"))]


def test_tables_and_plot_come_from_the_last_records_alone() -> None:
    def made(name: str, kl: float, size: int) -> Record:
        spread = [kl, kl, kl]
        detail = {"peer": name.split()[0], "alone": True, "healed": False, "bytes": size, "linear_bytes": size,
                  "bits_per_weight": 4, "top1_agreement": spread, "bits_per_byte": spread}  # fmt: skip
        return Record(run="compression", model=f"m, {name}", metric="kl", value=kl, low=kl, high=kl, detail=detail)

    sizes = [("Shrew int4", 90.0, 0.5, 0.4, 0.6)]
    told = Record(run="compression", model="m, Shrew", metric="kl_over_best_peer", value=0.5, low=0.4, high=0.6,
                  detail={"table": "whole file", "sizes": sizes, "unbeaten": []})  # fmt: skip
    records = [made("HQQ a", 0.5, 80), made("Shrew int4", 9.0, 90), made("Shrew int4", 0.25, 90), told,
               Record(run="else", model="m", metric="kl", value=1)]  # fmt: skip
    found = curves.latest(records)
    assert len(found) == 3
    assert "| 90 | int4 | 0.25 (0.25 to 0.25) | 0.5 | 0.5 (0.4 to 0.6) |" in curves.summary(found)
    ElementTree.fromstring(curves.picture(found))


# --- the smaller benchmarks ------------------------------------------------------------------------------------------


def test_costs_are_medians_and_ours_over_each_peer_by_rounds(bench: Any) -> None:
    reference, _ = bench
    names = [costs.OWN, "HQQ 4-bit g64", "torchao int4 g32 HQQ_SCALE_ONLY"]
    arms = [next(arm for arm in ARMS if arm.name == name) for name in names]

    def rounds(*seconds: float) -> list[dict[str, Any]]:
        return [{"seconds": one, "cpu_seconds": one, "peak_bytes": 2**21, "loaded_bytes": 2**20} for one in seconds]

    found = costs.facts(reference, arms, dict(zip(names, (rounds(1, 2, 9), rounds(4, 4, 4), [{"cannot": "no kernel"}]),
                                                  strict=True)))  # fmt: skip
    assert [item.value for item in found if item.metric == "cpu_seconds"] == [2, 4]
    (over,) = [item for item in found if item.metric == "cpu_over_peer"]
    assert (over.value, over.low, over.high) == (0.5, 0.25, 2.25)
    assert over.detail == {"peer": names[1], "interval": "least and most"}
    shown = costs.table(found)
    assert shown.index("no kernel") > shown.index("HQQ") > shown.index("int4 g64 | 2.0")
    assert set(costs.COSTS) <= {arm.name for arm in ARMS}


@pytest.mark.parametrize("rounds", [3, 5, 6, 7, 9])
def test_what_is_called_95_percent_of_rounds_is_about_that(rounds: int) -> None:
    draw = np.random.default_rng(rounds).lognormal(size=(1000, rounds))
    found = [runtime.ratio(row, np.ones(rounds)) for row in draw]
    kind = {"interval": "least and most"} if rounds < 6 else {}
    assert all(item[3] == kind for item in found)
    if kind:
        assert [item[1:3] for item in found] == [(row.min(), row.max()) for row in draw]
    else:  # the median of what is drawn is 1; 95 % less three standard errors of a thousand
        assert np.mean([low <= 1 <= high for _, low, high, _ in found]) > 0.93


def test_equal_quality_is_judged_on_the_split_that_chose_nothing() -> None:
    task, tokenizer = tasks.read("python"), folder.load("starter").tokenizer
    rows = equal.texts(512)
    final = [tokenizer.encode(item.text, add_special_tokens=False)[:511] for item in task.examples("final")]
    assert [ids[1:] for ids, _ in rows] == final
    seen = {item.text for item in task.examples("search")}
    assert seen and not any(text.startswith(tokenizer.decode(ids[1:])) for ids, _ in rows for text in seen)


def test_a_share_is_told_against_the_reference_that_the_gate_took() -> None:
    def said(model: str, metric: str, value: Any, **more: Any) -> Record:
        return Record(run="r", model=model, metric=metric, value=value, **more)

    kept = {"against": "healed original", "lower_bound": 0.8}
    final = {"task": "text@1/final"}
    records = [said("chosen", "bytes", 250), said("chosen", "recipe", "moves = []"),
               said("chosen", "bits_per_byte", 9.0, task="text@1/search"),
               said("chosen", "bits_per_byte", 2.0, **final),
               said("original", "bits_per_byte", 3.0, **final), said("healed original", "bits_per_byte", 1.8, **final),
               said("chosen", "retention", 0.9, low=0.85, high=0.95, n=7, detail=kept, **final)]  # fmt: skip
    found = shares.fact(0.26, 1000, records, "m")
    assert (found.value, found.low, found.high) == (1 / 0.9, 1 / 0.95, 1 / 0.85)
    assert found.detail["at_most"] == 1.25 and found.detail["bytes_over_bf16"] == 0.25
    assert "| 0.250 | 250 | 2.0000 | healed original 1.8000 |" in shares.table([found])


def test_a_share_is_made_anew_for_another_text_or_model_with_a_cache_of_its_own(
    tmp_path: Path, trained_llama_folder: Path, stories: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def run(words: list[str], **more: Any) -> Any:
        asked.append(Path(more["env"]["SHREW_CACHE"]))
        Path(words[words.index("--out") + 1]).mkdir(parents=True)
        Path(words[words.index("--out") + 1], "records.jsonl").touch()
        return argparse.Namespace(returncode=0)

    monkeypatch.setattr(shares, "subprocess", argparse.Namespace(run=run))
    text, model = tmp_path / "text.txt", tmp_path / "other" / trained_llama_folder.name
    text.write_text("One story.", "utf-8")
    shutil.copytree(trained_llama_folder, model)
    (model / "config.json").write_text((model / "config.json").read_text("utf-8") + "\n", "utf-8")
    ways = [(trained_llama_folder, stories), (trained_llama_folder, text), (model, text)]
    found = set()
    for folder_, source in (*ways, *ways):
        args = argparse.Namespace(model=str(folder_), text=[str(source)], work=tmp_path / "work", heal=1, minutes=1.0,
                                  jobs=1)  # fmt: skip
        found.add(shares.shrink(0.2, 1000, args, shares.mark(args)))
    assert len(found) == len(asked) == 3
    assert set(asked) == {(tmp_path / "work" / "cache").resolve()}


def test_files_of_another_model_or_matrix_are_made_anew(
    tmp_path: Path, trained_llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Path] = []

    def run(*words: Any) -> None:
        made.append(Path(words[words.index("--out") + 1] if "--out" in words else words[4]))
        assert not made[-1].exists()
        made[-1].touch()

    monkeypatch.setattr(equal, "run", run)
    matrix = tmp_path / "importance.npz"
    matrix.write_bytes(b"one")
    args = argparse.Namespace(work=tmp_path / "work", chosen=Path("starter"), coded=False, types=("F16", "Q8_0"),
                              importance=None, stock=[], llama="python")  # fmt: skip
    wanted = {"": 4, "again": 0, "coded": 1, "chosen": 2, "importance": 1, "another": 1}
    for change, count in wanted.items():
        args.coded |= change == "coded"
        args.chosen = trained_llama_folder if change == "chosen" else args.chosen
        args.importance = matrix if change in ("importance", "another") else None
        if change == "another":
            matrix.write_bytes(b"two")
        before = len(made)
        arms = equal.prepare(args)
        assert (change, len(made) - before) == (change, count)
        assert all(path.exists() for _, path in arms.values())


def test_flops_of_a_token_are_twice_the_products_and_what_attention_sees(trained_llama_folder: Path) -> None:
    loaded = folder.load(trained_llama_folder)
    config = loaded.model.config
    products = sum(module.weight.numel() for module in loaded.model.modules() if hasattr(module, "in_features"))
    width = config.num_attention_heads * (config.hidden_size // config.num_attention_heads)
    seen = 4 * width * config.num_hidden_layers * structure.LENGTH / 2
    assert structure.per_token(loaded) == pytest.approx(2 * products + seen, rel=0.05)
