"""`mlp`: the feed-forward layer, down(act(gate(x)) * up(x)) (Shazeer 2020), or ungated down(act(up(x))).

`none`: no feed-forward layer, as in Mamba.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

from torch import Tensor, nn

from shrew.blocks.layers import WIDEST, Shape
from shrew.spec import Meta, doc

Activation = Literal["silu", "gelu_tanh", "relu2"]


def gelu_tanh(x: Tensor) -> Tensor:
    """x Phi(x) with the tanh in place of the error function (Hendrycks and Gimpel 2016)."""
    return nn.functional.gelu(x, approximate="tanh")


def relu2(x: Tensor) -> Tensor:
    """max(x, 0)^2 (So et al. 2021, Primer)."""
    return nn.functional.relu(x).square()


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": nn.functional.silu,
    "gelu_tanh": gelu_tanh,
    "relu2": relu2,
}


@dataclass(frozen=True, kw_only=True)
class MlpSpec:
    kind: str = "mlp"
    hidden: Annotated[int, Meta(ge=1, le=WIDEST)] | None = doc("hidden channels; default: three times the width", None)
    activation: Activation = doc("silu makes it SwiGLU; relu2 is the square of ReLU", "silu")
    gated: bool = doc("multiply by a second projection; without it a channel costs a third less", True)

    def problem(self, width: int) -> str:
        return ""


class Mlp(nn.Module):
    def __init__(self, spec: MlpSpec, shape: Shape) -> None:
        super().__init__()
        self.spec = spec
        width, hidden = shape.width, spec.hidden or 3 * shape.width
        self.activation = ACTIVATIONS[spec.activation]
        self.gate_proj = nn.Linear(width, hidden, bias=False) if spec.gated else None
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def start(self, std: float, deep: float) -> None:
        for part in (self.gate_proj, self.up_proj):
            if part is not None:
                nn.init.normal_(part.weight, std=std)
        nn.init.normal_(self.down_proj.weight, std=deep)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """x [B, T, d] -> [B, T, d]; no penalty."""
        if self.gate_proj is None:
            return self.down_proj(self.activation(self.up_proj(x))), None
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x)), None

    def flops(self) -> int:
        """Multiply-adds times two, per token."""
        return 2 * sum(weight.numel() for weight in self.parameters())

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
        self.spec = spec

    def start(self, std: float, deep: float) -> None:
        pass

    def flops(self) -> int:
        return 0

    def idle(self) -> int:
        return 0
