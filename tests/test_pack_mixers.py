"""Every block as ONNX nodes, run by ONNX Runtime piece by piece and token by token, against the whole pass of torch."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from test_blocks import PLAIN, SHAPES, SSM
from test_folder import WORDS, make_tokenizer
from test_quantize_blocks import KINDS, make
from test_stock_granite import TINY as GRANITE
from test_stock_mamba2 import TINY as MAMBA2
from torch import nn
from transformers import AutoModelForCausalLM

from shrew.blocks.conv import ConvSpec
from shrew.blocks.delta import DeltaSpec
from shrew.blocks.depth import MixtureOfDepthsSpec
from shrew.blocks.embeddings import NgramSpec
from shrew.blocks.linear import LinearSpec
from shrew.blocks.memory import MemorySpec
from shrew.blocks.mlp import MlpSpec
from shrew.blocks.model import ModelSpec, ShrewForCausalLM, build
from shrew.blocks.moe import MoeSpec
from shrew.folder import Loaded
from shrew.folder.packed import pack_bits
from shrew.moves.quantize import Quantize
from shrew.packers.onnx.check import opened
from shrew.packers.onnx.source import ours
from shrew.packers.onnx.trunk import causal
from shrew.packers.onnx.weights import Weights
from shrew.runtime.manifest import DATA
from shrew.runtime.manifest import GRAPH as MODEL

States = dict[str, np.ndarray]
PROMPTS, STEPS = (9, 4, 17), 6  # tokens of each row before they are decoded together


class Packed:
    """A graph in its files, and the plainest use of it."""

    def __init__(self, model: ShrewForCausalLM, weights: Weights, where: Path, level: int = 0) -> None:
        self.graph = causal(model, weights)
        offsets = self.graph.write(where / DATA)
        (where / MODEL).write_bytes(self.graph.proto(offsets, level))
        self.runs = opened(where / MODEL)

    def empty(self) -> States:
        """What stands for nothing seen, of one row."""
        return {state.name: np.zeros((1, *(64 if size == "capacity" else size for size in state.shape)), state.dtype)
                for state in self.graph.states}  # fmt: skip

    def call(self, tokens: np.ndarray, start: list[int], states: States) -> tuple[np.ndarray, States]:
        """tokens [rows, length] -> logits [rows, length, vocabulary] and the states after them."""
        inputs = {"tokens": tokens, "start": np.array(start), "wanted": np.arange(tokens.size)}
        used = {item.name for item in self.runs.get_inputs()}
        feeds = {name: value for name, value in inputs.items() if name in used}
        feeds |= {f"past.{name}": value for name, value in states.items()}
        names = ["logits", *(f"next.{name}" for name in states)]
        logits, *after = self.runs.run(names, feeds)
        assert [value.shape for value in after] == [value.shape for value in states.values()]
        return logits.reshape(*tokens.shape, -1), dict(zip(states, after, strict=True))


def text(vocabulary: int, rows: int = 3, length: int = 23, seed: int = 0) -> torch.Tensor:
    return torch.randint(4, vocabulary, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def whole(model: Any, tokens: torch.Tensor) -> np.ndarray:
    """The logits of one pass in float64, so that what differs is the graph's doing."""
    if not isinstance(model, ShrewForCausalLM):
        model.set_experts_implementation("eager")  # the others know no float64
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    found = model.double()(tokens).logits.numpy()
    model.float().load_state_dict(kept)
    return np.asarray(found)


def compare(packed: Packed, tokens: torch.Tensor, wanted: np.ndarray, spare: float = 0.0) -> None:
    """Each row's prompt in pieces of random lengths, then all rows together, one token a call, at their own places."""
    draw, align, limit = np.random.default_rng(0), packed.graph.align, 1e-4 * max(1, np.abs(wanted).max() / 8) + spare
    held = []
    for row, length in enumerate(PROMPTS):
        states, at = packed.empty(), 0
        while at < length:
            step = min(int(draw.integers(1, 9)), length - at, align - at % align if align else length)
            found, states = packed.call(tokens[row : row + 1, at : at + step].numpy(), [at], states)
            np.testing.assert_allclose(found[0], wanted[row, at : at + step], rtol=0, atol=limit)
            at += step
        held.append(states)
    states = {name: np.concatenate([one[name] for one in held]) for name in held[0]}
    for step in range(STEPS):
        places = [length + step for length in PROMPTS]
        now = tokens[range(3), places][:, None].numpy()
        found, states = packed.call(now, places, states)
        np.testing.assert_allclose(found[:, 0], wanted[range(3), places], rtol=0, atol=limit)


