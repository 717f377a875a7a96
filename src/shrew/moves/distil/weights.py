"""What is trained: the parameters themselves, numbers behind a grid, a low-rank update of either, and scales."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from shrew.folder import Loaded
from shrew.folder.grids import Uniform, encode, spread
from shrew.folder.packed import Packed, from_rows, to_rows

IN_CACHE = 1 << 17  # weights rounded at once: few enough for a processor's cache


class Weights:
    """The parameters of a model as functions of what is trained."""

    def __init__(self, loaded: Loaded, rank: int, seed: int, scales: bool = False) -> None:
        self.loaded = loaded
        self.latent = {name: p.detach().clone().requires_grad_(rank == 0) for name, p in
                       loaded.model.named_parameters()}  # fmt: skip
        named = loaded.model.named_parameters() if loaded.sparse else ()
        # What was pruned stays zero. Of codes, many a zero comes from rounding alone.
        self.masks = {name: p.detach() != 0 for name, p in named if p.ndim > 1 and name not in loaded.packed}
        self.update: dict[str, tuple[Tensor, Tensor]] = {}
        if rank:
            ends = (loaded.model.get_input_embeddings(), loaded.model.get_output_embeddings())
            outer = {id(layer.weight) for layer in ends if layer is not None}
            draw = torch.Generator().manual_seed(seed)
            for name, p in loaded.model.named_parameters():
                if p.ndim >= 2 and id(p) not in outer:
                    low = torch.randn(*p.shape[:-2], rank, p.shape[-1], generator=draw) / rank**0.5
                    self.update[name] = (torch.zeros(*p.shape[:-1], rank, requires_grad=True), low.requires_grad_())
        # Scales are trained as the logarithm of what they grow by: none changes its sign or becomes zero.
        self.growth = {name: torch.zeros(item.steps.scales.shape, requires_grad=True)
                       for name, item in loaded.packed.items() if scales and has_plain_scales(item)}  # fmt: skip
        self.trained = [item for pair in self.update.values() for item in pair] or list(self.latent.values())
        self.trained += self.growth.values()

    def values(self) -> dict[str, Tensor]:
        """Parameter name -> the tensor that the forward pass uses, differentiable in what is trained."""
        return {name: self._value(name) for name in self.latent}

    def _value(self, name: str) -> Tensor:
        value = self._behind(name)
        packed = self.loaded.packed.get(name)
        if packed is None:
            return value
        if name in self.growth:
            return learned_steps(value, packed, self.growth[name])
        rounded: Tensor = Through.apply(value, packed)
        return rounded

    def _behind(self, name: str) -> Tensor:
        value = self.latent[name]
        if name in self.update:
            high, low = self.update[name]
            value = value + high @ low
        return value * self.masks[name] if name in self.masks else value

    @torch.no_grad()
    def show(self) -> None:
        """Write the values as they are now into the model, which may then be run by itself."""
        for name, p in self.loaded.model.named_parameters():
            p.copy_(self._value(name))

    @torch.no_grad()
    def finish(self) -> None:
        """Write the trained values into the model, and the codes and scales of packed tensors into `packed`."""
        for name, p in self.loaded.model.named_parameters():
            value = self._behind(name)
            packed = self.loaded.packed.get(name)
            if packed is not None:
                if name in self.growth:
                    scales = grown(packed, self.growth[name]).to(packed.steps.scales.dtype)
                    packed = replace(packed, steps=replace(packed.steps, scales=scales))
                codes, value = on_grid(value, packed)
                self.loaded.packed[name] = replace(packed, codes=codes)
            p.copy_(value)


class Through(torch.autograd.Function):
    """A weight rounded to its grid, with the gradient of one that is not (straight-through)."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, packed: Packed) -> Tensor:
        rows, grid = to_rows(value, packed.transposed), packed.grid
        scale, zero = grid.effective(packed.steps)
        width = grid.group or rows.shape[1]
        if packed.low is not None or scale.shape != zero.shape or scale.shape[1] * width != rows.shape[1]:
            return on_grid(value, packed)[1]
        found, step = torch.empty_like(rows), max(1, IN_CACHE // rows.shape[1])
        for low in range(0, len(rows), step):  # the same numbers, a few rows at a time
            some, steps = slice(low, low + step), (scale[low : low + step, :, None], zero[low : low + step, :, None])
            codes = grid.encode(rows[some].unflatten(1, (-1, width)), *steps)
            found[some] = grid.decode(codes, *steps).flatten(1)
        return from_rows(found, packed.shape, packed.transposed)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def on_grid(value: Tensor, packed: Packed) -> tuple[Tensor, Tensor]:
    """The nearest codes on the grid of `packed` (its steps and correction stay), and the parameter they stand for."""
    rows = to_rows(value, packed.transposed)
    codes = encode(rows if packed.low is None else rows - packed.correction(), packed.steps, packed.grid)
    return codes, replace(packed, codes=codes).dense()


def has_plain_scales(packed: Packed) -> bool:
    """Whether a packed tensor is on an integer grid, whose scales are numbers of their own, without a correction."""
    return packed.low is None and isinstance(packed.grid, Uniform)


def grown(packed: Packed, growth: Tensor) -> Tensor:
    """The scales after growth, float32 with the values of the type that a file holds; straight-through."""
    scale = packed.steps.scales.float() * growth.exp()
    return scale.detach().to(packed.steps.scales.dtype).float() + (scale - scale.detach())


def learned_steps(value: Tensor, packed: Packed, growth: Tensor) -> Tensor:
    """The values on the grid that the grown scales give, with the gradients of learned step sizes (LSQ, Esser et al.
    2019, arXiv:1902.08153): a weight within the range passes its own on and gives the scale its rounding error, one
    beyond it gives the scale the code where it is held and gets none."""
    grid, rows = packed.grid, to_rows(value, packed.transposed)
    cols = rows.shape[1]
    # LSQ's share, 1 / sqrt(weights of a step x highest code), keeps the norm of the gradient of scales near that of
    # weights, so that clipping the whole does not slow the weights down.
    share = ((grid.group or cols) * 2 ** (grid.bits - 1)) ** -0.5
    scale = grown(packed, growth)
    scale = spread(scale.detach() + share * (scale - scale.detach()), grid.group, cols)
    zero = spread(grid.effective(packed.steps)[1], grid.group, cols)
    near = (rows / scale + zero).clamp(0, 2**grid.bits - 1)
    codes = grid.encode(rows.detach(), scale.detach(), zero) + (near - near.detach())
    return from_rows((codes - zero) * scale, packed.shape, packed.transposed)
