"""Make layers narrower: keep the MLP channels and the attention heads that matter on calibration text."""

import dataclasses
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import nn

from shrew import files
from shrew.errors import UnsupportedError
from shrew.folder import Loaded
from shrew.moves import importance
from shrew.moves.anatomy import (
    Anatomy,
    Attention,
    Mlp,
    batches,
    fingerprint,
    is_transposed,
    logits,
    read_anatomy,
    rebuild,
    skeleton,
    with_widths,
)
from shrew.moves.context import Context
from shrew.spec import Meta, doc

SCORE_TOKENS = 8192  # of calibration text


@dataclass(frozen=True, kw_only=True)
class Narrow:
    """Cut MLP channels and whole key-value groups with their query heads; each layer keeps those that matter there."""

    name: ClassVar[str] = "narrow"
    paper: ClassVar[str] = "Muralidharan et al. 2024, Minitron (arXiv:2407.14679)"

    mlp: Annotated[float, Meta(gt=0, le=1)] = doc("share of the MLP channels to keep", 1.0)
    heads: Annotated[float, Meta(gt=0, le=1)] = doc(
        "share of the attention's key-value groups to keep, with their query heads", 1.0
    )
    multiple: Annotated[int, Meta(ge=1)] = doc("keep a multiple of this many MLP channels", 32)
    measure: Literal["activation", "hessian"] = doc(
        "activation: what matters is the size of a channel's part in the output; hessian: also how far the others can "
        "make up for it, which they then do, and the better of the two by the layer's output", "activation"
    )  # fmt: skip

    def apply(self, loaded: Loaded, context: Context) -> Loaded:
        """Raises UnsupportedError where the architecture, or an earlier quantize, allows no such cut."""
        anatomy = read_anatomy(loaded.model)
        settings: dict[str, int] = {}
        mlps = _cut_mlps(anatomy, self.mlp, self.multiple, settings) if self.mlp < 1 else []
        attentions = _cut_attentions(loaded.model, anatomy, self.heads, settings) if self.heads < 1 else []
        if not settings:
            if self.mlp < 1 or self.heads < 1:
                context.say(f"narrow: rounds to the present widths (multiples of {self.multiple}); nothing is cut")
            return loaded
        if self.heads < 1 and not attentions:
            context.say(f"narrow: {self.heads:.0%} of the groups of heads, rounded, are all of them; none is cut")
        config = with_widths(loaded.model.config, **settings)
        _check(loaded, config, mlps, attentions)
        scores = channel_scores(loaded, context)
        seen = self._moments(loaded, context, [*mlps, *attentions])
        state = dict(loaded.model.state_dict())
        for mlp in mlps:
            keep, new = _chosen(loaded, context, seen, scores, mlp.out, settings[mlp.key], 1)
            _narrow_mlp(loaded.model, state, mlp, keep)
            _refit(loaded.model, state, mlp.out, new)
        for attention in attentions:
            groups = settings.get("num_key_value_heads", settings["num_attention_heads"])
            size = attention.heads // attention.kv_heads * attention.head_dim
            keep, new = _chosen(loaded, context, seen, scores, attention.out, groups, size)
            _narrow_attention(loaded.model, state, attention, keep)
            _refit(loaded.model, state, attention.out, new)
        said = ", ".join(f"{key} {value}" for key, value in settings.items())
        context.say(f"narrow: {said}")
        return dataclasses.replace(loaded, model=rebuild(loaded.model, config, state))

    def _moments(self, loaded: Loaded, context: Context, parts: list[Mlp | Attention]) -> dict[str, torch.Tensor]:
        """What `measure` has to know of the inputs of each out-projection; nothing of experts, whose inputs no hook
        sees: their channels are chosen by activation alone."""
        if self.measure == "activation":
            return {}
        names = [part.out for part in parts if isinstance(part, Attention) or not part.experts]
        if len(names) < len(parts):
            context.say("narrow: channels of experts are chosen by activation")
        return importance.moments(loaded, context, names)


def _chosen(
    loaded: Loaded, context: Context, seen: dict[str, torch.Tensor], scores: dict[str, torch.Tensor], name: str,
    count: int, size: int,
) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """The units of `size` inputs that the out-projection `name` keeps, and its new weight [out, in] where its inputs'
    moments are known."""
    keep = _best(scores[name], count)
    if name not in seen:
        return keep, None
    keep, new, how = importance.best_cut(_as_linear(loaded.model, name).cpu(), seen[name], keep, size)
    context.say(f"narrow: {name}: {how}")
    return keep, new


def _refit(model: Any, state: dict[str, torch.Tensor], name: str, new: torch.Tensor | None) -> None:
    if new is not None:
        state[name] = (new.T if is_transposed(model, name) else new).contiguous().to(state[name])


