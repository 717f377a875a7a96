"""What a teacher says and how it is taken: losses against their definitions, the cache, the twin without teacher."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file
from test_distil import context_for, loaded_of, of_our_blocks, quantized
from test_folder import WORDS
from torch import Tensor

from shrew import folder, objectives
from shrew.errors import ShrewError, SpecError, UnsupportedError
from shrew.folder import Loaded
from shrew.moves.distil import Distil, Plan, Run, teacher
from shrew.moves.distil.teacher import Question, decoded, encoded, teacher_predictions

LOSSES = ["forward", "reverse", "skewed-forward", "skewed-reverse"]


def drawn(*shape: int, seed: int = 0, scale: float = 2.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def same(mine: Tensor, slow: Tensor, of: Tensor, near: float) -> None:
    """Two ways to compute a number give the same value and the same gradient."""
    assert mine.item() == pytest.approx(slow.item(), rel=near, abs=near)
    (gradient,), (wanted,) = (torch.autograd.grad(item, of, retain_graph=True) for item in (mine, slow))
    assert wanted.abs().max() > near
    assert torch.allclose(gradient, wanted, atol=near)


# --- losses


def by_definition(q: Tensor, p: Tensor, loss: str, alpha: float) -> Tensor:
    """One outcome after the other, from probabilities."""
    total = torch.zeros((), dtype=q.dtype)
    for place in range(len(q)):
        for a, b in zip(q[place], p[place], strict=True):
            left, right = {"forward": (b, a), "reverse": (a, b), "skewed-forward": (b, alpha * b + (1 - alpha) * a),
                           "skewed-reverse": (a, alpha * a + (1 - alpha) * b)}[loss]  # fmt: skip
            total = total + left * torch.log(left / right)
    return total


@pytest.mark.parametrize("loss", LOSSES)
def test_divergences_are_their_definitions(loss: str) -> None:
    logits, other = drawn(3, 7).requires_grad_(), drawn(3, 7, seed=1)
    mine = objectives.divergence(logits.log_softmax(-1), other.log_softmax(-1), loss, 0.2)
    slow = by_definition(logits.softmax(-1), other.softmax(-1), loss, 0.2)
    same(mine, slow, logits, 1e-9)
    assert float(objectives.divergence(other.log_softmax(-1), other.log_softmax(-1), loss, 0.2)) == pytest.approx(0)


@given(st.sampled_from(LOSSES), st.integers(1, 6), st.integers(0, 2**20))
def test_lumped_outcomes_are_sums_of_probabilities(loss: str, kept: int, seed: int) -> None:
    """The rest is one outcome; what is not kept, whatever its id, is none."""
    logits, other = drawn(2, 6, seed=seed).requires_grad_(), drawn(2, 6, seed=seed + 1).softmax(-1)
    order = other.argsort(-1, descending=True)
    ids, flags = order[:, [*range(kept), 0]], torch.tensor([[True] * kept + [False]] * 2)
    mine = objectives.lumped(logits, ids, flags)
    q = logits.softmax(-1)
    few = [torch.cat([part.gather(-1, order[:, :kept]), part.gather(-1, order[:, kept:]).sum(-1, keepdim=True)], -1)
           for part in (q, other)]  # fmt: skip
    assert torch.allclose(torch.cat([mine[:, :kept], mine[:, -1:]], -1).exp().double(), few[0], atol=1e-6)
    assert bool((mine[:, kept] == objectives.LOWEST).all())
    if kept == 6:
        return  # nothing is left: the slow definition has no logarithm of it
    theirs = torch.cat([few[1][:, :kept].log(), torch.full((2, 1), objectives.LOWEST), few[1][:, -1:].log()], -1)
    found, slow = objectives.divergence(mine, theirs.float(), loss), by_definition(few[0], few[1], loss, 0.1)
    same(found, slow, logits, 1e-4)


@pytest.mark.parametrize("heads", [2, 3])
def test_attention_transfer_is_its_definition(heads: int) -> None:
    logits, other = drawn(2, 2, 4, 4).requires_grad_(), drawn(2, heads, 4, 4, seed=1)
    hidden = torch.ones(4, 4).triu(1).bool()
    q, p = (item.masked_fill(hidden, -torch.inf).softmax(-1) for item in (logits, other))
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    mine = objectives.attention_kl(q, p, mask)
    one, two = (q, p) if heads == 2 else (q.mean(1, keepdim=True), p.mean(1, keepdim=True))
    slow = torch.zeros(())
    for row in range(2):
        for place in range(4 if row == 0 else 2):
            for head in range(one.shape[1]):
                a, b = one[row, head, place, : place + 1], two[row, head, place, : place + 1]
                slow = slow + (b * (b / a).log()).sum() / one.shape[1]
    same(mine, slow, logits, 1e-5)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_each_loss_is_lowered_by_its_own_setting(loss: str, temperature: float, tmp_path: Path) -> None:
    original = loaded_of("llama")
    context = context_for(tmp_path, original)

    @torch.no_grad()
    def measured(student: Loaded) -> float:
        total = 0.0
        for row in context.healing:
            ids = torch.from_numpy(row)[None]
            q, p = ((item.model(input_ids=ids).logits / temperature).log_softmax(-1) for item in (student, original))
            total += float(objectives.divergence(q, p, loss, 0.1))
        return total

    student = quantized("llama", context)
    before = measured(student)
    move: dict[str, Any] = {"loss": loss, "temperature": temperature}
    Distil(steps=16, lr=4e-3, teacher=1.0, **move).apply(student, context)
    assert measured(student) < 0.94 * before


def test_the_loss_of_a_step_is_the_weighted_sum_of_its_parts(tmp_path: Path) -> None:
    original, student = loaded_of("llama"), quantized("llama", context_for(tmp_path))
    context = context_for(tmp_path, original)
    move = Distil(steps=1, rows=3, teacher=0.25, temperature=2.0, top_k=WORDS, mass=1.0, loss="reverse")
    run = Run(move, student, original, context)
    windows = [run.plan.windows[index] for index in run.plan.picked(0)]
    mine, theirs = (torch.cat([logits_of(item, row) for row in windows]) for item in (student, original))
    targets = torch.from_numpy(np.concatenate([row[1:] for row in windows]))
    taught = 4 * objectives.divergence((mine / 2).log_softmax(-1), (theirs / 2).log_softmax(-1), "reverse")
    wanted = 0.75 * objectives.next_token(mine, targets) + 0.25 * taught
    with torch.no_grad():
        assert float(run._loss(0)) == pytest.approx(float(wanted) / len(targets), rel=1e-3)


def test_attention_maps_come_nearer(tmp_path: Path) -> None:
    original = loaded_of("llama")
    context = context_for(tmp_path, original)

    @torch.no_grad()
    def distance(student: Loaded) -> float:
        ids = torch.from_numpy(context.healing[0])[None]
        maps = []
        for item in (student, original):
            item.model.set_attn_implementation("eager")
            maps.append(item.model(input_ids=ids, output_attentions=True).attentions[-1])
            item.model.set_attn_implementation("sdpa")
        return float(objectives.attention_kl(*maps, torch.ones_like(ids)))

    student = quantized("llama", context)
    before = distance(student)
    Distil(steps=16, lr=4e-3, teacher=0.0, attention=20.0).apply(student, context)
    assert student.model.config._attn_implementation == original.model.config._attn_implementation == "sdpa"
    assert distance(student) < 0.8 * before
    with pytest.raises(UnsupportedError, match="attention = 0"):
        Distil(steps=1, attention=1.0).apply(of_our_blocks(), context)


# --- the cache


@given(st.lists(st.floats(-20, 0), min_size=1, max_size=30))
def test_bytes_of_log_probabilities_are_near_enough(values: list[float]) -> None:
    back = decoded(encoded(torch.tensor(values, dtype=torch.float64)))
    for value, found in zip(values, back, strict=True):
        value = max(value, -teacher.REACH)
        assert abs(value - found) <= (teacher.REACH * -value) ** 0.5 / 255 + 5e-5


def logits_of(loaded: Loaded, window: np.ndarray) -> Tensor:
    with torch.no_grad():
        found: Tensor = loaded.model(input_ids=torch.from_numpy(window)[None]).logits[0, :-1].double()
    return found


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_what_is_stored_is_what_the_teacher_says(temperature: float, tmp_path: Path) -> None:
    original = loaded_of("llama")
    with torch.no_grad():
        original.model.lm_head.weight.mul_(2.5 * temperature)  # sure here, unsure there
    context = context_for(tmp_path, original)
    plan = Plan(context.healing, rows=2, steps=3, seed=0)
    stored = teacher_predictions(original, plan, Question(8, 0.9, temperature), context)
    picked = plan.picked(0)
    logs, ids, kept = stored.top(picked)
    wanted = torch.cat([logits_of(original, plan.windows[index]) for index in picked]) / temperature
    wanted = wanted.softmax(-1)
    assert len(logs) == len(wanted)
    assert torch.allclose(logs.exp().sum(-1), torch.ones(len(logs)), atol=1e-5)
    assert not kept.all()  # some positions reach the mass with less than 8
    for place, (row, some) in enumerate(zip(ids, kept, strict=True)):
        count = int(some.sum())
        best = wanted[place].topk(count)
        assert row[:count].tolist() == best.indices.tolist()
        assert count == 8 or best.values.sum() >= 0.9 - 1e-6
        assert best.values[:-1].sum() < 0.9  # and no more than it takes
        assert torch.allclose(logs[place, :count].double().exp(), best.values, rtol=0.06)
        assert float(logs[place, -1].exp()) == pytest.approx(1 - float(best.values.sum()), rel=0.07)


def test_all_of_the_vocabulary_gives_the_whole_divergence(tmp_path: Path) -> None:
    original, student = loaded_of("llama"), quantized("llama", context_for(tmp_path))
    context = context_for(tmp_path, original)
    plan = Plan(context.healing, rows=2, steps=3, seed=0)
    picked = plan.picked(0)
    mine = torch.cat([logits_of(student, plan.windows[index]) for index in picked])
    theirs = torch.cat([logits_of(original, plan.windows[index]) for index in picked])
    full = float(objectives.divergence(mine.log_softmax(-1), theirs.log_softmax(-1)))
    found = []
    for count in (WORDS, 8):
        logs, ids, kept = teacher_predictions(original, plan, Question(count, 1.0, 1.0), context).top(picked)
        found.append(float(objectives.divergence(objectives.lumped(mine, ids, kept), logs)))
    assert found[0] == pytest.approx(full, rel=0.01)
    assert 0 < found[1] < full  # what is lumped together says less


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The lengths of the windows that the teacher was asked about."""
    calls: list[int] = []
    ask = teacher._ask

    def counted(loaded: Loaded, window: np.ndarray, question: Question) -> Any:
        calls.append(len(window))
        return ask(loaded, window, question)

    monkeypatch.setattr(teacher, "_ask", counted)
    return calls


