"""qwen3_next: the gated delta rule and gated attention with partly rotating heads; MLPs, or experts with a gated shared
one."""

from typing import Any

import torch
from torch import Tensor
from transformers import Qwen3NextConfig

from shrew.blocks.attention import AttentionSpec
from shrew.blocks.delta import DeltaSpec
from shrew.blocks.mlp import MlpSpec
from shrew.blocks.model import ModelSpec
from shrew.blocks.moe import MoeSpec
from shrew.blocks.stock.adapter import Adapter, Weights, by_kind, shortest
from shrew.blocks.stock.dense import plain, plain_attention, sizes

TYPES = {"delta": "linear_attention", "attention": "full_attention"}
COMMON = {"mixer_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "ffn": "mlp",
          "ffn.shared": "mlp.shared_expert", "ffn.shared_gate": "mlp.shared_expert_gate"}  # fmt: skip
NAMES = {
    "delta": {**COMMON, "mixer": "linear_attn", "mixer.o_proj": "linear_attn.out_proj",
              "mixer.o_norm": "linear_attn.norm", "mixer.conv": "linear_attn.conv1d.weight"},
    "attention": {**COMMON, "mixer": "self_attn"},
}  # fmt: skip


def _config(spec: ModelSpec) -> Any:
    mixers = by_kind(spec, TYPES)
    if mixers is None or len(mixers) < len(TYPES):
        return None
    delta, attention, ffn = mixers["delta"], mixers["attention"], spec.ffn
    options = {"qk_norm": "head", "gate": True, "rotary_share": attention.rotary_share}
    settings = _ffn(ffn, spec)
    said = (plain(spec), settings, plain_attention(attention, **options), attention.yarn == 1,
            attention.rotated(spec.width), delta.conv > 1, delta.gate, delta.decay)  # fmt: skip
    if not all(said):
        return None
    keys, share, key, value = _heads(delta, spec.width)
    return Qwen3NextConfig(
        vocab_size=spec.vocabulary, hidden_size=spec.width, num_hidden_layers=spec.layers,
        max_position_embeddings=spec.context, rms_norm_eps=spec.eps, tie_word_embeddings=spec.tied,
        layer_types=[TYPES[spec.mixer(number).kind] for number in range(spec.layers)],
        **sizes(attention, spec.width),
        rope_parameters={"rope_type": "default", "rope_theta": attention.rope_theta,
                         "partial_rotary_factor": attention.rotary_share},
        linear_conv_kernel_dim=delta.conv, linear_key_head_dim=key, linear_value_head_dim=value,
        linear_num_key_heads=keys, linear_num_value_heads=keys * share, eos_token_id=None, **settings,
    )  # fmt: skip


def _ffn(ffn: Any, spec: ModelSpec) -> dict[str, Any]:
    """The settings of the feed-forward layers; none where the type has no such layers."""
    if ffn == MlpSpec(hidden=getattr(ffn, "hidden", None)):
        return {"num_experts": 0, "intermediate_size": ffn.hidden or 3 * spec.width}
    if ffn.kind != "moe" or not ffn.shared or ffn.every > spec.layers:
        return {}
    wanted = MoeSpec(experts=ffn.experts, top_k=ffn.top_k, hidden=ffn.hidden, normalise=ffn.normalise,
                     shared=ffn.shared, shared_gate=True, balance_weight=ffn.balance_weight, z_weight=ffn.z_weight,
                     every=ffn.every, dense_hidden=ffn.dense_hidden)  # fmt: skip
    if ffn != wanted:
        return {}
    return {"num_experts": ffn.experts, "num_experts_per_tok": ffn.top_k, "norm_topk_prob": ffn.normalise,
            "moe_intermediate_size": ffn.width(spec.width), "shared_expert_intermediate_size": ffn.shared,
            "intermediate_size": ffn.dense(spec.width).hidden, "decoder_sparse_step": ffn.every,
            "router_aux_loss_coef": ffn.balance_weight}  # fmt: skip


