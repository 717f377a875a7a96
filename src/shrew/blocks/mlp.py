"""`mlp`: the gated feed-forward layer, down(act(gate(x)) * up(x)) (Shazeer 2020)."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

from torch import Tensor, nn

from shrew.blocks.layers import Shape
from shrew.spec import Meta, doc


@dataclass(frozen=True, kw_only=True)
class MlpSpec:
    kind: str = "mlp"
    hidden: Annotated[int, Meta(ge=1)] | None = doc("hidden channels; default: three times the width", None)
    activation: Literal["silu", "gelu_tanh", "relu2"] = doc("of the gate; relu2 is the square of relu", "silu")

    def problem(self, width: int) -> str:
        return ""


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": nn.functional.silu,
    "gelu_tanh": partial(nn.functional.gelu, approximate="tanh"),
    "relu2": lambda x: nn.functional.relu(x).square(),
}


class Mlp(nn.Module):
    def __init__(self, spec: MlpSpec, shape: Shape) -> None:
        super().__init__()
        self.spec = spec
        width, hidden = shape.width, spec.hidden or 3 * shape.width
        self.activation = ACTIVATIONS[spec.activation]
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def start(self, std: float, deep: float) -> None:
        for part in (self.gate_proj, self.up_proj):
            nn.init.normal_(part.weight, std=std)
        nn.init.normal_(self.down_proj.weight, std=deep)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """x [B, T, d] -> [B, T, d]; no penalty."""
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x)), None

    def flops(self) -> int:
        """Multiply-adds times two, per token."""
        return 6 * self.gate_proj.weight.numel()

    def idle(self) -> int:
        return 0
