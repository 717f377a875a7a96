"""Which parts a transformers model has, found in the live modules and the config, and how to rebuild it smaller.

There is no file per architecture: layers are found by their count, parts by the naming patterns below. A cut never
edits live modules. It makes a new config and new tensors, and `rebuild` makes a new model of the config *as a saved
folder would state it*; every tensor must fit and every kept layer must behave as it did, else the cut is refused.
So a wrong guess about an architecture ends in a plain refusal and never in a broken folder.
"""

import copy
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers.pytorch_utils import Conv1D

from shrew.blocks.model import ModelSpec, ShrewConfig
from shrew.blocks.stock.adapter import shortest
from shrew.errors import DataError, SpecError, UnsupportedError
from shrew.spec import dump

# In-projections and out-projection of an MLP, relative to one parent module; one in-projection twice as high as the
# out-projection is wide holds gate and up, stacked.
MLP_PATTERNS: list[tuple[tuple[str, ...], str]] = [
    (("gate_proj", "up_proj"), "down_proj"),
    (("gate_up_proj",), "down_proj"),
    (("up_proj",), "down_proj"),
    (("Wi",), "Wo"),
    (("c_fc",), "c_proj"),
    (("fc1",), "fc2"),
    (("lin1",), "lin2"),
    (("w1", "w3"), "w2"),
    (("intermediate.dense",), "output.dense"),
    (("dense_h_to_4h",), "dense_4h_to_h"),
]
EXPERT_PATTERN = ("gate_up_proj", "down_proj")
MLP_KEYS = (
    "moe_intermediate_size", "shared_expert_intermediate_size", "intermediate_size", "n_inner", "ffn_dim", "hidden_dim",
    "ffn_hidden_size",
)  # fmt: skip

# Query, key and value projections (or one that stacks all three) and the out-projection of an attention.
ATTENTION_PATTERNS: list[tuple[tuple[str, ...], str]] = [
    (("q_proj", "k_proj", "v_proj"), "o_proj"),
    (("q_proj", "k_proj", "v_proj"), "out_proj"),
    (("q_proj", "k_proj", "v_proj"), "dense"),
    (("q_lin", "k_lin", "v_lin"), "out_lin"),
    (("self.query", "self.key", "self.value"), "output.dense"),
    (("qkv_proj",), "o_proj"),
    (("Wqkv",), "Wo"),
    (("c_attn",), "c_proj"),
    (("query_key_value",), "dense"),
]
INTERLEAVED = {"query_key_value"}  # query, key and value of a head lie together: not cut here

# Config keys that hold one entry a layer; that name layers by number; that say in short what one entry a layer says.
PER_LAYER_KEYS = ("layer_types", "mlp_layer_types", "no_rope_layers", "layers_block_type", "attention_layers")
NUMBER_KEYS = ("mlp_only_layers",)
STALE_KEYS = ("global_attn_every_n_layers", "sliding_window_pattern")
# Kinds of layers that hold no keys and values; a hybrid without any other cannot be decoded by its own class.
RECURRENT = {"linear_attention", "conv", "mamba"}
INDEX_NAMES = {"layer_idx", "layer_index", "layer_id", "layer_number", "training"}


@dataclass(frozen=True)
class Mlp:
    """One MLP (or one stack of experts): full state-dict names of its weights, its width and the config key of it."""

    layer: int
    module: str
    ins: tuple[str, ...]
    out: str
    width: int
    stacked: bool
    experts: int
    key: str


@dataclass(frozen=True)
class Attention:
    """One attention. `refusal` says why its heads cannot be cut; empty when they can."""

    layer: int
    ins: tuple[str, ...]
    out: str
    heads: int
    kv_heads: int
    head_dim: int
    refusal: str


@dataclass(frozen=True)
class Anatomy:
    kind: str
    path: str
    count: int
    mlps: tuple[Mlp, ...]
    attentions: tuple[Attention, ...]


