"""The options of attention, each against its definition or against the transformers class that has it."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GptOssConfig, LlamaConfig, OlmoeConfig, Qwen2Config, Qwen3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward
from transformers.models.olmoe.modeling_olmoe import OlmoeAttention, OlmoeRotaryEmbedding
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention, Qwen2RotaryEmbedding
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

from shrew import spec
from shrew.blocks.attention import Attention, AttentionSpec, naive_attention
from shrew.blocks.layers import Place, Shape, rotary_tables, rotate
from shrew.blocks.model import ModelSpec, build
from shrew.blocks.stock import adopt, dense, stock
from shrew.errors import SpecError

OPTIONS: dict[str, dict[str, Any]] = {
    "none": {}, "nope": {"rotary_share": 0.0}, "partial": {"rotary_share": 0.5}, "scale": {"scale": 0.7},
    "yarn": {"yarn": 4.0, "yarn_context": 64}, "softcap": {"softcap": 1.5}, "sinks": {"sinks": True},
    "gate": {"gate": True}, "head norm": {"qk_norm": "head"}, "all norm": {"qk_norm": "all"},
    "values": {"value_embeddings": True}, "bias": {"bias": True},
    "capped": {"softcap": 2.0, "sinks": True, "scale": 0.4, "gate": True, "qk_norm": "all"},
}  # fmt: skip


def _block(kv_heads: int = 2, **options: Any) -> Attention:
    torch.manual_seed(0)
    block = Attention(AttentionSpec(heads=4, kv_heads=kv_heads, **options), Shape(32, 1e-6, vocabulary=11)).double()
    for p in block.parameters():
        torch.nn.init.normal_(p, std=0.4)
    return block


def _place(rows: int, length: int, owner: Tensor | None = None) -> Place:
    positions = torch.arange(length).expand(rows, -1)
    return Place(torch.randint(0, 11, (rows, length)), positions, owner)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding, pair by pair."""
    half, y = cos.shape[-1] // 2, x.clone()
    for i in range(half):
        c, s, low, high = cos[..., i], sin[..., i], x[..., i], x[..., i + half]
        y[..., i], y[..., i + half] = low * c - high * s, high * c + low * s
    return y


