"""The comparison with peers: its arithmetic, and what it says to an adapter, with a peer that only pretends."""

import argparse
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shrew import folder, spec
from shrew.moves import parse_moves
from shrew.tasks import Scores

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))

import compression  # noqa: E402
import curves  # noqa: E402
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
def bench(tmp_path_factory: pytest.TempPathFactory, trained_llama_folder: Path, stories: Path) -> Iterator[Any]:
    """A reference of the tiny llama and the arguments, with the fake among the peers."""
    tmp_path = tmp_path_factory.mktemp("compression")
    home = tmp_path / "benchmarks"
    shutil.copytree(ROOT / "benchmarks" / "peers", home / "peers")
    (home / "peers" / "fake_peer.py").write_text(FAKE, "utf-8")
    python = tmp_path / "venvs" / "fake" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n', "utf-8")
    python.chmod(0o755)
    args = argparse.Namespace(work=tmp_path / "work", venvs=tmp_path / "venvs", text=[str(stories)], bytes=3000, rows=3,
                              healing=2, threads=1, limit=120, again=False)  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compression, "HERE", home)
        patch.setitem(compression.ADAPTERS, "Fake", "fake")
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


def test_the_recipe_of_prose_suits_every_peer() -> None:
    table = spec.read_toml(ROOT / "recipes" / "prose.toml")["model"]
    assert table["width"] % 256 == 0 and table["ffn"]["hidden"] % 256 == 0
