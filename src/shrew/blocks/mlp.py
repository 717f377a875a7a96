"""`mlp`: the gated feed-forward layer, down(silu(gate(x)) * up(x)) (Shazeer 2020)."""

from dataclasses import dataclass
from typing import Annotated

from torch import Tensor, nn

from shrew.spec import Meta, doc


@dataclass(frozen=True, kw_only=True)
class MlpSpec:
    kind: str = "mlp"
    hidden: Annotated[int, Meta(ge=1)] | None = doc("hidden channels; default: three times the width", None)


class Mlp(nn.Module):
    def __init__(self, spec: MlpSpec, width: int) -> None:
        super().__init__()
        hidden = spec.hidden or 3 * width
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, d] -> [B, T, d]."""
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))

    def flops(self) -> int:
        """Multiply-adds times two, per token."""
        return 6 * self.gate_proj.weight.numel()
