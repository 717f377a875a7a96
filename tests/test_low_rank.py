"""Low-rank corrections beside the codes: the best there is, exact in the file, and counted."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_folder import ZOO, logits, make_model, make_tokenizer, plain
from test_quantize_blocks import BLOCKS, make

from shrew import folder, packers
from shrew.errors import FolderError, SpecError, UnsupportedError
from shrew.folder import Loaded, Packed, Uniform
from shrew.folder.packed import from_parts, to_entry, to_parts
from shrew.moves import grids
from shrew.moves.calibrate import hessians
from shrew.moves.distil.weights import on_grid
from shrew.moves.low_rank import factors
from shrew.moves.quantize import Quantize


def matrix(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def fresh(kind: str) -> Loaded:
    return make(kind) if kind in BLOCKS else Loaded(make_model(kind), make_tokenizer())


# Arithmetic


@settings(max_examples=40)
@given(st.integers(1, 3), st.integers(1, 30), st.integers(1, 30), st.integers(1, 8), st.integers(0, 2**32))
def test_no_factors_of_that_rank_do_better(batch: int, rows: int, cols: int, rank: int, seed: int) -> None:
    """The oracle: singular values of E H^(1/2) beyond the rank are what must be left (Eckart and Young 1936)."""
    error, inputs = matrix(seed, batch, rows, cols), matrix(seed + 1, batch, 50, cols) * torch.linspace(0.1, 3, cols)
    hessian = inputs.mT @ inputs
    left, right = factors(error, hessian, rank, 1e-6)
    kept = min(rank, rows, cols)
    assert (left.shape, right.shape) == ((batch * rows, kept), (batch * kept, cols))
    for at in range(batch):
        singular = torch.linalg.svdvals((error[at] @ inputs[at].T).double())
        product = left.view(batch, rows, kept)[at].double() @ right.view(batch, kept, cols)[at].double()
        found = ((error[at] - product) @ inputs[at].double().T).square().sum()
        whole, least = singular.square().sum(), singular[kept:].square().sum()
        assert least * 0.999 - 1e-9 <= found <= least + 0.002 * whole  # bf16


def test_without_statistics_it_is_the_plain_decomposition() -> None:
    error = matrix(1, 1, 20, 12)
    left, right = factors(error, None, 3, 0.01)
    u, s, v = torch.linalg.svd(error[0])
    torch.testing.assert_close(left.float() @ right.float(), u[:, :3] * s[:3] @ v[:3], rtol=0.05, atol=0.03)


def test_nothing_is_corrected_where_nothing_is_wrong() -> None:
    left, right = factors(torch.zeros(2, 5, 7), torch.eye(7).expand(2, 7, 7), 3, 0.01)
    assert not left.any()
    assert not right.any()
    left, right = factors(matrix(1, 1, 5, 7), torch.zeros(1, 7, 7), 3, 0.01)  # inputs that never came
    assert torch.isfinite(left).all()
    assert torch.isfinite(right).all()


@settings(max_examples=30)
@given(st.integers(1, 3), st.integers(1, 9), st.integers(1, 40), st.integers(1, 4), st.booleans(), st.integers(0, 999))
def test_parts_and_back(count: int, rows: int, cols: int, rank: int, transposed: bool, seed: int) -> None:
    shape = (cols, rows) if transposed else (rows, cols)
    shape = (count, *shape) if count > 1 else shape
    grid = Uniform(3, 16)
    codes, steps = grids.nearest(matrix(seed, count * rows, cols), grid)
    low = matrix(seed, count * rows, rank).bfloat16(), matrix(seed + 1, count * rank, cols).bfloat16()
    packed = Packed(codes, steps, grid, shape, transposed, low)
    parts = to_parts("w", packed)
    assert sum(parts["w" + part].nbytes for part in (":left", ":right")) == 2 * count * rank * (rows + cols)
    again = from_parts({key.removeprefix("w"): value for key, value in parts.items()},
                       json.loads(json.dumps(to_entry(packed))))  # fmt: skip
    assert torch.equal(again.dense(), packed.dense())
    wanted = packed.dense() - Packed(codes, steps, grid, shape, transposed).dense()
    product = low[0].view(count, rows, rank).float() @ low[1].view(count, rank, cols).float()
    product = (product.mT if transposed else product).reshape(shape)
    torch.testing.assert_close(wanted, product, rtol=1e-4, atol=1e-4)


# Whole models


@pytest.mark.parametrize("kind", [*ZOO, "delta", "moe"])
@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_saved_and_loaded_it_is_the_same_model(kind: str, method: Any, context: Any, tmp_path: Path) -> None:
    loaded = Quantize(bits=3, group=16, method=method, low_rank=4, embeddings=True).apply(fresh(kind), context)
    folder.save(loaded, tmp_path / "q")
    folder.save(Quantize(bits=3, group=16, method=method, embeddings=True).apply(fresh(kind), context), tmp_path / "no")
    again = folder.load(tmp_path / "q")
    without = {item.name: item.bytes for item in folder.tensors(tmp_path / "no")}
    for item in folder.tensors(tmp_path / "q"):
        if item.name in again.packed:
            packed = again.packed[item.name]
            rows, cols = packed.codes.shape
            matrices = packed.shape[0] if len(packed.shape) == 3 else 1
            assert item.effective.endswith(f" + rank {packed.rank}")
            assert item.bytes == without[item.name] + 2 * packed.rank * (rows + matrices * cols)
            assert torch.equal(packed.dense(), loaded.packed[item.name].dense())
    assert {packed.rank for packed in again.packed.values()} <= {1, 2, 3, 4}
    assert torch.equal(logits(plain(tmp_path / "q").eval()), logits(again.model))
    folder.save(again, tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (tmp_path / "q/model.safetensors").read_bytes()
    if again.model.can_generate():
        again.model.generate(torch.arange(4, 9)[None], max_new_tokens=2)


@pytest.mark.parametrize("kind", ["llama", "olmoe", "gpt2"])
@pytest.mark.parametrize("method", ["gptq", "rtn", "weighted"])
def test_never_worse_than_without_on_the_layers_inputs(kind: str, method: Any, context: Any) -> None:
    statistics = hessians(fresh(kind), context.calibration)
    reference, losses = fresh(kind), {}
    for rank in (0, 6):
        move = Quantize(bits=2, group=32, method=method, low_rank=rank, sequential=False)
        losses[rank] = {}
        for name, packed in move.apply(fresh(kind), context).packed.items():
            change = packed.dense() - reference.model.get_parameter(name).detach()
            change = change.mT if packed.transposed else change
            losses[rank][name] = float(torch.einsum("...ri,...ij,...rj->", change, statistics[name], change))
    # Rounding to nearest is corrected without a look at the inputs.
    slack = 1.3 if method == "rtn" else 1.0001
    assert all(losses[6][name] <= slack * losses[0][name] for name in losses[0])
    assert sum(losses[6].values()) < 0.9 * sum(losses[0].values())


def test_learned_rounding_keeps_the_correction(context: Any, said: list[str]) -> None:
    loaded = Quantize(bits=2, group=16, method="learned", steps=8, low_rank=4).apply(fresh("llama"), context)
    assert all(packed.rank == 4 for packed in loaded.packed.values())
    assert sum("learned" in line for line in said) == 2
    for name, packed in loaded.packed.items():
        assert torch.equal(loaded.model.get_parameter(name), packed.dense())


def test_healing_moves_codes_under_the_correction(context: Any) -> None:
    loaded = Quantize(bits=4, group=16, method="rtn", low_rank=4).apply(fresh("llama"), context)
    for name, packed in loaded.packed.items():
        codes, value = on_grid(loaded.model.get_parameter(name).detach(), packed)
        assert torch.equal(codes, packed.codes)
        assert torch.equal(value, packed.dense())


@pytest.mark.parametrize("form", ["gguf", "onnx"])
def test_forms_that_hold_none_refuse_in_one_line(form: str, context: Any, tmp_path: Path) -> None:
    folder.save(Quantize(bits=4, group=32, method="rtn", low_rank=2).apply(fresh("llama"), context), tmp_path / "q")
    with pytest.raises(UnsupportedError, match="no low-rank corrections, and 14 weights have one"):
        packers.main([str(tmp_path / "q"), "--to", form, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
    assert "low-rank" in json.loads((tmp_path / "q" / "shrew.json").read_text())["layout"]


def test_a_correction_as_large_as_the_weight_is_refused(context: Any) -> None:
    loaded = fresh("llama")
    rows, cols = loaded.model.get_parameter("model.layers.0.self_attn.q_proj.weight").shape
    most = (rows * cols - 1) // (rows + cols)
    with pytest.raises(SpecError, match=f"use low_rank = {most} at most"):
        Quantize(bits=4, group=32, method="rtn", low_rank=most + 1).apply(loaded, context)


@pytest.mark.parametrize("change", [{"rank": 3}, {"rank": 0}, {"rank": -1}, {"rank": True}, {"rank": "2"}, {}])
def test_a_config_that_lies_about_a_rank_is_refused(change: dict[str, Any], context: Any, tmp_path: Path) -> None:
    folder.save(Quantize(bits=3, group=32, method="rtn", low_rank=2).apply(fresh("llama"), context), tmp_path / "q")
    file = tmp_path / "q" / "config.json"
    config = json.loads(file.read_text())
    entry = config["quantization_config"]["tensors"]["model.layers.0.mlp.up_proj.weight"]
    del entry["rank"]
    entry.update(change)
    file.write_text(json.dumps(config))
    with pytest.raises(FolderError, match=r"up_proj\.weight"):
        folder.load(tmp_path / "q")
