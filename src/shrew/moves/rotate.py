"""The `rotate` move: turn the residual stream and the values of attention so that no channel stands out.

Only turns that fold into weights altogether: nothing is computed at run time that was not before.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from shrew.errors import UnsupportedError
from shrew.folder import Loaded
from shrew.moves.anatomy import ATTENTION_PATTERNS, MLP_PATTERNS, find_layers, rebuild, untied
from shrew.moves.context import Context
from shrew.moves.seams import Seam, Side, fed, gain_offset, value_seams
from shrew.spec import doc

OUTS = tuple(sorted({out for _, out in MLP_PATTERNS + ATTENTION_PATTERNS}))
TOLERANCE = 1e-3  # of the largest logit: what rounding in float32 may change; a wrong turn changes all of it


@dataclass(frozen=True, kw_only=True)
class Rotate:
    """Turn the residual stream and each head's values by random Hadamard matrices; the model says the same."""

    name: ClassVar[str] = "rotate"
    paper: ClassVar[str] = "Ashkboos et al. 2024, QuaRot, arXiv:2404.00456"

    residual: bool = doc("turn the residual stream; gains of norms go into weights, so a tied head is untied", True)
    values: bool = doc("turn the values of each attention head", True)

    def apply(self, loaded: Loaded, context: Context) -> Loaded:
        """The turned model. Raises UnsupportedError where the residual stream has a part that cannot be turned."""
        if loaded.packed:
            raise UnsupportedError("rotate goes before quantize: turned codes would be off their grid.")
        if loaded.sparse:
            raise UnsupportedError("rotate goes before prune: turning weights would fill their zeros.")
        draw = torch.Generator().manual_seed(context.seed)
        if self.residual:
            loaded = _turn_residual(loaded, context, draw)
        if self.values:
            _turn_values(loaded, context, draw)
        return loaded


def hadamard(size: int, draw: torch.Generator) -> Tensor:
    """A random orthogonal matrix [size, size], float64, that spreads every channel over all of them.

    Signs drawn at random times Sylvester's Hadamard matrix, where the size is a power of two. Else the size is that
    times an odd number, for which the Kronecker product with a cosine transform (DCT-II) of that number stands in.
    """
    odd = size
    found = torch.ones(1, 1, dtype=torch.float64)
    while odd % 2 == 0:
        odd //= 2
        found = torch.cat([torch.cat([found, found], 1), torch.cat([found, -found], 1)]) / math.sqrt(2)
    place = torch.arange(odd, dtype=torch.float64)
    cosines = torch.cos(math.pi / odd * (place[None] + 0.5) * place[:, None]) * math.sqrt(2 / odd)
    cosines[0] /= math.sqrt(2)
    signs = torch.randint(0, 2, (size,), generator=draw).double() * 2 - 1
    return signs[:, None] * torch.kron(found, cosines)


def turned(value: Tensor, side: Side, matrix: Tensor, width: int) -> Tensor:
    """`value` with its `width` channels multiplied by `matrix` [n, n], n channels at a time."""
    value = value.clone()
    part = value.narrow(side.axis, side.first, width)
    rows = part.movedim(side.axis, -1).unflatten(-1, (-1, len(matrix))).double() @ matrix
    part.copy_(rows.flatten(-2).movedim(-1, side.axis))
    return value


