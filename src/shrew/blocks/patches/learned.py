"""`learned`: patches that the model cuts by itself, where the text takes a turn (H-Net, Hwang et al. 2025).

With h the bytes' hidden states, p_t = (1 - cos(W_q h_{t-1}, W_k h_t)) / 2, and a patch ends with byte t where
p_t > 1/2; the first byte of a document always is one, so no byte is given what comes behind it. A ratio loss keeps the
patches of the wanted size, and what is given to the bytes is smoothed over the patches by p, so that it has a gradient.
B rows, T new bytes, d width, P patches.
"""

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor, nn

from shrew.blocks.layers import Place, State
from shrew.blocks.linear import ssd
from shrew.spec import Meta, doc

SURE = 1e-4  # no patch is less or more certain than this when patches are smoothed


@dataclass(frozen=True, kw_only=True)
class LearnedSpec:
    kind: str = "learned"
    mean: Annotated[float, Meta(gt=1)] = doc("bytes a patch that the ratio loss aims at", 4.5)
    weight: Annotated[float, Meta(ge=0)] = doc("weight of the ratio loss", 0.03)
    longest: Annotated[int, Meta(ge=0)] = doc("most bytes of a patch; 0: no limit", 0)

    def problem(self) -> str:
        """What is wrong with these settings; empty when nothing is."""
        return f"longest is {self.longest} bytes and mean {self.mean:g}" if 0 < self.longest < self.mean else ""


def begins(place: Place) -> Tensor:
    """bool [B, T]: the new positions that begin a document."""
    if place.owner is None:
        first = torch.zeros(place.tokens.shape, dtype=torch.bool, device=place.tokens.device)
        first[:, :1] = place.seen == 0
        return first
    before = nn.functional.pad(place.owner, (1, 0), value=-1)[:, place.seen : -1]
    return place.owner[:, place.seen :] != before


class Learned(nn.Module):
    def __init__(self, spec: LearnedSpec, width: int) -> None:
        super().__init__()
        self.spec = spec
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)

    def start(self, std: float, deep: float) -> None:
        """Both maps are the identity."""
        nn.init.eye_(self.q_proj.weight)
        nn.init.eye_(self.k_proj.weight)

    def forward(self, x: Tensor, place: Place, state: State | None = None) -> tuple[Tensor, Tensor]:
        """x [B, T, d] -> whether a patch ends with each byte, and p, both [B, T]. `state` holds the last x and how far
        back the last end of its own is, limits aside."""
        first = begins(place)
        held = {} if state is None else state.held
        last = held.get("before", torch.zeros_like(x[:, :1]))
        with torch.autocast(x.device.type, enabled=False):  # a rounded p is another choice
            exact = torch.promote_types(x.dtype, torch.float32)
            new, old = x.to(exact), torch.cat([last.to(x.dtype), x[:, :-1]], 1).to(exact)
            q = nn.functional.linear(old, self.q_proj.weight.to(exact))
            k = nn.functional.linear(new, self.k_proj.weight.to(exact))
            chance = (1 - nn.functional.cosine_similarity(q, k, -1)) / 2
        chance = torch.where(first, 1.0, chance)
        own = chance > 0.5
        place_of = torch.arange(x.shape[1], device=x.device).expand_as(own)
        since = held.get("since", torch.zeros(len(x), 1, dtype=torch.long, device=x.device))
        latest = torch.where(own, place_of, -1 - since).cummax(1).values
        away = place_of - latest
        closed = own | ((away % self.spec.longest == 0) & (away > 0)) if self.spec.longest else own
        if state is not None:
            state.held["before"], state.held["since"] = x[:, -1:], away[:, -1:]
        return closed, chance

    def penalty(self, closed: Tensor, chance: Tensor) -> Tensor:
        """H-Net's ratio loss: least where the share of ends F and the mean chance G are 1 / mean."""
        mean, hard, soft = self.spec.mean, closed.to(chance.dtype).mean(), chance.mean()
        return self.spec.weight * mean / (mean - 1) * ((mean - 1) * hard * soft + (1 - hard) * (1 - soft))

    def flops(self) -> int:
        return 2 * (self.q_proj.weight.numel() + self.k_proj.weight.numel())


def sure(closed: Tensor, chance: Tensor) -> Tensor:
    """1 everywhere in value, and in gradient how likely the choice was (straight through)."""
    likely = torch.where(closed, chance, 1 - chance)
    return likely + (1 - likely).detach()


def smoothed(x: Tensor, chance: Tensor, place: Place, state: State | None = None) -> Tensor:
    """y_j = p_j x_j + (1 - p_j) y_{j-1} over the patches of a document: x [B, P, d], p [B, P]."""
    chance = chance.clamp(SURE, 1 - SURE)
    one = torch.ones_like(chance)[..., None, None]
    y, last = ssd(one, chance[..., None, None], x[:, :, None], torch.log1p(-chance)[..., None],
                  None if state is None else state.held.get("matrix"), place.new, place.before)  # fmt: skip
    if state is not None:
        state.held["matrix"] = last
    return y[:, :, 0].to(x.dtype)
