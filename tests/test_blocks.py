"""Blocks against their definitions and against transformers: values, gradients, leaks, caches, folders, FLOPs."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import patched
import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, DataCollatorWithFlattening, Lfm2Config, LlamaConfig, Qwen3NextConfig
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from shrew import errors, folder, spec
from shrew.blocks.attention import Attention, AttentionSpec, naive_attention
from shrew.blocks.conv import ConvSpec
from shrew.blocks.delta import DeltaSpec
from shrew.blocks.depth import ExitSpec, MixtureOfDepthsSpec
from shrew.blocks.embeddings import NgramSpec
from shrew.blocks.layers import Place, Shape, State, rotate
from shrew.blocks.linear import LinearSpec
from shrew.blocks.memory import MemorySpec
from shrew.blocks.mlp import NothingSpec
from shrew.blocks.model import ModelSpec, ShrewForCausalLM, build
from shrew.blocks.moe import MoeSpec
from shrew.blocks.stock import adopt, as_spec, stock
from shrew.blocks.window import WindowSpec
from shrew.train import flops_per_token

PLAIN = AttentionSpec(heads=4, kv_heads=2)
NORMED = AttentionSpec(heads=2, head_width=24, qk_norm="head", rope_theta=500.0)
DELTA = DeltaSpec(heads=4, key_heads=2, key_width=8, value_width=6, chunk=4)
DELTANET = DeltaSpec(heads=2, key_width=8, conv=0, gate=False, decay=False, chunk=8)
LOCAL = WindowSpec(heads=4, kv_heads=2, window=5)
OPTIONS: dict[str, Any] = {
    "qk_norm": "all",
    "rotary_share": 0.5,
    "yarn": 4.0,
    "yarn_context": 32,
    "scale": 0.2,
    "softcap": 3.0,
    "sinks": True,
    "gate": True,
    "value_embeddings": True,
    "bias": True,
}
CAPPED = AttentionSpec(heads=4, kv_heads=2, **OPTIONS)
NEAR = WindowSpec(heads=4, kv_heads=1, window=5, **OPTIONS)
SSM = LinearSpec(heads=4, state=6, head_width=16, groups=1, decay="dt", conv=4, conv_bias=True, gate="before",
                 norm_groups=1, skip=True, bias=True)  # fmt: skip
SHAPES = {
    "grouped": ModelSpec(layers=2, width=32, vocabulary=97, context=64, mixers={"A": PLAIN}),
    "normed": ModelSpec(layers=2, width=32, vocabulary=97, context=64, tied=False, mixers={"A": NORMED}),
    "experts": ModelSpec(layers=2, width=32, vocabulary=97, context=64, mixers={"A": PLAIN},
                         ffn=MoeSpec(experts=4, every=2, shared=16, shared_gate=True, balance="bias")),
    "conv": ModelSpec(
        pattern="CA", layers=3, width=32, vocabulary=97, context=64, mixers={"A": PLAIN, "C": ConvSpec(bias=True)}
    ),
    "window": ModelSpec(layers=2, width=32, vocabulary=97, context=64, mixers={"A": LOCAL}),
    "options": ModelSpec(pattern="AB", layers=2, width=32, vocabulary=97, context=64, mixers={"A": CAPPED, "B": NEAR}),
    "unrotated": ModelSpec(layers=2, width=32, vocabulary=97, context=64, tied=False,
                           mixers={"A": AttentionSpec(rotary_share=0, scale=0.5)}),
    "gla": ModelSpec(layers=2, width=32, vocabulary=97, context=64,
                     mixers={"A": LinearSpec(heads=4, state=6, groups=2, chunk=8)}),
    "retnet": ModelSpec(layers=2, width=32, vocabulary=97, context=64,
                        mixers={"A": LinearSpec(heads=2, state=6, decay="constant", chunk=5)}),
    "mamba2": ModelSpec(layers=2, width=32, vocabulary=97, context=64, tied=False, mixers={"A": SSM},
                        ffn=NothingSpec()),
    "mixed": ModelSpec(pattern="AB", layers=3, width=32, vocabulary=97, context=64, mixers={"A": PLAIN, "B": NORMED}),
    "delta": ModelSpec(pattern="DDA", layers=3, width=32, vocabulary=97, context=64, mixers={"D": DELTA, "A": PLAIN}),
    "deltanet": ModelSpec(pattern="D", layers=2, width=32, vocabulary=97, context=64, mixers={"D": DELTANET}),
    "ngrams": ModelSpec(layers=2, width=32, vocabulary=97, context=64, ngrams=NgramSpec(sizes=(2, 4), rows=50)),
    "looped": ModelSpec(layers=2, width=32, vocabulary=97, context=64, loops=2, exits=ExitSpec(every=1)),
    "repeated": ModelSpec(pattern="AC", layers=2, width=32, vocabulary=97, context=64, repeats=(1, 2),
                          mixers={"A": PLAIN, "C": ConvSpec(bias=True)}),
    "routed": ModelSpec(layers=2, width=32, vocabulary=97, context=64, mixture_of_depths=MixtureOfDepthsSpec(every=1)),
    "memory": ModelSpec(layers=3, width=32, vocabulary=97, context=64, mixers={"A": MemorySpec(kv_heads=2, segment=4)}),
    "memories": ModelSpec(
        pattern="ABM", layers=3, width=32, vocabulary=97, context=64,
        mixers={
            "A": PLAIN, "B": MemorySpec(segment=3, gate="head", qk_norm=True),
            "M": MemorySpec(heads=2, segment=5, accumulate=True),
        },
    ),
    **patched.shapes(97, nats=4.2),
}


def _model(name: str) -> ShrewForCausalLM:
    model = build(SHAPES[name], bos_token_id=1, eos_token_id=2, pad_token_id=0).eval()
    torch.manual_seed(0)
    for p in model.parameters():  # as initialised, logits hardly depend on the text
        nn.init.normal_(p, std=0.3) if p.ndim > 1 else nn.init.uniform_(p, 0.5, 1.5)
    return model.double()  # so that only wrong arithmetic differs, not rounding


def _tokens(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 97, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=SHAPES)
def model(request: pytest.FixtureRequest) -> ShrewForCausalLM:
    return _model(request.param)


# --- attention -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 2, 7, 33])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("mixer", [PLAIN, NORMED, AttentionSpec(heads=4, kv_heads=1)], ids=["half", "normed", "one"])
def test_attention_is_its_definition(mixer: AttentionSpec, masked: bool, length: int) -> None:
    torch.manual_seed(length)
    block = Attention(mixer, Shape(32, 1e-6)).double()
    x = torch.randn(3, length, 32, dtype=torch.float64, requires_grad=True)
    causal = torch.ones(length, length, dtype=torch.bool).tril()[None, None].expand(3, 1, length, length)
    owner = torch.tensor([[0] * length, [min(i // 3, 3) for i in range(length)], [int(i > 0) for i in range(length)]])
    positions = torch.arange(length).expand(3, length)
    place = Place(positions, positions, owner if masked else None)
    mask, rotary = place.mask(), place.rotary(block.head_width, mixer.rope_theta)
    found = block(x, place)

    def heads(name: str, count: int) -> Tensor:
        y = getattr(block, f"{name}_proj")(x).view(3, length, count, -1).transpose(1, 2)
        if mixer.qk_norm == "head" and name != "v":
            y = y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt() * getattr(block, f"{name}_norm").weight
        return y if name == "v" else rotate(y, *rotary)

    q, k, v = heads("q", block.heads), heads("k", block.kv_heads), heads("v", block.kv_heads)
    y = naive_attention(q, k, v, causal if mask is None else mask)
    wanted = block.o_proj(y.transpose(1, 2).reshape(3, length, -1))
    torch.testing.assert_close(found, wanted)
    places = [x, *block.parameters()]
    weight = torch.randn_like(found)
    mine = torch.autograd.grad((found * weight).sum(), places, materialize_grads=True)
    theirs = torch.autograd.grad((wanted * weight).sum(), places, materialize_grads=True)
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other)


def test_a_mask_is_made_only_where_it_is_needed() -> None:
    def mask(owner: list[list[int]] | None, length: int, seen: int = 0) -> Any:
        tokens = torch.zeros(1 if owner is None else len(owner), length, dtype=torch.long)
        found = Place(tokens, tokens, None if owner is None else torch.tensor(owner), seen).mask()
        return None if found is None else found[:, 0].int().tolist()

    assert mask(None, 5) is None
    assert mask([[0] * 5, [7] * 5], 5) is None
    assert mask(None, 1, seen=4) is None
    assert mask(None, 2, seen=1) == [[[1, 1, 0], [1, 1, 1]]]
    assert mask([[0, 0, 1, 1]], 4) == [[[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]]
    assert mask([[0, 0, 1, 1]], 1, seen=3) == [[[0, 0, 1, 1]]]


# --- models: what may depend on what ---------------------------------------------------------------------------------


@torch.no_grad()
def test_nothing_leaks_from_the_future(model: ShrewForCausalLM) -> None:
    tokens, other = _tokens(2, 23), _tokens(2, 23, seed=1)
    other[:, :11] = tokens[:, :11]
    torch.testing.assert_close(model(tokens).logits[:, :11], model(other).logits[:, :11])
    assert not torch.allclose(model(tokens).logits[:, 11:], model(other).logits[:, 11:])


@torch.no_grad()
def test_batch_mates_do_not_matter(model: ShrewForCausalLM) -> None:
    tokens = _tokens(4, 17)
    together = model(tokens).logits
    for row in range(4):
        torch.testing.assert_close(together[row : row + 1], model(tokens[row : row + 1]).logits)


def test_a_packed_document_is_as_if_alone(model: ShrewForCausalLM) -> None:
    lengths = [1, 9, 6, 14]
    tokens = _tokens(1, sum(lengths))
    owner = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))[None]
    together = model.hidden(tokens, owner)[0].split(lengths, dim=1)
    for part, alone in zip(tokens.split(lengths, dim=1), together, strict=True):
        torch.testing.assert_close(alone, model.hidden(part)[0], rtol=1e-4, atol=1e-5)  # rotary angles are float32
    # and in gradients: a loss on the last document moves no other document's input
    rows = model.model.embed_tokens.weight
    (grad,) = torch.autograd.grad(together[-1].square().sum(), rows)
    absent = sorted(set(tokens[0, : -lengths[-1]].tolist()) - set(tokens[0, -lengths[-1] :].tolist()))
    assert grad[absent].count_nonzero() == 0


@torch.no_grad()
def test_positions_that_restart_begin_a_document(model: ShrewForCausalLM) -> None:
    rows = [{"input_ids": _tokens(1, length, seed=length)[0].tolist()} for length in (1, 6, 4)]
    packed = DataCollatorWithFlattening(return_tensors="pt")(rows)
    assert packed["position_ids"].tolist() == [[0, *range(6), *range(4)]]
    together = model(packed["input_ids"], position_ids=packed["position_ids"]).logits.split((1, 6, 4), dim=1)
    for row, found in zip(rows, together, strict=True):
        torch.testing.assert_close(found, model(torch.tensor([row["input_ids"]])).logits, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("first", [1, 5])
def test_decoding_with_a_cache_is_the_full_forward(model: ShrewForCausalLM, first: int) -> None:
    tokens = _tokens(2, 19)
    whole = model(tokens).logits
    done = model(tokens[:, :first], use_cache=True)
    parts, cache, place = [done.logits], done.past_key_values, first
    for step in (1, 1, 4, 1, 19):  # single tokens and chunks
        part = tokens[:, place : place + step]
        if part.shape[1]:
            parts.append(model(part, past_key_values=cache, use_cache=True).logits)
            place += part.shape[1]
    torch.testing.assert_close(torch.cat(parts, 1), whole)


@torch.no_grad()
def test_what_is_before_a_hole_is_not_seen_after_it(model: ShrewForCausalLM) -> None:
    tokens, mask = _tokens(1, 15), torch.tensor([[1] * 5 + [0] * 3 + [1] * 7])
    whole = model(tokens, attention_mask=mask).logits
    alone = model(tokens[:, 8:]).logits
    torch.testing.assert_close(whole[:, 8:], alone, rtol=1e-4, atol=1e-5)  # rotary angles are float32
    for cuts in ([5, 3, 7], [7, 1, 1, 2, 1, 3], [1] * 15):
        cache, parts, place = model.model.new_cache(), [], 0
        for cut in cuts:
            new, seen = tokens[:, place : place + cut], mask[:, : place + cut]
            parts.append(model(new, attention_mask=seen, past_key_values=cache).logits)
            place += cut
        torch.testing.assert_close(torch.cat(parts, 1), whole)


@torch.no_grad()
def test_an_empty_cache_is_filled_and_a_strange_one_refused(model: ShrewForCausalLM) -> None:
    tokens, cache = _tokens(2, 7), DynamicCache()
    parts = [model(part, past_key_values=cache).logits for part in tokens.split(4, dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), model(tokens).logits)
    strange = Cache(layers=[DynamicLayer() for _ in range(9)])
    with pytest.raises(errors.UsageError, match="not of this model"):
        model(tokens, past_key_values=strange)


def test_a_mask_of_the_new_positions_alone_is_refused() -> None:
    model, tokens = _model("delta"), _tokens(1, 4)
    cache = model(tokens, use_cache=True).past_key_values
    with pytest.raises(errors.UsageError, match="all positions"):
        model(tokens, attention_mask=torch.ones_like(tokens), past_key_values=cache)


@torch.no_grad()
def test_generating_left_padded_rows_equals_each_alone(model: ShrewForCausalLM) -> None:
    rows = [_tokens(1, length, seed=length) for length in (3, 8, 5)]
    ids = torch.cat([nn.functional.pad(row, (8 - row.shape[1], 0)) for row in rows])
    mask = torch.cat([nn.functional.pad(torch.ones_like(row), (8 - row.shape[1], 0)) for row in rows])
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    together = model.generate(input_ids=ids, attention_mask=mask, **options)
    for row, found in zip(rows, together, strict=True):
        alone = model.generate(input_ids=row, attention_mask=torch.ones_like(row), **options)
        assert found[8:].tolist() == alone[0, row.shape[1] :].tolist()
        assert len(set(found[8:].tolist())) > 1  # a model that only repeats itself would prove little


@torch.no_grad()
def test_hidden_states_are_given_and_a_tuple_where_asked(model: ShrewForCausalLM) -> None:
    tokens = _tokens(2, 7)
    found = model(tokens, output_hidden_states=True)
    front = model.spec.patches
    depth = front.encoder.layers + front.decoder.layers if front else model.spec.depth
    assert len(found.hidden_states) == depth + 1
    torch.testing.assert_close(found.hidden_states[0], model.model.embed(Place(tokens, tokens)))
    torch.testing.assert_close(model.logits(found.hidden_states[-1]), found.logits)
    assert model(tokens).hidden_states is None
    (logits,) = model(tokens, return_dict=False)
    assert torch.equal(logits, found.logits)


def test_hidden_states_are_those_of_the_stock_type() -> None:
    model, tokens = _model("normed").float(), _tokens(2, 7)
    mine, theirs = (m(tokens, output_hidden_states=True).hidden_states for m in (model, stock(model)))
    torch.testing.assert_close(mine, theirs)


def test_embeddings_in_place_of_tokens_are_refused() -> None:
    with pytest.raises(errors.UsageError, match="give input_ids"):
        _model("grouped")(inputs_embeds=torch.zeros(1, 2, 32))


def test_labels_are_shifted_inside(model: ShrewForCausalLM) -> None:
    tokens = _tokens(2, 9)
    done = model.float()(tokens, labels=tokens)
    wanted = nn.functional.cross_entropy(done.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    torch.testing.assert_close(done.loss, wanted)


def test_every_parameter_gets_a_gradient(model: ShrewForCausalLM) -> None:
    model(_tokens(2, 9)).logits.square().sum().backward()
    if model.spec.exits:
        model.train()(_tokens(2, 9), labels=_tokens(2, 9)).loss.backward()
    learns = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}  # all but those of entropies
    assert [name for name, grad in learns.items() if grad is None or not grad.count_nonzero()] == []


# --- FLOPs and bytes -------------------------------------------------------------------------------------------------


def test_counted_flops_are_the_measured_ones(model: ShrewForCausalLM) -> None:
    if model.spec.mixture_of_depths:
        pytest.skip("counts the wanted share of tokens; test_depth.py counts those that pass")
    if model.spec.patches:
        pytest.skip("counts patches of the mean size; test_patches.py counts those of a text")
    length = 16
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # computes every pair
        model(_tokens(1, length))
    assert counter.get_total_flops() == pytest.approx(length * model.flops(length), rel=0.02)


def test_the_flops_of_a_training_token() -> None:
    model, length = _model("grouped"), 16
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(_tokens(1, length)).logits.sum().backward()
    half = 6 * model.spec.layers * model.spec.width * length  # a causal model needs half of the pairs
    assert flops_per_token(model, length) == counter.get_total_flops() // length - half


def test_a_cache_is_as_big_as_said(model: ShrewForCausalLM) -> None:
    if model.spec.patches:
        pytest.skip("counts patches of the mean size; test_patches_decode.py counts those of a text")
    cache = model(_tokens(1, 10), use_cache=True).past_key_values
    sizes = [held.nbytes() if isinstance(held, State) else held.keys.nbytes + held.values.nbytes
             for held in cache.layers]  # fmt: skip
    for layer, size in zip(list[Any](model.model.layers), sizes, strict=False):
        assert layer.mixer.state_bytes(10, element=8) == size
    assert model.state_bytes(10, element=8) == sum(sizes)


# --- folders ---------------------------------------------------------------------------------------------------------

FRESH = """
import sys, torch
from transformers import AutoModelForCausalLM
for name in ("grouped", "normed"):
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    wanted = torch.load(name + ".pt")
    torch.testing.assert_close(model(wanted["tokens"]).logits, wanted["logits"])
    print(model.config.model_type)
