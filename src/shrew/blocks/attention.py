"""`attention`: causal softmax attention with grouped queries, rotary positions and optional QK-norm.

B rows, T new positions, S positions seen, H query heads, K key-value heads, D head width.
"""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer

from shrew.blocks.layers import Place, RMSNorm, Shape, rotate
from shrew.spec import Meta, doc


@dataclass(frozen=True, kw_only=True)
class AttentionSpec:
    kind: str = "attention"
    heads: Annotated[int, Meta(ge=1)] = doc("query heads", 4)
    kv_heads: Annotated[int, Meta(ge=1)] | None = doc("key-value heads (grouped queries); default: heads", None)
    head_width: Annotated[int, Meta(ge=2)] | None = doc("width of a head; default: model width / heads", None)
    qk_norm: Literal["none", "head", "all"] = doc(
        "RMS norm on queries and keys (Henry et al. 2020): of each head, or over all heads at once (OLMoE)", "none"
    )
    rope_theta: Annotated[float, Meta(gt=0)] = doc("base of the rotary frequencies", 10000.0)
    rotary_share: Annotated[float, Meta(ge=0, le=1)] = doc("share of a head's channels that rotate; 0: NoPE", 1.0)
    scale: Annotated[float, Meta(gt=0)] | None = doc("factor of the scores; default: 1 / sqrt(head width)", None)

    def problem(self, width: int) -> str:
        """What is wrong with these settings at a model's width; empty when nothing is."""
        if self.heads % (self.kv_heads or self.heads):
            return f"{self.heads} heads are no multiple of {self.kv_heads} kv_heads"
        if self.head_width is None and width % self.heads:
            return f"width {width} is no multiple of {self.heads} heads"
        if self.rotary_share not in (0, 1):
            return "rotary_share is 0 or 1"
        if (self.head_width or width // self.heads) % 2:
            return "heads of an odd width cannot be rotated; set an even head_width"
        return ""


def naive_attention(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
    """The definition: softmax(q k^T / sqrt(D)) v where `allowed` [B, 1, T, S] is true. The oracle of the tests."""
    share = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(share, 1), v.repeat_interleave(share, 1)
    scores = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(~allowed, float("-inf"))
    return scores.softmax(-1) @ v


class Attention(nn.Module):
    def __init__(self, spec: AttentionSpec, shape: Shape) -> None:
        super().__init__()
        width, eps = shape.width, shape.eps
        self.spec = spec
        self.heads, self.kv_heads = spec.heads, spec.kv_heads or spec.heads
        self.head_width = spec.head_width or width // spec.heads
        self.q_proj = nn.Linear(width, self.heads * self.head_width, bias=False)
        self.k_proj = nn.Linear(width, self.kv_heads * self.head_width, bias=False)
        self.v_proj = nn.Linear(width, self.kv_heads * self.head_width, bias=False)
        self.o_proj = nn.Linear(self.heads * self.head_width, width, bias=False)
        self.q_norm = self.k_norm = None
        if spec.qk_norm != "none":
            whole = spec.qk_norm == "all"
            self.q_norm = RMSNorm(self.head_width * (self.heads if whole else 1), eps)
            self.k_norm = RMSNorm(self.head_width * (self.kv_heads if whole else 1), eps)

    def forward(self, x: Tensor, place: Place, state: Any = None) -> Tensor:
        """x [B, T, d] -> [B, T, d]. `state` is a `DynamicLayer` of earlier keys and values, extended in place."""
        mask = place.mask()
        rows, length, _ = x.shape
        q, k = self.q_proj(x), self.k_proj(x)
        if self.spec.qk_norm == "all" and self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q = q.view(rows, length, self.heads, self.head_width).transpose(1, 2)
        k = k.view(rows, length, self.kv_heads, self.head_width).transpose(1, 2)
        v = self.v_proj(x).view(rows, length, self.kv_heads, self.head_width).transpose(1, 2)
        if self.spec.qk_norm == "head" and self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.spec.rotary_share:
            rotary = place.rotary(self.head_width, self.spec.rope_theta)
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        if state is not None:
            k, v = state.update(k, v)
        y = nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None and length > 1, scale=self.spec.scale,
            enable_gqa=self.heads != self.kv_heads,
        )  # fmt: skip
        return self.o_proj(y.transpose(1, 2).reshape(rows, length, -1))

    def start(self, std: float, deep: float) -> None:
        """Initialise: normal with `std`, and with `deep` what adds to the residual stream."""
        for part in (self.q_proj, self.k_proj, self.v_proj):
            nn.init.normal_(part.weight, std=std)
        nn.init.normal_(self.o_proj.weight, std=deep)

    def init_state(self) -> DynamicLayer:
        return DynamicLayer()

    def flops(self, context: int) -> int:
        """Multiply-adds times two, per token, when it sees `context` positions on average."""
        linear = sum(item.weight.numel() for item in (self.q_proj, self.k_proj, self.v_proj, self.o_proj))
        return 2 * linear + 4 * self.heads * self.head_width * context

    def state_bytes(self, context: int, element: int = 2) -> int:
        return 2 * self.kv_heads * self.head_width * context * element