def shaken(model: Any) -> Any:
    """Random weights in which every block matters."""
    torch.manual_seed(0)
    for p in model.parameters():
        nn.init.normal_(p, std=0.3) if p.ndim > 1 else nn.init.uniform_(p, 0.5, 1.5)
    return model.eval()


def check(spec: ModelSpec, where: Path) -> Packed:
    model = shaken(build(spec))
    packed = Packed(model, Weights(model.state_dict()), where)
    tokens = text(spec.vocabulary or 0)
    compare(packed, tokens, whole(model, tokens))
    return packed


@pytest.mark.parametrize("name", [name for name, spec in SHAPES.items() if not spec.patches])
def test_pieces_and_tokens_are_the_whole_pass(name: str, tmp_path: Path) -> None:
    packed, tied = check(SHAPES[name], tmp_path), SHAPES[name].tied
    weights = packed.graph.weights
    unused = {name for name in weights.dense if "exit_norms" in name or (tied and "lm_head" in name)}
    assert weights.effective.keys() == weights.dense.keys() - unused  # what the manifest says is all there is
    used = {node.op_type for node in packed.graph._nodes}
    assert not used & {"If", "Loop", "Scan"}  # what runs once a call is a node; these are slow


def _model(**settings: Any) -> ModelSpec:
    return ModelSpec(**{"layers": 2, "width": 32, "vocabulary": 97, "context": 64, "mixers": {"A": PLAIN}} | settings)


