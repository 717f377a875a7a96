"""`delta` against its definition: values, gradients, documents, states between calls; its cost, its numbers."""

from typing import Any

import pytest
import torch
from sizes import Largest
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from shrew.blocks import delta
from shrew.blocks.delta import Delta, DeltaSpec, delta_rule, naive_delta
from shrew.blocks.layers import Place, Shape

ROWS, KEYS, HEADS, KEY, VALUE = 3, 2, 4, 5, 3


def _inputs(length: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    torch.manual_seed(length)
    q, k = torch.randn(2, ROWS, length, KEYS, KEY, dtype=dtype)
    k = k / k.norm(dim=-1, keepdim=True)
    v = torch.randn(ROWS, length, HEADS, VALUE, dtype=dtype)
    beta = torch.rand(ROWS, length, HEADS, dtype=dtype)
    decay = -torch.rand(ROWS, length, HEADS, dtype=dtype) * torch.tensor([0.01, 0.3, 2.0, 30.0], dtype=dtype)
    return [part.requires_grad_() for part in (q, k, v, beta, decay)]


def _owner(length: int) -> Tensor:
    """One document; documents of three positions and a rest; padding and a document."""
    return torch.tensor([[0] * length, [min(i // 3, 3) for i in range(length)], [int(i > 4) for i in range(length)]])


def _same_gradients(found: Tensor, wanted: Tensor, inputs: list[Tensor]) -> None:
    torch.testing.assert_close(found, wanted)
    weight = torch.randn_like(found)
    mine = torch.autograd.grad((found * weight).sum(), inputs)
    theirs = torch.autograd.grad((wanted * weight).sum(), inputs)
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("length", [1, 2, 7, 33])
@pytest.mark.parametrize("chunk", [1, 3, 8, 64])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("decays", [False, True])
def test_chunks_are_the_definition(
    monkeypatch: pytest.MonkeyPatch, decays: bool, packed: bool, chunk: int, length: int
) -> None:
    monkeypatch.setattr(delta, "SPAN", 16)  # so that states also go from span to span
    *inputs, decay = _inputs(length)
    inputs = [*inputs, decay] if decays else inputs
    gone, owner = decay if decays else None, _owner(length) if packed else None
    found, _ = delta_rule(*inputs[:4], gone, chunk, owner=owner)
    _same_gradients(found, naive_delta(*inputs[:4], gone, owner), inputs)


@pytest.mark.parametrize("packed", [False, True])
def test_calls_in_a_row_are_one(packed: bool) -> None:
    length = 29
    inputs, owner = _inputs(length), _owner(length) if packed else None
    wanted, parts, state, start = naive_delta(*inputs, owner), [], None, 0
    for step in (1, 4, 1, 1, 9, 13):  # documents end inside parts and between them
        part = slice(start, start + step)
        own, before = (None, None) if owner is None else (owner[:, part], owner[:, start - 1] if start else None)
        y, state = delta_rule(*[x[:, part] for x in inputs], 4, state, own, before)
        parts.append(y)
        start += step
    _same_gradients(torch.cat(parts, 1), wanted, inputs)


def test_the_hardest_keys_stay_exact() -> None:
    # All keys alike and all of each value written: the system's matrix is as far from the identity as it can be.
    k = torch.full((1, 100, 1, 4), 0.5)
    v, beta = torch.randn(1, 100, 1, 3), torch.ones(1, 100, 1)
    for chunk in (16, 64):
        torch.testing.assert_close(delta_rule(k, k, v, beta, None, chunk)[0], v, rtol=1e-4, atol=1e-4)


def test_decays_of_any_strength_give_finite_gradients() -> None:
    *rest, decay = _inputs(70, torch.float32)
    strong = (decay.detach() * torch.tensor([1.0, 100.0, 1e4, 1e6])).requires_grad_()
    found, _ = delta_rule(*rest, strong, 64)
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(found.square().sum(), [*rest, strong]))
    torch.testing.assert_close(found, naive_delta(*rest, strong), rtol=1e-3, atol=1e-4)


def _block(**settings: Any) -> Delta:
    torch.manual_seed(0)
    block = Delta(DeltaSpec(**{"heads": 4, "key_heads": 2, "key_width": 8, "chunk": 8, **settings}), Shape(32, 1e-6))
    block.start(0.3, 0.3)
    return block


def _place(rows: int, length: int) -> Place:
    positions = torch.arange(length).expand(rows, length)
    return Place(positions, positions)


@torch.no_grad()
@pytest.mark.parametrize("spec", [{}, {"conv": 0, "decay": False, "gate": False}], ids=["gated", "plain"])
def test_bfloat16_is_near_and_keeps_its_state_in_float32(spec: dict[str, Any]) -> None:
    block, x = _block(**spec), torch.randn(2, 50, 32)
    wanted = block(x, _place(2, 50))
    with torch.autocast("cpu", torch.bfloat16):
        assert (block(x, _place(2, 50)) - wanted).norm() < 0.02 * wanted.norm()
    state = block.init_state()
    found = block.bfloat16()(x.bfloat16(), _place(2, 50), state)
    assert (found.dtype, state.held["rule"].dtype) == (torch.bfloat16, torch.float32)
    assert state.nbytes() == 2 * block.state_bytes(50, element=2)
    assert (found - wanted).norm() < 0.02 * wanted.norm()


def _solve_flops(system: Any, values: Any, *args: Any, **kwargs: Any) -> int:
    return torch.Size(values).numel() * system[-1]  # a multiply and an add for half of the matrix


@torch.no_grad()
@pytest.mark.parametrize("chunk", [8, 64])
def test_flops_are_exact_with_the_triangular_systems(chunk: int) -> None:
    block = _block(chunk=chunk)
    solved: Any = {torch.ops.aten.linalg_solve_triangular: _solve_flops}
    with FlopCounterMode(display=False, custom_mapping=solved) as counter:
        block(torch.randn(1, 32, 32), _place(1, 32))
    assert counter.get_total_flops() == 32 * block.flops(32)


@torch.no_grad()
def test_a_long_text_needs_memory_for_its_channels_only() -> None:
    block, length = _block(heads=1, key_heads=1, key_width=16, chunk=64), 16384
    with Largest() as largest:
        block(torch.randn(1, length, 32), _place(1, length))
    assert largest.size <= (length + 3) * sum(block.sizes)  # 64 positions are compared with each other at a time


def test_a_fresh_block_remembers_at_many_ranges() -> None:
    block = _block(heads=256, key_heads=1)
    assert block.A_log is not None
    step = torch.nn.functional.softplus(block.dt_bias)
    assert step.min() >= 0.00099 and step.max() <= 0.101
    reach = 1 / (block.A_log.exp() * step)  # steps until e times less is left
    assert reach.min() < 3 and reach.max() > 200


@pytest.mark.skipif(not torch.cuda.is_available() or delta._kernel() is None, reason="needs a GPU and fla")
def test_fla_kernels_give_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    block = _block(key_width=64).cuda()
    x = torch.randn(2, 200, 32, device="cuda")
    place = Place(*torch.arange(200, device="cuda").expand(2, 2, 200))
    wanted = torch.autograd.grad(block(x, place).square().sum(), list(block.parameters()))
    with torch.autocast("cuda", torch.bfloat16):
        found = torch.autograd.grad(block(x, place).float().square().sum(), list(block.parameters()))
    for one, other in zip(found, wanted, strict=True):
        assert (one - other).norm() < 0.05 * other.norm()
