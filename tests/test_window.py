"""Block-local windows against their definition: values, gradients, documents, chunks, and no square of the length."""

from typing import Any

import pytest
import torch
from sizes import Largest
from torch import Tensor

from shrew.blocks.layers import Place, Shape
from shrew.blocks.window import Window, WindowSpec, naive_window

CAPPED: dict[str, Any] = {"softcap": 2.0, "sinks": True, "scale": 0.3}
OWNERS = torch.tensor([[0] * 29, [0] * 7 + [1] * 22, [0] + [1] * 9 + [2] * 3 + [3] * 16])


def _block(window: int, **options: Any) -> Window:
    torch.manual_seed(window)
    block = Window(WindowSpec(heads=4, kv_heads=2, window=window, **options), Shape(16, 1e-6)).double()
    for p in block.parameters():
        torch.nn.init.normal_(p, std=0.4)
    return block


def _place(owner: Tensor | None, start: int, end: int) -> Place:
    positions = torch.arange(start, end).expand(3, -1)
    return Place(positions, positions, None if owner is None else owner[:, :end], start)


@pytest.mark.parametrize("length", [1, 2, 5, 8, 29])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("options", [{}, CAPPED, {"rotary_share": 0.0, "scale": 1.0}], ids=["plain", "capped", "nope"])
@pytest.mark.parametrize("window", [1, 2, 3, 4, 8])
def test_a_window_is_its_definition(window: int, options: dict[str, Any], packed: bool, length: int) -> None:
    block, owner = _block(window, **options), OWNERS[:, :length] if packed else torch.zeros(3, length)
    x = torch.randn(3, length, 16, dtype=torch.float64, requires_grad=True)
    place = _place(owner if packed else None, 0, length)
    found = block(x, place)
    known = {"scale": options.get("scale", 0.0), "softcap": options.get("softcap", 0.0), "sinks": block.sinks}
    y = naive_window(*block.project(x, place), owner, window, **known)
    wanted = block.o_proj(y.transpose(1, 2).flatten(2))
    torch.testing.assert_close(found, wanted)
    leaves, push = [x, *block.parameters()], torch.randn_like(found)
    for mine, theirs in zip(torch.autograd.grad((found * push).sum(), leaves),
                            torch.autograd.grad((wanted * push).sum(), leaves), strict=True):  # fmt: skip
        torch.testing.assert_close(mine, theirs)


@torch.no_grad()
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("options", [{}, CAPPED], ids=["plain", "capped"])
@pytest.mark.parametrize("window", [1, 2, 7, 64])
def test_chunks_with_a_state_are_the_whole_pass(window: int, options: dict[str, Any], packed: bool) -> None:
    block, owner, x = _block(window, **options), OWNERS if packed else None, torch.randn(3, 29, 16).double()
    whole = block(x, _place(owner, 0, 29))
    for steps in ([1] * 29, [3, 26], [1, 1, 11, 1, 15], [28, 1]):
        state, parts, start = block.init_state(), [], 0
        for step in steps:
            part = x[:, start : start + step]
            parts.append(block(part, _place(owner, start, start + step), state))
            start += step
            assert state.nbytes() == 3 * block.state_bytes(start, element=8)
        torch.testing.assert_close(torch.cat(parts, 1), whole)


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, CAPPED], ids=["plain", "capped"])
def test_nothing_grows_with_the_square_of_the_length(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shrew.blocks.window.PAIRS", 2**12)  # so that the scores too are made in parts
    block = _block(8, **options).float()
    sizes = []
    for length in (512, 1024):
        x, positions = torch.randn(1, length, 16), torch.arange(length)[None]
        with Largest() as largest:
            block(x, Place(positions, positions))
        sizes.append(largest.size)
    assert sizes[1] <= 2.1 * sizes[0]
    assert sizes[1] < 64 * 1024


def test_flops_count_the_pairs_of_the_blocks() -> None:
    block = _block(128)
    linear = 2 * sum(p.numel() for p in block.parameters())
    assert block.flops(100) == linear + 4 * 16 * 100
    assert block.flops(10_000) == linear + 4 * 16 * 192
