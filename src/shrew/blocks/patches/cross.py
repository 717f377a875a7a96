"""Attention between bytes and patches: a patch reads its own bytes, a byte reads the last patch that is whole.

Both are sparse, so neither holds a mask of bytes times patches: patches add their bytes up, bytes look their patch up,
at a cost linear in bytes. n bytes, N patches, k vectors a patch, d width, H heads of width D.
"""

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


def read(q: Tensor, k: Tensor, v: Tensor, patch: Tensor) -> Tensor:
    """[N, k, H, D]: each patch's softmax attention to its own bytes; arguments as of `naive_read`."""
    exact = torch.promote_types(q.dtype, torch.float32)
    scores = (q.index_select(0, patch) * k[:, None]).sum(-1).to(exact) * q.shape[-1] ** -0.5
    top = scores.new_full(q.shape[:3], float("-inf"))
    top = top.scatter_reduce(0, patch[:, None, None].expand_as(scores), scores.detach(), "amax")
    weights = (scores - top.index_select(0, patch)).exp()
    total = torch.zeros_like(top).index_add(0, patch, weights)
    weights = (weights / total.index_select(0, patch)).to(v.dtype)
    return torch.zeros_like(q, dtype=v.dtype).index_add(0, patch, weights[..., None] * v[:, None])


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

    def read(self, vectors: Tensor, bytes: Tensor, patch: Tensor) -> Tensor:
        """vectors [N, k, d] of patches, bytes [n, d], `patch` [n] of each byte -> [N, k, d]."""
        assert self.q_norm is not None and self.q_proj is not None and self.k_proj is not None
        bytes = self.k_norm(bytes)
        q, k, v = self.q_proj(self.q_norm(vectors)), self.k_proj(bytes), self.v_proj(bytes)
        y = read(self._split(q), self._split(k), self._split(v), patch).flatten(2)
        return self.residual * vectors + self.o_proj(y)

    def look(self, x: Tensor, vectors: Tensor, patch: Tensor, sure: Tensor | None = None) -> Tensor:
        """x [B, T, d] of bytes, vectors [N, k, d], `patch` [B, T] that each byte looks at -> [B, T, d]. `sure` [B, T]
        multiplies what is looked up."""
        vectors = self.k_norm(vectors)

        def found(part: Tensor) -> Tensor:  # [N, k, d] -> [B, T, k, H, D]
            rows = part.flatten(1).index_select(0, patch.flatten())
            return rows.view(*patch.shape, part.shape[1], self.heads, self.width // self.heads)

        v = found(self.v_proj(vectors))
        if self.q_norm is None or self.q_proj is None or self.k_proj is None:
            y = v[:, :, 0]
        else:
            q, k = self._split(self.q_proj(self.q_norm(x))), found(self.k_proj(vectors))
            exact = torch.promote_types(x.dtype, torch.float32)
            scores = (q[:, :, None] * k).sum(-1).to(exact) * k.shape[-1] ** -0.5
            y = (scores.softmax(2).to(v.dtype)[..., None] * v).sum(2)
        y = self.o_proj(y.flatten(2))
        return self.residual * x + (y if sure is None else y * sure[..., None].to(y.dtype))

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
        index = patch[:, None].expand_as(bytes)
        top = bytes.new_zeros(count, self.width).scatter_reduce(0, index, bytes, "amax", include_self=False)
        vectors = self.proj(top).unflatten(-1, (self.queries, self.width))
        return self.cross.read(vectors, bytes, patch).to(bytes.dtype)

    def flops(self, size: float) -> float:
        """Multiply-adds times two per byte, at `size` bytes a patch."""
        shares = self.queries / size
        return 2 * self.proj.weight.numel() / size + self.cross.flops(shares, 1, self.queries)