def _turn_residual(loaded: Loaded, context: Context, draw: torch.Generator) -> Loaded:
    model = loaded.model
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None or not isinstance(embedding, nn.Embedding):
        raise UnsupportedError("rotate: this model has no embedding and output head; set residual = false.")
    width, ids = embedding.weight.shape[1], torch.arange(min(48, len(embedding.weight)))[None]
    names = {id(module): name for name, module in model.named_modules()}
    readers = {norm: sides for norm, sides in fed(model, ids).items()
               if not any(side.name.removesuffix(".weight").endswith(OUTS) for side in sides)}  # fmt: skip
    state = {name: value.detach().clone() for name, value in model.state_dict().items()}
    head_name, untie = f"{names[id(head)]}.weight", False
    for norm, sides in readers.items():
        gain = _gain(model, norm, context)
        if (gain == gain[0]).all():  # the same for all channels: turns go through it
            continue
        for side in sides:
            shape = [1] * state[side.name].ndim
            shape[side.axis] = width
            state[side.name] *= gain.view(shape)
            untie |= side.name == head_name and head.weight is embedding.weight
        weight = state[f"{norm}.weight"]
        weight.copy_(weight - gain + 1)
    turns = {side.name: side for sides in readers.values() for side in sides}
    turns |= {side.name: side for side in _writers(model, width, set(turns))}
    turns |= {name: Side(name, 1) for name in (f"{names[id(embedding)]}.weight", head_name)}
    matrix = hadamard(width, draw)
    for side in turns.values():
        state[side.name] = turned(state[side.name], side, matrix, width)
    config = untied(model.config) if untie else model.config
    new = rebuild(model, config, state)
    if (lost := _difference(model, new, ids)) > TOLERANCE:
        raise UnsupportedError(
            f"rotate: the residual stream of {model.config.model_type} meets a part that cannot be turned with it "
            f"(logits would change by {lost:.0%}); set residual = false to turn the values alone."
        )
    if untie:
        size = head.weight.numel() * loaded.dtype.itemsize
        context.say(f"rotate: the head is no longer tied to the embedding, which adds {size:,} bytes before quantizing")
    return replace(loaded, model=new)


def _gain(model: Any, norm: str, context: Context) -> Tensor:
    """What a norm multiplies each channel by. Raises UnsupportedError for one that subtracts the mean."""
    module = model.get_submodule(norm)
    weight = module.weight.detach()
    plus, x = gain_offset(module), torch.randn(1, 1, len(weight), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        centred = plus is None or getattr(module, "bias", None) is not None or torch.allclose(
            module(x + 3), module(x), rtol=1e-2, atol=1e-3)  # fmt: skip
    if plus is None or centred:
        raise UnsupportedError(f"rotate: {norm} does more than divide by the root mean square, so the residual stream "
                               "cannot be turned; set residual = false to turn the values alone.")  # fmt: skip
    return torch.as_tensor(weight + plus)


def _writers(model: Any, width: int, readers: set[str]) -> list[Side]:
    """The parameters of the layers whose outputs are added to the residual stream, by their usual names."""
    path, layers = find_layers(model)
    found = []
    for name, module in layers.named_modules(prefix=path):
        if isinstance(module, nn.Linear | Conv1D) and name.endswith(OUTS) and f"{name}.weight" not in readers:
            axis = 1 if isinstance(module, Conv1D) else 0
            if module.weight.shape[axis] == width:
                found.append(Side(f"{name}.weight", axis))
                found += [Side(f"{name}.bias", 0)] if module.bias is not None else []
        down = getattr(module, "down_proj", None)
        if isinstance(down, nn.Parameter) and down.ndim == 3 and down.shape[1] == width:
            found.append(Side(f"{name}.down_proj", 1))
    return found


def _turn_values(loaded: Loaded, context: Context, draw: torch.Generator) -> None:
    """Turn each head's values in place; a layer where more than the out-projection reads them stays as it was."""
    model = loaded.model
    ids = torch.arange(min(48, model.config.vocab_size))[None]
    found: list[Seam] = list(value_seams(model))
    if not found:
        context.say("rotate: no attention of a known form, so no values are turned")
    with torch.no_grad():
        before = model(input_ids=ids).logits
        for seam in found:
            matrix = hadamard(seam.run, draw)
            held = {name: model.get_parameter(name).detach().clone() for name in seam.names}
            for side, width in ((side, seam.width) for side in seam.writers):
                model.get_parameter(side.name).copy_(turned(held[side.name], side, matrix, width))
            for side in seam.readers:
                model.get_parameter(side.name).copy_(turned(held[side.name], side, matrix, seam.width * seam.copies))
            change = (model(input_ids=ids).logits - before).abs().max() / before.abs().max()
            if not change <= TOLERANCE:
                context.say(f"rotate: the values of {seam.what} are left as they are; more than it reads them")
                for name, value in held.items():
                    model.get_parameter(name).copy_(value)


@torch.no_grad()
def _difference(one: Any, other: Any, ids: Tensor) -> float:
    """The largest change of a logit, as a share of the largest logit."""
    wanted = one(input_ids=ids).logits
    return float((other(input_ids=ids).logits - wanted).abs().max() / wanted.abs().max())
