"""`attention`: causal softmax attention with grouped queries and rotary positions; every further option is a flag.

B rows, T new positions, S positions seen and new, H query heads, K key-value heads, D head width.
"""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.cache_utils import DynamicLayer

from shrew.blocks.layers import Place, RMSNorm, Shape, multiplications, rotate
from shrew.spec import Meta, doc

PAIRS = 2**24  # scores held at once where no fused kernel computes them: 64 MB in float32


@dataclass(frozen=True, kw_only=True)
class AttentionSpec:
    kind: str = "attention"
    heads: Annotated[int, Meta(ge=1)] = doc("query heads", 4)
    kv_heads: Annotated[int, Meta(ge=1)] | None = doc("key-value heads (grouped queries); default: heads", None)
    head_width: Annotated[int, Meta(ge=2)] | None = doc("width of a head; default: model width / heads", None)
    qk_norm: Literal["none", "head", "all"] = doc(
        "RMS norm on queries and keys (Henry et al. 2020), of each head (Qwen3) or over all heads (OLMoE)", "none"
    )
    rope_theta: Annotated[float, Meta(gt=1)] = doc("base of the rotary frequencies", 10000.0)
    rotary_share: Annotated[float, Meta(ge=0, le=1)] = doc("share of a head's channels that rotate; 0: NoPE", 1.0)
    yarn: Annotated[float, Meta(ge=1)] = doc("factor of YaRN's longer context (Peng et al. 2023); 1: off", 1.0)
    yarn_context: Annotated[int, Meta(ge=2)] | None = doc("context that was trained before YaRN", None)
    scale: Annotated[float, Meta(gt=0)] | None = doc("factor of the scores; default: 1 / sqrt(head width)", None)
    softcap: Annotated[float, Meta(ge=0)] = doc("scores become softcap tanh(scores / softcap); 0: off", 0.0)
    sinks: bool = doc("a learned logit per head that takes attention and gives nothing (GPT-OSS)", False)
    gate: bool = doc("sigmoid gate on the heads' output (Qiu et al. 2025)", False)
    value_embeddings: bool = doc("a table of the tokens added to the values (Zhou et al. 2024)", False)
    bias: bool = doc("biases of queries, keys and values (Qwen2)", False)

    def problem(self, width: int) -> str:
        """What is wrong with these settings at a model's width; empty when nothing is."""
        if self.heads % (self.kv_heads or self.heads):
            return f"{self.heads} heads are no multiple of {self.kv_heads} kv_heads"
        if self.head_width is None and width % self.heads:
            return f"width {width} is no multiple of {self.heads} heads"
        if self.rotated(width) % 2:
            return f"{self.rotated(width)} channels cannot be rotated; make head_width times rotary_share even"
        if self.yarn > 1 and not self.yarn_context:
            return "yarn needs yarn_context, the context trained before"
        return ""

    def rotated(self, width: int) -> int:
        """Channels of a head that rotate, at a model's width."""
        return int((self.head_width or width // self.heads) * self.rotary_share)


def naive_attention(
    q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float = 0.0, softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The definition: softmax(q k^T / sqrt(D)) v where `allowed` [B, 1, T, S] is true. The oracle of the tests.

    `scale` stands for 1 / sqrt(D), `softcap` bounds the scores, `sinks` [H] are scores without a value."""
    share = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(share, 1), v.repeat_interleave(share, 1)
    scores = q @ k.transpose(-1, -2) * (scale or q.shape[-1] ** -0.5)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~allowed, float("-inf"))
    if sinks is None:
        return scores.softmax(-1) @ v
    nowhere = sinks[None, :, None, None].expand(*scores.shape[:-1], 1)
    return torch.cat([scores, nowhere], -1).softmax(-1)[..., :-1] @ v


def capped_attention(
    q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None, scale: float, softcap: float, sinks: Tensor | None
) -> Tensor:
    """The options that no fused kernel knows: holds B H T S scores, which the caller keeps few. Softmax in float32."""
    rows, heads, length, width = q.shape
    grouped = (rows, k.shape[1], -1)
    scores = ((q * scale).reshape(*grouped, width) @ k.transpose(-1, -2)).view(rows, heads, length, -1)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if allowed is not None:
        scores = scores.masked_fill(~allowed, float("-inf"))
    total = scores.logsumexp(-1, keepdim=True)
    if sinks is not None:
        total = torch.logaddexp(total, sinks[:, None, None].to(total.dtype))
    weights = (scores - total).exp().to(v.dtype)
    return (weights.view(*grouped, k.shape[2]) @ v).view(rows, heads, length, -1)


class Attention(nn.Module):
    def __init__(self, spec: AttentionSpec, shape: Shape) -> None:
        super().__init__()
        width, eps = shape.width, shape.eps
        self.spec = spec
        self.heads, self.kv_heads = spec.heads, spec.kv_heads or spec.heads
        self.head_width = spec.head_width or width // spec.heads
        self.scale = spec.scale or self.head_width**-0.5
        self.rotated = spec.rotated(width)
        self.capped = bool(spec.softcap or spec.sinks)
        mine, kv = self.heads * self.head_width, self.kv_heads * self.head_width
        self.q_proj = nn.Linear(width, mine, bias=spec.bias)
        self.k_proj = nn.Linear(width, kv, bias=spec.bias)
        self.v_proj = nn.Linear(width, kv, bias=spec.bias)
        self.o_proj = nn.Linear(mine, width, bias=False)
        self.g_proj = nn.Linear(width, mine, bias=False) if spec.gate else None
        sizes = {"head": (self.head_width, self.head_width), "all": (mine, kv)}.get(spec.qk_norm)
        self.q_norm = RMSNorm(sizes[0], eps) if sizes else None
        self.k_norm = RMSNorm(sizes[1], eps) if sizes else None
        self.sinks = nn.Parameter(torch.zeros(self.heads)) if spec.sinks else None
        self.value_table = nn.Embedding(shape.vocabulary, kv) if spec.value_embeddings else None
        self.value_gate = nn.Parameter(torch.ones(self.kv_heads)) if spec.value_embeddings else None

    def forward(self, x: Tensor, place: Place, state: Any = None) -> Tensor:
        """x [B, T, d] -> [B, T, d]. `state` is extended in place."""
        y = self.mix(*self.project(x, place), place, state).transpose(1, 2).flatten(2)
        return self.o_proj(y if self.g_proj is None else y * self.g_proj(x).sigmoid())

    def project(self, x: Tensor, place: Place) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, H, T, D], keys and values [B, K, T, D] of x [B, T, d]: normed, rotated, with their embeddings."""
        whole = self.spec.qk_norm == "all"
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.q_norm is not None and self.k_norm is not None and whole:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (y.unflatten(-1, (-1, self.head_width)) for y in (q, k, v))
        if self.value_table is not None and self.value_gate is not None:
            v = torch.addcmul(v, self.value_table(place.tokens).view_as(v).to(v.dtype),
                              self.value_gate[:, None].to(v.dtype))  # fmt: skip
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if self.q_norm is not None and self.k_norm is not None and not whole:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rotated:
            spec = self.spec
            tables = place.rotary(self.rotated, spec.rope_theta, spec.yarn, spec.yarn_context or 0)
            q, k = rotate(q, *tables), rotate(k, *tables)
        return q, k, v

    def mix(self, q: Tensor, k: Tensor, v: Tensor, place: Place, state: Any) -> Tensor:
        """The heads' output [B, H, T, D]. `state` is a `DynamicLayer` of earlier keys and values."""
        if state is not None:
            k, v = state.update(k, v)
        return self.causal(q, k, v, place)

    def causal(self, q: Tensor, k: Tensor, v: Tensor, place: Place) -> Tensor:
        """Attention of q [B, H, T, D] to all of k, v [B, K, S, D] up to its own position."""
        length, total = q.shape[2], k.shape[2]
        if not self.capped:
            bias = place.bias(q.dtype)
            return self.core(q, k, v, bias, bias is None and length > 1)
        step = max(1, PAIRS // (len(q) * self.heads * total))
        parts = []
        for start in range(0, length, step):
            end = min(start + step, length)
            seen = total - length + end
            block = (q[:, :, start:end], k[:, :, :seen], v[:, :, :seen], place.allowed(start, end))
            again = torch.is_grad_enabled() and step < length  # its scores are made again rather than kept
            parts.append(checkpoint(self.core, *block, use_reentrant=False) if again else self.core(*block))
        return torch.cat(parts, 2) if len(parts) > 1 else parts[0]

    def core(self, q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None, causal: bool = False) -> Tensor:
        """Softmax attention of q to k and v where `allowed`, everywhere where that is None; without a cap or sinks it
        may also be what is added to the scores."""
        if self.capped:
            return capped_attention(q, k, v, allowed, self.scale, self.spec.softcap, self.sinks)
        return nn.functional.scaled_dot_product_attention(
            q, k, v, allowed, is_causal=causal, scale=self.scale, enable_gqa=self.heads != self.kv_heads
        )

    def start(self, std: float, deep: float) -> None:
        """Initialise: normal with `std`, and with `deep` what adds to the residual stream."""
        for part in (self.q_proj, self.k_proj, self.v_proj, self.g_proj, self.value_table):
            if part is not None:
                nn.init.normal_(part.weight, std=std)
                if isinstance(part, nn.Linear) and part.bias is not None:
                    nn.init.zeros_(part.bias)
        nn.init.normal_(self.o_proj.weight, std=deep)
        if self.sinks is not None:
            nn.init.zeros_(self.sinks)
        if self.value_gate is not None:
            nn.init.ones_(self.value_gate)

    def init_state(self) -> Any:
        return DynamicLayer()

    def flops(self, context: int) -> int:
        """Multiply-adds times two, per token, when it sees `context` positions on average."""
        parts = [self.q_proj, self.k_proj, self.v_proj, self.o_proj, *([self.g_proj] if self.g_proj else [])]
        return 2 * sum(multiplications(part) for part in parts) + 4 * self.heads * self.head_width * context

    def state_bytes(self, context: int, element: int = 2) -> int:
        return 2 * self.kv_heads * self.head_width * context * element
