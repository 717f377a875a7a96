"""Low-rank error correction: what rounding got wrong, as two thin factors that are kept beside the codes."""

import torch
from torch import Tensor


def factors(error: Tensor, hessian: Tensor | None, rank: int, damp: float) -> tuple[Tensor, Tensor]:
    """bf16 left [batch * rows, rank] and right [batch * rank, cols] whose product is what is missing.

    Of error [batch, rows, cols] the best approximation of that rank as inputs of second moments `hessian`
    [batch, cols, cols] see it (None: all alike): U Uᵀ E, with U the first left singular vectors of E H^(1/2) (LQER,
    Zhang et al. 2024, arXiv:2402.02446; EoRA, Liu et al. 2024, arXiv:2410.21271). Zeros where rounding the factors to
    bf16 would leave nothing of the gain.
    """
    batch, rows, cols = error.shape
    rank = min(rank, rows, cols)
    wide = error.double()
    metric = torch.eye(cols).double().expand(batch, -1, -1) if hessian is None else hessian.double()
    mean = metric.diagonal(dim1=1, dim2=2).mean(1)
    mean = torch.where(mean > 0, mean, torch.ones_like(mean))
    metric = metric + (damp * mean)[:, None, None] * torch.eye(cols).double()
    if rows <= cols:
        left = torch.linalg.eigh(wide @ metric @ wide.mT)[1][..., -rank:]
    else:
        seen = wide @ torch.linalg.cholesky(metric)
        values, vectors = torch.linalg.eigh(seen.mT @ seen)
        left = seen @ vectors[..., -rank:] / values[..., None, -rank:].clamp(min=1e-300).sqrt()
    left = left.bfloat16().double()
    right = (torch.linalg.pinv(left) @ wide).bfloat16().double()  # the best for the left that is stored
    rest = wide - left @ right

    def seen_by(change: Tensor) -> Tensor:
        return ((change @ metric) * change).sum((1, 2))

    useful = (seen_by(rest) < seen_by(wide))[:, None, None]
    left, right = torch.where(useful, left, 0.0), torch.where(useful, right, 0.0)
    return left.reshape(-1, rank).bfloat16(), right.reshape(-1, cols).bfloat16()