def is_transposed(model: nn.Module, weight: str) -> bool:
    """Whether a weight is stored [in, out] (Conv1D) instead of [out, in] (Linear)."""
    return isinstance(model.get_submodule(weight.removesuffix(".weight")), Conv1D)


def find_layers(model: Any) -> tuple[str, nn.ModuleList]:
    """Path and ModuleList of a model's layers: the only outermost list as long as its config says.

    Raises UnsupportedError when there is none, or more than one (an encoder and a decoder).
    """
    if isinstance(model.config, ShrewConfig) and model.config.parsed().patches:
        raise UnsupportedError("a model of patches has local layers and others; only models with one stack of "
                               "layers can be cut.")  # fmt: skip
    count = getattr(model.config, "num_hidden_layers", None)
    found: list[tuple[str, nn.ModuleList]] = []
    for path, module in model.named_modules():
        nested = any(path.startswith(outer + ".") for outer, _ in found)
        if isinstance(module, nn.ModuleList) and len(module) == count and not nested:
            found.append((path, module))
    if len(found) != 1:
        raise UnsupportedError(
            f"{model.config.model_type}: its layers cannot be told apart ({len(found)} lists of num_hidden_layers "
            "modules); only models with one stack of layers can be cut."
        )
    return found[0]


def read_anatomy(model: Any) -> Anatomy:
    """What can be cut in a transformers model; parts that match no pattern are left out."""
    path, layers = find_layers(model)
    mlps: list[Mlp] = []
    attentions: list[Attention] = []
    for index, layer in enumerate(layers):
        prefix = f"{path}.{index}."
        linear = {name for name, part in layer.named_modules() if isinstance(part, nn.Linear | Conv1D)}
        found = _find_mlps(model, linear, index, prefix) + _find_experts(model, layer, index, prefix)
        attention = _find_attention(model, layer, linear, index, prefix)
        mlps += found
        attentions += attention
    return Anatomy(model.config.model_type, path, len(layers), tuple(mlps), tuple(attentions))


def _match(linear: set[str], patterns: list[tuple[tuple[str, ...], str]]) -> Iterator[tuple[str, tuple[str, ...], str]]:
    """Yield (parent with its dot, in-projections, out-projection); every projection belongs to one match at most."""
    taken: set[str] = set()
    for ins, out in patterns:
        for name in sorted(linear):
            if name != out and not name.endswith("." + out):
                continue
            parent = name.removesuffix(out)
            whole = {name, *(parent + part for part in ins)}
            if whole <= linear and not whole & taken:
                taken |= whole
                yield parent, ins, out


def _find_mlps(model: Any, linear: set[str], index: int, prefix: str) -> list[Mlp]:
    found = []
    for parent, ins, out in _match(linear, MLP_PATTERNS):
        names = tuple(f"{prefix}{parent}{part}.weight" for part in ins)
        weight, transposed = model.get_parameter(f"{prefix}{parent}{out}.weight"), is_transposed(model, names[0])
        width = weight.shape[0 if transposed else 1]
        heights = {model.get_parameter(name).shape[1 if transposed else 0] for name in names}
        high = heights.pop()
        if not heights and high in (width, 2 * width):
            key = _width_key(model.config, width, experts=False, shared="shared" in parent)
            module = (prefix + parent).rstrip(".")
            found.append(Mlp(index, module, names, f"{prefix}{parent}{out}.weight", width, high == 2 * width, 0, key))
    return found


def _find_experts(model: Any, layer: nn.Module, index: int, prefix: str) -> list[Mlp]:
    """Experts whose weights are 3-D: gate and up [experts, 2 x width, hidden], down [experts, hidden, width]."""
    found = []
    for name, part in layer.named_modules():
        own = dict(part.named_parameters(recurse=False))
        if set(own) != set(EXPERT_PATTERN) or any(value.ndim != 3 for value in own.values()):
            continue
        up, down = own[EXPERT_PATTERN[0]], own[EXPERT_PATTERN[1]]
        fits = up.shape[2] == down.shape[1] and up.shape[1] == 2 * down.shape[2]
        if fits and getattr(part, "is_concatenated", True):
            key = _width_key(model.config, down.shape[2], experts=True, shared=False)
            names = tuple(f"{prefix}{name}.{weight}" for weight in EXPERT_PATTERN)
            found.append(Mlp(index, prefix + name, names[:1], names[1], down.shape[2], True, up.shape[0], key))
    return found


