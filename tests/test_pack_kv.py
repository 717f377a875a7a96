"""A packed cache of 8 and 4 bits: the graph against torch with the same rounding, the runtime, and what is refused."""

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shrew import folder
from shrew.__main__ import main
from shrew.blocks.attention import AttentionSpec
from shrew.blocks.linear import LinearSpec
from shrew.blocks.model import ModelSpec, build
from shrew.blocks.window import WindowSpec
from shrew.errors import UnsupportedError
from shrew.folder import Loaded
from shrew.packers.onnx import check
from shrew.packers.onnx.build import CHUNK
from shrew.packers.onnx.build import build as build_graph
from shrew.packers.onnx.kv import MOST, fitted, rounded
from shrew.packers.onnx.source import ours
from shrew.packers.web import Options as WebOptions
from shrew.packers.web import pack as pack_web
from shrew.runtime import Engine, Request, load
from shrew.runtime.manifest import DATA

TOKENS = np.random.default_rng(1).integers(3, 290, 400).tolist()


@pytest.fixture(scope="module")
def models(tiny_llama_folder: Path, tiny_tokenizer: Any) -> dict[str, Loaded]:
    """A stock type, and a hybrid with heads of 10 channels, which the operator gets in another order and padded."""
    torch.manual_seed(0)
    mixers: Any = {"A": AttentionSpec(heads=4, kv_heads=2, head_width=10), "W": WindowSpec(heads=2, window=8),
                   "L": LinearSpec(heads=2, state=8)}  # fmt: skip
    spec = ModelSpec(pattern="WALA", layers=4, width=32, vocabulary=300, context=128, mixers=mixers)
    hybrid = build(spec, bos_token_id=0, eos_token_id=1, pad_token_id=2).eval()
    with torch.no_grad():
        for p in hybrid.parameters():
            p.normal_(std=0.3) if p.ndim > 1 else p.uniform_(0.5, 1.5)
    return {"llama": folder.load(tiny_llama_folder), "hybrid": Loaded(hybrid, tiny_tokenizer)}


@pytest.mark.parametrize("name", ["llama", "hybrid"])
@pytest.mark.parametrize("bits", [8, 4])
@torch.inference_mode()
def test_the_graph_reads_what_torch_rounds(name: str, bits: int, models: dict[str, Loaded], tmp_path: Path) -> None:
    built = build_graph(models[name], bits, TOKENS)
    (tmp_path / "g.onnx").write_bytes(built.graph.proto(built.graph.write(tmp_path / DATA)))
    runner = check.Runner(check.opened(tmp_path / "g.onnx"), built.graph.states, 128, CHUNK)
    kinds = {(state.dtype, state.shape[-1]) for state in built.graph.states if state.kind == "cache"}
    assert kinds == {("int8" if bits == 8 else "uint8", (16 if bits == 8 else 8))}
    model, tokens = ours(models[name])[0], TOKENS[:70]
    plain = model(input_ids=torch.tensor([tokens])).logits[0].numpy()
    assert len(built.graph.kv) == 2

    def project(block: Any, steps: Any, *args: Any) -> Any:
        q, k, v = type(block).project(block, *args)
        return q, rounded(k, steps.keys[:, None], bits), rounded(v, steps.values[:, None], bits)

    for mixer, steps in built.graph.kv.items():
        block = model.get_submodule(mixer)
        block.project = functools.partial(project, block, steps)
    wanted = model(input_ids=torch.tensor([tokens])).logits[0].numpy()
    for mixer in built.graph.kv:
        del model.get_submodule(mixer).project
    found = np.concatenate([runner.feed(tokens[:64]), *(runner.feed([token]) for token in tokens[64:])])
    # A value that lies between two codes may be rounded either way by either, so a few logits differ by a little.
    assert np.abs(found - wanted).mean() < np.abs(plain - wanted).mean() / 20
    assert np.median(np.abs(found - wanted)) < 1e-3 < np.abs(plain - wanted).max()


def test_steps_have_the_least_squared_error() -> None:
    torch.manual_seed(0)
    x = torch.randn(500, 2, 3)
    x[0, 0, 0] = 100.0
    for bits in (8, 4):
        steps = fitted(x, bits)
        largest = x.abs().amax(0) / MOST[bits]
        error, plain = ((rounded(x, each, bits) - x).square().sum(0) for each in (steps, largest))
        assert (error <= plain + 1e-6).all() and (error < plain).any() == (bits == 4)
        codes = (rounded(x, steps, bits) / steps).round()
        assert codes.min() >= -MOST[bits] - 1 and codes.max() <= MOST[bits]
    assert torch.isfinite(fitted(torch.zeros(4, 1, 2), 4)).all()


@pytest.mark.parametrize("bits", [8, 4])
def test_the_runtime_runs_it(bits: int, tiny_llama_folder: Path, text: str, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "t.txt").write_text(text, "utf-8")
    out = tmp_path / "pack"
    arguments = ["--out", str(out), "--text", str(tmp_path / "t.txt"), "--kv", str(bits)]
    assert main(["pack", str(tiny_llama_folder), *arguments]) == 0
    assert f"held in {bits} bits" in capsys.readouterr().err
    manifest = json.loads((out / "pack.json").read_text())
    assert manifest["shipped"]["kv_bits"] == bits and manifest["shipped"]["kl_bits"] > 0
    assert {item.name for item in out.iterdir()} >= {"model.onnx", "model.bin"} and not (out / "exact.onnx").exists()
    graph = build_graph(folder.load(tiny_llama_folder)).graph  # of the full cache, for the names of the states alone
    states = [type(graph.states[0])(state["name"], state["kind"], state["dtype"], tuple(state["shape"]))
              for state in manifest["states"]]  # fmt: skip
    runner = check.Runner(check.opened(out / "model.onnx"), states, 128, CHUNK)
    wanted = runner.greedy(TOKENS[:20], 12)[0]
    with Engine(load(out), slots=2) as engine:
        for _ in range(2):  # the second time from what was kept of the first
            request = Request(prompt=TOKENS[:20], max_tokens=12, temperature=0, ignore_eos=True)
            assert [token.id for token in engine.submit(request).result().tokens] == wanted
    with pytest.raises(UnsupportedError, match="pack without --kv"):
        pack_web(str(out), tmp_path / "web", WebOptions(), print)


def test_what_has_no_growing_cache_is_refused(
    models: dict[str, Loaded], tiny_classifier_folder: Path, tmp_path: Path
) -> None:
    window = {"W": WindowSpec(heads=2, window=8)}
    spec = ModelSpec(pattern="W", layers=2, width=32, vocabulary=300, context=64, mixers=window)
    with pytest.raises(UnsupportedError, match="no full attention"):
        build_graph(Loaded(build(spec).eval(), models["llama"].tokenizer), 8, TOKENS)
    assert main(["pack", str(tiny_classifier_folder), "--out", str(tmp_path / "p"), "--kv", "8"]) == 2
