"""blt: bytes in patches by entropy, around Llama's layers, with rotary pairs side by side.

A text is cut alike where no special token stands in it but at the beginning: behind one, ours begin a patch.
"""

from typing import Any

from torch import Tensor
from transformers import BltConfig

from shrew.blocks.attention import AttentionSpec
from shrew.blocks.mlp import MlpSpec
from shrew.blocks.model import ModelSpec
from shrew.blocks.patches.boundaries import EntropySpec, StaticSpec
from shrew.blocks.patches.hashes import HashSpec
from shrew.blocks.specs import LocalSpec, PatchesSpec
from shrew.blocks.stock.adapter import Adapter, Weights
from shrew.blocks.stock.dense import names, plain, plain_attention, rope_back, rope_out
from shrew.blocks.window import WindowSpec

FIRST = 4  # id of byte 0, behind four special tokens
RESIDUAL = 2.0  # attention between bytes and patches adds its input, and so do those who call it
# beginnings of our names and of theirs
PLACES = (
    ("model.encoder.layers.", "model.local_encoder.layers."),
    ("model.decoder.layers.", "model.local_decoder.layers."),
    ("model.entropy.model.", "model.patcher."),
    ("model.entropy.lm_head.", "model.patcher.lm_head."),
    ("model.layers.", "model.global_transformer.layers."),
    ("model.embed_tokens.", "model.local_encoder.embed_tokens."),
    ("model.hashes.table.", "model.encoder_hash_tok_embedding."),
    ("model.pool.proj.", "model.local_encoder.patch_embedding_projection."),
    ("model.pool.cross.", "model.local_encoder.cross_attn_layers.0."),
    ("model.into.", "model.global_transformer.token_embedding_projection."),
    ("model.back.", "model.local_decoder.patch_embedding_projection."),
    ("model.cross.", "model.local_decoder.cross_attn_layers."),
    ("model.norm.", "model.local_decoder.norm."),
)


