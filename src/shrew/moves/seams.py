"""Seams: places between two parts of a model where a number for each channel can be moved across without a change.

What one side writes is divided by it, what the other side reads is multiplied: a norm and the weights that read it, the
linear half of a gated MLP and its out-projection, values and the attention's out-projection. Seams are found by what
the live modules pass to each other (`fed`) and by the parts that `anatomy` knows; whoever moves something across one
checks the outputs afterwards, so a part that does more than it seems to is left whole.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from shrew.blocks.attention import Attention as OwnAttention
from shrew.blocks.layers import Factored
from shrew.blocks.moe import Moe
from shrew.errors import UnsupportedError
from shrew.moves.anatomy import read_anatomy


@dataclass(frozen=True)
class Side:
    """Channels of one parameter: `axis` runs over them, from `first` on. `plus` is what the model adds to the stored
    number before it multiplies by it (1 for Gemma's norms)."""

    name: str
    axis: int
    first: int = 0
    plus: float = 0.0


@dataclass(frozen=True)
class Seam:
    """`width` channels that `writers` write and `readers` read; `experts` > 0: each expert has channels of its own.

    A reader sees every run of `run` channels `copies` times in a row (grouped-query attention); 1 elsewhere.
    """

    what: str
    layer: int
    writers: tuple[Side, ...]
    readers: tuple[Side, ...]
    width: int
    experts: int = 0
    run: int = 0
    copies: int = 1

    def spread(self, factors: Tensor) -> Tensor:
        """Factors [..., width] as the readers' channels see them: [..., width * copies]."""
        if self.copies == 1:
            return factors
        return factors.unflatten(-1, (-1, self.run)).repeat_interleave(self.copies, -2).flatten(-2)

    def gathered(self, values: Tensor) -> Tensor:
        """The mean of a positive number for each of the readers' channels over the copies of a channel."""
        if self.copies == 1:
            return values
        return values.unflatten(-1, (-1, self.copies, self.run)).mean(-2).flatten(-2)

    @torch.no_grad()
    def move(self, model: nn.Module, factors: Tensor) -> None:
        """Divide what is written by `factors`, [width] or [experts, width], and multiply what is read."""
        for sides, values in ((self.writers, 1 / factors), (self.readers, self.spread(factors))):
            for side in sides:
                parameter = model.get_parameter(side.name)
                part = parameter.narrow(side.axis, side.first, values.shape[-1])
                shape = [1] * part.ndim
                shape[side.axis] = values.shape[-1]
                if values.ndim == 2:
                    shape[0] = len(values)
                part.copy_((part + side.plus) * values.view(shape) - side.plus)

    @property
    def names(self) -> list[str]:
        """Of every parameter that a move changes."""
        return [side.name for side in (*self.writers, *self.readers)]


def is_norm(module: nn.Module) -> bool:
    """A leaf whose own parameters are a gain for each channel, and perhaps a bias."""
    own = dict(module.named_parameters())
    return "norm" in type(module).__name__.lower() and set(own) <= {"weight", "bias"} and "weight" in own and all(
        value.ndim == 1 for value in own.values())  # fmt: skip


def gain_offset(norm: nn.Module) -> float | None:
    """What a norm adds to its stored weight: 0, or 1 as Gemma's; None when it does something else."""
    weight = norm.get_parameter("weight").detach()
    x = torch.randn(1, 1, len(weight), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        try:
            found = norm(x).float().flatten()
        except TypeError:  # one that wants a gate as well
            return None
    if "bias" in dict(norm.named_parameters()):
        found = found - norm.get_parameter("bias").detach()
    for centred in (x - x.mean(-1, keepdim=True), x):
        unit = (centred / centred.square().mean(-1, keepdim=True).sqrt()).flatten()
        for plus in (0.0, 1.0):
            if torch.allclose(found, unit * (weight + plus), rtol=1e-2, atol=1e-3 * float(found.abs().max() + 1e-30)):
                return plus
    return None


def fed(model: Any, ids: Tensor) -> dict[str, list[Side]]:
    """Norm -> the parameters that read its output, found in one pass over `ids` [1, T].

    Matrices of a module that is called with the norm's output itself, or a view of it, and as wide as it.
    """
    outputs: dict[int, tuple[str, Tensor]] = {}
    found: dict[str, list[Side]] = {}

    def wrote(name: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                outputs[output.data_ptr()] = name, output  # kept, so that no other tensor gets its place

        return hook

    def read(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
            value = next((item for item in (*args, *named.values()) if isinstance(item, Tensor)), None)
            if value is None or value.data_ptr() not in outputs:
                return
            norm, output = outputs[value.data_ptr()]
            if value.numel() == output.numel() and value.shape[-1] == output.shape[-1]:
                # Our own mixture of experts reads its router's weight itself.
                own_weights = {"gate.weight": module.gate.weight} if isinstance(module, Moe) else {}
                for own, weight in (own_weights or dict(module.named_parameters(recurse=False))).items():
                    axis = weight.ndim - (2 if isinstance(module, Conv1D) else 1)
                    if weight.ndim > 1 and own != "down_proj" and weight.shape[axis] == output.shape[-1]:
                        found.setdefault(norm, []).append(Side(f"{name}.{own}", axis))

        return hook

    with ExitStack() as hooks, torch.no_grad():
        for name, module in model.named_modules():
            if is_norm(module):
                hooks.enter_context(module.register_forward_hook(wrote(name)))
            elif isinstance(module, Moe) or (dict(module.named_parameters(recurse=False))
                                             and not isinstance(module, nn.Embedding)):  # fmt: skip
                hooks.enter_context(module.register_forward_pre_hook(read(name), with_kwargs=True))
        model(input_ids=ids)
    return {norm: list(dict.fromkeys(sides)) for norm, sides in found.items()}


def seams(model: Any, ids: Tensor) -> list[Seam]:
    """Every seam of the layers that is known here; `ids` [1, T] is any text. Raises UnsupportedError as `value_seams`
    does."""
    _refuse_factors(model)
    anatomy = read_anatomy(model)
    found = []
    for norm, readers in fed(model, ids).items():
        if norm.startswith(anatomy.path + "."):
            module = model.get_submodule(norm)
            plus = gain_offset(module)
            if plus is not None:
                writers = [Side(f"{norm}.weight", 0, plus=plus)]
                writers += [Side(f"{norm}.bias", 0)] if getattr(module, "bias", None) is not None else []
                layer = int(norm.removeprefix(anatomy.path + ".").partition(".")[0])
                found.append(Seam(norm, layer, tuple(writers), tuple(readers), len(module.weight)))
    return found + list(mlp_seams(model)) + list(value_seams(model))


def _refuse_factors(model: nn.Module) -> None:
    if any(isinstance(module, Factored) for module in model.modules()):
        raise UnsupportedError("the projections of this model are factored; put the move before factor.")


def mlp_seams(model: Any) -> Iterator[Seam]:
    """The half of a gated MLP that no activation bends, and the out-projection."""
    _refuse_factors(model)
    for mlp in read_anatomy(model).mlps:
        if not (mlp.stacked or len(mlp.ins) == 2):
            continue
        if mlp.experts:
            writers = [Side(mlp.ins[0], 1, mlp.width)]
            yield Seam(mlp.out, mlp.layer, tuple(writers), (Side(mlp.out, 2),), mlp.width, mlp.experts)
        else:
            writers = list(_outputs(model, mlp.ins[-1], mlp.width if mlp.stacked else 0))
            yield Seam(mlp.out, mlp.layer, tuple(writers), (_inputs(model, mlp.out),), mlp.width)


def value_seams(model: Any) -> Iterator[Seam]:
    """Values and the out-projection of attention; `run` is the width of a head. Raises UnsupportedError for a model
    whose projections are factored."""
    _refuse_factors(model)
    anatomy = read_anatomy(model)
    for part in anatomy.attentions:
        if not part.refusal or part.refusal.endswith("spans all heads"):  # a norm of queries and keys is no obstacle
            width = part.kv_heads * part.head_dim
            first = 0 if len(part.ins) == 3 else (part.heads + part.kv_heads) * part.head_dim
            yield Seam(part.out, part.layer, tuple(_outputs(model, part.ins[-1], first)), (_inputs(model, part.out),),
                       width, 0, part.head_dim, part.heads // part.kv_heads)  # fmt: skip
    for name, module in model.named_modules():
        if isinstance(module, OwnAttention):
            layer = int(name.removeprefix(anatomy.path + ".").partition(".")[0])
            writers = tuple(_outputs(model, f"{name}.v_proj.weight", 0))
            yield Seam(f"{name}.o_proj.weight", layer, writers, (Side(f"{name}.o_proj.weight", 1),),
                       module.kv_heads * module.head_width, 0, module.head_width,
                       module.heads // module.kv_heads)  # fmt: skip


def _outputs(model: Any, weight: str, first: int) -> Iterator[Side]:
    module = model.get_submodule(weight.removesuffix(".weight"))
    yield Side(weight, 1 if isinstance(module, Conv1D) else 0, first)
    if module.bias is not None:
        yield Side(weight.removesuffix("weight") + "bias", 0, first)


def _inputs(model: Any, weight: str) -> Side:
    return Side(weight, 0 if isinstance(model.get_submodule(weight.removesuffix(".weight")), Conv1D) else 1)
