"""Muon for stacked matrices. `torch.optim.Muon` takes single ones alone; experts are stored as one tensor of many."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

A, B, C = 3.4445, -4.7750, 2.0315  # of the quintic: steepest at zero, so that few iterations do (Jordan 2024)
ITERATIONS, EPS, MOMENTUM = 5, 1e-7, 0.95


def orthogonalised(stack: Tensor) -> Tensor:
    """Nearly the nearest orthogonal matrix of each matrix in [E, m, n], in bfloat16, by Newton-Schulz iterations."""
    x = stack.bfloat16()
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / x.flatten(1).norm(dim=1).clamp(min=EPS)[:, None, None]  # so that no singular value is above one
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=B, alpha=C), x, beta=A)
    return x.mT if tall else x


class StackedMuon(torch.optim.Optimizer):
    """Muon (Jordan 2024) on every matrix of parameters [E, m, n], as `torch.optim.Muon` does with
    adjust_lr_fn="match_rms_adamw" (Liu et al. 2025) on one."""

    def __init__(self, params: Iterable[Tensor], lr: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            rate = group["lr"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(p.grad)
                momentum = state["momentum_buffer"].lerp_(p.grad, 1 - MOMENTUM)
                update = orthogonalised(p.grad.lerp(momentum, MOMENTUM))  # Nesterov
                p.mul_(1 - rate * group["weight_decay"])
                p.add_(update, alpha=-rate * 0.2 * max(p.shape[1:]) ** 0.5)
