"""The segment attention with a linear memory: its definition, its cuts, its cache, what it holds in memory."""

from pathlib import Path
from typing import Any

import pytest
import torch
from sizes import Largest
from torch import Tensor
from transformers import AutoModelForCausalLM

from shrew import spec
from shrew.blocks import memory
from shrew.blocks.layers import Place, Shape, State
from shrew.blocks.memory import Memory, MemorySpec, naive_memory
from shrew.blocks.model import ModelSpec, build
from shrew.train import TrainSpec

GROUPED = MemorySpec(heads=4, kv_heads=2, segment=4)
GATES = MemorySpec(heads=2, segment=5, gate="head", qk_norm=True, rope_theta=50.0)
PAPER = MemorySpec(heads=4, kv_heads=1, segment=3, accumulate=True)
KINDS = pytest.mark.parametrize("mixer", [GROUPED, GATES, PAPER], ids=["grouped", "gates", "paper"])
LENGTHS = pytest.mark.parametrize("length", [1, 2, 4, 7, 20, 33])


@pytest.fixture(autouse=True)
def _short_stretches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "STRETCH", 12)


def _block(mixer: MemorySpec, seed: int = 0) -> Memory:
    torch.manual_seed(seed)
    block = Memory(mixer, Shape(24, 1e-6)).double()
    block.start(0.3, 0.3)
    torch.nn.init.normal_(block.beta)
    return block


def _place(length: int, owner: list[list[int]] | None = None, seen: int = 0, rows: int = 3) -> Place:
    positions = torch.arange(seen, seen + length).expand(rows, length)
    return Place(positions, positions, None if owner is None else torch.tensor(owner), seen)


def _input(length: int, rows: int = 3) -> Tensor:
    draw = torch.Generator().manual_seed(length)
    return torch.randn(rows, length, 24, dtype=torch.float64, generator=draw)


def _owner(length: int) -> list[list[int]]:
    """One document; several, shorter and longer than the segments; padding on the left."""
    lengths = [1, 2, 11, 3, 5, 9, length]
    several = [number for number, count in enumerate(lengths) for _ in range(count)][:length]
    return [[3] * length, several, [int(i >= 6) for i in range(length)]]


def _naive(block: Memory, x: Tensor, owner: list[list[int]] | None) -> Tensor:
    def heads(name: str, count: int) -> Tensor:
        y = getattr(block, f"{name}_proj")(x).view(*x.shape[:2], count, -1).transpose(1, 2)
        if block.spec.qk_norm and name != "v":
            y = y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt() * getattr(block, f"{name}_norm").weight
        return y

    q, k, v = heads("q", block.heads), heads("k", block.kv_heads), heads("v", block.kv_heads)
    gate = block.beta.sigmoid().expand(block.heads)
    found = naive_memory(
        q, k, v, gate, block.spec.segment, block.spec.rope_theta, None if owner is None else torch.tensor(owner)
    )
    return block.o_proj(found.transpose(1, 2).flatten(2))


