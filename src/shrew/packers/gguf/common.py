"""What the architectures have in common: what a file says, checked; rotary embeddings; sizes; and what a row is."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES
from torch import Tensor

from shrew.errors import FolderError, UnsupportedError
from shrew.packers.gguf.rows import Change, halves, renamed, rotated

LONG = 2**20  # the context that is written for models without a limit
LLAMA3_DEFAULTS = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
RECURRENT = ("linear_attention", "mamba", "conv")


class Values:
    """What a file says of its model, without the architecture's prefix; wrong types are refused."""

    def __init__(self, where: str, found: dict[str, Any], tensors: Mapping[str, Any]) -> None:
        self.where, self.found, self.tensors = where, found, tensors

    def _one(self, key: str, kinds: tuple[type, ...], default: Any) -> Any:
        value = self.found.get(key, default)
        if value is None:
            raise FolderError(f"{self.where} does not say '{key}'; it is incomplete, fetch it again.")
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise FolderError(f"{self.where} says nothing usable of '{key}'; fetch it again.")
        return value

    def whole(self, key: str, default: int | None = None) -> int:
        value = self._one(key, (int,), default)
        if not 0 <= value < 2**31:
            raise FolderError(f"{self.where} says {value} for '{key}', which no model has.")
        return int(value)

    def number(self, key: str, default: float | None = None) -> float:
        """The shortest decimal that is this 32-bit float: 1e-06, and not 9.99999997e-07."""
        value = float(str(np.float32(self._one(key, (int, float), default))))
        if not np.isfinite(value):
            raise FolderError(f"{self.where} says {value} for '{key}', which no model has.")
        return value

    def flag(self, key: str, default: bool) -> bool:
        return bool(self._one(key, (bool,), default))

    def text(self, key: str, default: str = "") -> str:
        return str(self._one(key, (str,), default))

    def layers(self) -> int:
        """How many there are, before a list of so many is made."""
        layers = self.whole("block_count")
        if layers > len(self.tensors):
            raise FolderError(f"{self.where} asks for {layers} layers and holds {len(self.tensors)} tensors.")
        return layers

    def each(self, key: str, layers: int, default: int | None = None) -> list[int]:
        """A number for each layer, of a value that may be one for all."""
        value = self.found.get(key, default)
        if isinstance(value, np.ndarray):
            if value.dtype.kind not in "iub" or len(value) < layers:
                raise FolderError(f"{self.where} says nothing usable of '{key}'; fetch it again.")
            return [int(one) for one in value[:layers]]
        return [self.whole(key, default)] * layers


@dataclass(frozen=True)
class Architecture:
    """One of llama.cpp's, and the model types of transformers that are written so."""

    arch: MODEL_ARCH
    types: tuple[str, ...]  # transformers' model types that are written so; the first is the one that is read back
    check: Callable[[Any], None]  # raises UnsupportedError for a config that llama.cpp cannot say
    values: Callable[[Any], dict[str, Any]]
    config: Callable[[Values], Any]
    changes: Callable[[Any], dict[str, Change]] = lambda config: {}
    extra: Callable[[Any], dict[str, Tensor]] = field(default=lambda config: {})  # tensors that are no weights

    @property
    def name(self) -> str:
        return MODEL_ARCH_NAMES[self.arch]


def refuse_unless(config: Any, **wanted: tuple[Any, ...]) -> None:
    """Refuse settings other than the `wanted` ones, of which the first is what a missing one means."""
    for key, allowed in wanted.items():
        value = getattr(config, key, allowed[0])
        if value not in allowed:
            raise UnsupportedError(f"llama.cpp's {config.model_type} knows {key} = "
                                   f"{' or '.join(map(str, allowed))}, and this model has {value}.")  # fmt: skip


