"""Calibration layer by layer, and rounding that is learned from what a whole layer gives."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_folder import ZOO, logits, make_model, make_tokenizer
from test_quantize_blocks import BLOCKS, make
from torch import nn

from shrew import folder
from shrew.folder import Loaded, Packed, Uniform
from shrew.folder.grids import dequantize
from shrew.moves import grids
from shrew.moves.anatomy import find_layers
from shrew.moves.calibrate import RIDGE, hessians, stages
from shrew.moves.learned import Rounding, learn
from shrew.moves.quantize import Quantize


def matrix(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def fresh(kind: str) -> Loaded:
    return make(kind) if kind in BLOCKS else Loaded(make_model(kind), make_tokenizer())


# Calibration, layer by layer


@pytest.mark.parametrize("sequential", [True, False])
@pytest.mark.parametrize("kind", [*ZOO, *BLOCKS])
def test_layer_by_layer_is_one_pass_where_nothing_changes(kind: str, sequential: bool, context: Any) -> None:
    loaded = fresh(kind)
    wanted, found = hessians(loaded, context.calibration), {}
    names: list[str] = []
    for stage in stages(loaded, context.calibration, sequential):
        found |= stage.statistics
        names += stage.names
        for correction in stage.corrections.values():
            torch.testing.assert_close(correction, torch.eye(len(correction)), rtol=0, atol=1e-3)
    assert sorted(names) == sorted(name for name, _ in loaded.model.named_parameters())
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-3 * float(value.abs().max()))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "olmoe", "delta", "distilbert"])
def test_later_layers_see_what_earlier_ones_became(kind: str, context: Any) -> None:
    """Spoil each layer in its turn: the statistics of the next are those of a model spoiled so far."""
    loaded, spoiled = fresh(kind), fresh(kind)
    for stage in stages(loaded, context.calibration):
        wanted = hessians(spoiled, context.calibration)
        for name, value in stage.statistics.items():
            torch.testing.assert_close(value, wanted[name], rtol=1e-3, atol=1e-3 * float(value.abs().max()))
        for model in (loaded.model, spoiled.model):
            with torch.no_grad():
                for name in stage.names:
                    parameter = model.get_parameter(name)
                    if parameter.ndim == 2:
                        parameter.mul_(1 + 0.1 * matrix(len(name), *parameter.shape))


def test_a_correction_is_the_regression_on_todays_inputs(context: Any) -> None:
    loaded, reference = fresh("llama"), fresh("llama")
    found = {}
    for stage in stages(loaded, context.calibration):
        found |= stage.corrections
        if stage.block is not None and stage.block.prefix.endswith(".0."):
            with torch.no_grad():
                loaded.model.get_parameter("model.layers.0.mlp.down_proj.weight").mul_(0.5)
    name = "model.layers.1.self_attn.q_proj"
    seen: dict[int, list[torch.Tensor]] = {}
    for number, model in enumerate((reference.model, loaded.model)):
        seen[number] = []
        module = model.get_submodule(name)
        handle = module.register_forward_pre_hook(lambda _, args, to=seen[number]: to.append(args[0][0]))
        for sequence in context.calibration:
            model(input_ids=torch.from_numpy(sequence)[None])
        handle.remove()
    before, now = (torch.cat(seen[number]).detach().double() for number in (0, 1))
    ridge = torch.eye(64).double() * RIDGE * (now.T @ now).diagonal().mean()
    wanted = (before.T @ now + ridge) @ torch.linalg.inv(now.T @ now + ridge)
    torch.testing.assert_close(found[name + ".weight"], wanted.float(), rtol=1e-3, atol=1e-4)
    weight = reference.model.get_parameter(name + ".weight").detach().double()
    error = (now @ (weight @ wanted).T - before @ weight.T).square().sum()
    assert error < 0.9 * ((now - before) @ weight.T).square().sum()


class Handing(nn.Module):
    """A model whose second layer is also called with something of what the first gave: a tensor or a number that the
    model takes from it, a tensor that the layer itself hands on, or its input once more under another name."""

    class Layer(nn.Module):
        def __init__(self, how: str) -> None:
            super().__init__()
            self.proj, self.how = nn.Linear(8, 8), how

        def forward(self, hidden: torch.Tensor, more: Any, again: torch.Tensor | None = None) -> Any:
            found = hidden + self.proj((hidden if again is None else again) * more).relu()
            return (found, found.square().mean()) if self.how == "layer" else found

    def __init__(self, how: str) -> None:
        super().__init__()
        self.config, self.how = SimpleNamespace(num_hidden_layers=2), how
        self.embed, self.head = nn.Embedding(16, 8), nn.Linear(8, 16)
        self.layers = nn.ModuleList(self.Layer(how) for _ in range(2))

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
        x, more = self.embed(input_ids), torch.ones(())
        for layer in self.layers:
            if self.how == "input":
                x = layer(x, more, again=x)
                continue
            found = layer(x, more)
            x, more = found if self.how == "layer" else (found, found.square().mean())
            more = more.item() if self.how == "number" else more
        return SimpleNamespace(logits=self.head(x))


@pytest.mark.parametrize("asked", ["all", "layers"])
@pytest.mark.parametrize("sequential", [True, False])
@pytest.mark.parametrize("how", ["tensor", "number", "layer", "input"])
def test_what_a_layer_is_called_with_may_hang_on_the_one_before(how: str, sequential: bool, asked: str) -> None:
    torch.manual_seed(0)
    loaded: Any = SimpleNamespace(model=Handing(how), is_classifier=False)
    text = [np.arange(number, number + 6) for number in range(5)]
    wanted, found = hessians(loaded, text), {}
    only = set(wanted) if asked == "all" else {name for name in wanted if name.startswith("layers.")}
    for stage in stages(loaded, text, sequential, only=only):
        found |= stage.statistics
    assert found.keys() >= only
    for name in only:
        torch.testing.assert_close(found[name], wanted[name])


def test_layers_that_run_twice_are_calibrated_at_once(context: Any, said: list[str]) -> None:
    loaded = fresh("depth")
    assert len(list(stages(loaded, context.calibration, say=context.say))) == 1
    assert any("at once" in line for line in said)


# Learned rounding


@settings(max_examples=40)
@given(st.integers(2, 8), st.sampled_from([0, 3, 16]), st.booleans(), st.integers(1, 40), st.integers(0, 2**32))
def test_it_starts_exactly_where_it_is_told_to(bits: int, group: int, symmetric: bool, cols: int, seed: int) -> None:
    rows, grid = matrix(seed, 4, cols), Uniform(bits, group, symmetric)
    packed = Packed(*grids.nearest(rows + 0.3 * matrix(seed + 1, 4, cols), grid), grid, (4, cols))
    start = Rounding.of(packed, rows)
    assert torch.equal(start.value().detach(), packed.dense())
    assert torch.equal(start.done().codes, packed.codes)
    assert torch.equal(start.done().steps.scales, packed.steps.scales)


def test_gradients_are_those_of_the_definition() -> None:
    """Straight through the rounding: offsets move a weight by their step, a factor moves it by how it was rounded."""
    rows, grid = matrix(1, 3, 8), Uniform(3, 0)
    start = Rounding.of(Packed(*grids.nearest(rows, grid, search=False), grid, (3, 8)), rows)
    value, slope = start.value(), matrix(2, 3, 8)
    value.backward(slope)
    scale = start.packed.steps.scales.float()
    inside = (start.base / scale).round().clamp(-4, 3) == (start.base / scale).round()
    assert inside.float().mean() > 0.8
    assert start.offsets.grad is not None
    torch.testing.assert_close(start.offsets.grad, torch.where(inside, slope * scale.abs(), 0.0))
    pull = torch.where(inside, value.detach() - start.base, value.detach())
    found = start.factors["scales"].grad
    torch.testing.assert_close(found, (slope * pull).sum(1, keepdim=True), rtol=1e-2, atol=1e-3)  # it passes bf16


@pytest.mark.parametrize("kind", ["llama", "gpt2", "olmoe", "delta", "modernbert"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_layer_is_never_worse_than_before(kind: str, symmetric: bool, context: Any, said: list[str]) -> None:
    move = Quantize(bits=2, group=16, method="learned", steps=8, symmetric=symmetric, embeddings=True)
    loaded = move.apply(fresh(kind), replace(context, calibration=context.calibration[:4]))
    pairs = [(float(line.split()[3]), float(line.split()[6])) for line in said if "squared error" in line]
    assert len(pairs) == len(find_layers(loaded.model)[1])
    assert all(after <= before for before, after in pairs)
    assert sum(after for _, after in pairs) < sum(before for before, _ in pairs)


def test_more_steps_help_and_a_seed_says_it_all(context: Any) -> None:
    def errors(steps: int, seed: int) -> tuple[float, Any]:
        loaded = fresh("llama")
        stage = next(item for item in stages(loaded, context.calibration) if item.block is not None)
        grid = Uniform(2, 16)
        named = {name: loaded.model.get_parameter(name).detach() for name in stage.names if "proj" in name}
        packed = {name: Packed(*grids.nearest(rows, grid), grid, tuple(rows.shape)) for name, rows in named.items()}
        assert stage.block is not None
        found, (before, after) = learn(stage.block, packed, named, steps, seed)
        assert after < before
        return after, found

    few, first = errors(4, 0)
    assert errors(40, 0)[0] < few
    again = errors(4, 0)[1]
    assert all(torch.equal(item.codes, again[name].codes) for name, item in first.items())
    other = errors(4, 1)[1]
    assert any(not torch.equal(item.codes, other[name].codes) for name, item in first.items())


def test_saved_and_loaded_with_the_promised_bytes(context: Any, tmp_path: Any) -> None:
    kinds = {}
    for method in ("learned", "rtn"):
        loaded = Quantize(bits=3, group=32, method=method, steps=4).apply(fresh("llama"), context)  # type: ignore[arg-type]
        folder.save(loaded, tmp_path / method)
        again = folder.load(tmp_path / method)
        assert all(torch.equal(again.packed[name].dense(), item.dense()) for name, item in loaded.packed.items())
        assert np.isfinite(logits(again.model).numpy()).all()
        again.model.generate(torch.arange(4, 9)[None], max_new_tokens=2)
        kinds[method] = {item.name: (item.effective, item.bytes) for item in folder.tensors(tmp_path / method)}
    assert kinds["learned"] == kinds["rtn"]


# Rounding to nearest, weighted


@settings(max_examples=30)
@given(st.integers(2, 8), st.booleans(), st.integers(1, 70), st.integers(0, 2**32))
def test_weighted_is_never_worse_where_inputs_are_independent(bits: int, symmetric: bool, cols: int, seed: int) -> None:
    rows, moments = matrix(seed, 5, cols), matrix(seed + 1, 1, cols).square() * 10
    grid = Uniform(bits, 16, symmetric)

    def loss(codes: torch.Tensor, steps: Any) -> torch.Tensor:
        return ((dequantize(codes, steps, grid) - rows).square() * moments).sum(1)

    plain, weighted = loss(*grids.nearest(rows, grid)), loss(*grids.weighted(rows[None], moments, grid, 0.01))
    assert (weighted <= plain * 1.00001 + 1e-9).all()


@settings(max_examples=20)
@given(st.integers(2, 5), st.sampled_from([0, 16, 24]), st.integers(2, 80), st.integers(1, 60), st.integers(0, 2**32))
def test_error_feedback_is_never_worse_than_rounding(bits: int, group: int, cols: int, seen: int, seed: int) -> None:
    """On the layer's outputs, row by row, for any inputs: few, zero, of outliers."""
    rows, inputs, grid = matrix(seed, 6, cols), matrix(seed + 1, seen, cols), Uniform(bits, group)
    inputs[:, 0], inputs[:, 1] = 0, inputs[:, 1] * 100
    rows[0] = 0
    hessian = inputs.T @ inputs

    def loss(made: Any) -> torch.Tensor:
        return grids.damage(rows[None], *made, grid, hessian[None])

    slow = ((dequantize(*grids.nearest(rows, grid), grid) - rows) @ inputs.T).square().sum(1)
    torch.testing.assert_close(loss(grids.nearest(rows, grid)).float(), slow, rtol=1e-3, atol=1e-3)
    found = loss(grids.solve(rows[None], hessian[None], grid, 0.01))
    for other in (
        grids.weighted(rows[None], hessian.diagonal()[None], grid, 0.01),
        grids.gptq(rows[None], *grids.decompose(hessian[None], 0.01), grid),
    ):
        assert (found <= loss(other)).all()


def test_important_columns_first_is_the_definition_on_sorted_columns() -> None:
    rows, inputs, grid = matrix(3, 12, 96), matrix(4, 300, 96) * torch.linspace(0.1, 3, 96), Uniform(3, 0)
    hessian = (inputs.T @ inputs)[None]
    _, importance = grids.decompose(hessian, 0.01)
    order = importance[0].argsort(descending=True, stable=True)
    sorted_upper, _ = grids.decompose(hessian[:, order][:, :, order], 0.01)
    wanted, _ = grids.gptq(rows[None][..., order], sorted_upper, importance[:, order], grid)
    steps = grids.fit(rows, grid, importance.expand_as(rows))
    found, _ = grids.gptq_ordered(rows[None], hessian, importance, steps, grid, 0.01)
    assert (found[:, order] != wanted).float().mean() < 0.01  # scales of a row are one, so order is all that differs