def _width_key(config: Any, width: int, experts: bool, shared: bool) -> str:
    """The config key that holds this MLP's width (None means four times the hidden size), of our own type the key of
    its ffn; empty when none does."""
    if isinstance(config, ShrewConfig):
        mixture = config.parsed().ffn.kind == "moe"
        return "shared" if shared else "dense_hidden" if mixture and not experts else "hidden"
    for key in MLP_KEYS:
        if (key.startswith("moe") and not experts) or (key.startswith("shared") and not shared):
            continue
        value = getattr(config, key, 0)
        if value == width or (value is None and width == 4 * config.hidden_size):
            return key
    return ""


def _find_attention(model: Any, layer: nn.Module, linear: set[str], index: int, prefix: str) -> list[Attention]:
    config = model.config
    heads = getattr(config, "num_attention_heads", None)
    if not isinstance(heads, int):
        return []
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    for parent, ins, out in _match(linear, ATTENTION_PATTERNS):
        names = tuple(f"{prefix}{parent}{part}.weight" for part in ins)
        transposed = is_transposed(model, names[0])
        rows = [model.get_parameter(name).shape[1 if transposed else 0] for name in names]
        width = model.get_parameter(f"{prefix}{parent}{out}.weight").shape[0 if transposed else 1]
        head_dim, refusal = width // heads, ""
        known = {*(parent + part for part in ins), parent + out}
        wanted = [width, kv_heads * head_dim, kv_heads * head_dim]
        if ins[0] in INTERLEAVED:
            refusal = "stores query, key and value of each head together"
        elif rows != (wanted if len(ins) == 3 else [sum(wanted)]):
            refusal = "has query, key and value projections of an unknown layout"
        elif odd := _odd_parameter(layer, parent, known, head_dim):
            refusal = f"has {odd}, which spans all heads"
        return [Attention(index, names, f"{prefix}{parent}{out}.weight", heads, kv_heads, head_dim, refusal)]
    return []


def _odd_parameter(layer: nn.Module, parent: str, known: set[str], head_dim: int) -> str:
    """An attention parameter besides the projections that is not per channel of one head (olmoe's q_norm)."""
    scope = parent.split(".")[0] + "."
    for name, value in layer.named_parameters():
        owner = name.rpartition(".")[0]
        if name.startswith(scope) and owner not in known and value.shape != (head_dim,):
            return owner.rpartition(".")[2] or name
    return ""


# --- rebuilding


def with_settings(config: Any, **settings: Any) -> Any:
    """A copy of a config with some keys changed, read back from the JSON that a folder would hold.

    Raises UnsupportedError when the architecture's own checks refuse the settings.
    """
    changed = copy.deepcopy(config)
    try:
        for key, value in settings.items():
            setattr(changed, key, value)
        content = json.loads(changed.to_json_string(use_diff=True))
        reread = type(config).from_dict(type(config)._decode_special_floats(content))
    except (StrictDataclassError, ValueError, TypeError, AttributeError) as error:
        said = ", ".join(f"{key} {value}" for key, value in settings.items())
        raise UnsupportedError(
            f"{config.model_type} takes no {said}: {_reason(error)}; choose another size of cut."
        ) from None
    reread._attn_implementation = config._attn_implementation
    reread._name_or_path = config._name_or_path
    return reread


