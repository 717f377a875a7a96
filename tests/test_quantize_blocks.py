"""Every block quantized, packed, saved and loaded: our own type and the stock types of the hybrids."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from stocks import hybrids
from test_folder import WORDS, logits, make_tokenizer, plain
from torch import nn
from transformers import AutoModelForCausalLM

from shrew import folder
from shrew.blocks.attention import AttentionSpec
from shrew.blocks.conv import ConvSpec
from shrew.blocks.delta import DeltaSpec
from shrew.blocks.depth import ExitSpec, MixtureOfDepthsSpec
from shrew.blocks.embeddings import NgramSpec
from shrew.blocks.linear import LinearSpec
from shrew.blocks.memory import MemorySpec
from shrew.blocks.mlp import NothingSpec
from shrew.blocks.model import ModelSpec, build
from shrew.blocks.moe import MoeSpec
from shrew.blocks.window import WindowSpec
from shrew.folder import Loaded
from shrew.moves.calibrate import hessians
from shrew.moves.quantize import Quantize

BLOCKS: dict[str, dict[str, Any]] = {
    "attention": {"mixers": {"A": AttentionSpec(heads=2, gate=True, value_embeddings=True, sinks=True, bias=True)}},
    "window": {"mixers": {"A": WindowSpec(heads=2, window=5)}},
    "conv": {"mixers": {"A": ConvSpec(bias=True)}},
    "linear": {"mixers": {"A": LinearSpec(heads=2, state=16)}},
    "mamba2": {"mixers": {"A": LinearSpec(heads=2, state=16, head_width=16, groups=1, decay="dt", conv=4, skip=True)},
               "ffn": NothingSpec(), "tied": False},
    "delta": {"mixers": {"A": DeltaSpec(heads=2, key_width=8)}},
    "memory": {"mixers": {"A": MemorySpec(heads=2, segment=8)}},
    "moe": {"mixers": {"A": AttentionSpec(heads=2)},
            "ffn": MoeSpec(experts=3, hidden=16, shared=16, shared_gate=True, balance="bias", every=2)},
    "ngrams": {"mixers": {"A": AttentionSpec(heads=2)}, "ngrams": NgramSpec(sizes=(2, 3), rows=40)},
    "depth": {"mixers": {"A": AttentionSpec(heads=2)}, "loops": 2, "exits": ExitSpec(every=1),
              "mixture_of_depths": MixtureOfDepthsSpec(every=1, share=0.9)},
}  # fmt: skip
BASE = {"vocab_size": WORDS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 48, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3,
        "initializer_range": 0.2}  # fmt: skip
HYBRIDS = hybrids(BASE)
KINDS = [*BLOCKS, *(f"stock {kind}" for kind in HYBRIDS)]


def make(kind: str) -> Loaded:
    """A tiny model of random weights in which every block matters."""
    torch.manual_seed(0)
    if kind in BLOCKS:
        spec = ModelSpec(**{"layers": 2, "width": 32, "vocabulary": WORDS, "context": 64, **BLOCKS[kind]})
        model: Any = build(spec, pad_token_id=1, bos_token_id=2, eos_token_id=3)
    else:
        name, settings = HYBRIDS[kind.removeprefix("stock ")]
        model = AutoModelForCausalLM.from_config(getattr(transformers, name)(**settings))
    for weight in model.parameters():
        if weight.ndim > 1:
            nn.init.normal_(weight, std=0.2)
    return Loaded(model.eval(), make_tokenizer())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_saved_and_loaded_gives_the_same_logits(kind: str, method: Any, context: Any, tmp_path: Path) -> None:
    loaded = make(kind)
    original = logits(loaded.model)
    names = dict(loaded.model.named_parameters())
    Quantize(bits=8, group=0, method=method, embeddings=True).apply(loaded, context)
    assert loaded.packed.keys() | loaded.untouched.keys() == names.keys()
    assert not loaded.packed.keys() & loaded.untouched.keys()
    assert (logits(loaded.model) - original).abs().mean() < 0.15 * original.abs().mean()
    folder.save(loaded, tmp_path / "q")
    folder.save(make(kind), tmp_path / "dense")
    again, dense = folder.load(tmp_path / "q"), folder.load(tmp_path / "dense")
    assert again.packed.keys() == loaded.packed.keys()
    for name, packed in loaded.packed.items():  # codes are exact; what is dense is rounded to bf16
        assert torch.equal(again.model.get_parameter(name), packed.dense())
        dense.model.get_parameter(name).data.copy_(packed.dense())
    assert torch.equal(logits(again.model), logits(dense.model))
    assert torch.equal(logits(plain(tmp_path / "q").eval()), logits(again.model))


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_left_alone_has_a_true_reason(kind: str, context: Any, said: list[str]) -> None:
    loaded = make(kind)
    Quantize(bits=4, group=0, embeddings=True).apply(loaded, context)
    assert [line for line in said if "no calibration text" in line] == []
    for name, reason in loaded.untouched.items():
        weight = loaded.model.get_parameter(name)
        last, owner = name.removesuffix(".weight").rpartition(".")[2], name.rpartition(".")[0]
        if weight.ndim == 1:
            wanted = "one-dimensional"
        elif "conv" in last or "conv" in owner.rpartition(".")[2]:
            wanted = "taps of a convolution"
        elif last in ("gate", "router", "score", "shared_gate", "shared_expert_gate"):
            wanted = "a router"
        else:
            assert min(weight.shape) < 16, name
            wanted = "too small"
        assert reason.startswith(wanted), (name, reason)


@pytest.mark.parametrize("kind", KINDS)
def test_gptq_beats_rounding_on_every_input(kind: str, context: Any) -> None:
    statistics = hessians(make(kind), context.calibration)
    reference, losses = make(kind), {}
    for method in ("gptq", "rtn"):
        move = Quantize(bits=3, group=0, method=method, sequential=False)  # type: ignore[arg-type]
        loaded = move.apply(make(kind), context)
        total = 0.0
        for name, packed in loaded.packed.items():
            change = packed.dense() - reference.model.get_parameter(name).detach()
            total += float(torch.einsum("...ri,...ij,...rj->", change, statistics[name], change))
        losses[method] = total
    assert losses["gptq"] < 0.9 * losses["rtn"]


def test_our_experts_are_seen_by_the_tokens_they_get(context: Any) -> None:
    loaded, seen = make("moe"), []
    experts = loaded.model.get_submodule("model.layers.1.ffn.experts")
    handle = experts.register_forward_pre_hook(lambda _, args: seen.append(args[:2]))
    statistics = hessians(loaded, context.calibration)
    handle.remove()
    wanted = torch.zeros(3, 32, 32)
    for hidden, index in seen:
        for expert in range(3):
            rows = hidden[(index == expert).any(-1)]
            wanted[expert] += rows.T @ rows
    torch.testing.assert_close(statistics["model.layers.1.ffn.experts.gate_up_proj"], wanted, rtol=1e-4, atol=1e-3)
