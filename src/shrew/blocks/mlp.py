"""`mlp`: the gated feed-forward layer, down(silu(gate(x)) * up(x)) (Shazeer 2020). `none`: no feed-forward layer."""

from dataclasses import dataclass
from typing import Annotated

from torch import Tensor, nn

from shrew.blocks.layers import Shape
from shrew.spec import Meta, doc


@dataclass(frozen=True, kw_only=True)
class MlpSpec:
    kind: str = "mlp"
    hidden: Annotated[int, Meta(ge=1)] | None = doc("hidden channels; default: three times the width", None)

    def problem(self, width: int) -> str:
        return ""


class Mlp(nn.Module):
    def __init__(self, spec: MlpSpec, shape: Shape) -> None:
        super().__init__()
        width, hidden = shape.width, spec.hidden or 3 * shape.width
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def start(self, std: float, deep: float) -> None:
        for part in (self.gate_proj, self.up_proj):
            nn.init.normal_(part.weight, std=std)
        nn.init.normal_(self.down_proj.weight, std=deep)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """x [B, T, d] -> [B, T, d]; no penalty."""
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x)), None

    def flops(self) -> int:
        """Multiply-adds times two, per token."""
        return 6 * self.gate_proj.weight.numel()

    def idle(self) -> int:
        return 0


@dataclass(frozen=True, kw_only=True)
class NothingSpec:
    kind: str = "none"

    def problem(self, width: int) -> str:
        return ""


class Nothing(nn.Module):
    """Layers of a mixer alone, as Mamba's: the layer leaves this block and its norm out."""

    def __init__(self, spec: NothingSpec, shape: Shape) -> None:
        super().__init__()

    def start(self, std: float, deep: float) -> None:
        pass

    def flops(self) -> int:
        return 0

    def idle(self) -> int:
        return 0
