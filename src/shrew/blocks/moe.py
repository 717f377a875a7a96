"""`moe`: a mixture of experts. A router sends every token to its `top_k` experts; no token is ever dropped.

N tokens, d width, E experts of F hidden channels, k chosen. The parameters are those of transformers' fused experts.
"""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from shrew.blocks.layers import WIDEST, Shape
from shrew.blocks.mlp import ACTIVATIONS, Activation, Mlp, MlpSpec
from shrew.spec import Meta, doc

ROWS = 64  # on a CPU a product in bf16 is compiled anew for every number of rows, which takes longer than to compute it


@dataclass(frozen=True, kw_only=True)
class MoeSpec:
    kind: str = "moe"
    experts: Annotated[int, Meta(ge=1, le=4096)] = doc("number of experts", 8)
    top_k: Annotated[int, Meta(ge=1)] = doc("experts that a token uses", 2)
    hidden: Annotated[int, Meta(ge=1, le=WIDEST)] | None = doc(
        "hidden channels of an expert; default: three times the width, divided by top_k", None
    )
    activation: Activation = doc("silu makes each expert a SwiGLU", "silu")
    router: Literal["softmax", "sigmoid"] = doc("what makes scores of the router's logits", "softmax")
    normalise: bool = doc("divide the scores of the chosen experts by their sum", True)
    shared: Annotated[int, Meta(ge=0, le=WIDEST)] = doc(
        "hidden channels of a shared expert that every token uses; 0: none", 0
    )
    shared_gate: bool = doc("multiply the shared expert by a sigmoid gate of the token (Qwen3-Next)", False)
    balance: Literal["loss", "bias"] = doc(
        "what keeps the experts in use: a loss (Fedus et al. 2021), or a bias of the choice alone that is nudged after "
        "every step of `shrew train` and distil; other training loops must call `after_step` of the block (Wang et al. "
        "2024, DeepSeek-V3)", "loss"
    )  # fmt: skip
    balance_weight: Annotated[float, Meta(ge=0)] = doc("weight of the balance loss, or the nudge of the bias", 0.01)
    z_weight: Annotated[float, Meta(ge=0)] = doc("weight of the router's z-loss (Zoph et al. 2022)", 0.001)
    every: Annotated[int, Meta(ge=1)] = doc("every so many layers, the last of them has experts", 1)
    dense_hidden: Annotated[int, Meta(ge=1, le=WIDEST)] | None = doc(
        "hidden channels of the mlp in the other layers; default: as many as a token uses in a layer with experts", None
    )

    def problem(self, width: int) -> str:
        if self.top_k > self.experts:
            return f"top_k {self.top_k} is more than the {self.experts} experts"
        if self.shared_gate and not self.shared:
            return "shared_gate needs a shared expert; set shared"
        return ""

    def width(self, width: int) -> int:
        """Hidden channels of an expert in a model of a width."""
        return self.hidden or max(1, 3 * width // self.top_k)

    def has_experts(self, layer: int) -> bool:
        return layer % self.every == self.every - 1

    def dense(self, width: int) -> MlpSpec:
        """The mlp of the layers without experts."""
        hidden = self.dense_hidden or self.top_k * self.width(width) + self.shared
        return MlpSpec(hidden=hidden, activation=self.activation)


def naive_moe(x: Tensor, index: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, spec: MoeSpec) -> Tensor:
    """The definition, token by token: sum over chosen experts of weight * down(act(gate(x)) * up(x)). The oracle of the
    tests. x [N, d], index and weights [N, k], gate_up [E, 2F, d], down [E, d, F]."""
    rows = []
    for token, chosen, share in zip(x, index, weights, strict=True):
        y = torch.zeros_like(token)
        for expert, weight in zip(chosen, share, strict=True):
            gate, up = (gate_up[expert] @ token).chunk(2)
            y = y + weight * (down[expert] @ (ACTIVATIONS[spec.activation](gate) * up))
        rows.append(y)
    return torch.stack(rows)


class _Dispatch(torch.autograd.Function):
    """x [N, d] -> [N k, d]: the tokens of the choices in their `order` [N k]; choice [n, j] stands at `back` [n, j].

    The library's gradient of such a copy adds row by row into zeros; knowing `back`, ours gathers and sums.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(back)
        return x.index_select(0, order // back.shape[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (back,) = ctx.saved_tensors
        return nn.functional.embedding_bag(back, grads[0], mode="sum"), None, None


class _Combine(torch.autograd.Function):
    """The way back: y [N k, d] and weights [N, k] -> [N, d], each token's sum of weight times y."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, weights: Tensor, order: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(y, weights, order, back)
        return nn.functional.embedding_bag(back, y, per_sample_weights=weights, mode="sum")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        y, weights, order, back = ctx.saved_tensors
        each = grads[0].index_select(0, order // back.shape[1])
        share = (each * y).sum(-1)[back]
        spread = weights.new_zeros(len(order)).scatter_(0, back.flatten(), weights.flatten())  # rows of no choice: 0
        return each.mul_(spread[:, None]), share, None, None


def _whole_blocks(order: Tensor, back: Tensor, counts: list[int]) -> tuple[Tensor, Tensor, list[int]]:
    """The same choices in runs whose lengths are multiples of ROWS: what fills a run up is computed and never used."""
    sizes = [-(-count // ROWS) * ROWS for count in counts]
    spare = torch.tensor([0, *(size - count for size, count in zip(sizes, counts, strict=True))]).cumsum(0)[:-1]
    slots = torch.arange(len(order)) + spare.repeat_interleave(torch.tensor(counts))
    filled = order.new_zeros(sum(sizes)).scatter_(0, slots, order)
    return filled, slots[back], sizes


class Experts(nn.Module):
    """Gated MLPs, stacked: `gate_up_proj` [E, 2F, d] and `down_proj` [E, d, F]."""

    def __init__(self, experts: int, width: int, hidden: int, activation: Activation) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * hidden, width))
        self.down_proj = nn.Parameter(torch.empty(experts, width, hidden))
        self.act_fn = ACTIVATIONS[activation]

    def _apply_gate(self, gate_up: Tensor) -> Tensor:  # transformers' name: calibration calls it
        gate, up = gate_up.chunk(2, -1)
        return self.act_fn(gate) * up

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """x [N, d], index and weights [N, k] -> [N, d].

        Tokens are sorted by expert and each expert multiplies its own run: on a CPU as fast as a grouped matmul, in
        every dtype. `unbind` keeps the gradient of one expert from being a tensor of all; gate and up are products of
        their own, because the gradient of halves of one product would be put together in one more pass.
        """
        order = index.flatten().argsort(stable=True)
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device)).view_as(index)
        counts = index.flatten().bincount(minlength=len(self.down_proj)).tolist()
        in_bf16 = x.dtype == torch.bfloat16 or torch.is_autocast_enabled("cpu")
        if x.device.type == "cpu" and in_bf16 and len(order) >= ROWS * len(counts):
            order, back, counts = _whole_blocks(order, back, counts)
        halves = iter(self.gate_up_proj.unflatten(1, (2, -1)).flatten(0, 1).unbind())
        runs = _Dispatch.apply(x, order, back).split(counts)
        parts = [
            nn.functional.linear(self.act_fn(nn.functional.linear(run, gate)) * nn.functional.linear(run, up), down)
            for run, gate, up, down in zip(runs, halves, halves, self.down_proj.unbind(), strict=True)
            if len(run)
        ]
        y = torch.cat(parts)
        combined: Tensor = _Combine.apply(y, weights.to(y.dtype), order, back)
        return combined


