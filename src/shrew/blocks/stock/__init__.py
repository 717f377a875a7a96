"""Our models as stock transformers types, and those types as ours: same weights, same logits.

An adapter is a row of `ADAPTERS`, made in the file of its family: the config of its type that says a spec, the
spec that says a config, and the names of the parts. Norms that add one to their weight, stacked projections and the
like are undone in `out` and `back`.
"""

from dataclasses import replace
from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedModel

from shrew.blocks.model import ModelSpec, ShrewForCausalLM, build
from shrew.blocks.specs import BytesSpec
from shrew.blocks.stock import blt, dense, gemma3, granite, lfm2, mamba2, olmoe, qwen3_next
from shrew.blocks.stock.adapter import Adapter, Weights
from shrew.errors import SpecError, UnsupportedError
from shrew.spec import dump, parse

IDS = ("bos_token_id", "eos_token_id", "pad_token_id")

# The first that can say a spec is what gets saved.
ADAPTERS: dict[str, Adapter] = {
    "llama": dense.LLAMA,
    "qwen3": dense.QWEN3,
    "qwen2": dense.QWEN2,
    "olmoe": olmoe.OLMOE,
    "qwen3_moe": olmoe.QWEN3_MOE,
    "mixtral": olmoe.MIXTRAL,
    "qwen3_next": qwen3_next.QWEN3_NEXT,
    "gemma3_text": gemma3.GEMMA3,
    "lfm2": lfm2.LFM2,
    "mamba2": mamba2.MAMBA2,
    "granitemoehybrid": granite.GRANITE,
    "blt": blt.BLT,
}


def stock(model: ShrewForCausalLM) -> PreTrainedModel:
    """The same model as a stock transformers type, sharing no memory with `model`; the model itself where no type can
    say its spec."""
    spec = _of_tokens(model.spec)
    for adapter in ADAPTERS.values():
        config = adapter.config(spec)
        if config is not None:
            for key in IDS:
                setattr(config, key, getattr(model.config, key))
            same = AutoModelForCausalLM.from_config(config, dtype=model.dtype)
            weights = {name: value.clone() for name, value in model.state_dict().items()}
            same.load_state_dict(restated(adapter, spec, weights))
            same.tie_weights()
            same.generation_config = model.generation_config  # no spec says it
            return same.eval()
    return model


def adapter_of(spec: ModelSpec) -> Adapter | None:
    """The row of the type that `stock` makes of a spec."""
    spec = _of_tokens(spec)
    return next((adapter for adapter in ADAPTERS.values() if adapter.config(spec) is not None), None)


def _of_tokens(spec: ModelSpec) -> ModelSpec:
    """The spec without the front `bytes`, which says nothing of the model."""
    return replace(spec, front=None) if isinstance(spec.front, BytesSpec) else spec


def restated(adapter: Adapter, spec: ModelSpec, weights: Weights) -> Weights:
    """Our weights as the type has them, or anything of their shapes that moves with their rows, as codes do."""
    return adapter.out(spec, _renamed(weights, _names(adapter, spec)))


def as_spec(config: Any) -> ModelSpec:
    """The spec that a stock config says. Raises UnsupportedError where our blocks cannot say it."""
    adapter = ADAPTERS.get(config.model_type)
    try:
        spec = adapter.spec(config) if adapter else None
        spec = spec and parse(ModelSpec, dump(spec), "its config")  # the ranges too
    except SpecError as error:
        raise UnsupportedError(f"{config.model_type}: this model cannot be said in our blocks: {error}") from None
    if spec is None and adapter:
        raise UnsupportedError(f"{config.model_type}: this model cannot be said in our blocks: they lack an option of "
                               "its config.json (biases, another activation, other positions, ...).")  # fmt: skip
    if spec is None:
        known = ", ".join(ADAPTERS)
        raise UnsupportedError(f"{config.model_type}: this model cannot be said in our blocks; known: {known}.")
    return spec


def adopt(model: PreTrainedModel) -> ShrewForCausalLM:
    """A stock model in our blocks, sharing no memory with `model`; one of ours is returned as it is.

    Raises UnsupportedError where our blocks cannot say its config."""
    if isinstance(model, ShrewForCausalLM):
        return model
    spec = as_spec(model.config)
    ours = build(spec, **{key: getattr(model.config, key) for key in IDS}).to(model.dtype)
    ours.load_state_dict(in_our_names(model.config, spec, model.state_dict()))  # which copies
    ours.tie_weights()
    ours.generation_config = model.generation_config
    return ours.eval()


def in_our_names(config: Any, spec: ModelSpec, weights: Weights) -> Weights:
    """The weights of a stock model as those of the model in our blocks that `spec` says, where possible without a copy.

    Anything of the same shapes can go the same way: what moves rows of weights moves rows of their codes."""
    adapter = ADAPTERS[config.model_type]
    names = [{theirs: part for part, theirs in layer.items()} for layer in _names(adapter, spec)]
    return _renamed(adapter.back(spec, dict(weights)), names)


def _names(adapter: Adapter, spec: ModelSpec) -> list[dict[str, str]]:
    return [adapter.names(spec, layer) for layer in range(spec.deepest)]


def _renamed(weights: Weights, names: list[dict[str, str]]) -> Weights:
    """The parts of layers ('model.layers.3.PART.rest') renamed; longest first, so that a name can begin another."""
    found = {}
    for name, value in weights.items():
        head, dot, rest = name.partition(".layers.")
        number, _, part = rest.partition(".")
        table = names[int(number)] if dot else {}
        for old in sorted(table, key=len, reverse=True):
            if part == old or part.startswith(old + "."):
                name = f"{head}.layers.{number}.{table[old]}{part.removeprefix(old)}"
                break
        found[name] = value
    return found
