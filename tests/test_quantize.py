"""Quantization: pure arithmetic with eight numbers, then whole models of other people's architectures."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_folder import ZOO, logits, make_model, make_tokenizer, plain

from shrew import folder, spec
from shrew.errors import SpecError, UnsupportedError
from shrew.folder import Grid, Loaded, Steps, Uniform
from shrew.folder.grids import dequantize, encode, groups
from shrew.moves import grids
from shrew.moves.calibrate import Stage, hessians
from shrew.moves.quantize import Quantize, quantizable


@pytest.fixture
def fresh() -> Callable[[str], Loaded]:
    return lambda kind: Loaded(make_model(kind), make_tokenizer())


def matrix(seed: int, rows: int, cols: int) -> torch.Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))


# Arithmetic


def test_rounding_eight_numbers() -> None:
    rows = torch.tensor([[-4.0, -1.0, 0.4, 2.6], [0.0, 0.0, 0.0, 0.0]])
    codes, steps = grids.nearest(rows, Uniform(3, 0), search=False)
    assert steps.zeros is None
    assert steps.scales.flatten().tolist() == [1, 1]
    assert codes.tolist() == [[0, 3, 4, 7], [4, 4, 4, 4]]
    codes, steps = grids.nearest(torch.tensor([[0.0, 1.0, 2.0, 7.0]]), Uniform(3, 0, False), search=False)
    assert steps.zeros is not None
    assert (codes.tolist(), steps.scales.tolist(), steps.zeros.tolist()) == ([[0, 1, 2, 7]], [[1]], [[0]])


@given(st.integers(2, 8), st.integers(0, 40), st.booleans(), st.integers(1, 70), st.integers(0, 2**32))
def test_what_is_on_the_grid_stays(bits: int, group: int, symmetric: bool, cols: int, seed: int) -> None:
    grid = Uniform(bits, group, symmetric)
    codes, steps = grids.nearest(matrix(seed, 3, cols), grid)
    assert int(codes.max()) < 2**bits
    assert steps.scales.shape == (3, groups(cols, group))
    values = dequantize(codes, steps, grid)
    assert torch.equal(dequantize(encode(values, steps, grid), steps, grid), values)


@settings(max_examples=30)
@given(st.integers(2, 8), st.booleans(), st.integers(0, 2**32))
def test_searching_the_range_never_hurts_much_and_bits_help(bits: int, symmetric: bool, seed: int) -> None:
    rows = matrix(seed, 8, 64)

    def error(grid: Grid, search: bool) -> float:
        return float((dequantize(*grids.nearest(rows, grid, search), grid) - rows).square().mean())

    assert error(Uniform(bits, 32, symmetric), True) <= error(Uniform(bits, 32, symmetric), False) * 1.05
    if bits < 8:
        assert error(Uniform(bits + 1, 32, symmetric), True) < error(Uniform(bits, 32, symmetric), True)


def test_error_is_bounded_by_half_a_step() -> None:
    rows = matrix(1, 16, 96)
    grid = Uniform(8, 32, False)
    codes, steps = grids.nearest(rows, grid, search=False)
    step = steps.scales.float().repeat_interleave(32, 1)
    error = (dequantize(codes, steps, grid) - rows).abs()
    # Rounding the scale to bf16 may clip the ends of the range by up to half a percent.
    assert (error <= 0.5 * step + 0.005 * rows.abs()).all()


def correlated(seed: int, tokens: int, cols: int) -> torch.Tensor:
    return matrix(seed, tokens, cols // 4) @ matrix(seed + 1, cols // 4, cols) + 0.1 * matrix(seed + 2, tokens, cols)


def slow_gptq(rows: torch.Tensor, hessian: torch.Tensor, grid: Grid, damp: float) -> torch.Tensor:
    """The definition: after each column, solve for the best change of all columns still free (OBS)."""
    rows = rows.double().clone()
    matrix = hessian.double() + damp * hessian.double().diagonal().mean() * torch.eye(len(hessian)).double()
    importance = hessian.diagonal()
    result = torch.empty_like(rows)
    for column in range(rows.shape[1]):
        width = grid.group or rows.shape[1]
        if column % width == 0:
            steps = grids.fit(rows[:, column : column + width].float(), grid, importance[None, column : column + width])
        value = rows[:, column : column + 1]
        chosen = dequantize(encode(value.float(), steps, grid), steps, grid).double()
        inverse = torch.linalg.inv(matrix[column:, column:])
        rows[:, column:] -= (value - chosen) / inverse[0, 0] * inverse[:1]
        result[:, column] = chosen[:, 0]
    return result.float()


@pytest.mark.parametrize(
    "grid", [Uniform(3, 16), Uniform(4, 48), Uniform(4, 0), Uniform(2, 100, False)], ids=Uniform.label
)
def test_gptq_equals_its_definition(grid: Grid) -> None:
    rows, inputs = matrix(3, 12, 144), correlated(7, 800, 144)
    hessian = inputs.T @ inputs
    fast = dequantize(*grids.gptq(rows[None], *grids.decompose(hessian[None], 0.01), grid), grid)
    slow = slow_gptq(rows, hessian, grid, 0.01)
    assert (fast != slow).float().mean() < 0.02  # float32 against float64: a tie may fall the other way

    def loss(chosen: torch.Tensor) -> float:
        return float(((chosen - rows) @ inputs.T).square().sum())

    assert loss(fast) == pytest.approx(loss(slow), rel=0.05)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_gptq_beats_rounding_on_correlated_inputs(bits: int, symmetric: bool) -> None:
    rows, inputs = matrix(3, 32, 192), correlated(7, 1000, 192)  # more than one block of columns
    grid = Uniform(bits, 64, symmetric)
    upper, importance = grids.decompose((inputs.T @ inputs)[None], 0.01)

    def loss(codes: torch.Tensor, steps: Steps) -> float:
        return float(((dequantize(codes, steps, grid) - rows) @ inputs.T).square().sum())

    assert loss(*grids.gptq(rows[None], upper, importance, grid)) < 0.6 * loss(*grids.nearest(rows, grid))


def test_gptq_in_a_batch_equals_one_by_one() -> None:
    rows, inputs = matrix(1, 12, 32).reshape(2, 6, 32), torch.stack([correlated(1, 200, 32), correlated(2, 200, 32)])
    hessian, grid = inputs.transpose(1, 2) @ inputs, Uniform(4, 16)
    together = dequantize(*grids.gptq(rows, *grids.decompose(hessian, 0.01), grid), grid)
    for i in range(2):
        one = grids.gptq(rows[i : i + 1], *grids.decompose(hessian[i : i + 1], 0.01), grid)
        assert torch.allclose(dequantize(*one, grid), together[6 * i : 6 * i + 6])


def test_gptq_without_statistics_is_rounding() -> None:
    rows, grid = matrix(1, 8, 64), Uniform(4, 32)
    codes = grids.gptq(rows[None], *grids.decompose(torch.zeros(1, 64, 64), 0.01), grid)
    assert torch.equal(dequantize(*codes, grid), dequantize(*grids.nearest(rows, grid), grid))


def test_gptq_survives_inputs_that_are_copies_of_each_other() -> None:
    inputs = matrix(0, 50, 1).expand(50, 64) * 1e3
    upper, _ = grids.decompose((inputs.T @ inputs)[None], 1e-9)
    assert torch.isfinite(upper).all()


# Whole models


@pytest.mark.parametrize("kind", ZOO)
@pytest.mark.parametrize("method", ["gptq", "rtn"])
@pytest.mark.parametrize("embeddings", [True, False])
def test_every_architecture_saved_and_loaded_gives_the_same_logits(
    kind: str, method: Any, embeddings: bool, fresh: Callable[[str], Loaded], context: Any, tmp_path: Path
) -> None:
    loaded = fresh(kind)
    original = logits(loaded.model)
    names = dict(loaded.model.named_parameters())
    Quantize(bits=8, group=32, method=method, embeddings=embeddings).apply(loaded, context)
    assert loaded.packed.keys() | loaded.untouched.keys() == names.keys()
    assert not loaded.packed.keys() & loaded.untouched.keys()
    big = {name for name in names if any(part in name for part in ("proj", "c_attn", "c_fc", "Wi", "ffn.lin"))}
    assert big <= {name for name in names if name.endswith("bias")} | loaded.packed.keys()
    assert (logits(loaded.model) - original).abs().mean() < 0.1 * original.abs().mean()
    folder.save(loaded, tmp_path / "q")
    folder.register()
    again = folder.load(tmp_path / "q")
    dense = folder.load(_bf16(loaded, kind, tmp_path))  # dense weights are rounded to bf16, codes are exact
    for name, packed in loaded.packed.items():
        assert torch.equal(again.model.get_parameter(name), packed.dense())
        dense.model.get_parameter(name).data.copy_(packed.dense())
    assert torch.equal(logits(again.model), logits(dense.model))
    assert torch.equal(logits(plain(tmp_path / "q").eval()), logits(again.model))


def _bf16(loaded: Loaded, kind: str, tmp_path: Path) -> Path:
    folder.save(Loaded(make_model(kind), make_tokenizer()), tmp_path / "dense")
    return tmp_path / "dense"


@pytest.mark.parametrize("kind", ZOO)
def test_gptq_beats_rounding_in_the_model(kind: str, fresh: Callable[[str], Loaded], context: Any) -> None:
    """On the calibration text itself, output errors of each layer are smaller."""
    reference = fresh(kind)
    statistics = hessians(reference, context.calibration)
    losses = {}
    for method in ("gptq", "rtn"):
        move = Quantize(bits=3, group=32, method=method, sequential=False)  # type: ignore[arg-type]
        loaded = move.apply(fresh(kind), context)
        total = 0.0
        for name, packed in loaded.packed.items():
            change = packed.dense() - reference.model.get_parameter(name).detach()
            change = change.mT if packed.transposed else change
            total += float(torch.einsum("...ri,...ij,...rj->", change, statistics[name], change))
        losses[method] = total
    assert losses["gptq"] < 0.8 * losses["rtn"]


def test_statistics_are_sums_over_real_inputs(fresh: Callable[[str], Loaded], context: Any) -> None:
    loaded = fresh("llama")
    statistics = hessians(loaded, context.calibration[:2])
    seen = []
    module = loaded.model.model.layers[1].mlp.down_proj
    handle = module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0]))
    for sequence in context.calibration[:2]:
        loaded.model(input_ids=torch.from_numpy(sequence)[None])
    handle.remove()
    inputs = torch.cat(seen).detach()
    assert torch.allclose(statistics["model.layers.1.mlp.down_proj.weight"], inputs.T @ inputs, rtol=1e-4, atol=1e-4)
    layer = "model.layers.0.self_attn."
    assert statistics[layer + "q_proj.weight"] is statistics[layer + "v_proj.weight"]
    assert not module._forward_pre_hooks


def test_expert_statistics_count_only_routed_tokens(fresh: Callable[[str], Loaded], context: Any) -> None:
    loaded = fresh("olmoe")
    statistics = hessians(loaded, context.calibration)
    shared = []
    block = loaded.model.model.layers[0].mlp
    handle = block.register_forward_pre_hook(lambda _, inputs: shared.append(inputs[0].reshape(-1, 64)))
    for sequence in context.calibration:
        loaded.model(input_ids=torch.from_numpy(sequence)[None])
    handle.remove()
    inputs = torch.cat(shared).detach()
    found = statistics["model.layers.0.mlp.experts.gate_up_proj"]
    assert found.shape == (4, 64, 64)
    # Each token goes to two experts.
    assert torch.allclose(found.sum(0), 2 * inputs.T @ inputs, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("kind", ["tied", "gpt2", "gemma3"])
def test_tied_weights_stay_tied(kind: str, fresh: Callable[[str], Loaded], context: Any) -> None:
    model = Quantize(embeddings=True).apply(fresh(kind), context).model
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_single_weights_get_their_own_bits(fresh: Callable[[str], Loaded], context: Any, tmp_path: Path) -> None:
    up, down, head = "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.down_proj.weight", "lm_head.weight"
    loaded = Quantize(bits=4, group=32, tensors={up: 8, down: 0, head: 6}).apply(fresh("llama"), context)
    assert loaded.packed[up].grid == Uniform(8, 32)
    assert loaded.packed[head].grid == Uniform(6, 32)
    assert down not in loaded.packed
    assert loaded.untouched[down] == "left alone on request"
    folder.save(loaded, tmp_path / "q")
    effective = {info.name: info.effective for info in folder.tensors(tmp_path / "q")}
    assert (effective[up], effective[down], effective[head]) == ("int8 g32 sym", "bf16", "int6 g32 sym")


def test_a_tied_name_may_be_either(fresh: Callable[[str], Loaded], context: Any) -> None:
    loaded = Quantize(tensors={"lm_head.weight": 8}).apply(fresh("tied"), context)
    assert loaded.packed["model.embed_tokens.weight"].grid.bits == 8


def test_experts_without_text_are_named(
    fresh: Callable[[str], Loaded], context: Any, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = fresh("olmoe")
    statistics, names = hessians(loaded, context.calibration), loaded.model.named_parameters()
    for name in statistics:
        if "experts" in name:
            statistics[name][2] = 0
    monkeypatch.setattr("shrew.moves.quantize.stages", lambda *_: [Stage(set(dict(names)), statistics)])
    Quantize(bits=4).apply(loaded, context)
    assert any("no text reached experts 2," in line for line in said)


def test_routers_norms_and_labels_are_left_with_a_reason() -> None:
    _, reasons = quantizable(make_model("olmoe"))
    assert "router" in reasons["model.layers.0.mlp.gate.weight"]
    assert "one-dimensional" in reasons["model.norm.weight"]
    _, reasons = quantizable(make_model("modernbert"))
    assert "label" in reasons["classifier.weight"]


def test_quantizing_twice_is_refused(fresh: Callable[[str], Loaded], context: Any, tmp_path: Path) -> None:
    folder.save(Quantize(bits=4).apply(fresh("llama"), context), tmp_path / "q")
    with pytest.raises(UnsupportedError, match=r"q_proj\.weight' is already int4 g.* sym"):
        Quantize(bits=3).apply(folder.load(tmp_path / "q"), context)


def test_bad_settings_are_refused(fresh: Callable[[str], Loaded], context: Any) -> None:
    for values in ({"bits": 1}, {"bits": 9}, {"group": 7}, {"method": "magic"}, {"tensors": {"x": 11}}, {"bit": 4}):
        with pytest.raises(SpecError):
            spec.parse(Quantize, values, "recipe")
    with pytest.raises(SpecError, match=r"did you mean 'model\.layers\.0\.mlp\.up_proj\.weight'"):
        Quantize(tensors={"model.layers.0.mlp.up_proj": 4}).apply(fresh("llama"), context)
    with pytest.raises(SpecError, match="one-dimensional"):
        Quantize(tensors={"model.norm.weight": 4}).apply(fresh("llama"), context)
    assert spec.parse(Quantize, {"bits": 3, "tensors": {"a": 4}}, "recipe") == Quantize(bits=3, tensors={"a": 4})