@LENGTHS
@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
@KINDS
def test_memory_is_its_definition(mixer: MemorySpec, packed: bool, length: int) -> None:
    block, owner = _block(mixer), _owner(length) if packed else None
    x = _input(length).requires_grad_()
    found, wanted = block(x, _place(length, owner)), _naive(block, x, owner)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)  # rotary angles are float32
    places = [x, *block.parameters()]
    weight = torch.randn_like(found)
    mine = torch.autograd.grad((found * weight).sum(), places)
    theirs = torch.autograd.grad((wanted * weight).sum(), places)
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("steps", [[1] * 33, [4, 4, 25], [7, 1, 1, 12, 12], [30, 1, 1, 1], [2, 13, 18]], ids=str)
@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
@KINDS
@torch.no_grad()
def test_chunks_with_a_state_are_the_whole_pass(mixer: MemorySpec, packed: bool, steps: list[int]) -> None:
    block, owner, x = _block(mixer), _owner(33) if packed else None, _input(33)
    state, parts = State(), []
    for step in steps:
        until = state.seen + step
        place = _place(step, owner and [row[:until] for row in owner], state.seen)
        parts.append(block(x[:, state.seen : until], place, state))
        state.seen = until
        assert state.nbytes() == 3 * block.state_bytes(until, element=8)
    torch.testing.assert_close(torch.cat(parts, 1), _naive(block, x, owner), rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_another_document_may_follow_one_that_filled_the_cache_alone() -> None:
    block, x, owner = _block(GROUPED), _input(26), [[0] * 10 + [1] * 16] * 3
    state = State()
    parts = [block(x[:, :10], _place(10), state)]
    state.seen = 10
    parts.append(block(x[:, 10:], _place(16, owner, 10), state))
    torch.testing.assert_close(torch.cat(parts, 1), _naive(block, x, owner), rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_the_memory_reaches_past_the_segment_and_only_backwards() -> None:
    block, x = _block(GROUPED), _input(20)
    y = block(x, _place(20))
    changed = x.clone()
    changed[:, 9] += 1
    moved = (block(changed, _place(20)) - y).abs().amax((0, 2)) > 1e-9
    # the ninth position is read by its own segment, 8 to 11, from itself on, and by all later segments
    assert moved.tolist() == [False] * 9 + [True] * 11


@torch.no_grad()
def test_a_read_is_a_mean_of_earlier_values() -> None:
    """So it stays bounded, however long the text, though M and z grow with it."""
    block = Memory(MemorySpec(heads=2, segment=4), Shape(24, 1e-6))
    k, v = 3 * torch.randn(1, 400, 2, 4, 12), torch.randn(1, 400, 2, 4, 12)
    sums = block._write(k, v).cumsum(1)
    read = memory._ratio(block._read(memory.phi(3 * torch.randn(1, 400, 2, 4, 12)), sums))
    assert sums[:, -1].norm() > 100 * sums[:, 0].norm()
    assert float(read.abs().max()) <= float(v.abs().max())


@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
def test_accumulating_changes_memory_and_nothing_else(packed: bool) -> None:
    x, place = _input(50), _place(50, _owner(50) if packed else None)
    blocks = [_block(MemorySpec(segment=4, accumulate=accumulate)) for accumulate in (False, True)]
    found = [block(x, place) for block in blocks]
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)
    grads = [torch.autograd.grad(y.square().sum(), list(b.parameters())) for y, b in zip(found, blocks, strict=True)]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_stream_holds_a_stretch_and_an_accumulation_everything() -> None:
    def largest(length: int, accumulate: bool) -> int:
        block = _block(MemorySpec(heads=2, segment=4, accumulate=accumulate))
        x, place = _input(length, rows=1), _place(length, rows=1)
        with Largest(apart=x.numel()) as mode:
            block(x, place)
        return mode.size

    assert largest(1200, False) == largest(120, False) < 24 * 120
    assert largest(1200, True) >= 24 * 1200


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_other_dtypes_and_autocast(dtype: torch.dtype) -> None:
    block, x, owner = _block(GROUPED), _input(33), _owner(33)
    wanted = block(x, _place(33, owner))
    block.to(dtype)
    found = block(x.to(dtype), _place(33, owner))
    assert found.dtype == dtype
    close: dict[str, Any] = {"rtol": 0.1, "atol": 0.1} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(found.double(), wanted, **close)
    if dtype == torch.float32:
        state = State()
        with torch.autocast("cpu", torch.bfloat16):
            found = block(x.float(), _place(33, owner), state)
        torch.testing.assert_close(found.double(), wanted, rtol=0.1, atol=0.1)
        assert state.held["memory"].dtype == torch.float32


def test_settings_that_do_not_fit_are_refused() -> None:
    assert "kv_heads" in MemorySpec(heads=4, kv_heads=3).problem(64)
    assert "even" in MemorySpec(heads=4).problem(12)
    with pytest.raises(Exception, match="segment"):
        spec.parse(ModelSpec, {"mixers": {"A": {"kind": "memory", "segment": 1}}}, "r.toml")


def test_gates_open_by_layer_or_by_head(tmp_path: Path) -> None:
    values: dict[str, Any] = {"layers": 2, "width": 24, "vocabulary": 50}
    for gate, count in (("layer", 1), ("head", 4)):
        model = build(spec.parse(ModelSpec, {**values, "mixers": {"A": {"kind": "memory", "gate": gate}}}, "r.toml"))
        betas = [value for name, value in model.named_parameters() if name.endswith("beta")]
        assert [beta.tolist() for beta in betas] == [[0.0] * count] * 2
        for beta in betas:
            torch.nn.init.normal_(beta)
        model.save_pretrained(tmp_path / gate)
        again = AutoModelForCausalLM.from_pretrained(tmp_path / gate, dtype=torch.float32)
        assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("name", "total", "active", "far"),
    [("white-basilisk", 193.1, 94.0, [2, 10]), ("white-basilisk-small", 8.0, 4.4, [2])],
)
def test_the_presets_have_the_papers_rule_and_the_parameters_they_say(
    name: str, total: float, active: float, far: list[int]
) -> None:
    path = Path(__file__).parents[1] / "recipes" / f"{name}.toml"
    values = spec.read_toml(path)
    spec.parse(TrainSpec, values["train"], "train")
    shape = spec.parse(ModelSpec, values["model"], "model")
    assert [i for i in range(shape.layers) if shape.mixer(i).kind == "memory"] == far
    with torch.device("meta"):
        model = build(shape)
    ffns = [layer.ffn for layer in list[Any](model.model.layers)]
    assert [bool(ffn.idle()) for ffn in ffns] == [bool(i % 2) for i in range(shape.layers)]
    counted = sum(p.numel() for p in model.parameters())
    assert (round(counted / 1e6, 1), round((counted - sum(ffn.idle() for ffn in ffns)) / 1e6, 1)) == (total, active)
    assert f"{total} M parameters, {active} M of them active" in path.read_text("utf-8")
