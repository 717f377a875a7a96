"""`linearize`: softmax attention becomes a mixer whose cost does not grow with the text.

Attention transfer: each new mixer starts from the projections of the attention it replaces and is trained to give that
attention's output on the original's hidden states, whatever the other layers do (Zhang et al. 2024; Wang et al. 2024,
arXiv:2408.15237). What is left of the damage is for `distil` to heal.
"""

import dataclasses
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from shrew.blocks.attention import Attention, AttentionSpec
from shrew.blocks.delta import Delta, DeltaSpec
from shrew.blocks.layers import Place, Shape
from shrew.blocks.linear import Linear, LinearSpec
from shrew.blocks.model import MIXERS, ModelSpec, ShrewForCausalLM, build
from shrew.blocks.stock import IDS, adopt, stock
from shrew.blocks.stock.adapter import shortest
from shrew.blocks.window import WindowSpec
from shrew.errors import ShrewError, SpecError, UnsupportedError
from shrew.folder import Loaded
from shrew.moves.context import Context
from shrew.moves.distil import Plan, rate
from shrew.spec import Meta, doc

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
OPEN = 1.2785  # silu(OPEN) = 1: a gate that changes nothing
MEASURED = 8192  # tokens of calibration text that errors are measured on


@dataclass(frozen=True, kw_only=True)
class Linearize:
    """Replace softmax attention by windows, linear attention or the delta rule, trained to give the same output."""

    name: ClassVar[str] = "linearize"
    paper: ClassVar[str] = "Zhang et al. 2024, LoLCATs (arXiv:2410.10254)"

    to: Literal["window", "linear", "delta"] = doc("what attention becomes", "linear")
    keep: Annotated[int, Meta(ge=0)] = doc("each so many layers, the last of them keeps its attention; 0: none", 4)
    window: Annotated[int, Meta(ge=1)] = doc("to = window: positions that a token attends to, itself included", 64)
    steps: Annotated[int, Meta(ge=0)] = doc("optimizer steps of the transfer", 200)
    rows: Annotated[int, Meta(ge=1)] = doc("windows of text in a step", 4)
    lr: Annotated[float, Meta(gt=0)] = doc("peak learning rate (AdamW, 10 % warm-up, linear to zero)", 1e-2)

    def apply(self, loaded: Loaded, context: Context) -> Loaded:
        """Raises UnsupportedError for a model that our blocks cannot say, without attention or without text."""
        if loaded.is_classifier:
            raise UnsupportedError("linearize: only causal language models can be linearized.")
        if loaded.packed:
            raise UnsupportedError("linearize: the weights are quantized already; put it before quantize.")
        if not context.calibration or not context.healing:
            raise UnsupportedError("linearize needs text to train and to measure on; give a longer text or task.")
        ours = adopt(loaded.model)
        self._check(ours.spec, [*context.calibration, *context.healing])
        chosen = [number for number in range(ours.spec.layers) if self._replaces(ours.spec, number)]
        if not chosen:
            raise UnsupportedError(f"linearize: no attention layer of this {loaded.model.config.model_type} would be "
                                   f"replaced at keep {self.keep}; leave the move out.")  # fmt: skip
        measured = Plan(_some(context.calibration), 1, len(_some(context.calibration)), context.seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(context.seed)
            new = self._new_mixers(ours, chosen, loaded, measured)
            before = errors(ours, new, loaded, measured)
            self._transfer(ours, new, loaded, context)
            after = errors(ours, new, loaded, measured)
        for number in chosen:
            context.say(f"linearize: layer {number}, attention -> {self.to}: error {before[number]:.1%} of the "
                        f"output's power, {after[number]:.1%} after {self.steps} steps")  # fmt: skip
        made = stock(_assembled(ours, new, self._spec(ours.spec)))
        context.say(f"linearize: saved as {made.config.model_type}")
        return dataclasses.replace(loaded, model=made, untouched={})

    def _check(self, spec: ModelSpec, windows: list[np.ndarray]) -> None:
        if spec.patches:
            raise UnsupportedError("linearize: a model of patches has local layers and others; leave it out.")
        if any(".mixer." in name for name in spec.ranks):
            raise UnsupportedError("linearize: projections of attention are two factors; put linearize before factor.")
        if self.to == "window" and self.window >= spec.context:
            raise SpecError(f"linearize: window {self.window} is no shorter than the context of {spec.context}, so "
                            "nothing would be saved; choose a shorter one.")  # fmt: skip
        longest = max(map(len, windows))
        if longest > spec.context:
            raise UnsupportedError(f"linearize: the model was made for {spec.context} tokens and a text window has "
                                   f"{longest}; set window = {spec.context} in [source].")  # fmt: skip

    def _replaces(self, spec: ModelSpec, number: int) -> bool:
        kept = self.keep and number % self.keep == self.keep - 1
        return not kept and spec.mixer(number).kind == "attention"

    def _mixer(self, old: AttentionSpec, width: int) -> Any:
        """The spec of what replaces an attention. Key-value heads become as many as heads: a recurrent state that
        several queries share would save nothing."""
        head = old.head_width or width // old.heads
        if self.to == "linear":
            return LinearSpec(heads=old.heads, state=head, head_width=head, bias=True)
        if self.to == "delta":
            return DeltaSpec(heads=old.heads, key_width=head, conv=0)
        options = {field.name: getattr(old, field.name) for field in dataclasses.fields(old) if field.name != "kind"}
        return WindowSpec(**options, window=self.window)

    def _spec(self, spec: ModelSpec) -> ModelSpec:
        """The whole model's spec: a letter for each new mixer, a pattern that names every layer's."""
        letters, mixers, names = "", dict(spec.mixers), {}
        for number in range(spec.layers):
            letter = spec.pattern[number % len(spec.pattern)]
            if self._replaces(spec, number):
                if letter not in names:
                    names[letter] = next(free for free in LETTERS if free not in mixers)
                    mixers[names[letter]] = self._mixer(spec.mixers[letter], spec.width)
                letter = names[letter]
            letters += letter
        used = {letter: mixer for letter, mixer in mixers.items() if letter in letters}
        return dataclasses.replace(spec, pattern=shortest(letters), mixers=used)

    def _new_mixers(self, ours: Any, chosen: list[int], loaded: Loaded, plan: Plan) -> dict[int, nn.Module]:
        """By layer, the mixers that replace attention, started from it."""
        spec, sizes = ours.spec, _head_sizes(ours, chosen, loaded, plan) if self.to != "window" else {}
        found: dict[int, nn.Module] = {}
        for number in chosen:
            old = ours.model.layers[number].mixer
            wanted = self._mixer(spec.mixer(number), spec.width)
            new = MIXERS[wanted.kind][1](wanted, Shape(spec.width, spec.eps, spec.vocabulary or 0, number))
            if self.to == "window":
                new.load_state_dict(old.state_dict())
            else:
                new.start(0.02, 0.02)
                _start_from(new, old, sizes[number])
            found[number] = new.to(ours.dtype)
        return found

    def _transfer(self, ours: Any, new: dict[int, nn.Module], loaded: Loaded, context: Context) -> None:
        """Train every new mixer on its own error. They share no weight, so one optimizer does for all."""
        if not self.steps:
            return
        plan = Plan(context.healing, self.rows, self.steps, context.seed)
        trained = [p for mixer in new.values() for p in mixer.parameters()]
        optimizer = torch.optim.AdamW(trained, lr=self.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
        for step in range(self.steps):
            optimizer.param_groups[0]["lr"] = self.lr * rate(step, self.steps)
            seen, mask, place = watch(ours, list(new), loaded, plan, step)
            for number, pairs in seen.items():
                loss = torch.stack([error(new[number](x, place), y, mask) for x, y in pairs]).mean()
                if not torch.isfinite(loss):
                    raise ShrewError(f"linearize diverged in layer {number} at step {step}; lower its lr from "
                                     f"{self.lr}.")  # fmt: skip
                loss.backward()
                nn.utils.clip_grad_norm_(new[number].parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


def error(found: Tensor, wanted: Tensor, mask: Tensor) -> Tensor:
    """Squared error of [B, T, d] where `mask` [B, T], as a share of the power of `wanted`."""
    here = mask.bool()
    return (found - wanted)[here].square().sum() / wanted[here].square().sum().clamp(min=1e-12)


@torch.no_grad()
def watch(
    ours: Any, layers: list[int], loaded: Loaded, plan: Plan, step: int
) -> tuple[dict[int, list[tuple[Tensor, Tensor]]], Tensor, Place]:
    """What goes into the mixers of these layers and comes out, once for each loop, in one step of the plan; its mask
    [B, T] and place."""
    tokens, mask = plan.batch(plan.picked(step), loaded)
    place = Place(tokens, torch.arange(tokens.shape[1]).expand_as(tokens), mask)
    seen: dict[int, list[tuple[Tensor, Tensor]]] = {number: [] for number in layers}

    def note(number: int) -> Any:
        return lambda _, args, output: seen[number].append((args[0], output))

    with ExitStack() as hooks:
        for number in layers:
            hooks.enter_context(ours.model.layers[number].mixer.register_forward_hook(note(number)))
        ours.model(place)
    return seen, mask, place


@torch.no_grad()
def errors(ours: Any, new: dict[int, nn.Module], loaded: Loaded, plan: Plan) -> dict[int, float]:
    """The mean error of each new mixer over the windows of a plan."""
    total = dict.fromkeys(new, 0.0)
    for step in range(plan.steps):
        seen, mask, place = watch(ours, list(new), loaded, plan, step)
        for number, pairs in seen.items():
            total[number] += sum(float(error(new[number](x, place), y, mask)) for x, y in pairs) / len(pairs)
    return {number: value / plan.steps for number, value in total.items()}


def _some(windows: list[np.ndarray]) -> list[np.ndarray]:
    """The first windows, about MEASURED tokens in all."""
    ends = np.cumsum([len(window) for window in windows])
    return windows[: int(np.searchsorted(ends, MEASURED)) + 1]


@torch.no_grad()
def _head_sizes(ours: Any, chosen: list[int], loaded: Loaded, plan: Plan) -> dict[int, Tensor]:
    """By layer, the root mean square [H] of each head's output. The new mixers norm theirs to one."""
    total = {number: torch.zeros(()) for number in chosen}
    count = 0

    def note(number: int) -> Any:
        def hook(part: nn.Module, args: Any) -> None:
            heads = ours.model.layers[number].mixer.heads
            total[number] = total[number] + args[0].unflatten(-1, (heads, -1)).square().mean(-1).sum((0, 1))

        return hook

    with ExitStack() as hooks:
        for number in chosen:
            hooks.enter_context(ours.model.layers[number].mixer.o_proj.register_forward_pre_hook(note(number)))
        for step in range(plan.steps):
            count += watch(ours, [], loaded, plan, step)[1].numel()
    return {number: (value / count / ours.spec.order.count(number)).sqrt() for number, value in total.items()}


@torch.no_grad()
def _start_from(new: Any, old: Attention, sizes: Tensor) -> None:
    """Copy the projections of attention into `linear` or `delta`: keys and values once for each query head, the weights
    of QK-norms and the size of each head's output multiplied in. Where a gate has a bias it starts open. What has no
    place there is left out: rotary positions (there are decays), sinks, gates of its own, the biases in `delta`."""
    share = old.heads // old.kv_heads

    def rows(part: nn.Linear, norm: Any, repeat: int) -> tuple[Tensor, Tensor]:
        weight, bias = part.weight, torch.zeros(len(part.weight)) if part.bias is None else part.bias
        if norm is not None:
            gain = norm.weight.repeat(len(weight) // len(norm.weight))
            weight, bias = weight * gain[:, None], bias * gain
        heads = (item.unflatten(0, (-1, old.head_width)).repeat_interleave(repeat, 0) for item in (weight, bias))
        weight, bias = (item.flatten(0, 1) for item in heads)
        return weight, bias

    (q, q_bias), (k, k_bias) = rows(old.q_proj, old.q_norm, 1), rows(old.k_proj, old.k_norm, share)
    v, v_bias = rows(old.v_proj, None, share)
    out = old.o_proj.weight * sizes.repeat_interleave(old.head_width)
    if isinstance(new, Linear):
        gate, mixed, _ = new.in_proj.weight.split(new.parts)
        gate_bias, mixed_bias, _ = new.in_proj.bias.split(new.parts)
        gate.zero_()
        gate_bias.fill_(OPEN)
        mixed.copy_(torch.cat([v, k, q]))
        mixed_bias.copy_(torch.cat([v_bias, k_bias, q_bias]))
        new.out_proj.weight.copy_(out)
    elif isinstance(new, Delta):
        new.qkv_proj.weight.copy_(torch.cat([q, k, v]))
        new.o_proj.weight.copy_(out)


def _assembled(ours: Any, new: dict[int, nn.Module], spec: ModelSpec) -> ShrewForCausalLM:
    """The model of `spec` with the new mixers and all else as it was."""
    made = build(spec, **{key: getattr(ours.config, key) for key in IDS}).to(ours.dtype)
    replaced = tuple(f"model.layers.{number}.mixer." for number in new)
    state = {name: value.clone() for name, value in ours.state_dict().items() if not name.startswith(replaced)}
    for number, mixer in new.items():
        state |= {f"model.layers.{number}.mixer.{name}": value for name, value in mixer.state_dict().items()}
    made.load_state_dict(state)
    made.tie_weights()
    made.generation_config = ours.generation_config
    return made.eval()