def _normed(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def _defined(block: Attention, x: Tensor, place: Place, allowed: Tensor) -> Tensor:
    """The block written out."""
    item, rows, length = block.spec, *x.shape[:2]
    made: dict[str, Any] = {name: getattr(block, f"{name}_proj")(x) for name in "qkv"}
    if item.qk_norm == "all":
        made |= {name: _normed(made[name], getattr(block, f"{name}_norm").weight) for name in "qk"}
    q, k, v = (y.view(rows, length, -1, block.head_width) for y in made.values())
    if block.value_table is not None and block.value_gate is not None:
        v = v + block.value_gate[:, None] * block.value_table.weight[place.tokens].view(v.shape)
    q, k, v = (y.transpose(1, 2) for y in (q, k, v))
    if item.qk_norm == "head":
        q, k = _normed(q, block.q_norm.weight), _normed(k, block.k_norm.weight)  # type: ignore[union-attr]
    if item.rotary_share:
        tables = rotary_tables(place.positions, block.rotated, item.rope_theta, item.yarn, item.yarn_context or 0)
        q, k = _turned(q, *tables), _turned(k, *tables)
    y = naive_attention(q, k, v, allowed, item.scale or 0.0, item.softcap, block.sinks)
    y = y.transpose(1, 2).reshape(rows, length, -1)
    return block.o_proj(y if block.g_proj is None else y * torch.sigmoid(block.g_proj(x)))


@pytest.mark.parametrize("pairs", [2**24, 300], ids=["at once", "in blocks"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
def test_every_option_is_its_definition(
    options: dict[str, Any], packed: bool, pairs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shrew.blocks.attention.PAIRS", pairs)
    block = _block(**options)
    x = torch.randn(2, 13, 32, dtype=torch.float64, requires_grad=True)
    owner = torch.tensor([[0] * 13, [0] * 4 + [1] * 9]) if packed else torch.zeros(2, 13)
    place = _place(2, 13, owner if packed else None)
    allowed = ((owner[:, :, None] == owner[:, None]) & torch.ones(13, 13).tril().bool())[:, None]
    found, wanted = block(x, place), _defined(block, x, place, allowed)
    torch.testing.assert_close(found, wanted)
    leaves, push = [x, *block.parameters()], torch.randn_like(found)
    for mine, theirs in zip(torch.autograd.grad((found * push).sum(), leaves),
                            torch.autograd.grad((wanted * push).sum(), leaves), strict=True):  # fmt: skip
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
def test_every_parameter_is_started(options: dict[str, Any]) -> None:
    block = _block(**options)
    for p in block.parameters():
        torch.nn.init.constant_(p, torch.nan)
    block.start(0.02, 0.0)
    norms = {"q_norm.weight", "k_norm.weight"}  # the model's own rule starts every norm
    assert {name for name, p in block.named_parameters() if p.isnan().any()} <= norms
    assert not block.o_proj.weight.any()


# --- against transformers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("factor", "trained", "theta"), [(4.0, 32, 1e4), (8.0, 2048, 1e6), (1.5, 8, 100.0)])
def test_yarn_is_that_of_transformers(factor: float, trained: int, theta: float) -> None:
    rope = {"rope_type": "yarn", "rope_theta": theta, "factor": factor, "original_max_position_embeddings": trained}
    config = Qwen3Config(hidden_size=64, num_attention_heads=4, head_dim=32, rope_parameters=rope,
                         max_position_embeddings=int(factor * trained))  # fmt: skip
    rates, warm = ROPE_INIT_FUNCTIONS["yarn"](config)
    positions = torch.arange(200)[None]
    angles = positions[..., None] * torch.cat([rates, rates])
    cos, sin = rotary_tables(positions, 32, theta, factor, trained)
    torch.testing.assert_close(cos[:, 0], angles.cos() * warm, rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(sin[:, 0], angles.sin() * warm, rtol=1e-4, atol=2e-5)
    wanted = Qwen3RotaryEmbedding(config)(torch.zeros(1), positions)
    torch.testing.assert_close(cos[:, 0], wanted[0], rtol=1e-4, atol=2e-5)


@torch.no_grad()
@pytest.mark.parametrize("normed", [False, True])
def test_a_model_with_yarn_is_a_stock_type(normed: bool) -> None:
    mixer = AttentionSpec(heads=4, kv_heads=2, qk_norm="head" if normed else "none", yarn=4.0, yarn_context=16)
    ours = build(ModelSpec(layers=2, width=32, vocabulary=51, context=64, mixers={"A": mixer})).double().eval()
    for p in ours.parameters():
        torch.nn.init.normal_(p, std=0.3)
    same, tokens = stock(ours), torch.randint(0, 51, (2, 40))
    assert same.config.model_type == ("qwen3" if normed else "llama")
    torch.testing.assert_close(same(tokens).logits, ours(tokens).logits, rtol=1e-4, atol=1e-5)
    again = adopt(same)
    assert again.spec.mixers["A"] == AttentionSpec(**{**spec.dump(mixer), "head_width": 8})
    assert torch.equal(again(tokens).logits, ours(tokens).logits)


@pytest.mark.parametrize("rope", [{"rope_type": "linear", "factor": 2.0}, {
    "rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 16, "beta_fast": 16.0}])  # fmt: skip
def test_other_scalings_of_positions_are_refused(rope: dict[str, Any]) -> None:
    config = LlamaConfig(vocab_size=51, hidden_size=32, rope_parameters={**rope, "rope_theta": 1e4})
    assert dense.LLAMA.spec(config) is None


def test_partial_rotation_turns_the_first_channels() -> None:
    x, positions = torch.randn(2, 3, 7, 16), torch.arange(7).expand(2, -1)
    tables = rotary_tables(positions, 4, 100.0)
    found = rotate(x, *tables)
    assert torch.equal(found[..., 4:], x[..., 4:])
    torch.testing.assert_close(found, _turned(x, *tables))


def _plain() -> dict[str, Any]:
    return {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "attn_implementation": "eager"}


@torch.no_grad()
@pytest.mark.parametrize(
    ("config", "attention", "rotary", "options"),
    [(OlmoeConfig(**_plain()), OlmoeAttention, OlmoeRotaryEmbedding, {"qk_norm": "all"}),
     (Qwen2Config(**_plain()), Qwen2Attention, Qwen2RotaryEmbedding, {"bias": True})],
    ids=["olmoe", "qwen2"],
)  # fmt: skip
def test_an_option_is_that_of_its_stock_type(config: Any, attention: Any, rotary: Any, options: dict[str, Any]) -> None:
    config.rms_norm_eps = 1e-6
    block = _block(**options, rope_theta=config.rope_parameters["rope_theta"])
    theirs, x, positions = attention(config, 0).double(), torch.randn(2, 9, 32).double(), torch.arange(9)[None]
    theirs.load_state_dict(block.state_dict())
    mask = torch.zeros(9, 9).masked_fill(~torch.ones(9, 9).tril().bool(), -1e9)[None, None].double()
    wanted = theirs(x, position_embeddings=rotary(config)(x, positions), attention_mask=mask)[0]
    torch.testing.assert_close(block(x, _place(2, 9)), wanted, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_sinks_are_those_of_gpt_oss() -> None:
    assert GptOssConfig().model_type == "gpt_oss"
    block = _block(sinks=True, rotary_share=0.0)
    q, k, v = block.project(torch.randn(2, 9, 32).double(), _place(2, 9))
    mask = torch.zeros(9, 9).masked_fill(~torch.ones(9, 9).tril().bool(), -1e9)[None, None].double()
    module: Any = block.train(False)
    module.num_key_value_groups = 2
    wanted = eager_attention_forward(module, q, k, v, mask, scaling=block.scale)[0].transpose(1, 2)
    torch.testing.assert_close(block.causal(q, k, v, _place(2, 9)), wanted)


# --- specs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "words"),
    [({"yarn": 2.0}, ["yarn_context"]), ({"rotary_share": 0.4}, ["rotary_share", "3 channels"]),
     ({"rotary_share": 1.5}, ["rotary_share"]), ({"qk_norm": True}, ["qk_norm"]), ({"yarn": 0.5}, ["yarn"])],
)  # fmt: skip
def test_a_wrong_option_is_refused_in_words(values: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(SpecError) as caught:
        spec.parse(ModelSpec, {"width": 32, "mixers": {"A": {"heads": 4, **values}}}, "r.toml")
    assert all(word in str(caught.value) for word in words), str(caught.value)


@torch.no_grad()
def test_a_model_with_biases_is_a_qwen2() -> None:
    mixer = AttentionSpec(heads=4, kv_heads=2, head_width=8, bias=True)
    ours = build(ModelSpec(layers=2, width=32, vocabulary=51, context=64, mixers={"A": mixer})).double().eval()
    for p in ours.parameters():
        torch.nn.init.normal_(p, std=0.3)
    same, tokens = stock(ours), torch.randint(0, 51, (2, 20))
    assert same.config.model_type == "qwen2"
    torch.testing.assert_close(same(tokens).logits, ours(tokens).logits, rtol=1e-4, atol=1e-5)
    again = adopt(same)
    assert again.spec.mixers["A"] == mixer and torch.equal(again(tokens).logits, ours(tokens).logits)