def _cut_mlps(anatomy: Anatomy, share: float, multiple: int, settings: dict[str, int]) -> list[Mlp]:
    """The MLPs to cut; their config keys and new widths go into `settings`."""
    covered = {mlp.layer for mlp in anatomy.mlps if mlp.key}
    if missing := sorted(set(range(anatomy.count)) - covered):
        raise UnsupportedError(
            f"{anatomy.kind}: no MLP whose width its config states was found in layer {missing[0]}; leave mlp at 1."
        )
    for mlp in anatomy.mlps:
        width = min(mlp.width, max(1, round(mlp.width * share / multiple)) * multiple)
        if mlp.key and width < mlp.width:
            settings[mlp.key] = width
    return [mlp for mlp in anatomy.mlps if mlp.key in settings]


def _cut_attentions(model: Any, anatomy: Anatomy, share: float, settings: dict[str, int]) -> list[Attention]:
    """The attentions to cut; the config's head counts go into `settings`."""
    if len(anatomy.attentions) != anatomy.count:
        missing = min(set(range(anatomy.count)) - {attention.layer for attention in anatomy.attentions})
        raise UnsupportedError(f"{anatomy.kind}: no attention of a known form in layer {missing}; leave heads at 1.")
    first = anatomy.attentions[0]
    groups = max(1, round(first.kv_heads * share))
    if groups == first.kv_heads:
        return []
    settings["num_attention_heads"] = groups * (first.heads // first.kv_heads)
    if getattr(model.config, "num_key_value_heads", None) is not None:
        settings["num_key_value_heads"] = groups
    settings["head_dim"] = first.head_dim
    return list(anatomy.attentions)


def _check(loaded: Loaded, config: Any, mlps: list[Mlp], attentions: list[Attention]) -> None:
    """Refuse before any measuring what could not be built, or is packed already."""
    parts: list[Mlp | Attention] = [*mlps, *attentions]
    for name in [name for part in parts for name in (*part.ins, part.out)]:
        if name in loaded.packed:
            raise UnsupportedError(f"{name} is quantized already; put narrow before quantize in the recipe.")
    if not attentions:
        return
    shapes = skeleton(loaded.model, config)
    for attention in attentions:
        axis = 0 if is_transposed(loaded.model, attention.out) else 1
        if shapes[attention.out][axis] != config.num_attention_heads * attention.head_dim:
            raise UnsupportedError(
                f"{config.model_type} ties the size of a head to its hidden size divided by the number of heads, so "
                "its heads cannot be cut; leave heads at 1."
            )
        if attention.refusal:
            raise UnsupportedError(
                f"{config.model_type}'s attention {attention.refusal}, so its heads cannot be cut; leave heads at 1."
            )


def _best(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Indices of the `count` largest scores along the last axis, in their old order."""
    return scores.topk(count, dim=-1).indices.sort(dim=-1).values


# --- measuring


def channel_scores(loaded: Loaded, context: Context) -> dict[str, torch.Tensor]:
    """Importance of every MLP channel and attention group on calibration text, by the name of the out-projection.

    For MLPs [width], for experts [experts, width], for key-value groups [groups]: the root mean square over tokens of
    the norm of what the channel, or the group's query heads, add to the layer's output. (Of an MLP's channel that is
    its activation's root mean square times the norm of its column in the out-projection; on a small trained llama it
    cut better than Minitron's mean |activation|.) Cached in `context.cache`, so that other widths cost no second pass.
    """
    key = fingerprint(loaded.model, context.calibration, "channels", SCORE_TOKENS)
    cached = context.cache / f"channels-{key}.safetensors"
    if cached.exists():
        return load_file(cached)
    anatomy = read_anatomy(loaded.model)
    sums: dict[str, torch.Tensor] = defaultdict(lambda: torch.zeros((), dtype=torch.float64))
    tokens = 0
    with ExitStack() as hooks, torch.inference_mode():
        for mlp in anatomy.mlps:
            if mlp.experts:
                module = loaded.model.get_submodule(mlp.module)
                hooks.enter_context(
                    module.register_forward_pre_hook(_note_experts(sums, mlp.out), with_kwargs=True)
                )
            else:
                module = loaded.model.get_submodule(mlp.out.removesuffix(".weight"))
                hooks.enter_context(module.register_forward_pre_hook(_note_channels(sums, mlp.out)))
        for attention in anatomy.attentions:
            module = loaded.model.get_submodule(attention.out.removesuffix(".weight"))
            hooks.enter_context(module.register_forward_pre_hook(_note_groups(sums, attention)))
        for ids in batches(loaded, context.calibration, 2048, SCORE_TOKENS):
            logits(loaded, ids)
            tokens += ids.numel()
    scores = {}
    for mlp in anatomy.mlps:
        columns = _as_linear(loaded.model, mlp.out).double().norm(dim=-2).cpu()
        scores[mlp.out] = ((sums[mlp.out] / tokens).sqrt() * columns).float().contiguous()
    for attention in anatomy.attentions:
        weight = _as_linear(loaded.model, attention.out).double().cpu()
        blocks = weight.unflatten(1, (attention.kv_heads, -1)).transpose(0, 1)  # [groups, hidden, channels]
        power = (blocks.transpose(1, 2) @ blocks * sums[attention.out]).sum((1, 2)) / tokens
        scores[attention.out] = power.clamp(min=0).sqrt().float().contiguous()
    files.write_bytes(cached, to_bytes(scores))
    return scores


def _as_linear(model: Any, name: str) -> torch.Tensor:
    """A weight as [out, in] (of experts [experts, out, in]), however it is stored."""
    weight: torch.Tensor = model.get_parameter(name).detach()
    return weight.T if weight.ndim == 2 and is_transposed(model, name) else weight


def _note_channels(sums: dict[str, torch.Tensor], name: str) -> Callable[[nn.Module, Any], None]:
    def note(_: nn.Module, args: Any) -> None:
        sums[name] = sums[name] + args[0].square().flatten(0, -2).sum(0, dtype=torch.float64).cpu()

    return note


def _note_groups(sums: dict[str, torch.Tensor], part: Attention) -> Callable[[nn.Module, Any], None]:
    def note(_: nn.Module, args: Any) -> None:
        x = args[0].flatten(0, -2).unflatten(-1, (part.kv_heads, -1)).transpose(0, 1)  # [groups, tokens, channels]
        sums[part.out] = sums[part.out] + (x.transpose(1, 2) @ x).double().cpu()

    return note


def _note_experts(sums: dict[str, torch.Tensor], name: str) -> Callable[[nn.Module, Any, Any], None]:
    """Activations inside fused experts are seen by no hook, so they are computed again, weighted as the router does."""

    def note(experts: Any, args: Any, kwargs: Any) -> None:
        given = [*args, *(kwargs[key] for key in ("hidden_states", "top_k_index", "top_k_weights") if key in kwargs)]
        hidden, index, weights = given[0].flatten(0, -2), given[1], given[2]
        rows = []
        for expert in range(len(experts.gate_up_proj)):
            token, slot = torch.where(index == expert)
            gate, up = (hidden[token] @ experts.gate_up_proj[expert].T).chunk(2, dim=-1)
            rows.append((experts.act_fn(gate) * up * weights[token, slot, None]).square().sum(0, dtype=torch.float64))
        sums[name] = sums[name] + torch.stack(rows).cpu()

    return note


# --- cutting


def _narrow_mlp(model: Any, state: dict[str, torch.Tensor], mlp: Mlp, keep: torch.Tensor) -> None:
    """Cut one MLP in `state` to the channels `keep` ([width], of experts [experts, width])."""
    rows = torch.cat([keep, keep + mlp.width], dim=-1) if mlp.stacked else keep
    if mlp.experts:
        state[mlp.ins[0]] = torch.stack([w[row] for w, row in zip(state[mlp.ins[0]], rows, strict=True)])
        state[mlp.out] = torch.stack([w[:, column] for w, column in zip(state[mlp.out], keep, strict=True)])
        return
    for name in mlp.ins:
        _keep_outputs(model, state, name, rows)
    _keep_inputs(model, state, mlp.out, keep)


def _narrow_attention(model: Any, state: dict[str, torch.Tensor], part: Attention, groups: torch.Tensor) -> None:
    """Cut one attention in `state` to these key-value groups and their query heads."""
    keys = (groups[:, None] * part.head_dim + torch.arange(part.head_dim)).flatten()
    size = part.heads // part.kv_heads * part.head_dim
    queries = (groups[:, None] * size + torch.arange(size)).flatten()
    if len(part.ins) == 3:
        for name, rows in zip(part.ins, (queries, keys, keys), strict=True):
            _keep_outputs(model, state, name, rows)
    else:
        first, second = part.heads * part.head_dim, (part.heads + part.kv_heads) * part.head_dim
        _keep_outputs(model, state, part.ins[0], torch.cat([queries, keys + first, keys + second]))
    _keep_inputs(model, state, part.out, queries)


def _keep_outputs(model: Any, state: dict[str, torch.Tensor], name: str, rows: torch.Tensor) -> None:
    state[name] = state[name].index_select(1 if is_transposed(model, name) else 0, rows.to(state[name].device))
    bias = name.removesuffix("weight") + "bias"
    if bias in state:
        state[bias] = state[bias].index_select(0, rows.to(state[bias].device))


def _keep_inputs(model: Any, state: dict[str, torch.Tensor], name: str, columns: torch.Tensor) -> None:
    state[name] = state[name].index_select(0 if is_transposed(model, name) else 1, columns.to(state[name].device))