def _stack(part: Any, width: int, eps: float) -> dict[str, Any] | None:
    """What a config of one stack of layers says of them; None where it cannot."""
    mixers = [part.mixers[letter] for letter in part.pattern]
    first = mixers[0]
    odd = (any(mixer != first for mixer in mixers), first.kind not in ("attention", "window"),
           part.ffn != MlpSpec(hidden=getattr(part.ffn, "hidden", None)))  # fmt: skip
    window = {"window": first.window} if first.kind == "window" else {}
    whole = (first.head_width or width // first.heads) * first.heads == width
    if any(odd) or not whole or not plain_attention(first, **window):
        return None
    return {"hidden_size": width, "num_hidden_layers": part.layers, "num_attention_heads": first.heads,
            "num_key_value_heads": first.kv_heads or first.heads, "rms_norm_eps": eps,
            "intermediate_size": part.ffn.hidden or 3 * width, "rope_parameters": rope_out(first)}  # fmt: skip


def _window(part: Any) -> int | None:
    return getattr(part.mixers[part.pattern[0]], "window", None)


def _config(spec: ModelSpec) -> Any:
    front = spec.patches
    if front is None or front.hashes is None or front.residual != RESIDUAL or front.first != FIRST or front.queries < 2:
        return None
    rule, entropy = front.rule, front.entropy
    cut = EntropySpec(threshold=getattr(rule, "threshold", 0.0), longest=getattr(rule, "longest", 0))
    stacks = {
        "encoder_config": _stack(front.encoder, front.width, spec.eps),
        "decoder_config": _stack(front.decoder, front.width, spec.eps),
        "global_config": _stack(spec, spec.width, spec.eps),
        "patcher_config": _stack(entropy, entropy.width, entropy.eps) if entropy else {},
    }
    like = ModelSpec(pattern=spec.pattern, layers=spec.layers, width=spec.width, vocabulary=spec.vocabulary,
                     context=spec.context, tied=spec.tied, eps=spec.eps, zero_init=spec.zero_init, mixers=spec.mixers,
                     ffn=spec.ffn, front=front)  # fmt: skip
    local = [stacks["encoder_config"], stacks["decoder_config"]]
    odd = (
        None in stacks.values(),
        rule not in (cut, StaticSpec(size=1)),
        spec != like or _window(spec) is not None,
        _window(front.encoder) != _window(front.decoder),
        any(part and not part["num_attention_heads"] == part["num_key_value_heads"] == front.heads for part in local),
        entropy is not None and (not plain(entropy) or entropy.tied),
    )
    if any(odd):
        return None
    k: dict[str, Any] = {"cross_attn_k": front.queries, "vocab_size": spec.vocabulary, "hidden_size_global": spec.width}
    local[0].update(k, cross_attn_all_layers=False)  # type: ignore[union-attr]
    local[1].update(k, cross_attn_all_layers=front.every)  # type: ignore[union-attr]
    stacks["patcher_config"].update(  # type: ignore[union-attr]
        {"vocab_size": spec.vocabulary, "sliding_window": _window(entropy)} if entropy else {})
    return BltConfig(
        vocab_size=spec.vocabulary, max_position_embeddings=spec.context, tie_word_embeddings=spec.tied,
        patch_in_forward=entropy is not None, patching_mode="entropy",
        max_patch_length=getattr(rule, "longest", 0) or None, cross_attn_k=front.queries, use_cache=False,
        local_attention_window_len=_window(front.encoder), encoder_hash_byte_group_size=list(front.hashes.sizes),
        encoder_hash_byte_group_vocab=front.hashes.rows, encoder_hash_byte_group_nb_functions=front.hashes.functions,
        **({"patching_threshold": rule.threshold} if entropy else {}), **stacks,
    )  # fmt: skip


def _part(config: Any, window: int | None) -> dict[str, Any] | None:
    """The layers that a config of one stack says."""
    rope = rope_back(config.rope_parameters)
    if rope is None or config.hidden_act != "silu":
        return None
    heads: Any = {"heads": config.num_attention_heads, "kv_heads": config.num_key_value_heads, **rope}
    mixer = AttentionSpec(**heads) if window is None else WindowSpec(**heads, window=window)
    return {"layers": config.num_hidden_layers, "mixers": {"A": mixer}, "ffn": MlpSpec(hidden=config.intermediate_size)}


def _spec(config: Any) -> ModelSpec | None:
    encoder, decoder, whole, patcher = (
        config.encoder_config, config.decoder_config, config.global_config, config.patcher_config
    )  # fmt: skip
    asked = config.patch_in_forward and config.patching_mode == "entropy"
    near = [_part(local, config.local_attention_window_len) for local in (encoder, decoder)]
    far = _part(whole, None)
    oracle = _part(patcher, patcher.sliding_window) if config.patch_in_forward else None
    k = config.cross_attn_k
    odd = (
        None in (*near, far) or (config.patch_in_forward and oracle is None),
        config.patch_in_forward and not asked,  # would keep a model that cuts nothing
        asked and (config.patching_threshold is None or config.patch_size is None),
        k < 2 or {encoder.cross_attn_k, decoder.cross_attn_k} != {k},
        encoder.cross_attn_all_layers,  # all but the last of which come to nothing
        encoder.hidden_size != decoder.hidden_size or decoder.hidden_size_global != whole.hidden_size,
        len({part.rms_norm_eps for part in (encoder, decoder, whole)}) > 1,
        len({local.num_attention_heads for local in (encoder, decoder)}) > 1,
        any(local.num_key_value_heads != local.num_attention_heads for local in (encoder, decoder)),
        {encoder.vocab_size, decoder.vocab_size} != {config.vocab_size},
        asked and patcher.vocab_size != config.vocab_size,
    )
    if any(odd) or far is None or near[0] is None or near[1] is None:
        return None
    entropy = None if oracle is None else ModelSpec(
        width=patcher.hidden_size, vocabulary=config.vocab_size, tied=False, context=patcher.max_position_embeddings,
        eps=patcher.rms_norm_eps, **oracle)  # fmt: skip
    rule = EntropySpec(threshold=config.patching_threshold, longest=config.max_patch_length or 0)
    front = PatchesSpec(
        rule=rule if asked else StaticSpec(size=1), width=encoder.hidden_size, encoder=LocalSpec(**near[0]),
        decoder=LocalSpec(**near[1]), queries=k, heads=encoder.num_attention_heads, entropy=entropy, first=FIRST,
        every=decoder.cross_attn_all_layers, residual=RESIDUAL,
        hashes=HashSpec(sizes=tuple(config.encoder_hash_byte_group_size), rows=config.encoder_hash_byte_group_vocab,
                        functions=config.encoder_hash_byte_group_nb_functions),
    )  # fmt: skip
    return ModelSpec(width=whole.hidden_size, vocabulary=config.vocab_size, context=config.max_position_embeddings,
                     tied=config.tie_word_embeddings, eps=whole.rms_norm_eps, front=front, **far)  # fmt: skip


def _turned(spec: ModelSpec, weights: Weights, back: bool) -> Weights:
    """Queries and keys with their rotary channels in halves, as ours, or in pairs."""
    front = spec.patches
    assert front is not None
    parts: dict[str, Any] = {"model.encoder.": front.encoder, "model.decoder.": front.decoder, "model.layers.": spec,
                             "model.entropy.": front.entropy}  # fmt: skip
    found = dict(weights)
    for name, value in weights.items():
        part = next((part for head, part in parts.items() if name.startswith(head)), None)
        own = name.rpartition(".")[0].rpartition(".")[2]
        if part is None or ".layers." not in name or own not in ("q_proj", "k_proj"):
            continue
        mixer = part.mixers[part.pattern[0]]
        found[name] = _turn(value, mixer.heads if own == "q_proj" else mixer.kv_heads or mixer.heads, back)
    return found


def _turn(value: Tensor, heads: int, back: bool) -> Tensor:
    shape = (heads, -1, 2) if back else (heads, 2, value.shape[0] // heads // 2)
    return value.unflatten(0, shape).transpose(1, 2).flatten(0, 2)


def _moved(weights: Weights, places: list[tuple[str, str]]) -> Weights:
    found = {}
    for name, value in weights.items():
        old, new = next(((old, new) for old, new in places if name.startswith(old)), ("", ""))
        found[new + name.removeprefix(old)] = value
    return found


def _out(spec: ModelSpec, weights: Weights) -> Weights:
    return _moved(_turned(spec, weights, back=False), list(PLACES))


def _back(spec: ModelSpec, weights: Weights) -> Weights:
    ours = sorted(((theirs, mine) for mine, theirs in PLACES), key=lambda pair: -len(pair[0]))
    return _turned(spec, _moved(weights, ours), back=True)


BLT = Adapter(_config, _spec, names, out=_out, back=_back)