SSM_OF_FOUR = replace(SSM, bias=False, head_width=16)
BASILISK = _model(
    pattern="MMBMMMMM", layers=8, ffn=MoeSpec(experts=8, top_k=2, hidden=24, every=2, normalise=False, balance="loss"),
    mixers={"B": MemorySpec(heads=4, kv_heads=2, segment=8), "M": replace(SSM_OF_FOUR, norm_groups=1)},
)  # fmt: skip
OPTIONS: dict[str, ModelSpec] = {
    "conv of one tap": _model(mixers={"A": ConvSpec(kernel=1, bias=True)}),
    "conv of many": _model(mixers={"A": ConvSpec(kernel=12)}),
    "gla, conv, two norms": _model(mixers={"A": LinearSpec(heads=4, state=5, conv=3, conv_bias=True, norm_groups=2)}),
    "gla, no gate": _model(mixers={"A": LinearSpec(heads=2, state=6, gate="none", skip=True)}),
    "gla, one norm, no gate": _model(mixers={"A": LinearSpec(heads=2, state=6, gate="none", norm_groups=1)}),
    "retnet, gate before": _model(mixers={"A": LinearSpec(heads=4, state=8, groups=2, decay="constant",
                                                          gate="before", norm_groups=1, bias=True)}),
    "retnet, one head": _model(mixers={"A": LinearSpec(heads=1, state=3, decay="constant", conv=1)}),
    "dt, gate after": _model(mixers={"A": LinearSpec(heads=4, state=8, decay="dt", norm_groups=1)}),
    "mamba2, groups": _model(mixers={"A": replace(SSM, groups=2, norm_groups=2, head_width=8)}),
    "delta, one key head": _model(mixers={"A": DeltaSpec(heads=4, key_heads=1, value_width=5)}),
    "delta, no gate": _model(mixers={"A": DeltaSpec(heads=2, gate=False, conv=2)}),
    "delta, no decay": _model(mixers={"A": DeltaSpec(heads=2, decay=False, conv=1)}),
    "memory of wide heads": _model(mixers={"A": MemorySpec(heads=2, kv_heads=1, head_width=32, segment=16)}),
    "memory of odd heads": _model(mixers={"A": MemorySpec(heads=4, kv_heads=2, head_width=6, segment=2, gate="head",
                                                          qk_norm=True)}),
    "memory, one segment": _model(mixers={"A": MemorySpec(heads=4, kv_heads=1, segment=64)}),
    "memories of one align": _model(pattern="AB", mixers={"A": MemorySpec(segment=8), "B": MemorySpec(segment=12)}),
    "one expert": _model(ffn=MoeSpec(experts=1, top_k=1)),
    "one of many": _model(ffn=MoeSpec(experts=16, top_k=1, normalise=False)),
    "all experts": _model(ffn=MoeSpec(experts=3, top_k=3, activation="relu2")),
    "sigmoids": _model(ffn=MoeSpec(experts=4, router="sigmoid", activation="gelu_tanh", shared=8)),
    "sigmoids as they are": _model(ffn=MoeSpec(experts=4, router="sigmoid", normalise=False, balance="bias")),
    "biased softmax": _model(ffn=MoeSpec(experts=4, balance="bias", shared=8, shared_gate=True)),
    "looped experts": _model(loops=3, layers=1, ffn=MoeSpec(experts=4)),
    "looped states": _model(pattern="LCD", layers=3, loops=2, mixers={
        "L": LinearSpec(heads=2, state=6), "C": ConvSpec(), "D": DeltaSpec(heads=2, value_width=9)}),
    "one n-gram": _model(ngrams=NgramSpec(sizes=(3,), rows=7), embedding_scale=2.0),
    "n-grams out of order": _model(ngrams=NgramSpec(sizes=(5, 2, 3), rows=1000)),
    "routed, scaled, sandwiched": _model(mixture_of_depths=MixtureOfDepthsSpec(every=2), residual_scale=0.5,
                                         norms="sandwich"),
    "routed experts": _model(mixture_of_depths=MixtureOfDepthsSpec(every=1), ffn=MoeSpec(experts=4, shared=8)),
    "white basilisk": BASILISK,
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_is_the_whole_pass(name: str, tmp_path: Path) -> None:
    check(OPTIONS[name], tmp_path)


def test_calls_stop_where_every_segment_does(tmp_path: Path) -> None:
    assert check(OPTIONS["memories of one align"], tmp_path).graph.align == 4
    assert check(SHAPES["grouped"], tmp_path).graph.align == 0


@pytest.mark.parametrize("length", [1, 3])
def test_what_an_earlier_segment_left_is_not_read(length: int, tmp_path: Path) -> None:
    model, tokens = shaken(build(SHAPES["memory"])), text(97)[:1]
    packed = Packed(model, Weights(model.state_dict()), tmp_path)
    _, states = packed.call(tokens[:, :4].numpy(), [0], packed.empty())
    poisoned = {name: value * np.nan if name.endswith((".k", ".v")) else value for name, value in states.items()}
    assert sum(np.isnan(value).any() for value in poisoned.values()) == 6
    found, _ = packed.call(tokens[:, 4 : 4 + length].numpy(), [4], poisoned)
    np.testing.assert_allclose(found, whole(model, tokens)[:, 4 : 4 + length], rtol=0, atol=1e-4)


@pytest.mark.parametrize("bias", [-100.0, 100.0], ids=["no token", "every token"])
@pytest.mark.parametrize("ffn", [MlpSpec(), MoeSpec(experts=4, shared=8)], ids=["mlp", "moe"])
def test_a_layer_may_get_no_token_at_all(ffn: Any, bias: float, tmp_path: Path) -> None:
    model = shaken(build(_model(mixture_of_depths=MixtureOfDepthsSpec(every=2), ffn=ffn)))
    model.model.layers[1].router.score.bias.data.fill_(bias)
    tokens = text(97)
    compare(Packed(model, Weights(model.state_dict()), tmp_path), tokens, whole(model, tokens))


@pytest.mark.parametrize("kind", ["delta", "linear"])
def test_the_strongest_and_the_weakest_decay_are_safe(kind: str, tmp_path: Path) -> None:
    """Decays of exp(-20000) and of 1, in one head each, over one call of 64 tokens."""
    mixers = {"delta": DeltaSpec(heads=2, key_width=16), "linear": replace(SSM, heads=2)}
    model = shaken(build(_model(mixers={"A": mixers[kind]})))
    for name, p in model.named_parameters():
        if name.endswith("A_log"):
            p.data.copy_(torch.tensor([9.0, -60.0]))
    tokens = text(97, rows=1, length=64)
    packed = Packed(model, Weights(model.state_dict()), tmp_path)
    found, states = packed.call(tokens.numpy(), [0], packed.empty())
    assert all(np.isfinite(value).all() for value in states.values())
    wanted = whole(model, tokens)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4 * np.abs(wanted).max())


