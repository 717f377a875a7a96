"""The gated short convolution against its definition: values, gradients, documents, chunks, dtypes."""

from typing import Any

import pytest
import torch
from torch import Tensor

from shrew.blocks.conv import Conv, ConvSpec, naive_conv
from shrew.blocks.layers import Place, Shape, State, causal_conv

OWNERS = torch.tensor([[0] * 13, [0, 1, 1, 2, 2, 2, 3, 3, 3, 3, 3, 4, 5], [0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1]])


def _place(owner: Tensor | None, start: int, end: int, rows: int = 3) -> Place:
    positions = torch.arange(start, end).expand(rows, -1)
    return Place(positions, positions, None if owner is None else owner[:, :end], start)


def _weights(taps: int, biased: bool, channels: int = 5) -> tuple[Tensor, Tensor | None]:
    weight = torch.randn(channels, taps, dtype=torch.float64, requires_grad=True)
    return weight, torch.randn(channels, dtype=torch.float64, requires_grad=True) if biased else None


@pytest.mark.parametrize("length", [1, 2, 3, 13])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("taps", "biased"), [(1, False), (2, True), (3, False), (4, True)])
def test_the_convolution_is_its_definition(taps: int, biased: bool, packed: bool, length: int) -> None:
    torch.manual_seed(taps)
    weight, bias = _weights(taps, biased)
    x = torch.randn(3, length, 5, dtype=torch.float64, requires_grad=True)
    owner = OWNERS[:, :length] if packed else torch.zeros(3, length)
    found = causal_conv(x, weight, bias, _place(owner if packed else None, 0, length))
    wanted = naive_conv(x, weight, bias, owner)
    torch.testing.assert_close(found, wanted)
    leaves: list[Any] = [part for part in (x, weight, bias) if part is not None]
    push = torch.randn_like(found)
    for mine, theirs in zip(torch.autograd.grad((found * push).sum(), leaves),
                            torch.autograd.grad((wanted * push).sum(), leaves), strict=True):  # fmt: skip
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("steps", [[1] * 13, [5, 8], [1, 1, 7, 1, 3], [12, 1]])
def test_chunks_with_a_state_are_the_whole_pass(steps: list[int], packed: bool) -> None:
    weight, bias = _weights(4, True)
    x, owner, state, parts, start = torch.randn(3, 13, 5).double(), OWNERS if packed else None, State(), [], 0
    for step in steps:
        part = x[:, start : start + step]
        parts.append(causal_conv(part, weight, bias, _place(owner, start, start + step), state))
        start += step
        assert state.held["conv"].shape == (3, 3, 5)
    torch.testing.assert_close(torch.cat(parts, 1), causal_conv(x, weight, bias, _place(owner, 0, 13)))


def test_the_gradient_has_a_gradient() -> None:
    weight, bias = _weights(3, True, channels=2)
    x = torch.randn(1, 4, 2, dtype=torch.float64, requires_grad=True)
    place = _place(None, 0, 4, rows=1)
    assert torch.autograd.gradgradcheck(lambda *parts: causal_conv(*parts, place), (x, weight, bias))


def test_the_block_is_the_gated_convolution() -> None:
    torch.manual_seed(0)
    block, x = Conv(ConvSpec(kernel=3, bias=True), Shape(8, 1e-6)).double(), torch.randn(3, 13, 8).double()
    block.start(0.5, 0.5)
    before, after, inner = block.in_proj(x).chunk(3, -1)
    y = after * naive_conv(before * inner, block.conv.weight[:, 0], block.conv.bias, OWNERS)
    torch.testing.assert_close(block(x, _place(OWNERS, 0, 13)), block.out_proj(y))


def test_low_precision_stays_near_and_keeps_its_dtype() -> None:
    torch.manual_seed(0)
    block, x = Conv(ConvSpec(), Shape(16, 1e-6)), torch.randn(3, 13, 16)
    block.start(0.3, 0.3)
    for owner in (None, OWNERS):
        wanted, place = block(x, _place(owner, 0, 13)), _place(owner, 0, 13)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = block(x, place)
        mixed.float().square().sum().backward()
        assert (mixed.dtype, block.conv.weight.grad.dtype) == (torch.bfloat16, torch.float32)
        torch.testing.assert_close(mixed.float(), wanted, rtol=0.05, atol=0.02)
        half = Conv(ConvSpec(), Shape(16, 1e-6)).bfloat16()
        half.load_state_dict(block.state_dict())
        torch.testing.assert_close(half(x.bfloat16(), place).float(), wanted, rtol=0.05, atol=0.02)