assert not any(name.split(".")[0] == "shrew" for name in sys.modules)
"""


def test_stock_models_give_the_same_logits_without_shrew(tiny_tokenizer: Any, tmp_path: Path) -> None:
    for name in ("grouped", "normed"):
        model, tokens = _model(name).float(), _tokens(2, 21)
        same = stock(model)
        torch.testing.assert_close(same(tokens).logits, model(tokens).logits)
        assert torch.equal(adopt(same)(tokens).logits, model(tokens).logits)
        assert not {p.data_ptr() for p in same.parameters()} & {p.data_ptr() for p in model.parameters()}
        folder.save(folder.Loaded(same, tiny_tokenizer, dtype=torch.float32), tmp_path / name)
        torch.save({"tokens": tokens, "logits": same(tokens).logits.detach()}, tmp_path / f"{name}.pt")
    done = subprocess.run([sys.executable, "-c", FRESH], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.stdout == "llama\nqwen3\n", done.stderr


@torch.no_grad()
def test_a_model_that_no_stock_type_can_say_survives_its_folder(tiny_tokenizer: Any, tmp_path: Path) -> None:
    shape = replace(SHAPES["mixed"], vocabulary=len(tiny_tokenizer))
    torch.manual_seed(0)
    model, tokens = build(shape, eos_token_id=1).eval(), _tokens(2, 21)
    assert stock(model) is model
    folder.save(folder.Loaded(model, tiny_tokenizer, dtype=torch.float32), tmp_path)
    wanted = model(tokens).logits
    for again in (folder.load(tmp_path).model, AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)):
        assert (again.config.model_type, again.spec, again.config.eos_token_id) == ("shrew", shape, 1)
        assert torch.equal(again(tokens).logits, wanted)
        assert again.lm_head.weight is again.model.embed_tokens.weight


@torch.no_grad()
@pytest.mark.parametrize("name", ["mixed", "unrotated"])
def test_a_model_of_another_vocabulary_survives_its_folder(name: str, tmp_path: Path) -> None:
    model, tokens = _model(name).float(), _tokens(2, 7)
    model.resize_token_embeddings(101)
    assert (model.spec.vocabulary, model.lm_head.weight.shape[0], model.config.vocab_size) == (101, 101, 101)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert again.spec == model.spec
    assert torch.equal(again(tokens).logits, model(tokens).logits)
    with pytest.raises(errors.UsageError, match="value_embeddings"):
        _model("options").resize_token_embeddings(101)


def test_a_block_may_be_the_first_import() -> None:
    done = subprocess.run([sys.executable, "-c", "import shrew.blocks.attention"], capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("config", [
    Qwen3NextConfig(shared_expert_intermediate_size=0),
    Lfm2Config(hidden_size=50, num_attention_heads=4, num_key_value_heads=2),
    LlamaConfig(rms_norm_eps=0.0),
], ids=lambda config: config.model_type)  # fmt: skip
def test_a_stock_config_outside_our_ranges_is_unsupported(config: Any) -> None:
    with pytest.raises(errors.UnsupportedError, match=f"{config.model_type}: this model cannot be said"):
        as_spec(config)


# --- specs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"pattern": "AX"}, ["'AX'", "no mixer 'X'", "known: A."]),
        ({"pattern": "Aa"}, ["no mixer 'a'"]),
        ({"pattern": ""}, ["pattern", "known: A."]),
        ({"width": 30, "mixers": {"A": {"heads": 4}}}, ["mixers.A", "30", "4 heads"]),
        ({"width": 32, "mixers": {"A": {"heads": 4, "kv_heads": 3}}}, ["mixers.A", "4 heads", "3 kv_heads"]),
        ({"width": 12, "mixers": {"A": {"heads": 4}}}, ["mixers.A", "even"]),
        ({"mixers": {"A": {"kind": "atention"}}}, ["mixers.A", "'atention'", "attention"]),
        ({"mixers": {"A": {"heds": 4}}}, ["'heds'", "did you mean 'heads'?"]),
        ({"ffn": {"kind": "mpl"}}, ["ffn", "'mpl'", "mlp"]),
        ({"layers": 0}, ["layers", ">= 1"]),
        ({"eps": 0.0}, ["eps", "> 0"]),
        ({"embedding_scale": float("nan")}, ["embedding_scale", "finite", "nan"]),
        ({"residual_scale": float("inf")}, ["residual_scale", "finite", "inf"]),
        ({"logit_scale": 0.0}, ["logit_scale", "> 0"]),
        ({"mixers": {"A": {"yarn": 4.0, "yarn_context": 64, "rope_theta": 1.0}}}, ["mixers.A", "rope_theta", "> 1"]),
        ({"ffn": "moe"}, ["ffn", "table with kind", "mlp, moe", "got str"]),
        ({"ffn": []}, ["ffn", "table with kind", "got list"]),
        ({"mixers": {"A": "conv"}}, ["mixers.A", "table with kind", "got str"]),
        ({"mixers": {"A": 5}}, ["mixers.A", "table with kind", "got int"]),
        ({"mixers": 5}, ["mixers", "got int"]),
        ({"mixers": [{"kind": "conv"}]}, ["mixers", "got array"]),
        ({"mixers": {"A": {"kind": ["conv"]}}}, ["mixers.A", "unknown kind"]),
        ({"ffn": {"kind": {}}}, ["ffn", "unknown kind", "mlp"]),
    ],
)
def test_a_wrong_model_is_refused_in_words(values: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(errors.SpecError) as caught:
        spec.parse(ModelSpec, values, "r.toml")
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert "\n" not in str(caught.value)
