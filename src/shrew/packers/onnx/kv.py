"""Keys and values of 8 or 4 bits in the packed graph, as GroupQueryAttention holds them.

The operator rounds what it stores to whole steps around zero, with one step for each channel of each head that is fixed
beforehand. So the steps are fitted to the keys and values of some text, each to the least squared error: a few values
beyond the largest code are worth smaller steps for all others.

K key-value heads, D head width, N tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shrew.blocks.attention import Attention
from shrew.blocks.model import ShrewForCausalLM
from shrew.errors import UnsupportedError

MOST = {8: 127, 4: 7}  # the largest code; the least is one further from zero
SHARES = torch.linspace(0.3, 1.0, 29)  # of the largest value, that may be the largest code
WINDOW = 256  # tokens of a text at a time


@dataclass(frozen=True)
class Steps:
    """Steps [K, D] of the keys (rotated) and the values of one mixer."""

    bits: int
    keys: Tensor
    values: Tensor


def rounded(x: Tensor, steps: Tensor, bits: int) -> Tensor:
    """x [..., D] as codes times steps [..., D]: what the operator reads back."""
    return (x / steps).round().clamp(-MOST[bits] - 1, MOST[bits]) * steps


def fitted(x: Tensor, bits: int) -> Tensor:
    """[N, K, D] -> the steps [K, D] of least squared error."""
    largest = x.abs().amax(0).clamp_min(1e-6) / MOST[bits]
    tried = torch.stack([(rounded(x, largest * share, bits) - x).square().sum(0) for share in SHARES])
    return largest * SHARES[tried.argmin(0)]


@torch.inference_mode()
def calibrated(model: ShrewForCausalLM, tokens: Sequence[int], bits: int) -> dict[str, Steps]:
    """Steps of every `attention` mixer by its name, fitted to what the model makes of these tokens. Windows, which
    hold few tokens, stay in full."""
    blocks: dict[str, Any] = {name: block for name, block in model.named_modules() if type(block) is Attention}
    if not blocks:
        raise UnsupportedError("--kv: this model has no full attention, whose cache grows with the text; leave it out.")
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in blocks}

    def kept(name: str, inner: Any) -> Any:
        def project(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
            found: tuple[Tensor, Tensor, Tensor] = inner(*args)
            seen[name].append((found[1][0].transpose(0, 1), found[2][0].transpose(0, 1)))
            return found

        return project

    for name, block in blocks.items():
        block.project = kept(name, block.project)
    try:
        width = min(WINDOW, model.spec.context)
        for first in range(0, len(tokens), width):
            model(input_ids=torch.tensor([list(tokens[first : first + width])]), use_cache=False)
    finally:
        for block in blocks.values():
            del block.project  # the class has its own
    both = {name: [torch.cat(part).float() for part in zip(*parts, strict=True)] for name, parts in seen.items()}
    return {name: Steps(bits, *(fitted(part, bits) for part in parts)) for name, parts in both.items()}
