"""The optimizers of a model, and Muon for stacked matrices: `torch.optim.Muon` takes single ones alone, and experts are
stored as one tensor of many."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

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


def optimizers(model: Any, item: Any) -> list[torch.optim.Optimizer]:
    """Muon (Jordan 2024) for the linear maps inside layers, stacked experts too, and AdamW for the rest (embeddings,
    head, routers, gates of one number, taps of convolutions), or AdamW for all. What a block does after each step
    (`after_step`) hangs on the last one. `item` says `optimizer`, `lr` and `weight_decay`."""
    hidden: list[nn.Parameter] = []
    stacked: list[nn.Parameter] = []
    matrices: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    routers = [part.gate for part in model.modules() if hasattr(part, "experts") and hasattr(part, "gate")]
    others = {id(part) for part in (head, *routers)}
    maps = {id(part.weight) for part in model.modules() if isinstance(part, nn.Linear | Conv1D)
            and id(part) not in others and min(part.weight.shape) > 1}  # fmt: skip
    for name, p in model.named_parameters():
        if id(p) in maps:
            hidden.append(p)
        elif p.ndim == 3 and ".experts." in name:
            stacked.append(p)
        else:
            (matrices if p.ndim > 1 else vectors).append(p)
    adam = [{"params": matrices, "weight_decay": item.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    found: list[torch.optim.Optimizer] = []
    if item.optimizer == "muon" and hidden:
        found.append(torch.optim.Muon(hidden, lr=item.lr, weight_decay=item.weight_decay,
                                      adjust_lr_fn="match_rms_adamw"))  # fmt: skip
    else:
        adam.append({"params": hidden, "weight_decay": item.weight_decay})
    if item.optimizer == "muon" and stacked:
        found.append(StackedMuon(stacked, lr=item.lr, weight_decay=item.weight_decay))
    else:
        adam.append({"params": stacked, "weight_decay": item.weight_decay})
    adam = [group for group in adam if group["params"]]
    found.append(torch.optim.AdamW(adam, lr=item.lr, betas=(0.9, 0.95), eps=1e-10, fused=True))
    for optimizer in found:
        for group in optimizer.param_groups:
            group["peak"] = item.lr
    for block in [part for part in model.modules() if hasattr(part, "after_step")]:
        found[-1].register_step_post_hook(lambda *_, block=block: block.after_step())
    return found
