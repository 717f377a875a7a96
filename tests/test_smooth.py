"""`smooth`: whatever architecture, the model says the same afterwards, and rounds better."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from test_folder import BASE, GROUPED, ZOO, logits, make_model, make_tokenizer
from test_quantize_blocks import BLOCKS, make

from shrew import folder
from shrew.errors import UnsupportedError
from shrew.folder import Loaded, Uniform
from shrew.folder.grids import dequantize
from shrew.moves import grids
from shrew.moves.calibrate import hessians
from shrew.moves.quantize import Quantize, quantizable
from shrew.moves.seams import Seam, Side, seams
from shrew.moves.smooth import Smooth

MORE = {
    "qwen2": ("Qwen2ForCausalLM", GROUPED),
    "mistral": ("MistralForCausalLM", GROUPED),
    "biased": ("LlamaForCausalLM", BASE | {"attention_bias": True, "mlp_bias": True}),
}
CAUSAL = [kind for kind, (name, _) in ZOO.items() if "Classification" not in name]
# What is left in each kind: nothing feeds it that a scale could go into, or what does feeds more.
LEFT = {
    "gpt2": ("mlp.c_proj",), "modernbert": ("layers.0.attn.Wqkv",), "delta": ("mixer.o_proj",),
    "distilbert": ("sa_layer_norm", "k_lin", "q_lin", "v_lin", "lin2"), "conv": ("mixer.out_proj",),
    "linear": ("mixer.out_proj",), "mamba2": ("mixer.out_proj",), "memory": ("mixer.o_proj",),
    "attention": ("layers.1.mixer.o_proj",),
}  # fmt: skip


def outliers(kind: str) -> Loaded:
    """A tiny model with norms and biases that matter, and channels of unlike size."""
    torch.manual_seed(0)
    if kind in MORE:
        name, values = MORE[kind]
        cls = getattr(transformers, name)
        model = cls(cls.config_class(**values))
    else:
        model = make(kind).model if kind in BLOCKS else make_model(kind)
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.ndim == 1 and ("norm" in name.lower() or ".ln_" in name) and "bias" not in name:
                value.add_(torch.rand(value.shape, generator=draw))
                value[::16] += 4
            elif value.ndim == 1:
                value.add_(0.1 * torch.randn(value.shape, generator=draw))
    return Loaded(model.eval(), make_tokenizer())


@pytest.mark.parametrize("kind", [*CAUSAL, *MORE, "modernbert", "distilbert", *BLOCKS])
def test_the_model_says_the_same(kind: str, context: Any, said: list[str], tmp_path: Path) -> None:
    loaded = outliers(kind)
    before, weights = logits(loaded.model), {name: p.clone() for name, p in loaded.model.named_parameters()}
    move = Smooth(steps=3, group=16)
    if kind == "depth":
        with pytest.raises(UnsupportedError, match="one by one"):
            move.apply(loaded, context)
        return
    move.apply(loaded, context)
    assert (logits(loaded.model) - before).abs().max() < 2e-5 * before.abs().max()
    changed = {name for name, p in loaded.model.named_parameters() if not torch.equal(p, weights[name])}
    left = " ".join(line for line in said if line.startswith("smooth: "))
    known = {side.name for seam in seams(loaded.model, torch.arange(4, 20)[None]) for side in seam.readers}
    weights_of_layers = [name for name, target in quantizable(loaded.model)[0].items()
                         if re.search(r"\.(layers?|h)\.\d", name) and target.kind != "embedding"]  # fmt: skip
    for name in weights_of_layers:
        named = any(part in name for part in LEFT.get(kind, ()))
        assert name in known or (named and name in left)
    assert all(part in left for part in LEFT.get(kind, ()))
    assert LEFT.get(kind) or not left
    assert len(changed & set(weights_of_layers)) >= len(weights_of_layers) / (9 if kind == "distilbert" else 2)
    folder.save(loaded, tmp_path / "smooth")
    again = folder.load(tmp_path / "smooth").model
    assert (logits(again) - before).abs().mean() < 0.05 * before.abs().mean()  # stored in bf16


def test_what_a_norm_adds_to_its_weight() -> None:
    for kind, plus in (("llama", 0), ("gemma3", 1), ("gpt2", 0)):
        found = seams(outliers(kind).model, torch.arange(4, 20)[None])
        norms = [seam.writers[0].plus for seam in found if "norm" in seam.what or ".ln_" in seam.what]
        assert norms == [plus] * 4


@settings(max_examples=20)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 6), st.integers(0, 2**32))
def test_factors_cross_grouped_heads(kv: int, copies: int, run: int, seed: int) -> None:
    """The definition: each query head reads the values of its group."""
    draw = torch.Generator().manual_seed(seed)
    values, out = torch.nn.Linear(5, kv * run), torch.nn.Linear(kv * copies * run, 3)
    model = torch.nn.ModuleDict({"v": values, "o": out})
    x = torch.randn(7, 5, generator=draw)

    def run_it() -> torch.Tensor:
        heads = values(x).view(7, kv, 1, run).expand(7, kv, copies, run)
        return out(heads.reshape(7, -1)).detach()

    before = run_it()
    seam = Seam("o", 0, (Side("v.weight", 0), Side("v.bias", 0)), (Side("o.weight", 1),), kv * run, 0, run, copies)
    seam.move(model, torch.rand(kv * run, generator=draw) + 0.1)
    torch.testing.assert_close(run_it(), before, rtol=1e-4, atol=1e-5)


def test_rounding_hurts_less_than_before(context: Any) -> None:
    """The outputs of every layer's weights, each on the inputs it then has, at the bits the scales were chosen for."""
    total = {}
    for name, moves in {"plain": [], "smooth": [Smooth(bits=3, group=16)]}.items():
        loaded = outliers("llama")
        for move in moves:
            loaded = move.apply(loaded, context)
        exact = {key: p.detach().clone() for key, p in loaded.model.named_parameters()}
        statistics = hessians(loaded, context.calibration)
        Quantize(bits=3, group=16, method="weighted").apply(loaded, context)
        change = {key: item.dense() - exact[key] for key, item in loaded.packed.items()}
        total[name] = {key: float(((value @ statistics[key]) * value).sum()) for key, value in change.items()}
    readers = [key for key in total["plain"] if "v_proj" not in key and "up_proj" not in key]
    assert sum(total["smooth"][key] for key in readers) < 0.97 * sum(total["plain"][key] for key in readers)


