"""lfm2: gated short convolutions, and attention with QK-norm in a few layers."""

from typing import Any

from transformers import Lfm2Config

from shrew.blocks.attention import AttentionSpec
from shrew.blocks.conv import ConvSpec
from shrew.blocks.mlp import MlpSpec
from shrew.blocks.model import ModelSpec
from shrew.blocks.stock.adapter import Adapter, Weights, by_kind, shortest
from shrew.blocks.stock.dense import plain, plain_attention, rope_back, rope_out, sizes

TYPES = {"conv": "conv", "attention": "full_attention"}
NAMES = {"mixer_norm": "operator_norm", "ffn.gate_proj": "feed_forward.w1", "ffn.up_proj": "feed_forward.w3",
         "ffn.down_proj": "feed_forward.w2"}  # fmt: skip
MIXER_NAMES = {
    "conv": {"mixer": "conv"},
    "attention": {"mixer": "self_attn", "mixer.o_proj": "self_attn.out_proj",
                  "mixer.q_norm": "self_attn.q_layernorm", "mixer.k_norm": "self_attn.k_layernorm"},
}  # fmt: skip


def _config(spec: ModelSpec) -> Any:
    mixers = by_kind(spec, TYPES)
    if mixers is None or "attention" not in mixers:  # the type's cache cannot do without
        return None
    conv, full = mixers.get("conv", ConvSpec()), mixers["attention"]
    head = sizes(full, spec.width)
    odd = (not plain(spec), spec.ffn != MlpSpec(hidden=getattr(spec.ffn, "hidden", None)),
           not plain_attention(full, qk_norm="head"), head.pop("head_dim") * full.heads != spec.width)  # fmt: skip
    if any(odd):
        return None
    return Lfm2Config(
        vocab_size=spec.vocabulary, hidden_size=spec.width, num_hidden_layers=spec.layers, **head,
        intermediate_size=spec.ffn.hidden or 3 * spec.width, block_auto_adjust_ff_dim=False,
        max_position_embeddings=spec.context, norm_eps=spec.eps, tie_word_embeddings=spec.tied,
        conv_bias=conv.bias, conv_L_cache=conv.kernel,
        layer_types=[TYPES[spec.mixer(number).kind] for number in range(spec.layers)],
        rope_parameters=rope_out(full),
    )  # fmt: skip


def _hidden(config: Any) -> int:
    hidden = config.intermediate_size
    if config.block_auto_adjust_ff_dim:
        step = config.block_multiple_of
        hidden = -(-int(config.block_ffn_dim_multiplier * int(2 * hidden / 3)) // step) * step
    return int(hidden)


def _spec(config: Any) -> ModelSpec | None:
    rope = rope_back(config.rope_parameters)
    if rope is None or set(config.layer_types) - set(TYPES.values()) or getattr(config, "head_dim", None):
        return None
    full = AttentionSpec(heads=config.num_attention_heads, kv_heads=config.num_key_value_heads, qk_norm="head", **rope)
    mixers = {"C": ConvSpec(kernel=config.conv_L_cache, bias=config.conv_bias), "A": full}
    letters = "".join("C" if kind == "conv" else "A" for kind in config.layer_types)
    return ModelSpec(
        pattern=shortest(letters), layers=config.num_hidden_layers, width=config.hidden_size,
        vocabulary=config.vocab_size, context=config.max_position_embeddings, tied=config.tie_word_embeddings,
        eps=config.norm_eps, mixers={letter: mixers[letter] for letter in sorted(set(letters))},
        ffn=MlpSpec(hidden=_hidden(config)),
    )  # fmt: skip


def _names(spec: ModelSpec, layer: int) -> dict[str, str]:
    return NAMES | MIXER_NAMES[spec.mixer(layer).kind]


def _last_norm(weights: Weights, old: str, new: str) -> Weights:
    return {new if name == old else name: value for name, value in weights.items()}


OURS, THEIRS = "model.norm.weight", "model.embedding_norm.weight"
LFM2 = Adapter(_config, _spec, _names,
               out=lambda spec, weights: _last_norm(weights, OURS, THEIRS),
               back=lambda spec, weights: _last_norm(weights, THEIRS, OURS))  # fmt: skip
