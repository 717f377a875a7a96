"""Two factors for one: singular values against the error they promise, ranks against brute force, the dense product as
the oracle of the model."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from shrew import folder
from shrew.blocks.attention import AttentionSpec
from shrew.blocks.conv import ConvSpec
from shrew.blocks.layers import Factored
from shrew.blocks.mlp import NothingSpec
from shrew.blocks.model import ModelSpec, build
from shrew.blocks.window import WindowSpec
from shrew.errors import SpecError, UnsupportedError
from shrew.folder import Loaded
from shrew.moves import Context
from shrew.moves.distil import Distil
from shrew.moves.drop_layers import DropLayers
from shrew.moves.factor import Factor, Pair, allocate, projections
from shrew.moves.importance import damped, missed
from shrew.moves.rotate import Rotate
from shrew.moves.share import Share
from shrew.moves.smooth import Smooth

A = AttentionSpec(heads=2, kv_heads=1, bias=True)


def make(**more: Any) -> Loaded:
    torch.manual_seed(0)
    settings = {"layers": 2, "width": 32, "vocabulary": 64, "context": 64, "mixers": {"A": A}, **more}
    model = build(ModelSpec(**settings), bos_token_id=1, eos_token_id=2, pad_token_id=0).eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    return Loaded(model, None)


def answers(model: Any) -> torch.Tensor:
    ids = torch.randint(4, 64, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ids).logits
    return found


def multiplied_out(model: Any) -> Any:
    """The same model with every pair of factors as their product."""
    dense = build(ModelSpec(**{**vars(model.spec), "ranks": {}})).eval()
    state = dict(model.state_dict())
    for name in model.spec.ranks:
        low, high = state.pop(f"model.{name}.low.weight"), state.pop(f"model.{name}.high.weight")
        state[f"model.{name}.weight"] = high @ low
        if f"model.{name}.high.bias" in state:
            state[f"model.{name}.bias"] = state.pop(f"model.{name}.high.bias")
    dense.load_state_dict(state)
    return dense


@settings(max_examples=50)
@given(out=st.integers(1, 6), inputs=st.integers(1, 6), seed=st.integers(0, 999))
def test_what_is_left_out_is_the_error_and_no_pair_is_better(out: int, inputs: int, seed: int) -> None:
    chance = torch.Generator().manual_seed(seed)
    x = torch.randn(50, inputs, generator=chance) @ torch.randn(inputs, inputs, generator=chance)
    weight, moment = torch.randn(out, inputs, generator=chance).double(), (x.T @ x / 50).double()
    pair, every = Pair.of(weight, moment), torch.arange(inputs)
    for rank in range(1, min(out, inputs) + 1):
        low, high = pair.factors(rank)
        found = missed(weight, damped(moment), every, (high @ low).double())
        scale = float(pair.powers.sum())
        assert found == pytest.approx(float(pair.powers[rank:].sum()), rel=1e-3, abs=1e-4 * scale)
        other = torch.randn(out, rank, generator=chance) @ torch.randn(rank, inputs, generator=chance)
        assert missed(weight, damped(moment), every, other.double()) >= found - 1e-4 * scale
        assert pair.missed(rank) == pytest.approx(found / scale, abs=1e-4)


@settings(max_examples=50)
@given(
    shapes=st.lists(st.tuples(st.integers(4, 9), st.integers(4, 9)), min_size=1, max_size=3),
    keep=st.floats(0.3, 0.95),
    multiple=st.integers(1, 2),
    seed=st.integers(0, 999),
)
def test_ranks_fit_the_budget(shapes: list[tuple[int, int]], keep: float, multiple: int, seed: int) -> None:
    named = {str(number): shape for number, shape in enumerate(shapes)}
    chance = np.random.default_rng(seed)
    powers = {name: torch.from_numpy(np.sort(chance.random(min(shape)))[::-1].copy()) for name, shape in named.items()}
    total = sum(rows * cols for rows, cols in shapes)
    try:
        ranks = allocate(powers, named, keep, multiple)
    except UnsupportedError:
        assert sum(min(multiple * sum(shape), shape[0] * shape[1]) for shape in shapes) > keep * total
        return
    size = sum(ranks[name] * sum(shape) if name in ranks else shape[0] * shape[1] for name, shape in named.items())
    assert size <= keep * total
    assert all(rank % multiple == 0 and 0 < rank * sum(named[name]) < np.prod(named[name])
               for name, rank in ranks.items())  # fmt: skip


def test_ranks_of_equal_shapes_are_the_best_there_are() -> None:
    chance = np.random.default_rng(0)
    for _ in range(20):
        powers = {name: torch.from_numpy(np.sort(chance.random(6) ** 3)[::-1].copy()) for name in "abc"}
        ranks = allocate(powers, dict.fromkeys("abc", (12, 12)), 0.5, 1)  # 9 ranks of 24 weights each, at most 5 in one
        best = min(sum(float(powers[name][rank:].sum()) for name, rank in zip("abc", choice, strict=True))
                   for choice in itertools.product(range(1, 6), repeat=3) if sum(choice) <= 9)  # fmt: skip
        assert sum(float(powers[name][rank:].sum()) for name, rank in ranks.items()) == pytest.approx(best)


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"pattern": "WC", "mixers": {"W": WindowSpec(heads=2, window=8, gate=True), "C": ConvSpec()}},
        {"tied": False, "norms": "sandwich", "loops": 2},
    ],
    ids=["plain", "mixed", "looped"],
)
def test_it_is_the_model_of_the_products(
    more: dict[str, Any], context: Context, tmp_path: Path, said: list[str]
) -> None:
    loaded = make(**more)
    before = sum(part.weight.numel() for part in projections(loaded.model).values())
    bare = loaded.model.num_parameters() - before
    small = Factor(keep=0.6, multiple=2).apply(loaded, context)
    assert small.model.spec.ranks and all("misses" in line for line in said)
    assert small.model.num_parameters() - bare <= 0.6 * before
    dense = multiplied_out(small.model)
    torch.testing.assert_close(answers(small.model), answers(dense), rtol=1e-3, atol=1e-3)
    assert small.model.flops(9) == dense.flops(9) - 2 * small.model.spec.loops * (
        dense.num_parameters() - small.model.num_parameters()
    )
    folder.save(small, tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    wanted = {name: value.bfloat16().float() for name, value in small.model.state_dict().items()}
    assert all(torch.equal(value, wanted[name]) for name, value in again.state_dict().items())
    ids = torch.randint(4, 64, (1, 12), generator=torch.Generator().manual_seed(3))
    options: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "do_sample": False}
    cached, plain = (again.generate(ids, use_cache=use, **options) for use in (True, False))
    assert torch.equal(cached, plain)


def test_a_projection_of_low_rank_is_found(context: Context) -> None:
    loaded = make()
    name = "layers.1.ffn.up_proj"
    part = loaded.model.model.get_submodule(name)
    with torch.no_grad():
        part.weight.copy_(torch.randn(96, 4) @ torch.randn(4, 32) * 0.1)
    small = Factor(keep=0.6, multiple=4).apply(loaded, context)
    assert small.model.spec.ranks[name] == 4
    torch.testing.assert_close(
        small.model.model.get_submodule(name).high.weight @ small.model.model.get_submodule(name).low.weight,
        part.weight, rtol=1e-3, atol=1e-3)  # fmt: skip


def test_a_stock_model_end_to_end(trained_llama_folder: Path, stories: Path, apply: Any, tmp_path: Path) -> None:
    code, said = apply(trained_llama_folder, "factor", "--text", stories, "--keep", 0.7, "--out", tmp_path / "out")
    assert code == 0 and "misses" in said
    items = folder.tensors(tmp_path / "out")
    dense = [item for item in folder.tensors(trained_llama_folder) if "_proj" in item.name]
    size = sum(item.bytes for item in items if "_proj" in item.name)
    assert size <= 0.7 * sum(item.bytes for item in dense) and {item.effective for item in items} == {"bf16"}
    loaded = folder.load(tmp_path / "out")
    row = AutoTokenizer.from_pretrained(tmp_path / "out")("The cat sees", return_tensors="pt")
    assert loaded.model.generate(**row, max_new_tokens=4).shape[1] == row["input_ids"].shape[1] + 4
    code, _ = apply(tmp_path / "out", "quantize", "--text", stories, "--group", 0, "--out", tmp_path / "four")
    assert code == 0 and any(name.endswith("low.weight") for name in folder.load(tmp_path / "four").packed)


def test_healing_trains_both_factors(context: Context) -> None:
    small = Factor(keep=0.6, multiple=2).apply(make(), context)
    before = {name: value.clone() for name, value in small.model.state_dict().items()}
    small.tokenizer = type("Tokenizer", (), {"pad_token_id": 0})()
    after = Distil(steps=2, rows=2, teacher=0.0).apply(small, context).model.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name for name in before if ".low." in name or ".high.weight" in name} <= moved


def test_ranks_can_be_trained_from_the_start() -> None:
    model = build(ModelSpec(layers=1, width=64, vocabulary=50, ranks={"layers.0.ffn.up_proj": 8}))
    part: Any = model.model.get_submodule("layers.0.ffn.up_proj")
    assert isinstance(part, Factored) and part.low.weight.shape == (8, 64)
    assert float((part.high.weight @ part.low.weight).detach().std()) == pytest.approx(0.02, rel=0.5)
    for name, rank in (("layers.0.ffn.up", 8), ("norm", 1), ("layers.0.mixer.q_proj", 100)):
        with pytest.raises(SpecError, match="ranks: "):
            build(ModelSpec(layers=1, width=64, vocabulary=50, ranks={name: rank}))


def test_what_is_refused(context: Context) -> None:
    with pytest.raises(UnsupportedError, match="less than rank 32"):
        Factor(keep=0.1, multiple=32).apply(make(), context)
    small = Factor(keep=0.6, multiple=2).apply(make(), context)
    with pytest.raises(UnsupportedError, match="put factor behind"):
        DropLayers(layers=(0,)).apply(small, context)
    with pytest.raises(UnsupportedError, match="put share before factor"):
        Share().apply(small, context)
    with pytest.raises(UnsupportedError, match="no projection"):
        Factor().apply(make(mixers={"A": ConvSpec()}, ffn=NothingSpec()), context)


@pytest.mark.parametrize("move", [Smooth(), Rotate(residual=False)])
def test_what_crosses_projections_comes_before(move: Any, context: Context) -> None:
    factored = Factor(keep=0.5).apply(make(), context)
    with pytest.raises(UnsupportedError, match="put the move before factor"):
        move.apply(factored, context)


def test_a_file_for_llama_cpp_is_refused_by_name(context: Context, tmp_path: Path) -> None:
    from shrew.packers.gguf import Options, write

    small = Factor(keep=0.6, multiple=2).apply(make(mixers={"A": AttentionSpec(heads=2)}), context)
    with pytest.raises(UnsupportedError, match="no architecture for this model: ranks = "):
        write(small, tmp_path / "model.gguf", Options(), print)