def with_widths(config: Any, **settings: int) -> Any:
    """A copy of a config with these widths; of our own type they are those of its ffn."""
    if not isinstance(config, ShrewConfig):
        return with_settings(config, **settings)
    item = config.parsed()
    ffn = item.ffn
    if ffn.kind == "moe":  # a width that follows from those of the experts stays what it is
        ffn = replace(ffn, dense_hidden=ffn.dense(item.width).hidden)
    return _with_spec(config, replace(item, ffn=replace(ffn, **settings)))


def _with_spec(config: ShrewConfig, item: ModelSpec) -> Any:
    return with_settings(config, spec=dump(item))


def untied(config: Any) -> Any:
    """A copy of a config whose head has weights of its own."""
    if isinstance(config, ShrewConfig):
        return _with_spec(config, replace(config.parsed(), tied=False))
    return with_settings(config, tie_word_embeddings=False)


def without_layers(model: Any, dropped: set[int]) -> Any:
    """The config without some layers; lists with one entry a layer, or of layer numbers, follow."""
    if isinstance(model.config, ShrewConfig):
        return _without_own_layers(model.config, dropped)
    config = copy.deepcopy(model.config)
    count = config.num_hidden_layers
    settings: dict[str, Any] = {}
    for key in PER_LAYER_KEYS:
        value, derived = getattr(config, key, None), isinstance(getattr(type(config), key, None), property)
        if isinstance(value, list) and len(value) == count and not derived:
            settings[key] = [entry for index, entry in enumerate(value) if index not in dropped]
            if not set(value) <= RECURRENT and set(settings[key]) <= RECURRENT:
                raise UnsupportedError(f"{config.model_type}: no attention layer would be left, and its class cannot "
                                       "decode without one; leave more of its layers.")  # fmt: skip
    places = {old: new for new, old in enumerate(index for index in range(count) if index not in dropped)}
    for key in NUMBER_KEYS:
        if numbers := getattr(config, key, None):
            settings[key] = [places[index] for index in numbers if index in places]
    if "layer_types" in settings:
        for key in STALE_KEYS:
            if key in vars(config):
                delattr(config, key)
    return with_settings(config, num_hidden_layers=count - len(dropped), **settings)


def _without_own_layers(config: ShrewConfig, dropped: set[int]) -> Any:
    """Our own type: the pattern names the mixers of the layers left, one by one."""
    item = config.parsed()
    if item.exits:
        raise UnsupportedError("shrew: early exits stand after a number of layers, so those after a cut would read "
                               "other layers than they were trained on; leave the layers whole.")  # fmt: skip
    if item.ranks:
        raise UnsupportedError("shrew: this model's projections are factored by the number of their layer; put factor "
                               "behind the moves that take layers out.")  # fmt: skip
    letters = "".join(item.pattern[place % len(item.pattern)] for place in range(item.layers) if place not in dropped)
    mixers = {letter: mixer for letter, mixer in item.mixers.items() if letter in letters}
    repeats = tuple(times for place, times in enumerate(item.repeats) if place not in dropped)
    try:
        return _with_spec(config, replace(item, pattern=shortest(letters), layers=len(letters), mixers=mixers,
                                          repeats=repeats))  # fmt: skip
    except SpecError as error:
        raise UnsupportedError(f"shrew: {str(error).rstrip('.')}; leave more of its layers.") from None


