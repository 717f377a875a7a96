"""Healing: what is trained, what stays where it is, and what the teacher's stored predictions are worth."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_folder import GROUPED, WORDS, ZOO, make_model, make_tokenizer
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from shrew import folder, objectives, spec
from shrew.blocks.model import ModelSpec, build
from shrew.errors import ShrewError, UnsupportedError
from shrew.folder import Loaded, Packed, Steps, Uniform
from shrew.folder.blocktypes import Levels
from shrew.folder.grids import Product, groups
from shrew.folder.packed import to_rows
from shrew.moves.context import Context
from shrew.moves.distil import Distil, Plan
from shrew.moves.distil.weights import Through, Weights, learned_steps, on_grid
from shrew.moves.grids import nearest
from shrew.moves.quantize import Quantize

LINES: list[str] = []


def context_for(cache: Path, teacher: Loaded | None = None, texts: int = 6, length: int = 24, **more: Any) -> Context:
    """Random token ids to calibrate on and, of other seeds, to heal on."""
    draw = np.random.default_rng(0)
    calibration = [draw.integers(4, WORDS, length) for _ in range(texts)]
    healing = [draw.integers(4, WORDS, length - number % 3) for number in range(texts)]
    return Context(calibration, healing, teacher, 0, cache / "cache", LINES.append, **more)


def loaded_of(kind: str) -> Loaded:
    loaded = Loaded(make_model(kind), make_tokenizer())
    if kind == "distilbert":  # its own initial weights are so small that every input gets the same answer
        with torch.no_grad():
            for p in loaded.model.parameters():
                p.normal_(1.0 if p.ndim == 1 else 0.0, 0.2)
    return loaded


def quantized(kind: str, context: Context, bits: int = 3) -> Loaded:
    return Quantize(bits=bits, group=32, method="rtn", embeddings=True).apply(loaded_of(kind), context)


@torch.no_grad()
def divergence(teacher: Loaded, student: Loaded, context: Context) -> float:
    total = 0.0
    for row in context.healing:
        ids = torch.from_numpy(row)[None]
        q, p = (item.model(input_ids=ids).logits.log_softmax(-1) for item in (student, teacher))
        total += float(objectives.divergence(q, p))
    return total


@pytest.mark.parametrize("kind", list(ZOO))
def test_healing_brings_a_packed_model_nearer_to_its_original_on_its_grid(kind: str, tmp_path: Path) -> None:
    teacher = loaded_of(kind)
    context = context_for(tmp_path, teacher)
    student = quantized(kind, context)
    before, packed = divergence(teacher, student, context), dict(student.packed)
    Distil(steps=16, lr=1e-2 if kind == "distilbert" else 4e-3, teacher=1.0).apply(student, context)
    assert divergence(teacher, student, context) < 0.93 * before
    assert set(student.packed) == set(packed)
    for name, item in student.packed.items():
        assert torch.equal(item.steps.scales, packed[name].steps.scales)
        assert torch.equal(dict(student.model.named_parameters())[name], item.dense())  # exactly on the grid
    assert any(not torch.equal(item.codes, packed[name].codes) for name, item in student.packed.items())
    if kind == "tied":
        assert student.model.lm_head.weight is student.model.model.embed_tokens.weight
    folder.save(student, tmp_path / "out")  # refuses weights that are not their codes
    again = folder.load(tmp_path / "out")
    ids = torch.from_numpy(context.healing[0])[None]
    with torch.no_grad():
        assert torch.allclose(again.model(input_ids=ids).logits, student.model(input_ids=ids).logits, atol=0.15)


def test_zero_points_stay_too(tmp_path: Path) -> None:
    teacher = loaded_of("llama")
    context = context_for(tmp_path, teacher)
    student = Quantize(bits=2, group=32, method="rtn", symmetric=False).apply(loaded_of("llama"), context)
    packed = dict(student.packed)
    Distil(steps=4).apply(student, context)
    for name, item in student.packed.items():
        assert item.steps.zeros is not None
        assert torch.equal(item.steps.zeros, packed[name].steps.zeros)
        assert int(item.codes.max()) < 4
    folder.save(student, tmp_path / "out")


@given(st.integers(2, 4), st.integers(0, 9), st.booleans(), st.booleans(), st.integers(1, 12), st.integers(0, 2**20))
def test_learned_steps_are_their_definition(
    bits: int, group: int, symmetric: bool, transposed: bool, cols: int, seed: int
) -> None:
    """Weight by weight, as Esser et al. (2019) write it; what the forward pass sees is on the grid to the last bit."""
    draw = torch.Generator().manual_seed(seed)
    grid, count = Uniform(bits, group, symmetric), groups(cols, group)
    scales = (torch.rand(3, count, generator=draw) * 0.2 + 0.05).bfloat16()
    zeros = None if symmetric else torch.randint(0, 2**bits, (3, count), dtype=torch.uint8, generator=draw)
    shape = (cols, 3) if transposed else (3, cols)
    packed = Packed(torch.zeros(3, cols, dtype=torch.uint8), Steps(scales, zeros), grid, shape, transposed)
    value = (torch.randn(shape, generator=draw) * 0.4).requires_grad_()
    growth = (torch.randn(3, count, generator=draw) * 0.3).requires_grad_()
    weight = torch.randn(shape, generator=draw)
    found = learned_steps(value, packed, growth)
    grown = scales.float() * growth.detach().exp()
    after = replace(packed, steps=replace(packed.steps, scales=grown.bfloat16()))
    assert torch.equal(found.detach(), on_grid(value.detach(), after)[1])
    (found * weight).sum().backward()
    assert value.grad is not None
    assert growth.grad is not None
    rows, own, passed = (to_rows(item.detach(), transposed) for item in (value, value.grad, weight))
    slopes = torch.zeros(3, count)
    for row in range(3):
        for col in range(cols):
            place = col // group if group else 0
            scale = float(after.steps.scales[row, place])
            zero = 2 ** (bits - 1) if zeros is None else int(zeros[row, place])
            level = float(rows[row, col]) / scale
            low, high = -zero, 2**bits - 1 - zero
            inside = low <= level <= high
            slope = round(level) - level if inside else low if level < low else high
            slopes[row, place] += float(passed[row, col]) * slope * float(grown[row, place])
            assert float(own[row, col]) == pytest.approx(float(passed[row, col]) if inside else 0, abs=1e-6)
    share = ((group or cols) * 2 ** (bits - 1)) ** -0.5
    assert torch.allclose(growth.grad, slopes * share, atol=2e-4)


@pytest.mark.parametrize(("bits", "symmetric", "lora"), [(2, True, 0), (3, False, 0), (2, True, 4)])
def test_scales_are_trained_and_saved_as_trained(bits: int, symmetric: bool, lora: int, tmp_path: Path) -> None:
    teacher = loaded_of("llama")
    context = context_for(tmp_path, teacher)
    for scales in (False, True):
        student = Quantize(bits=bits, group=32, method="rtn", symmetric=symmetric).apply(loaded_of("llama"), context)
        before, packed = divergence(teacher, student, context), dict(student.packed)
        seen: dict[str, torch.Tensor] = {}
        finish = Weights.finish

        def noted(self: Weights) -> None:
            seen.update({name: value.detach().clone() for name, value in self.values().items()})  # noqa: B023
            finish(self)  # noqa: B023

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Weights, "finish", noted)
            Distil(steps=14, lr=4e-3, teacher=1.0, scales=scales, lora=lora).apply(student, context)
        moved = [not torch.equal(item.steps.scales, packed[name].steps.scales) for name, item in student.packed.items()]
        assert all(moved) if scales else not any(moved)
        for name, item in student.packed.items():
            assert item.steps.scales.dtype == torch.bfloat16
            assert torch.equal(student.model.get_parameter(name), item.dense())
            assert torch.equal(item.dense(), seen[name]) if scales else torch.allclose(item.dense(), seen[name])
        if scales:
            assert divergence(teacher, student, context) < 0.95 * before
    folder.save(student, tmp_path / "out")
    again = folder.load(tmp_path / "out")
    for name, item in student.packed.items():
        assert torch.equal(again.packed[name].dense(), item.dense())


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("grid", [Uniform(3, 16), Uniform(3, 16, False), Uniform(4, 0), Uniform(3, 20), Product(6),
                                  Levels("q4_k", 32), Levels("nf4", 64)])  # fmt: skip
def test_rounding_some_rows_at_a_time_is_rounding(
    grid: Any, transposed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shrew.moves.distil.weights.IN_CACHE", 600)
    rows = torch.randn(7, 256, generator=torch.Generator().manual_seed(0))
    weight = rows.T.contiguous() if transposed else rows
    packed = Packed(*nearest(rows, grid, search=False), grid, tuple(weight.shape), transposed)
    value = (weight + 0.1 * weight.roll(1)).requires_grad_()
    found = Through.apply(value, packed)
    assert torch.equal(found, on_grid(value.detach(), packed)[1])
    (found * weight).sum().backward()
    assert value.grad is not None and torch.equal(value.grad, weight)


def test_without_a_teacher_it_is_plain_training(tmp_path: Path) -> None:
    """Against a loop by hand: the same windows, next-token loss, AdamW, warm-up and linear decay."""
    context = replace(context_for(tmp_path, length=24), healing=[np.random.default_rng(1).integers(4, WORDS, 16)] * 2)
    steps, rate = 5, 1e-3
    mine = Distil(steps=steps, lr=rate, rows=2, teacher=0.0).apply(loaded_of("llama"), context)
    model = make_model("llama")
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
    ids = torch.from_numpy(np.stack(context.healing))
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * min((step + 1) / 1, (steps - step) / (0.9 * steps), 1.0)
        model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    for (name, p), q in zip(mine.model.named_parameters(), model.parameters(), strict=True):
        assert torch.allclose(p, q, atol=2e-5), name


def of_our_blocks() -> Loaded:
    """With everything that training adds to the loss or does between steps."""
    table = {"layers": 4, "width": 32, "vocabulary": WORDS, "mixers": {"A": {"heads": 4}}, "exits": {"every": 2},
             "ffn": {"kind": "moe", "experts": 4, "hidden": 16, "balance": "bias"},
             "mixture_of_depths": {"every": 2}}  # fmt: skip
    torch.manual_seed(0)
    return Loaded(build(spec.parse(ModelSpec, table, "r.toml")).eval(), make_tokenizer())


def test_a_model_of_our_blocks_is_healed_as_it_is_trained(tmp_path: Path) -> None:
    context = replace(context_for(tmp_path), healing=[np.random.default_rng(1).integers(4, WORDS, 16)] * 2)
    mine = Distil(steps=1, lr=1e-3, rows=2, teacher=0.0).apply(of_our_blocks(), context).model
    model = of_our_blocks().model.train()
    ids = torch.from_numpy(np.stack(context.healing))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)
    loss, added = model.losses(ids, F.pad(ids[:, 1:], (0, 1), value=objectives.IGNORE))
    ((loss + added) / ids[:, 1:].numel()).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    for (name, p), q in zip(mine.named_parameters(), model.parameters(), strict=True):
        assert torch.allclose(p, q, atol=2e-5), name
    start = dict(of_our_blocks().model.named_parameters())
    assert all(not torch.equal(p, start[name]) for name, p in mine.named_parameters() if "exit_norms" in name)
    assert all(buffer.any() for name, buffer in mine.named_buffers() if name.endswith("balance_bias"))
    assert not mine.training


def test_hidden_states_of_our_blocks(tmp_path: Path) -> None:
    context = context_for(tmp_path, of_our_blocks())
    mine = Distil(steps=1, hidden=1.0).apply(of_our_blocks(), context)
    without = Distil(steps=1).apply(of_our_blocks(), context)
    assert not torch.equal(mine.model.lm_head.weight, without.model.lm_head.weight)


def test_a_classifier_with_and_without_labels(tmp_path: Path) -> None:
    teacher = loaded_of("modernbert")
    labels = np.array([0, 1, 2, 3, 4, 0])
    labelled = context_for(tmp_path, teacher, labels=labels)

    def loss_of(loaded: Loaded) -> float:
        with torch.no_grad():
            found = [loaded.model(input_ids=torch.from_numpy(row)[None]).logits for row in labelled.healing]
        return float(F.cross_entropy(torch.cat(found), torch.from_numpy(labels)))

    before = loss_of(loaded_of("modernbert"))
    taught = Distil(steps=10, lr=2e-3, teacher=0.0).apply(loaded_of("modernbert"), labelled)
    assert loss_of(taught) < before - 0.1
    mixed = Distil(steps=10, lr=2e-3, teacher=0.5).apply(loaded_of("modernbert"), labelled)
    assert loss_of(mixed) < before
    alone = Distil(steps=2, lr=1e-5, teacher=1.0).apply(loaded_of("modernbert"), context_for(tmp_path, teacher))
    assert loss_of(alone) == pytest.approx(before, rel=0.05)  # it is its own teacher
    with pytest.raises(UnsupportedError, match="teacher or labelled"):
        Distil(steps=1, teacher=0.0).apply(loaded_of("modernbert"), context_for(tmp_path, teacher))


@pytest.mark.parametrize("kind", ["llama", "tied", "gpt2", "olmoe", "distilbert"])
def test_low_rank_updates_are_merged(kind: str, tmp_path: Path) -> None:
    teacher = loaded_of(kind)
    context = context_for(tmp_path, teacher)
    student = quantized(kind, context)
    before = divergence(teacher, student, context)
    outer = student.model.get_input_embeddings().weight.clone()
    Distil(steps=16, lr=1e-2, lora=8, teacher=1.0).apply(student, context)
    assert divergence(teacher, student, context) < 0.97 * before
    assert torch.equal(student.model.get_input_embeddings().weight, outer)  # only the layers are trained
    folder.save(student, tmp_path / "out")


def test_hidden_states_come_nearer(tmp_path: Path) -> None:
    teacher = loaded_of("llama")
    context = context_for(tmp_path, teacher)

    @torch.no_grad()
    def distance(student: Loaded) -> float:
        ids = torch.from_numpy(context.healing[0])[None]
        found = [item.model(input_ids=ids, output_hidden_states=True) for item in (student, teacher)]
        return float(objectives.hidden_cosine(*(item.hidden_states[-1][0] for item in found)))

    student = quantized("llama", context)
    before = distance(student)
    Distil(steps=16, lr=4e-3, teacher=0.5, hidden=20.0).apply(student, context)
    assert distance(student) < 0.9 * before


def test_hidden_states_of_another_width_are_mapped(tmp_path: Path) -> None:
    """The map is learned too: what is left after it falls further than it alone could bring it."""
    torch.manual_seed(0)
    wide = Loaded(LlamaForCausalLM(LlamaConfig(**GROUPED | {"hidden_size": 96})).eval(), make_tokenizer())
    context = context_for(tmp_path, wide)

    @torch.no_grad()
    def left(student: Loaded) -> float:
        """What the best linear map of the student's states leaves of the teacher's."""
        found = []
        for item in (student, wide):
            states = [item.model(input_ids=torch.from_numpy(row)[None], output_hidden_states=True).hidden_states[-1][0]
                      for row in context.healing]  # fmt: skip
            found.append(torch.nn.functional.normalize(torch.cat(states).double(), dim=-1))
        best = torch.linalg.lstsq(found[0], found[1]).solution
        return float((found[0] @ best - found[1]).square().sum())

    student = loaded_of("llama")
    before = left(student)
    Distil(steps=40, lr=1e-2, teacher=0.0, hidden=20.0).apply(student, context)
    assert left(student) < 0.9 * before
    assert "projection" not in " ".join(student.model.state_dict())


def test_a_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    teacher = loaded_of("gpt2")
    for number, seed in enumerate((1, 1, 2)):
        context = replace(context_for(tmp_path, teacher), seed=seed)
        student = Distil(steps=4, rows=2, lr=1e-2).apply(quantized("gpt2", context), context)
        folder.save(student, tmp_path / str(number))
    first, same, other = ((tmp_path / str(number) / "model.safetensors").read_bytes() for number in range(3))
    assert first == same
    assert first != other


def test_every_window_is_taken_once_an_epoch() -> None:
    plan = Plan([np.zeros(4, np.int64)] * 7, rows=3, steps=7, seed=3)
    taken = [index for step in range(7) for index in plan.picked(step)]
    assert [sorted(taken[low : low + 7]) for low in (0, 7, 14)] == [list(range(7))] * 3
    assert taken[:7] != taken[7:14]
    assert plan.used() == list(range(7))
    assert len(Plan([np.zeros(4, np.int64)] * 70, rows=3, steps=2, seed=3).used()) == 6


def test_what_cannot_be_healed_is_refused(tmp_path: Path) -> None:
    loaded = loaded_of("llama")
    with pytest.raises(UnsupportedError, match="needs healing text"):
        Distil().apply(loaded, replace(context_for(tmp_path, loaded), healing=[]))
    with pytest.raises(UnsupportedError, match="needs the original"):
        Distil().apply(loaded, context_for(tmp_path))
    with pytest.raises(ShrewError, match="lower its lr"), torch.no_grad():
        loaded.model.lm_head.weight.fill_(float("inf"))
        with torch.enable_grad():
            Distil(steps=2, teacher=0.0).apply(loaded, context_for(tmp_path))
