"""Leave out the experts that calibration text uses least."""

import dataclasses
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor, nn
from torch.nn import functional as F

from shrew import files
from shrew.errors import SpecError, UnsupportedError
from shrew.folder import Loaded
from shrew.moves.anatomy import Mlp, batches, fingerprint, logits, read_anatomy, rebuild, with_settings
from shrew.moves.context import Context
from shrew.spec import Meta, doc

KINDS = ("olmoe", "qwen3_moe", "mixtral", "shrew")
ROUTING = ("gate.weight", "balance_bias")  # beside the experts, one row or entry for each
USE_TOKENS = 16384  # of calibration text


@dataclass(frozen=True, kw_only=True)
class PruneExperts:
    """Keep the `keep` experts of each layer that calibration text uses most; the others go, or are merged into them."""

    name: ClassVar[str] = "prune-experts"
    paper: ClassVar[str] = "Li et al. 2024, MC-SMoE (arXiv:2310.01334)"

    keep: Annotated[int, Meta(ge=1)] = doc("experts to keep in each layer", 4)
    merge: bool = doc("average each expert that goes into the kept one with the likest weights, by use", False)

    def apply(self, loaded: Loaded, context: Context) -> Loaded:
        """Raises UnsupportedError without experts, or without a router of a known form; SpecError for too few."""
        model = loaded.model
        if model.config.model_type not in KINDS:
            raise UnsupportedError(f"prune-experts: the router of {model.config.model_type} is not known; known: "
                                   f"{', '.join(KINDS)}.")  # fmt: skip
        stacks = [mlp for mlp in read_anatomy(model).mlps if mlp.experts]
        if not stacks:
            raise UnsupportedError(f"prune-experts: this {model.config.model_type} has no experts; leave the move out.")
        total, chosen = stacks[0].experts, _chosen(model)
        if self.keep > total:
            raise SpecError(f"prune-experts: keep {self.keep} is more than the {total} experts of a layer.")
        if self.keep < chosen:
            raise SpecError(f"prune-experts: each token uses {chosen} experts; keep at least as many.")
        for name in (name for stack in stacks for name in (*stack.ins, stack.out)):
            if name in loaded.packed:
                raise UnsupportedError(f"{name} is quantized already; put prune-experts before quantize in the recipe.")
        if self.keep == total:
            return loaded
        uses = expert_use(loaded, context)
        state = dict(model.state_dict())
        for stack in stacks:
            use = uses[stack.out]
            kept = use.topk(self.keep).indices.sort().values
            if self.merge:
                _merge(state, stack, use, kept)
            for name in (*stack.ins, stack.out, *_routing(state, stack)):
                state[name] = state[name][kept].clone()
            context.say(f"prune-experts: layer {stack.layer} keeps {float(use[kept].sum() / use.sum()):.1%} of its use")
        return dataclasses.replace(loaded, model=rebuild(model, _config(model.config, self.keep), state))


def expert_use(loaded: Loaded, context: Context) -> dict[str, Tensor]:
    """Use of every expert on calibration text, [experts] by the name of the out-projections: the sum of the weights
    that the router gave it. Cached in `context.cache`."""
    key = fingerprint(loaded.model, context.calibration, "experts", USE_TOKENS)
    cached = context.cache / f"experts-{key}.safetensors"
    if cached.exists():
        return load_file(cached)
    sums: dict[str, Tensor] = {}

    def note(stack: Mlp) -> Any:
        sums[stack.out] = torch.zeros(stack.experts, dtype=torch.float64)

        def hook(_: nn.Module, args: Any) -> None:
            _, index, weights = args
            sums[stack.out].index_add_(0, index.flatten().cpu(), weights.flatten().double().cpu())

        return hook

    with ExitStack() as hooks, torch.inference_mode():
        for stack in read_anatomy(loaded.model).mlps:
            if stack.experts:
                module = loaded.model.get_submodule(stack.module)
                hooks.enter_context(module.register_forward_pre_hook(note(stack)))
        for ids in batches(loaded, context.calibration, 2048, USE_TOKENS):
            logits(loaded, ids)
    files.write_bytes(cached, to_bytes(sums))
    return sums


def _merge(state: dict[str, Tensor], stack: Mlp, use: Tensor, kept: Tensor) -> None:
    """Average into each kept expert of `state` those that go whose weights have the highest cosine with its own. The
    channels are taken in their order: experts of common descent keep it, and others are hardly alike anyway."""
    names = (*stack.ins, stack.out)
    flat = F.normalize(torch.cat([state[name].flatten(1).float() for name in names], 1))
    home = kept[(flat @ flat[kept].T).argmax(1)]
    home[kept] = kept
    share = use.clamp(min=1e-12)  # an expert that no text reached weighs nothing beside any other
    for name in names:
        weighted = state[name] * share.to(state[name])[:, None, None]
        merged = torch.zeros_like(weighted).index_add_(0, home, weighted)
        total = torch.zeros_like(share).index_add_(0, home, share)
        merged[kept] /= total[kept].to(merged)[:, None, None]
        state[name] = merged


def _routing(state: dict[str, Tensor], stack: Mlp) -> list[str]:
    """The names of the tensors of a stack's router."""
    block = stack.module.rpartition(".")[0]
    return [f"{block}.{part}" for part in ROUTING if f"{block}.{part}" in state]


def _chosen(model: Any) -> int:
    config = model.config
    return int(config.spec["ffn"]["top_k"] if config.model_type == "shrew" else config.num_experts_per_tok)


def _config(config: Any, keep: int) -> Any:
    if config.model_type == "shrew":
        return with_settings(config, spec={**config.spec, "ffn": {**config.spec["ffn"], "experts": keep}})
    return with_settings(config, num_experts=keep)