def test_the_choice_is_the_best_of_all_exponents(context: Any) -> None:
    """By the slow definition: scale, round, unscale, and run the calibration text through the difference."""
    loaded = outliers("llama")
    statistics, name = hessians(loaded, context.calibration), "model.layers.1.mlp.down_proj.weight"
    seam = next(item for item in seams(loaded.model, torch.arange(4, 20)[None]) if item.what == name)
    weight, hessian = loaded.model.get_parameter(name).detach(), statistics[name]
    move = Smooth(bits=2, group=16)
    chosen = move._choose(loaded.model, seam, {name: hessian})
    assert chosen is not None

    def error(factors: torch.Tensor) -> float:
        moments = (hessian.diagonal() / factors.square())[None]
        codes, steps = grids.weighted((weight * factors)[None], moments, Uniform(2, 16), 0.01)
        change = dequantize(codes, steps, Uniform(2, 16)) / factors - weight
        return float(torch.einsum("ri,ij,rj->", change, hessian, change))

    size = hessian.diagonal().sqrt() / hessian.diagonal().sqrt().mean()
    tried = [size ** (step / 10) for step in range(11)]
    tried = [one / (one.max() * one.min()).sqrt() for one in tried]
    assert error(chosen) == pytest.approx(min(error(one) for one in tried), rel=1e-5)


def test_what_is_refused(context: Any) -> None:
    loaded = outliers("llama")
    with pytest.raises(UnsupportedError, match="needs calibration text"):
        Smooth().apply(loaded, replace(context, calibration=[]))
    with pytest.raises(UnsupportedError, match="goes before quantize"):
        Smooth().apply(Quantize(method="rtn").apply(loaded, context), context)