def _spec(config: Any) -> ModelSpec | None:
    rope, layers, used = config.rope_parameters, config.num_hidden_layers, set(config.layer_types)
    rotated = int(config.head_dim * rope.get("partial_rotary_factor", 1.0))
    odd = (config.attention_bias, config.hidden_act != "silu", rope["rope_type"] != "default",
           used - set(TYPES.values()), config.linear_conv_kernel_dim < 2, not rotated or rotated % 2,
           config.num_experts and config.num_experts_per_tok > config.num_experts)  # fmt: skip
    if any(odd):
        return None
    ffn: Any = MlpSpec(hidden=config.intermediate_size)
    step, without = config.decoder_sparse_step, set(config.mlp_only_layers)
    some = [layer for layer in range(layers) if config.num_experts and (layer + 1) % step == 0 and layer not in without]
    if some:
        every = some[0] + 1
        if some != [*range(every - 1, layers, every)]:
            return None
        ffn = MoeSpec(experts=config.num_experts, top_k=config.num_experts_per_tok, hidden=config.moe_intermediate_size,
                      normalise=config.norm_topk_prob, shared=config.shared_expert_intermediate_size, shared_gate=True,
                      balance_weight=config.router_aux_loss_coef, every=every,
                      dense_hidden=config.intermediate_size)  # fmt: skip
    delta = DeltaSpec(heads=config.linear_num_value_heads, key_heads=config.linear_num_key_heads,
                      key_width=config.linear_key_head_dim, value_width=config.linear_value_head_dim,
                      conv=config.linear_conv_kernel_dim)  # fmt: skip
    attention = AttentionSpec(heads=config.num_attention_heads, kv_heads=config.num_key_value_heads,
                              head_width=config.head_dim, qk_norm="head", gate=True, rope_theta=rope["rope_theta"],
                              rotary_share=rope.get("partial_rotary_factor", 1.0))  # fmt: skip
    letters = "".join("D" if kind == "linear_attention" else "A" for kind in config.layer_types)
    return ModelSpec(pattern=shortest(letters), layers=layers, width=config.hidden_size, vocabulary=config.vocab_size,
                     context=config.max_position_embeddings, tied=config.tie_word_embeddings, eps=config.rms_norm_eps,
                     mixers={"D": delta, "A": attention}, ffn=ffn)  # fmt: skip


def _centred(name: str) -> bool:
    """Of a norm that multiplies by 1 + weight there: all but the gated one of the delta rule."""
    return name.endswith("norm.weight") and ".linear_attn." not in name


def _stacked(parts: list[Tensor], heads: int) -> Tensor:
    """Rows of all parts of the first head, then those of the second ..."""
    return torch.cat([part.unflatten(0, (heads, -1)) for part in parts], 1).flatten(0, 1)


def _parted(whole: Tensor, heads: int, sizes: list[int]) -> list[Tensor]:
    """`_stacked` undone; `sizes` are the rows of a head in each part."""
    return [part.flatten(0, 1) for part in whole.unflatten(0, (heads, -1)).split(sizes, 1)]


def _heads(delta: Any, width: int) -> tuple[int, int, int, int]:
    """Key heads, value heads of each, key width, value width."""
    keys, key = delta.key_heads or delta.heads, delta.key_width or width // delta.heads
    return keys, delta.heads // keys, key, delta.value_width or key


def _out(spec: ModelSpec, weights: Weights) -> Weights:
    weights = {name: value - 1 if _centred(name) else value for name, value in weights.items()}
    for layer in range(spec.layers):
        mixer, at = spec.mixer(layer), f"model.layers.{layer}."
        if mixer.kind == "attention":
            at += "self_attn."
            both = [weights[at + "q_proj.weight"], weights.pop(at + "g_proj.weight")]
            weights[at + "q_proj.weight"] = _stacked(both, mixer.heads)
            continue
        at += "linear_attn."
        keys, share, key, value = _heads(mixer, spec.width)
        q, k, v = weights.pop(at + "qkv_proj.weight").split([keys * key, keys * key, keys * share * value])
        weights[at + "in_proj_qkvz.weight"] = _stacked([q, k, v, weights.pop(at + "g_proj.weight")], keys)
        rates = [weights.pop(at + f"{name}_proj.weight") for name in "ba"]
        weights[at + "in_proj_ba.weight"] = _stacked(rates, keys)
        weights[at + "conv1d.weight"] = weights[at + "conv1d.weight"][:, None]
    return weights


def _back(spec: ModelSpec, weights: Weights) -> Weights:
    weights = {name: value + 1 if _centred(name) else value for name, value in weights.items()}
    for layer in range(spec.layers):
        mixer, at = spec.mixer(layer), f"model.layers.{layer}."
        if mixer.kind == "attention":
            at += "self_attn."
            q, g = _parted(weights[at + "q_proj.weight"], mixer.heads, [mixer.head_width] * 2)
            weights |= {at + "q_proj.weight": q, at + "g_proj.weight": g}
            continue
        at += "linear_attn."
        keys, share, key, value = _heads(mixer, spec.width)
        sizes = [key, key, share * value, share * value]
        *qkv, weights[at + "g_proj.weight"] = _parted(weights.pop(at + "in_proj_qkvz.weight"), keys, sizes)
        weights[at + "qkv_proj.weight"] = torch.cat(qkv)
        b, a = _parted(weights.pop(at + "in_proj_ba.weight"), keys, [share, share])
        weights |= {at + "b_proj.weight": b, at + "a_proj.weight": a}
        weights[at + "conv1d.weight"] = weights[at + "conv1d.weight"][:, 0]
    return weights


QWEN3_NEXT = Adapter(_config, _spec, lambda spec, layer: NAMES[spec.mixer(layer).kind], _out, _back)