def head_width(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def layer_count(config: Any) -> int:
    return int(config.num_hidden_layers)


def recurrent_layers(config: Any) -> list[bool]:
    return [kind in RECURRENT for kind in config.layer_types]


# --- rotary embeddings ------------------------------------------------------------------------------------------------


def rope_out(rope: dict[str, Any]) -> dict[str, Any]:
    """transformers' `rope_parameters` of one kind of layer as GGUF says them."""
    given = {key for key, value in rope.items() if value is not None} - {"rope_type", "rope_theta"}
    given -= {"partial_rotary_factor"}
    kind: str = rope["rope_type"]
    found: dict[str, Any] = {"rope.freq_base": float(rope["rope_theta"])}
    known: dict[str, set[str]] = {"default": set(), "linear": {"factor"}, "llama3": {"factor", *LLAMA3_DEFAULTS},
             "yarn": {"factor", "original_max_position_embeddings", "beta_fast", "beta_slow"}}  # fmt: skip
    odd = sorted(given - known.get(kind, set())) if kind != "default" else []
    if kind not in known or odd:
        raise UnsupportedError(f"rotary embeddings of type '{kind}'{' with ' + ', '.join(odd) if odd else ''} are not "
                               f"written to GGUF; known: {', '.join(known)}.")  # fmt: skip
    if kind in ("linear", "yarn"):
        found |= {"rope.scaling.type": kind, "rope.scaling.factor": float(rope["factor"])}
    if kind == "yarn":
        found["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
        for key in ("beta_fast", "beta_slow"):
            if rope.get(key) is not None:
                found[f"rope.scaling.yarn_{key}"] = float(rope[key])
    return found


def rope_back(values: Values) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": values.number("rope.freq_base", 10000.0)}
    kind = values.text("rope.scaling.type", "none")
    if kind not in ("none", "linear", "yarn"):
        raise FolderError(f"{values.where} has rotary embeddings of type '{kind[:40]}', which Shrew does not read.")
    if kind != "none":
        rope |= {"rope_type": kind, "factor": values.number("rope.scaling.factor")}
    if kind == "yarn":
        odd = {"rope.scaling.attn_factor", "rope.scaling.yarn_log_multiplier", "rope.scaling.yarn_attn_factor",
               "rope.scaling.yarn_ext_factor"} & set(values.found)  # fmt: skip
        if odd:
            raise FolderError(f"{values.where} sets '{min(odd)}', which Shrew does not read.")
        rope["original_max_position_embeddings"] = values.whole("rope.scaling.original_context_length")
        for key in ("beta_fast", "beta_slow"):
            if f"rope.scaling.yarn_{key}" in values.found:
                rope[key] = values.number(f"rope.scaling.yarn_{key}")
    return rope


def llama3_factors(rope: dict[str, Any], width: int) -> Tensor:
    """What Llama 3 divides each rotary frequency by: float32 [width / 2]."""
    wave = 2 * torch.pi * rope["rope_theta"] ** (torch.arange(0, width, 2, dtype=torch.float32) / width)
    context, factor = rope["original_max_position_embeddings"], rope["factor"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = (context / wave - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    slow = torch.where(wave > context / low, torch.full_like(wave, factor), between)
    return torch.where(wave < context / high, torch.ones_like(wave), slow)


def llama3_extra(config: Any) -> dict[str, Tensor]:
    rope = config.rope_parameters
    return {"rope_freqs.weight": llama3_factors(rope, head_width(config))} if rope["rope_type"] == "llama3" else {}


# --- what all have ----------------------------------------------------------------------------------------------------


def common_values(config: Any, kv_heads: Any = None) -> dict[str, Any]:
    width = head_width(config)
    epsilon = config.rms_norm_eps if hasattr(config, "rms_norm_eps") else config.norm_eps
    return {
        "vocab_size": config.vocab_size, "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size, "block_count": layer_count(config),
        "feed_forward_length": config.intermediate_size, "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": kv_heads or config.num_key_value_heads,
        "attention.key_length": width, "attention.value_length": width,
        "attention.layer_norm_rms_epsilon": float(epsilon),
        "rope.dimension_count": width,
    }  # fmt: skip


def dense_values(config: Any) -> dict[str, Any]:
    return common_values(config) | rope_out(config.rope_parameters)


def shared_settings(values: Values) -> dict[str, Any]:
    """The settings that every config class has."""
    heads = values.whole("attention.head_count")
    layers = values.layers()
    kv_heads = max(values.each("attention.head_count_kv", layers, heads), default=0)
    width = values.whole("embedding_length")
    if not heads or not width or not layers or not kv_heads:
        raise FolderError(f"{values.where} describes a model without heads, width or layers; fetch it again.")
    return {
        "vocab_size": values.whole("vocab_size"), "hidden_size": width, "num_hidden_layers": layers,
        "max_position_embeddings": values.whole("context_length"), "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "intermediate_size": values.each("feed_forward_length", 1)[0],
        "tie_word_embeddings": values.flag("tied", False), "bos_token_id": None, "eos_token_id": None,
        "pad_token_id": None,
    }  # fmt: skip


def head_width_of(values: Values) -> int:
    usual = values.whole("embedding_length") // max(values.whole("attention.head_count"), 1)
    width = values.whole("attention.key_length", usual)
    if width != values.whole("attention.value_length", width) or width % 2 or not width:
        raise FolderError(f"{values.where} has heads of odd or unequal widths, which Shrew does not read.")
    return width


def eps_of(values: Values) -> float:
    return values.number("attention.layer_norm_rms_epsilon")


def expert_values(config: Any, count: int) -> dict[str, Any]:
    return {"expert_count": count, "expert_used_count": config.num_experts_per_tok}


def expert_changes() -> dict[str, Change]:
    return {"experts.gate_up_proj": halves("ffn_gate_exps.weight", "ffn_up_exps.weight"),
            "experts.down_proj": renamed("ffn_down_exps.weight")}  # fmt: skip


def rotations(config: Any) -> dict[str, Change]:
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    return {f"self_attn.{part}_proj.{what}": rotated(count) for part, count in (("q", heads), ("k", kv_heads))
            for what in ("weight", "bias")}  # fmt: skip


def check_full_attention(config: Any) -> None:
    """Refuse windows, where llama.cpp's architecture has none."""
    refuse_unless(config, hidden_act=("silu",))
    layers = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if layers or (getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)):
        raise UnsupportedError(f"llama.cpp's {config.model_type} has no sliding window, and this model has one.")
