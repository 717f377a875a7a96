"""Attention between bytes and patches: a patch reads its own bytes, a byte reads the last patch that is whole.

Both are sparse, so neither holds a mask of bytes times patches: patches add their bytes up, bytes look their patch up,
at a cost linear in bytes. n bytes, N patches, k vectors a patch, d width, H heads of width D.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from shrew.blocks.layers import RMSNorm


def naive_read(q: Tensor, k: Tensor, v: Tensor, patch: Tensor) -> Tensor:
    """The definition, patch by patch: q [N, k, H, D], k, v [n, H, D], `patch` [n] of each byte. The tests' oracle."""
    y = torch.zeros_like(q)
    for number in range(len(q)):
        own = patch == number
        for head in range(q.shape[2]):
            scores = q[number, :, head] @ k[own, head].t() * q.shape[-1] ** -0.5
            y[number, :, head] = scores.softmax(-1) @ v[own, head]
    return y


@dataclass(frozen=True)
class Groups:
    """Bytes by their patch: `patch` [n] of each byte, the bytes in the `order` [n] of their patches, and where in it
    each patch begins, `first` [N]. Sums over it are the library's for bags: those by index go row by row in a loop."""

    patch: Tensor
    order: Tensor
    first: Tensor

    @classmethod
    def of(cls, patch: Tensor, count: int) -> "Groups":
        sizes = torch.bincount(patch, minlength=count)
        ordered = bool((patch[1:] >= patch[:-1]).all())
        order = torch.arange(len(patch), device=patch.device) if ordered else patch.argsort(stable=True)
        return cls(patch, order, sizes.cumsum(0) - sizes)

    def spread(self, x: Tensor) -> Tensor:
        """x [N, ...] of patches -> [n, ...], one for each byte."""
        y: Tensor = _Spread.apply(x, self)
        return y

    def sum(self, x: Tensor) -> Tensor:
        """x [n, ...] of bytes -> [N, ...], summed over each patch."""
        y: Tensor = _Sum.apply(x, self)
        return y

    def largest(self, x: Tensor) -> Tensor:
        """x [n, d] of bytes -> [N, d]: the largest of each channel in each patch; none is without bytes."""
        y: Tensor = _Largest.apply(x, self)
        return y


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, groups: Groups) -> Tensor:
        ctx.groups = groups
        return x.index_select(0, groups.patch)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _Sum.apply(grads[0], ctx.groups), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, groups: Groups) -> Tensor:
        ctx.groups = groups
        y = nn.functional.embedding_bag(groups.order, x.flatten(1), groups.first, mode="sum")
        return y.view(-1, *x.shape[1:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _Spread.apply(grads[0], ctx.groups), None


class _Largest(torch.autograd.Function):
    """The byte with the largest has the whole gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, groups: Groups) -> Tensor:
        top, _, _, at = torch.embedding_bag(x, groups.order, groups.first, False, 2)  # 2: the largest
        ctx.save_for_backward(at)
        ctx.rows = len(x)
        return top

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (at,) = ctx.saved_tensors
        return grads[0].new_zeros(ctx.rows, grads[0].shape[1]).scatter_(0, at, grads[0]), None


def read(q: Tensor, k: Tensor, v: Tensor, groups: Groups) -> Tensor:
    """[N, k, H, D]: each patch's softmax attention to its own bytes; arguments as of `naive_read`, bytes in groups."""
    exact = torch.promote_types(q.dtype, torch.float32)
    scores = (groups.spread(q) * k[:, None]).sum(-1).to(exact) * q.shape[-1] ** -0.5
    top = groups.largest(scores.detach().flatten(1)).view(q.shape[:3])
    weights = (scores - top.index_select(0, groups.patch)).exp()
    y = groups.sum(weights.to(v.dtype)[..., None] * v[:, None])
    return y / groups.sum(weights)[..., None].to(v.dtype)


class Cross(nn.Module):
    """The projections and norms, on either side. The result is `residual` times what is given plus what was read."""

    def __init__(self, width: int, heads: int, eps: float, residual: float, chooses: bool = True) -> None:
        super().__init__()
        self.heads, self.residual, self.width = heads, residual, width
        # of a single vector there is nothing to choose
        self.q_norm = RMSNorm(width, eps) if chooses else None
        self.q_proj = nn.Linear(width, width, bias=False) if chooses else None
        self.k_norm = RMSNorm(width, eps)
        self.k_proj = nn.Linear(width, width, bias=False) if chooses else None
        self.v_proj = nn.Linear(width, width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

    def start(self, std: float, deep: float) -> None:
        """Initialise: normal with `std`, and with `deep` what adds to the residual stream."""
        for part in (self.q_proj, self.k_proj, self.v_proj):
            if part is not None:
                nn.init.normal_(part.weight, std=std)
        nn.init.normal_(self.o_proj.weight, std=deep)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, self.width // self.heads))

    def read(self, vectors: Tensor, bytes: Tensor, groups: Groups) -> Tensor:
        """vectors [N, k, d] of patches, bytes [n, d] in groups -> [N, k, d]."""
        assert self.q_norm is not None and self.q_proj is not None and self.k_proj is not None
        bytes = self.k_norm(bytes)
        q, k, v = self.q_proj(self.q_norm(vectors)), self.k_proj(bytes), self.v_proj(bytes)
        y = read(self._split(q), self._split(k), self._split(v), groups).flatten(2)
        return self.o_proj(y).add(vectors, alpha=self.residual)

    def look(self, x: Tensor, vectors: Tensor, groups: Groups, sure: Tensor | None = None) -> Tensor:
        """x [B, T, d] of bytes, vectors [N, k, d], `groups` of the B T bytes by the patch that each looks at ->
        [B, T, d]. `sure` [B, T] multiplies what is looked up."""
        vectors = self.k_norm(vectors)

        def found(part: Tensor) -> Tensor:  # [N, k, d] -> [B, T, k, H, D]
            rows = groups.spread(part.flatten(1))
            return rows.view(*x.shape[:2], -1, self.heads, self.width // self.heads)

        v = found(self.v_proj(vectors))
        if self.q_norm is None or self.q_proj is None or self.k_proj is None:
            y = v[:, :, 0]
        else:
            q, k = self._split(self.q_proj(self.q_norm(x))), found(self.k_proj(vectors))
            exact = torch.promote_types(x.dtype, torch.float32)
            scores = (q[:, :, None] * k).sum(-1).to(exact) * k.shape[-1] ** -0.5
            y = (scores.softmax(2).to(v.dtype)[..., None] * v).sum(2)
        y = self.o_proj(y.flatten(2))
        return (y if sure is None else y * sure[..., None].to(y.dtype)).add(x, alpha=self.residual)

    def flops(self, queries: float, keys: float, each: int) -> float:
        """Multiply-adds times two per byte, at so many queries and keys a byte; `each` scores a byte."""
        square = 2 * self.width**2
        mine = square * queries * (1 + (self.q_proj is not None))
        theirs = square * keys * (1 + (self.k_proj is not None))
        return mine + theirs + 4 * each * self.width * (self.q_proj is not None)


class Pool(nn.Module):
    """Bytes to patches: the largest of each channel, made k queries that read the bytes."""

    def __init__(self, width: int, heads: int, queries: int, eps: float, residual: float) -> None:
        super().__init__()
        self.width, self.queries = width, queries
        self.proj = nn.Linear(width, queries * width, bias=False)
        self.cross = Cross(width, heads, eps, residual)

    def start(self, std: float, deep: float) -> None:
        nn.init.normal_(self.proj.weight, std=self.width**-0.5)
        self.cross.start(std, deep)

    def forward(self, bytes: Tensor, patch: Tensor, count: int) -> Tensor:
        """bytes [n, d], `patch` [n] of each, N -> [N, k, d]. No patch is without bytes."""
        groups = Groups.of(patch, count)
        top = groups.largest(bytes)
        vectors = self.proj(top).unflatten(-1, (self.queries, self.width))
        return self.cross.read(vectors, bytes, groups).to(bytes.dtype)

    def flops(self, size: float) -> float:
        """Multiply-adds times two per byte, at `size` bytes a patch."""
        shares = self.queries / size
        return 2 * self.proj.weight.numel() / size + self.cross.flops(shares, 1, self.queries)