# --- stock types and codes -------------------------------------------------------------------------------------------

BASE = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 64}  # fmt: skip
STOCK: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba2": ("Mamba2Config", MAMBA2 | {"n_groups": 2}),
    "granitemoehybrid": ("GraniteMoeHybridConfig", GRANITE),
    "lfm2": ("Lfm2Config", BASE | {"full_attn_idxs": [1, 3], "block_auto_adjust_ff_dim": False}),
    "qwen3_next": ("Qwen3NextConfig", BASE | {
        "head_dim": 16, "linear_key_head_dim": 8, "linear_value_head_dim": 12, "linear_num_key_heads": 2,
        "linear_num_value_heads": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16}),
    "olmoe": ("OlmoeConfig", BASE | {"num_experts": 4, "num_experts_per_tok": 2}),
    "mixtral": ("MixtralConfig", BASE | {"num_local_experts": 4}),
    "qwen3_moe": ("Qwen3MoeConfig", BASE | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
                                            "head_dim": 16, "decoder_sparse_step": 2}),
}  # fmt: skip


@pytest.mark.parametrize("kind", STOCK)
def test_a_stock_type_is_its_own_whole_pass(kind: str, tmp_path: Path) -> None:
    name, settings = STOCK[kind]
    model = shaken(AutoModelForCausalLM.from_config(getattr(transformers, name)(**settings)))
    packed = Packed(*ours(Loaded(model, make_tokenizer())), tmp_path)
    tokens = text(model.config.vocab_size)
    wanted = whole(model, tokens)
    with torch.no_grad():  # norms of almost nothing: torch's own float32 is as far off
        compare(packed, tokens, wanted, spare=2 * np.abs(model(tokens).logits.numpy() - wanted).max())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("bits", "symmetric"), [(2, True), (3, False), (4, True), (5, True), (6, False), (7, True),
                                                 (8, False)])  # fmt: skip
def test_codes_are_the_values_that_torch_has(kind: str, bits: int, symmetric: bool, tmp_path: Path) -> None:
    loaded = make(kind)
    context = SimpleNamespace(calibration=[], say=lambda line: None, work=None)
    group = {2: 16, 4: 32}.get(bits, 0)
    Quantize(bits=bits, group=group, symmetric=symmetric, method="rtn", embeddings=True).apply(loaded, context)
    model, weights = ours(loaded)
    packed = Packed(model, weights, tmp_path)
    tokens = text(WORDS)
    compare(packed, tokens, whole(loaded.model, tokens))
    assert sum("int" in label for label in weights.effective.values()) >= len(loaded.packed) - 1


@pytest.mark.parametrize("kind", ["linear", "delta", "memory", "moe", "stock olmoe"])
def test_the_level_that_rounds_inputs_is_near(kind: str, tmp_path: Path) -> None:
    """Experts that get no row among them, which is a case of its own in every kernel."""
    loaded = make(kind)
    context = SimpleNamespace(calibration=[], say=lambda line: None, work=None)
    Quantize(bits=4, group=32, method="rtn").apply(loaded, context)
    tokens = text(WORDS)
    wanted = whole(loaded.model, tokens)
    compare(Packed(*ours(loaded), tmp_path, level=4), tokens, wanted, spare=0.1 * np.abs(wanted).max())


def test_each_expert_has_its_own_codes_once(tmp_path: Path) -> None:
    loaded = make("moe")
    context = SimpleNamespace(calibration=[], say=lambda line: None, work=None)
    Quantize(bits=4, group=0, method="rtn").apply(loaded, context)
    model, weights = ours(loaded)
    before = set(weights.dense), set(weights.packed)
    Packed(model, weights, tmp_path)
    name = "model.layers.1.ffn.experts.gate_up_proj"
    whole_matrix = pack_bits(loaded.packed[name].codes, 4).numpy().tobytes()
    content, size = (tmp_path / DATA).read_bytes(), len(whole_matrix) // 3
    assert [content.count(whole_matrix[at : at + size]) for at in range(0, 3 * size, size)] == [1, 1, 1]
    assert weights.effective[name].startswith("int4")
    assert (set(weights.dense), set(weights.packed)) == before  # the parts that had names for a while are gone