def skeleton(model: Any, config: Any) -> dict[str, torch.Size]:
    """Shape of every tensor that a model of `config` has; nothing is allocated."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        empty = _build(model, config)
    return {name: value.shape for name, value in empty.state_dict().items()}


def _build(model: Any, config: Any) -> Any:
    try:
        return type(model)._from_config(copy.deepcopy(config), dtype=model.dtype)
    except (StrictDataclassError, ValueError, TypeError) as error:
        raise UnsupportedError(
            f"{config.model_type} cannot be built in this size: {_reason(error)}; choose another size of cut."
        ) from None


def _reason(error: BaseException) -> str:
    """The innermost message in one line, to stand inside a sentence."""
    return " ".join(str(error.__cause__ or error).split()).rstrip(".!")


def rebuild(model: Any, config: Any, state: dict[str, torch.Tensor]) -> Any:
    """A new model of `config` with exactly these tensors, on the device of the old one.

    Raises UnsupportedError naming the first tensor that `config` and `state` do not agree about.
    """
    with torch.random.fork_rng(devices=[]):
        new = _build(model, config)
    shapes = {name: value.shape for name, value in new.state_dict().items()}
    for name in [*state, *shapes]:
        here, there = state.get(name), shapes.get(name)
        if here is None or here.shape != there:
            has, wants = "none" if here is None else tuple(here.shape), "none" if there is None else tuple(there)
            raise UnsupportedError(
                f"{config.model_type}: its config cannot describe this cut ({name}: the cut leaves {has}, the config "
                f"says {wants}); leave this part whole."
            )
    new.load_state_dict(state)
    if model.can_generate():
        new.generation_config = copy.deepcopy(model.generation_config)
    return new.to(model.device).train(model.training)


def check_same_layer(kind: str, old: nn.Module, new: nn.Module, at: int) -> None:
    """Refuse when a layer would work differently in its new place, beyond knowing its index (its window, say)."""
    for (name, before), (_, after) in zip(old.named_modules(), new.named_modules(), strict=True):
        for key, value in vars(before).items():
            plain = value is None or isinstance(value, bool | int | float | str)
            if plain and key not in INDEX_NAMES and not key.startswith("_") and vars(after).get(key) != value:
                _refuse_place(kind, at, f"{name}.{key}".lstrip("."))
        buffers = dict(after.named_buffers(recurse=False))
        for key, value in before.named_buffers(recurse=False):
            if key not in buffers or not torch.equal(value, buffers[key]):
                _refuse_place(kind, at, f"{name}.{key}".lstrip("."))


def _refuse_place(kind: str, at: int, what: str) -> None:
    raise UnsupportedError(
        f"{kind}: the layer that moves to place {at} would get another {what} there, and its config cannot say "
        "otherwise; leave the layers whole."
    )


# --- running


def batches(loaded: Any, sequences: list[np.ndarray], tokens: int, limit: int | None = None) -> Iterator[torch.Tensor]:
    """Input ids [B, T] of sequences of equal length, so that nothing is padded; at most `tokens` a batch.

    `limit` ends after that many tokens. Raises DataError without any sequence.
    """
    if not any(len(sequence) for sequence in sequences):
        raise DataError("There is no calibration text to measure importance on; give some text.")
    alone = loaded.is_classifier and loaded.model.config.pad_token_id is None  # these refuse a batch of several
    pending: list[np.ndarray] = []
    seen = 0
    for sequence in sequences:
        if not len(sequence) or (limit is not None and seen >= limit):
            continue
        seen += len(sequence)
        full = (len(pending) + 1) * len(sequence) > tokens
        if pending and (alone or full or len(pending[0]) != len(sequence)):
            yield _stack(loaded, pending)
            pending = []
        pending.append(sequence)
    yield _stack(loaded, pending)


def _stack(loaded: Any, sequences: list[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.stack(sequences).astype(np.int64)).to(loaded.model.device)


def logits(loaded: Any, ids: torch.Tensor) -> torch.Tensor:
    """Logits of input ids [B, T]: [B, T, vocabulary] of a causal model, [B, labels] of a classifier."""
    extra = {} if loaded.is_classifier else {"use_cache": False}
    result: torch.Tensor = loaded.model(input_ids=ids, **extra).logits
    return result


def fingerprint(model: Any, sequences: list[np.ndarray], *extra: Any) -> str:
    """SHA-256 of a model's weights and config, the sequences and further settings: the key of a cached score."""
    sha = hashlib.sha256(repr((model.config.to_json_string(), extra)).encode())
    for name, value in model.state_dict().items():
        sha.update(name.encode())
        sha.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    for sequence in sequences:
        sha.update(repr(sequence.shape).encode())
        sha.update(np.ascontiguousarray(sequence, dtype=np.int64).data)
    return sha.hexdigest()