def test_the_teacher_runs_once_for_each_window(tmp_path: Path, asked: list[int]) -> None:
    original = loaded_of("llama")
    context = context_for(tmp_path, original)
    Distil(steps=1).apply(quantized("llama", context), context)
    assert len(asked) == 4
    Distil(steps=1, lr=1e-5).apply(quantized("llama", context, 4), replace(context, seed=0))
    assert len(asked) == 4
    Distil(steps=3).apply(quantized("llama", context), context)
    assert len(asked) == 6  # the two windows that the first step left out
    Distil(steps=3, top_k=5).apply(quantized("llama", context), context)
    assert len(asked) == 12  # another question


def test_an_interrupted_cache_goes_on(tmp_path: Path, asked: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    original = loaded_of("llama")
    context, question = context_for(tmp_path, original), Question(8, 0.99, 1.0)
    plan = Plan(context.healing, rows=2, steps=3, seed=0)
    monkeypatch.setattr(teacher, "SHARD", 2)
    ask = teacher._ask

    def stops(*arguments: Any) -> Any:
        if len(asked) == 3:
            raise KeyboardInterrupt
        return ask(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(teacher, "_ask", stops)
        with pytest.raises(KeyboardInterrupt):
            teacher_predictions(original, plan, question, context)
    again = teacher_predictions(original, plan, question, context)
    assert len(asked) == 3 + 4  # the first shard of two was kept
    whole = teacher_predictions(original, plan, question, context_for(tmp_path / "new", original))
    for mine, theirs in zip(again.top(plan.used()), whole.top(plan.used()), strict=True):
        assert torch.equal(mine, theirs)
    assert again.seconds > 0


def test_what_another_process_has_asked_meanwhile_is_read(
    tmp_path: Path, asked: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = loaded_of("llama")
    context, question = context_for(tmp_path, original), Question(8, 0.99, 1.0)
    plan = Plan(context.healing, rows=2, steps=3, seed=0)
    monkeypatch.setattr(teacher, "SHARD", 2)
    ask, other = teacher._ask, list[Any]()

    def slowly(*arguments: Any) -> Any:
        if not other:
            other.append(None)
            other[0] = teacher_predictions(original, plan, question, context)
        return ask(*arguments)

    monkeypatch.setattr(teacher, "_ask", slowly)
    mine = teacher_predictions(original, plan, question, context)
    assert len(asked) == 6 + 2  # all of theirs, and the shard that was begun
    for one, two in zip(mine.top(plan.used()), other[0].top(plan.used()), strict=True):
        assert torch.equal(one, two)


def test_size_is_bounded_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, said = loaded_of("llama"), []
    context = replace(context_for(tmp_path, original), say=said.append)
    plan, question = Plan(context.healing, rows=2, steps=3, seed=0), Question(8, 1.0, 1.0)
    teacher_predictions(original, plan, question, context)
    (file,) = (tmp_path / "cache" / "teacher").rglob("*.safetensors")
    bound = sum(len(window) - 1 for window in plan.windows) * (8 * 3 + 3)
    assert f"at most {bound / 1e6:.1f} MB" in said[0]
    parts = load_file(file)
    assert parts["ids"].dtype == np.uint16
    assert sum(parts[name].nbytes for name in ("counts", "logs", "ids", "rest")) <= bound
    monkeypatch.setattr(teacher, "REACH", 0.01)
    unsure = teacher_predictions(original, plan, Question(8, 0.99, 1.0), context).top(plan.used())
    assert unsure[2].shape[1] == 1  # where nothing is within reach, the likeliest is kept
    monkeypatch.setattr(teacher.shutil, "disk_usage", lambda place: type("Usage", (), {"free": 100}))
    with pytest.raises(ShrewError, match="less room"):
        teacher_predictions(original, plan, Question(9, 1.0, 1.0), context)


def test_two_teachers_do_not_share_predictions(tmp_path: Path) -> None:
    """The cache is for all models: neither two folders of one name nor two models without a folder may be mixed up."""
    first, second = loaded_of("llama"), loaded_of("llama")
    with torch.no_grad():
        second.model.lm_head.weight.mul_(2)
    plan = Plan(context_for(tmp_path).healing, rows=2, steps=2, seed=0)
    stored = []
    for item in (first, second):
        folder.save(item, tmp_path / "teacher")
        again = folder.load(tmp_path / "teacher")
        stored.append(teacher_predictions(again, plan, Question(8, 1.0, 1.0), context_for(tmp_path, again)))
    logs = [item.top(plan.picked(0))[0] for item in stored]
    assert not torch.equal(logs[0], logs[1])


# --- the twin


def test_the_twin_is_the_same_run_without_a_teacher(tmp_path: Path) -> None:
    original = loaded_of("llama")
    context = context_for(tmp_path, original, texts=30)
    taught = Distil(steps=6, rows=2, lr=2e-3, twin=True).apply(quantized("llama", context), context)
    (found,) = taught.lineage["twins"]
    kept = replace(context, healing=context.healing[:27])
    steps = found["twin_steps"]
    # An equal teacher that reads 12 windows once: a third of a step's work for each.
    assert steps == 8
    held = context.healing[27:]

    def loss(student: Loaded) -> float:
        total = sum(float(objectives.next_token(logits_of(student, row), torch.from_numpy(row[1:]))) for row in held)
        return total / sum(len(row) - 1 for row in held)

    again = Distil(steps=6, rows=2, lr=2e-3).apply(quantized("llama", context), kept)
    alone = Distil(steps=steps, rows=2, lr=2e-3, teacher=0.0).apply(quantized("llama", context), kept)
    assert found["loss"] == pytest.approx(loss(again), rel=1e-5)
    assert found["loss"] == pytest.approx(loss(taught), rel=1e-5)
    assert found["twin_loss"] == pytest.approx(loss(alone), rel=1e-5)
    assert found["difference"] == pytest.approx(found["loss"] - found["twin_loss"])
    assert found["low"] <= found["difference"] <= found["high"]
    assert found["windows"] == 3
    assert found["cpu_seconds"] > 0
    with pytest.raises(UnsupportedError, match="at least 3 windows"):
        Distil(twin=True).apply(loaded_of("llama"), replace(context, healing=context.healing[:2]))


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "twin": ({"twin": True, "teacher": 0.0}, "twin needs a teacher"),
    "on-policy": ({"on_policy": 0.5, "teacher": 0.0}, "on_policy needs a teacher"),
    "on-policy, hidden": ({"on_policy": 0.5, "teacher": 0.0, "hidden": 1.0}, "on_policy needs a teacher"),
    "teacher model": ({"teacher_model": "starter", "teacher": 0.0}, "teacher_model needs a teacher"),
}


@pytest.mark.parametrize("name", BAD)
def test_settings_that_do_not_go_together(name: str, tmp_path: Path) -> None:
    more, words = BAD[name]
    original = loaded_of("llama")
    with pytest.raises(SpecError, match=words):
        Distil(**more).apply(quantized("llama", context_for(tmp_path)), context_for(tmp_path, original))


def test_classifiers_write_nothing(tmp_path: Path) -> None:
    original = loaded_of("modernbert")
    context = context_for(tmp_path, original)
    for more in ({"on_policy": 0.5}, {"rationales": "r.jsonl", "teacher": 0.0}):
        with pytest.raises(UnsupportedError, match="writes no text"):
            Distil(**more).apply(loaded_of("modernbert"), context)  # type: ignore[arg-type]
    with pytest.raises(UnsupportedError, match="cannot teach each other"):
        Distil().apply(loaded_of("llama"), context)
