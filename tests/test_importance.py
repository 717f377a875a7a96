"""Optimal brain surgeon against least squares and brute force; and `narrow` that makes up for what it cuts."""

from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_folder import ZOO, make_model, make_tokenizer
from test_structure import CAUSAL, GROUPED, answers, check_folder, make

from shrew.folder import Loaded
from shrew.moves import Context, replay
from shrew.moves.anatomy import batches, logits, read_anatomy
from shrew.moves.importance import best_cut, columns_of, missed, moments, refitted, surgeon
from shrew.moves.narrow import Narrow
from shrew.moves.replay import Replay, steady

SHAPES = {"units": st.integers(2, 6), "size": st.integers(1, 3), "out": st.integers(1, 5), "seed": st.integers(0, 999)}


def problem(units: int, size: int, out: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight [out, in] and the second moment [in, in] of correlated inputs."""
    chance = torch.Generator().manual_seed(seed)
    mixed = torch.randn(units * size, units * size, generator=chance, dtype=torch.float64)
    x = torch.randn(200, units * size, generator=chance, dtype=torch.float64) @ mixed
    return torch.randn(out, units * size, generator=chance, dtype=torch.float64), x.T @ x / 200


@settings(max_examples=60)
@given(**SHAPES)
def test_the_unit_that_goes_is_the_cheapest_of_all(units: int, size: int, out: int, seed: int) -> None:
    weight, moment = problem(units, size, out, seed)
    damped = moment + 0.01 * moment.diagonal().mean() * torch.eye(len(moment), dtype=torch.float64)
    costs = {}
    for kept in combinations(range(units), units - 1):
        columns = columns_of(torch.tensor(kept), size)
        costs[kept] = missed(weight, damped, columns, refitted(weight, moment, columns))
    found = costs[tuple(surgeon(weight, moment, size, units - 1).tolist())]
    assert found <= min(costs.values()) * (1 + 1e-6) + 1e-12


@settings(max_examples=60)
@given(**SHAPES)
def test_a_refit_is_the_least_squares_one(units: int, size: int, out: int, seed: int) -> None:
    """No step away from it is better, by the damped objective."""
    weight, moment = problem(units, size, out, seed)
    damped = moment + 0.01 * moment.diagonal().mean() * torch.eye(len(moment), dtype=torch.float64)
    columns = columns_of(torch.arange(units - 1), size)
    best = refitted(weight, moment, columns)
    chance = torch.Generator().manual_seed(seed)
    for scale in (1e-3, 0.1, 1):
        step = torch.randn(best.shape, generator=chance, dtype=torch.float64) * scale
        assert missed(weight, damped, columns, best + step) >= missed(weight, damped, columns, best) - 1e-9


@settings(max_examples=60)
@given(keep=st.integers(1, 5), **SHAPES)
def test_never_worse_than_the_plain_choice(units: int, size: int, out: int, seed: int, keep: int) -> None:
    weight, moment = problem(units, size, out, seed)
    plain = torch.arange(min(keep, units))
    kept, new, _ = best_cut(weight.float(), moment, plain, size)
    assert kept.tolist() == sorted(set(kept.tolist())) and len(kept) == len(plain)
    whole = weight.float().double()
    columns = columns_of(plain, size)
    assert (
        missed(whole, moment, columns_of(kept, size), new) <= missed(whole, moment, columns, whole[:, columns]) + 1e-9
    )


def divergence(old: Loaded, new: Loaded, context: Context) -> float:
    total = 0.0
    with torch.no_grad():
        for ids in batches(old, context.calibration, 2048, 4096):
            before, after = (logits(item, ids).log_softmax(-1) for item in (old, new))
            total += float((before.exp() * (before - after)).sum())
    return total


@pytest.mark.parametrize("kind", ["llama", "gpt2", "phi3", "qwen3_moe", "bert"])
def test_channels_take_over_for_those_that_go(kind: str, context: Context, tmp_path: Path) -> None:
    """Two channels of each pair see the same: one of them can go and the other does for both."""
    loaded = make(kind)
    found = [move.apply(loaded, context) for move in
             (Narrow(mlp=0.5, multiple=8), Narrow(mlp=0.5, multiple=8, measure="hessian"))]  # fmt: skip
    shapes = [{name: value.shape for name, value in item.model.state_dict().items()} for item in found]
    assert shapes[0] == shapes[1]
    check_folder(found[1], tmp_path / "model")
    if kind in CAUSAL and kind != "qwen3_moe":
        plain, better = (divergence(loaded, item, context) for item in found)
        assert better < plain


def test_a_twin_is_no_loss(context: Context) -> None:
    loaded = make("llama")
    anatomy = read_anatomy(loaded.model)
    with torch.no_grad():
        for mlp in anatomy.mlps:
            for name in mlp.ins:
                for weight in (name, name.removesuffix("weight") + "bias"):
                    value = loaded.model.get_parameter(weight)
                    value[32:] = value[:32]
    small = Narrow(mlp=0.5, measure="hessian").apply(loaded, context)
    torch.testing.assert_close(answers(small.model), answers(loaded.model), rtol=0.05, atol=0.3)
    worse = Narrow(mlp=0.5).apply(loaded, context)
    assert divergence(loaded, small, context) < 0.05 * divergence(loaded, worse, context)


HEADS: dict[str, dict[str, Any]] = {
    "one key-value head": GROUPED | {"num_key_value_heads": 1},
    "groups": GROUPED,
    "a key-value head for each": GROUPED | {"num_key_value_heads": 4},
}


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("measure", ["activation", "hessian"])
def test_heads_of_every_grouping(name: str, measure: Any, context: Context, tmp_path: Path, said: list[str]) -> None:
    loaded = make("llama", num_key_value_heads=HEADS[name]["num_key_value_heads"])
    groups = HEADS[name]["num_key_value_heads"]
    small = Narrow(heads=0.5, measure=measure).apply(loaded, context)
    config = small.model.config
    assert (config.num_key_value_heads, config.num_attention_heads) == {1: (1, 4), 2: (1, 2), 4: (2, 2)}[groups]
    check_folder(small, tmp_path / "model")
    if groups == 1:
        assert "nothing is cut" in said[-1]
    elif measure == "hessian":
        assert divergence(loaded, small, context) < divergence(
            loaded, Narrow(heads=0.5).apply(loaded, context), context
        )


def test_moments_are_those_of_the_inputs(context: Context) -> None:
    loaded = make("llama")
    name = "model.layers.1.self_attn.o_proj.weight"
    seen: list[torch.Tensor] = []
    module = loaded.model.get_submodule(name.removesuffix(".weight"))
    hook = module.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1).double()))
    with torch.no_grad():
        for window in context.calibration:
            loaded.model(input_ids=torch.from_numpy(window)[None])
    hook.remove()
    x = torch.cat(seen)
    torch.testing.assert_close(moments(loaded, context, [name])[name], x.T @ x / len(x), rtol=1e-4, atol=1e-5)


# Running again from the first layer that changed


IDS = torch.arange(4, 44).reshape(2, 20)


@pytest.mark.parametrize("kind", ZOO)
def test_a_replay_is_the_whole_pass_bit_for_bit(kind: str) -> None:
    loaded = Loaded(make_model(kind), make_tokenizer())
    layers = steady(loaded, IDS)
    assert len(layers) == loaded.model.config.num_hidden_layers
    with torch.no_grad():
        made = Replay(loaded, IDS, layers)
        assert torch.equal(made.whole, logits(loaded, IDS))
        for first, layer in enumerate(layers):
            weight = next(value for value in layer.parameters() if value.ndim > 1)
            before = weight.clone()
            weight.mul_(1.5)
            whole = logits(loaded, IDS)
            assert not torch.equal(whole, made.whole)
            assert torch.equal(made.logits(first), whole)
            assert torch.equal(made.logits(first + 1), made.whole)  # from behind it nothing has changed
            weight.copy_(before)
    assert not any("forward" in vars(layer) for layer in layers)


class Odd(torch.nn.Module):
    """A layer that works on more than it is given, or on what it is given itself."""

    kept: torch.Tensor = torch.zeros(())

    def __init__(self, layer: Any, how: str) -> None:
        super().__init__()
        self.layer, self.how = layer, how

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name) if name in ("layer", "how") else getattr(self.layer, name)

    def forward(self, hidden: torch.Tensor, **more: Any) -> torch.Tensor:
        if self.how == "writes":
            hidden += 1
        found: torch.Tensor = self.layer(hidden, **more)
        if self.how == "leaves":
            Odd.kept = found.mean()
        return found + Odd.kept if self.how == "reads" else found


@pytest.mark.parametrize("ways", [("leaves", "reads"), ("plain", "writes")])
def test_layers_that_share_more_than_their_outputs_are_found_out(ways: tuple[str, str]) -> None:
    loaded = Loaded(make_model("llama"), make_tokenizer())
    for place, how in enumerate(ways):
        loaded.model.model.layers[place] = Odd(loaded.model.model.layers[place], how)
    assert steady(loaded, IDS) == []
    with torch.no_grad():
        made = Replay(loaded, IDS, [])
        loaded.model.model.layers[0].layer.mlp.down_proj.weight.mul_(1.5)
        assert torch.equal(made.logits(1), logits(loaded, IDS))  # all of it is run


def test_a_divergence_in_pieces_is_its_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "IN_CACHE", 100)  # two rows
    chance = torch.Generator().manual_seed(0)
    old, new = (torch.randn(3, 5, 40, generator=chance) for _ in range(2))
    p, q = old.double().softmax(-1), new.double().softmax(-1)
    assert replay.divergence(new, old.log_softmax(-1)) == pytest.approx(float((p * (p / q).log()).sum()), rel=1e-5)
    assert replay.divergence(old, old.log_softmax(-1)) == pytest.approx(0, abs=1e-5)
