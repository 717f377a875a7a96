"""`conv`: the gated short convolution of LFM2, out_proj(C * conv(B * x)): the cheapest mixer, of a few tokens' reach.

B rows, T new positions, d width, K taps.
"""

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor, nn

from shrew.blocks.layers import Place, Shape, State, causal_conv
from shrew.spec import Meta, doc


@dataclass(frozen=True, kw_only=True)
class ConvSpec:
    kind: str = "conv"
    kernel: Annotated[int, Meta(ge=1, le=256)] = doc("taps of the convolution: this token and those before it", 3)
    bias: bool = doc("biases in the projections and the convolution", False)

    def problem(self, width: int) -> str:
        return ""


def naive_conv(x: Tensor, weight: Tensor, bias: Tensor | None, owner: Tensor) -> Tensor:
    """The definition, one position and one tap at a time: x [B, T, C], weight [C, K], owner [B, T]. The oracle of the
    tests."""
    taps, rows = weight.shape[1], []
    for t in range(x.shape[1]):
        y = torch.zeros_like(x[:, t]) if bias is None else bias.expand_as(x[:, t])
        for back in range(min(taps, t + 1)):
            same = (owner[:, t - back] == owner[:, t])[:, None]
            y = y + same * weight[:, taps - 1 - back] * x[:, t - back]
        rows.append(y)
    return torch.stack(rows, 1)


class Conv(nn.Module):
    def __init__(self, spec: ConvSpec, shape: Shape) -> None:
        super().__init__()
        width = shape.width
        self.spec, self.kernel = spec, spec.kernel
        self.in_proj = nn.Linear(width, 3 * width, bias=spec.bias)
        self.conv = nn.Conv1d(width, width, spec.kernel, groups=width, bias=spec.bias)
        self.out_proj = nn.Linear(width, width, bias=spec.bias)

    def forward(self, x: Tensor, place: Place, state: State | None = None) -> Tensor:
        """x [B, T, d] -> [B, T, d]. `state` holds the last K - 1 inputs of the convolution."""
        before, after, x = self.in_proj(x).chunk(3, -1)
        return self.out_proj(after * causal_conv(before * x, self.conv.weight[:, 0], self.conv.bias, place, state))

    def start(self, std: float, deep: float) -> None:
        """Initialise: normal with `std`, and with `deep` what adds to the residual stream; taps as a convolution's."""
        self.conv.reset_parameters()
        nn.init.normal_(self.in_proj.weight, std=std)
        nn.init.normal_(self.out_proj.weight, std=deep)
        for part in (self.in_proj, self.conv, self.out_proj):
            if part.bias is not None:
                nn.init.zeros_(part.bias)

    def init_state(self) -> State:
        return State()

    def flops(self, context: int) -> int:
        """Multiply-adds times two, per token."""
        return 2 * sum(part.weight.numel() for part in (self.in_proj, self.conv, self.out_proj))

    def state_bytes(self, context: int, element: int = 2) -> int:
        return (self.kernel - 1) * self.out_proj.in_features * element
