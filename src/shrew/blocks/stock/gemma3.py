"""gemma3_text: local and global attention with rotary bases of their own, QK-norm, norms around each block."""

from dataclasses import replace
from typing import Any

import torch
from transformers import Gemma3TextConfig

from shrew.blocks.attention import AttentionSpec
from shrew.blocks.mlp import MlpSpec
from shrew.blocks.model import ModelSpec
from shrew.blocks.stock.adapter import Adapter, Weights, by_kind, shortest
from shrew.blocks.stock.dense import plain, plain_attention, rope_back, rope_out, sizes
from shrew.blocks.window import WindowSpec

TYPES = {"window": "sliding_attention", "attention": "full_attention"}
NAMES = {"mixer_norm": "input_layernorm", "mixer": "self_attn", "mixer_after": "post_attention_layernorm",
         "ffn_norm": "pre_feedforward_layernorm", "ffn": "mlp", "ffn_after": "post_feedforward_layernorm"}  # fmt: skip


def _scale(width: int) -> float:
    """Factor of the embeddings, as float32 holds it."""
    return torch.tensor(width**0.5).item()


def _config(spec: ModelSpec) -> Any:
    mixers = by_kind(spec, TYPES)
    if mixers is None:
        return None
    first, *_ = mixers.values()
    heads, scales = [sizes(mixer, spec.width) for mixer in mixers.values()], {mixer.scale for mixer in mixers.values()}
    more = {"qk_norm": "head", "scale": first.scale}
    scalar = round(first.scale**-2) if first.scale else heads[0]["head_dim"]
    odd = (
        not all(plain_attention(mixer, **more, **_window(mixer)) for mixer in mixers.values()),
        heads[0] != heads[-1] or len(scales) > 1 or scalar**-0.5 != (first.scale or scalar**-0.5),
        spec.width % first.heads,
        spec.norms != "sandwich" or torch.tensor(spec.embedding_scale).item() != _scale(spec.width),
        not plain(replace(spec, norms="pre", embedding_scale=1.0, softcap=0.0)),
        spec.ffn != MlpSpec(hidden=getattr(spec.ffn, "hidden", None), activation="gelu_tanh"),
    )
    if any(odd):
        return None
    local = mixers.get("window")
    return Gemma3TextConfig(
        vocab_size=spec.vocabulary, hidden_size=spec.width, num_hidden_layers=spec.layers, **heads[0],
        intermediate_size=spec.ffn.hidden or 3 * spec.width, max_position_embeddings=spec.context,
        rms_norm_eps=spec.eps, tie_word_embeddings=spec.tied, query_pre_attn_scalar=scalar,
        layer_types=[TYPES[spec.mixer(number).kind] for number in range(spec.layers)],
        final_logit_softcapping=spec.softcap or None,
        rope_parameters={TYPES[kind]: rope_out(mixer) for kind, mixer in mixers.items()},
        **({"sliding_window": local.window} if local else {}),
    )  # fmt: skip


def _window(mixer: Any) -> dict[str, int]:
    return {"window": mixer.window} if mixer.kind == "window" else {}


def _spec(config: Any) -> ModelSpec | None:
    used = set(config.layer_types)
    rope = {kind: rope_back(config.rope_parameters[kind]) for kind in used}
    # `attn_logit_softcapping` is in the config, but transformers' attention of this type does not apply it
    odd = (config.attention_bias, config.hidden_activation != "gelu_pytorch_tanh", config.use_bidirectional_attention,
           config.attn_logit_softcapping, used - set(TYPES.values()), None in rope.values())  # fmt: skip
    if any(odd):
        return None
    scalar = config.query_pre_attn_scalar
    common: Any = {"heads": config.num_attention_heads, "kv_heads": config.num_key_value_heads,
                   "head_width": config.head_dim, "qk_norm": "head",
                   "scale": None if scalar == config.head_dim else scalar**-0.5}  # fmt: skip
    mixers: dict[str, Any] = {}
    if (local := rope.get("sliding_attention")) is not None:
        mixers["L"] = WindowSpec(**common, **local, window=config.sliding_window)
    if (whole := rope.get("full_attention")) is not None:
        mixers["G"] = AttentionSpec(**common, **whole)
    letters = "".join("L" if kind == "sliding_attention" else "G" for kind in config.layer_types)
    return ModelSpec(
        pattern=shortest(letters), layers=config.num_hidden_layers, width=config.hidden_size,
        vocabulary=config.vocab_size, context=config.max_position_embeddings, tied=config.tie_word_embeddings,
        eps=config.rms_norm_eps, norms="sandwich", embedding_scale=_scale(config.hidden_size),
        softcap=config.final_logit_softcapping or 0.0, mixers=mixers,
        ffn=MlpSpec(hidden=config.intermediate_size, activation="gelu_tanh"),
    )  # fmt: skip


def _shifted(weights: Weights, by: float) -> Weights:
    """Norms here multiply by 1 + weight."""
    return {name: value + by if "norm" in name else value for name, value in weights.items()}


GEMMA3 = Adapter(_config, _spec, lambda spec, layer: NAMES,
                 out=lambda spec, weights: _shifted(weights, -1.0),
                 back=lambda spec, weights: _shifted(weights, 1.0))  # fmt: skip