class Moe(nn.Module):
    balance_bias: Tensor | None

    def __init__(self, spec: MoeSpec, shape: Shape) -> None:
        super().__init__()
        width = shape.width
        self.spec = spec
        self.gate = nn.Linear(width, spec.experts, bias=False)
        self.experts = Experts(spec.experts, width, spec.width(width), spec.activation)
        shared = MlpSpec(hidden=spec.shared, activation=spec.activation)
        self.shared = Mlp(shared, shape) if spec.shared else None
        self.shared_gate = nn.Linear(width, 1, bias=False) if spec.shared_gate else None
        # Added to the scores for the choice only; saved, so that a run goes on as if it had never stopped.
        self.register_buffer("balance_bias", torch.zeros(spec.experts) if spec.balance == "bias" else None)
        self.counts: Tensor | None = None  # tokens of each expert since the last step

    def start(self, std: float, deep: float) -> None:
        for weight in (self.gate.weight, self.experts.gate_up_proj):
            nn.init.normal_(weight, std=std)
        nn.init.normal_(self.experts.down_proj, std=deep)
        if self.shared is not None:
            self.shared.start(std, deep)
        if self.shared_gate is not None:
            nn.init.normal_(self.shared_gate.weight, std=std)
        if self.balance_bias is not None:
            nn.init.zeros_(self.balance_bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """x [B, T, d] -> [B, T, d]; in training, the penalty that keeps the router in shape."""
        flat = x.reshape(-1, x.shape[-1])
        logits, scores = self.route(flat)
        choice = scores if self.balance_bias is None else scores.detach() + self.balance_bias
        index = choice.topk(self.spec.top_k, -1).indices
        weights = scores.gather(1, index)
        if self.spec.normalise:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)  # sigmoids can all be zero
        y = self.experts(flat, index, weights)
        if self.shared is not None:
            extra = self.shared(flat)[0]
            y = y + (extra if self.shared_gate is None else extra * self.shared_gate(flat).sigmoid())
        return y.view_as(x), self.penalty(logits, scores, index) if self.training else None

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and scores [N, E] of tokens [N, d], never in less than float32: a rounded score is another choice."""
        with torch.autocast(x.device.type, enabled=False):
            wide = torch.promote_types(x.dtype, torch.float32)
            logits = nn.functional.linear(x.to(wide), self.gate.weight.to(wide))
        return logits, logits.softmax(-1) if self.spec.router == "softmax" else logits.sigmoid()

    def penalty(self, logits: Tensor, scores: Tensor, index: Tensor) -> Tensor:
        """Mean z-loss and, where a loss balances, E sum_e f_e P_e: the share of the choices that fall on an expert
        times its mean share of the scores; 1 when all are used alike (Fedus et al. 2021)."""
        spec = self.spec
        counts = index.flatten().bincount(minlength=spec.experts)
        penalty = spec.z_weight * logits.logsumexp(-1).square().mean()
        if spec.balance == "bias":
            self.counts = counts if self.counts is None else self.counts + counts
            return penalty
        shares = scores / scores.sum(-1, keepdim=True)
        return penalty + spec.balance_weight * spec.experts * (counts / index.numel() * shares.mean(0)).sum()

    @torch.no_grad()
    def after_step(self) -> None:
        """Nudge the bias against the use since the last step, of all processes: up where it was below the mean."""
        if self.balance_bias is None or self.counts is None:
            return
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(self.counts)
        use = self.counts.to(self.balance_bias)
        self.balance_bias += self.spec.balance_weight * (use.mean() - use).sign()
        self.counts = None

    def flops(self) -> int:
        """Multiply-adds times two, per token: router, chosen experts, shared expert."""
        used = sum(p.numel() for p in self.parameters()) - self.idle()
        return 2 * used

    def idle(self) -> int:
        """Parameters of the experts that a token does not use."""
        stacked = sum(p.numel() for p in self.experts.parameters())
        return stacked // self.spec.experts * (self.spec.experts - self.spec.top_k)


def moe_or_mlp(spec: MoeSpec, shape: Shape) -> Moe | Mlp:
    """The feed-forward layer of one layer of the model."""
    return Moe(spec, shape) if spec.has_experts(shape.layer) else Mlp(spec.dense(shape.width), shape)
