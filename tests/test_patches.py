"""Models of patches: their parts against definitions, what may depend on what, training, folders, costs."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import patched
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from patched import END, FEW, SHAPES, sentences
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from shrew import errors, folder, spec
from shrew.blocks.layers import Place
from shrew.blocks.model import ModelSpec, ShrewForCausalLM, build
from shrew.blocks.patches.boundaries import EntropySpec, StaticSpec
from shrew.blocks.patches.cross import Groups, naive_read, read
from shrew.blocks.patches.learned import Learned, LearnedSpec, smoothed
from shrew.blocks.patches.packing import ends, lay, members
from shrew.blocks.specs import BytesSpec, PatchesSpec
from shrew.blocks.stock import stock
from shrew.data import byte_tokenizer
from shrew.tasks import likelihood
from shrew.train import TrainSpec, optimizers

EVERY = list(SHAPES)
MODELS: dict[str, ShrewForCausalLM] = {}


def _model(name: str) -> ShrewForCausalLM:
    """Made once; not to be changed."""
    if name not in MODELS:
        MODELS[name] = patched.patched(name)
    return MODELS[name]


def _place(tokens: Tensor, owner: Tensor | None = None) -> Place:
    return Place(tokens, torch.arange(tokens.shape[1]).expand_as(tokens), owner)


def _owner(rows: int, length: int) -> Tensor:
    """Documents of lengths 1, 2, 3, ... in the first row, of others in the next ones."""
    return torch.stack([(torch.arange(length) * (2 + row)).sqrt().long() for row in range(rows)])


# --- the parts -------------------------------------------------------------------------------------------------------


def test_patches_read_their_bytes_by_the_definition() -> None:
    torch.manual_seed(0)
    patch = torch.tensor([2, 0, 0, 1, 2, 2, 2, 3])
    q = torch.randn(4, 2, 3, 5, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(8, 3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight = torch.randn(4, 2, 3, 5)
    found, wanted = read(q, k, v, Groups.of(patch, 4)), naive_read(q, k, v, patch)
    torch.testing.assert_close(found, wanted)
    mine, theirs = (torch.autograd.grad((y * weight).sum(), (q, k, v)) for y in (found, wanted))
    torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("longest", [0, 4])
def test_learned_patches_are_their_definition(packed: bool, longest: int) -> None:
    torch.manual_seed(0)
    block = Learned(LearnedSpec(mean=2.0, longest=longest), 6).double()
    nn.init.normal_(block.q_proj.weight)
    nn.init.normal_(block.k_proj.weight)
    x, owner = torch.randn(2, 40, 6, dtype=torch.float64), _owner(2, 40)
    with torch.no_grad():
        found, chance = block(x, _place(torch.zeros(2, 40, dtype=torch.long), owner if packed else None))
    for row in range(2):
        since = 0
        for t in range(40):
            p = 1.0
            if t and not (packed and owner[row, t] != owner[row, t - 1]):
                q, k = block.q_proj.weight @ x[row, t - 1], block.k_proj.weight @ x[row, t]
                p = ((1 - q @ k / q.norm() / k.norm()) / 2).item()
            since += 1
            closes = p > 0.5 or since == longest
            assert (bool(found[row, t]), float(chance[row, t])) == (closes, pytest.approx(p))
            since = 0 if closes else since
    share, mean = found.double().mean(), chance.mean()
    wanted = 0.03 * 2 / 1 * (1 * share * mean + (1 - share) * (1 - mean))
    torch.testing.assert_close(block.penalty(found, chance), wanted)


def test_smoothing_is_the_recurrence_and_stops_at_documents() -> None:
    torch.manual_seed(0)
    x, p, owner = torch.randn(2, 30, 3, dtype=torch.float64), torch.rand(2, 30, dtype=torch.float64), _owner(2, 30)
    found = smoothed(x, p, _place(torch.zeros(2, 30, dtype=torch.long), owner))
    for row in range(2):
        held = torch.zeros(3, dtype=torch.float64)
        for t in range(30):
            held = held * 0 if t and owner[row, t] != owner[row, t - 1] else held
            held = p[row, t] * x[row, t] + (1 - p[row, t]) * held
            torch.testing.assert_close(found[row, t], held)


@given(st.lists(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=7, max_size=7), min_size=1, max_size=3))
@settings(max_examples=30)
def test_bytes_are_members_of_the_patch_that_ends_behind_them(rows: list[list[tuple[bool, bool]]]) -> None:
    closed = torch.tensor([[item[0] for item in row] for row in rows])
    owner = torch.tensor([[item[1] for item in row] for row in rows]).long().cumsum(1)
    patch, inside = members(closed, owner)
    number = 0
    for row in range(len(rows)):
        open_bytes: list[int] = []
        for t in range(7):
            if t and owner[row, t] != owner[row, t - 1]:
                open_bytes = []
            open_bytes.append(t)
            if closed[row, t]:
                assert patch[row, open_bytes].tolist() == [number] * len(open_bytes)
                assert inside[row, open_bytes].all()
                number, open_bytes = number + 1, []
            else:
                later = closed[row, t:] & (owner[row, t:] == owner[row, t])
                assert bool(inside[row, t]) == bool(later.any())


@given(st.lists(st.integers(1, 9), min_size=1, max_size=8))
def test_patches_of_rows_stand_in_few_rows(counts: list[int]) -> None:
    documents = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    layout = lay(counts, documents)
    assert layout.length == max(counts)
    assert len(set(layout.at.tolist())) == sum(counts)
    assert layout.rows <= len(counts)
    assert layout.rows == 1 or sum(counts) > layout.rows * layout.length / 2  # two rows half empty would be one
    x = torch.rand(sum(counts), 2)
    laid = layout.laid(x)
    torch.testing.assert_close(layout.taken(laid), x)
    if layout.place.owner is not None:  # what is told apart is one text, side by side and in order
        for number in range(len(counts)):
            at = layout.at[documents == number]
            assert at.diff().tolist() == [1] * (counts[number] - 1)
            runs = layout.place.owner.flatten()[at]
            assert len(set(runs.tolist())) == 1
    counted = sum(counts) if layout.place.real is None else len(layout.place.real)
    assert counted == sum(counts)


@pytest.mark.parametrize("name", ["static", "space", "entropy", "rise"])
def test_packed_documents_are_cut_as_if_alone(name: str) -> None:
    model, tokens, owner = _model(name), sentences(2, 40), _owner(2, 40)
    together = model.model.ends(tokens, owner)
    for row in range(2):
        parts = tokens[row].split(owner[row].unique(return_counts=True)[1].tolist())
        alone = torch.cat([model.model.ends(part[None])[0] for part in parts])
        assert torch.equal(together[row], alone)


# --- what may depend on what -----------------------------------------------------------------------------------------

TEXTS = st.lists(st.binary(min_size=1, max_size=30) | st.text(min_size=1, max_size=12).map(str.encode), min_size=1,
                 max_size=4)  # fmt: skip


def _padded(texts: list[bytes]) -> tuple[Tensor, Tensor]:
    """Rows that begin with the end token, right-padded with it, and their mask."""
    length = max(len(text) for text in texts) + 1
    ids = torch.full((len(texts), length), END)
    mask = torch.zeros_like(ids)
    for row, text in enumerate(texts):
        ids[row, 1 : len(text) + 1] = torch.tensor(list(text))
        mask[row, : len(text) + 1] = 1
    return ids, mask


@pytest.mark.parametrize("name", EVERY)
@given(texts=TEXTS, cut=st.integers(0, 30), other=st.binary(min_size=31, max_size=31))
@FEW
@torch.no_grad()
def test_any_bytes_leak_nothing_and_need_no_company(name: str, texts: list[bytes], cut: int, other: bytes) -> None:
    model = _model(name)
    ids, mask = _padded(texts)
    together = model(ids, attention_mask=mask).logits
    assert together.isfinite().all()
    for row, text in enumerate(texts):
        alone = model(ids[row : row + 1, : len(text) + 1]).logits[0]
        found = together[row, : len(text) + 1]
        torch.testing.assert_close(found, alone, rtol=0, atol=5e-6)  # rotary angles are float32
    cut = min(cut, ids.shape[1] - 1)
    changed = ids.clone()
    changed[:, cut + 1 :] = torch.tensor(list(other))[: ids.shape[1] - cut - 1]
    after = model(changed).logits[:, : cut + 1]
    torch.testing.assert_close(after, model(ids).logits[:, : cut + 1], rtol=0, atol=5e-6)  # rotary angles are float32


@pytest.mark.parametrize("name", EVERY)
def test_no_gradient_comes_from_the_future(name: str) -> None:
    model, tokens = patched.patched(name).train(), sentences(1, 24)
    seen: list[Tensor] = []
    def kept(_: Any, __: Any, y: Tensor) -> Tensor:
        seen.append(y.detach().requires_grad_())
        return seen[-1]

    hook = model.model.embed_tokens.register_forward_hook(kept)
    logits = model(tokens).logits
    hook.remove()
    for t in (0, 1, 5, 13, 22):
        (grad,) = torch.autograd.grad(logits[:, t].square().sum(), seen[0], retain_graph=True)
        assert grad[:, : t + 1].abs().amax(-1).count_nonzero() > t / 2
        assert grad[:, t + 1 :].count_nonzero() == 0


@torch.no_grad()
@pytest.mark.parametrize("name", EVERY)
def test_bits_do_not_depend_on_how_they_are_measured(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = _model(name), [sentences(1, length, seed=length)[0].tolist() for length in (3, 60, 31, 90, 2)]
    plan = likelihood.spans(rows, 48, 36, 1000)

    def measured() -> list[Tensor]:
        found = {}
        for batch in likelihood.batches(plan, 257):
            found |= dict(zip(batch, likelihood.logits(model, rows, batch), strict=True))
        return [found[item] for item in plan]

    whole = measured()
    monkeypatch.setattr(likelihood, "TOKENS", 50)
    torch.testing.assert_close(measured(), whole, rtol=1e-4, atol=1e-5)  # they are given as float32
    few = likelihood.spans(rows, 48, 36, 7)  # the same contexts in more passes
    parts: dict[tuple[int, int], list[Tensor]] = {}
    for item in few:
        (found,) = likelihood.logits(model, rows, [item])
        parts.setdefault((item.row, item.start), []).append(found)
    assert len(few) > len(plan)
    again = [torch.cat(parts[item.row, item.start]) for item in plan]
    torch.testing.assert_close(again, whole, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", EVERY)
def test_a_single_byte_is_a_text(name: str) -> None:
    assert _model(name)(torch.tensor([[END]])).logits.isfinite().all()  # what an empty text comes to
    assert _model(name).model.ends(torch.tensor([[7], [200]])).tolist() == [[True], [True]]


def test_ends_know_the_byte_itself_and_the_first_is_always_one() -> None:
    bytes = torch.tensor([list(b"an ox sat")])
    rule = SHAPES["space"].front.rule
    assert ends(bytes, _place(bytes), rule)[0].int().tolist() == [[1, 0, 1, 0, 0, 1, 0, 0, 0]]
    assert ends(bytes, _place(bytes), StaticSpec(size=3))[0].int().tolist() == [[1, 0, 0, 1, 0, 0, 1, 0, 0]]


# --- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY)
def test_it_learns(name: str) -> None:
    torch.manual_seed(0)
    model = build(SHAPES[name]).train()
    frozen = {key: p.clone() for key, p in model.named_parameters() if key.startswith("model.entropy.")}
    tokens = sentences(2, 33)
    owner = torch.zeros(2, 32, dtype=torch.long)
    owner[:, 20:] = 1
    found = optimizers(model, TrainSpec(data=[], out="", lr=0.02))
    losses = []
    for _ in range(10):
        loss, added = model.losses(tokens[:, :-1], tokens[:, 1:], owner)
        assert (added is not None) == (name in ("learned", "free"))
        (loss if added is None else loss + added).backward()
        for optimizer in found:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert all(torch.equal(model.get_parameter(key), p) for key, p in frozen.items())
    assert bool(frozen) == (name in ("entropy", "rise"))


def test_learned_patches_come_to_the_wanted_size() -> None:
    torch.manual_seed(0)
    spec_ = replace(SHAPES["free"], front=replace(SHAPES["free"].front, rule=LearnedSpec(mean=3.0, weight=3.0)))
    model = build(spec_).train()
    found = optimizers(model, TrainSpec(data=[], out="", lr=0.02))
    for step in range(25):
        tokens = sentences(4, 41, seed=step)
        loss, added = model.losses(tokens[:, :-1], tokens[:, 1:])
        assert added is not None
        ((loss + added) / 160).backward()
        for optimizer in found:
            optimizer.step()
            optimizer.zero_grad()
    size = 1 / model.model.ends(sentences(4, 40, seed=99)).double().mean().item()
    assert 2 < size < 5


@pytest.mark.parametrize("name", EVERY)
def test_half_precision(name: str) -> None:
    model, tokens = build(SHAPES[name]).float(), sentences(2, 30)
    with torch.no_grad():
        wanted = model(tokens).logits
    with torch.autocast("cpu", torch.bfloat16):
        loss, added = model.train().losses(tokens[:, :-1], tokens[:, 1:])
    (loss if added is None else loss + added).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        half = model.eval().bfloat16()(tokens).logits
    assert half.dtype == torch.bfloat16
    assert half.isfinite().all()
    if name in ("static", "space", "first"):  # the others may cut elsewhere
        torch.testing.assert_close(half.float(), wanted, rtol=0.1, atol=0.02)


# --- folders and specs -----------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("name", EVERY)
def test_it_survives_its_folder(name: str, tmp_path: Path) -> None:
    model, tokens = patched.patched(name).float(), sentences(2, 21)
    assert stock(model) is model
    folder.save(folder.Loaded(model, byte_tokenizer(), dtype=torch.float32), tmp_path / "model")
    wanted = model(tokens).logits
    for again in (folder.load(tmp_path / "model").model,
                  AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)):  # fmt: skip
        assert again.spec == SHAPES[name]
        assert torch.equal(again(tokens).logits, wanted)
        assert not any(p.requires_grad for key, p in again.named_parameters() if key.startswith("model.entropy."))


@pytest.mark.parametrize("name", EVERY)
def test_a_spec_survives_its_text(name: str) -> None:
    values = spec.dump(SHAPES[name])
    assert spec.parse(ModelSpec, values, "again") == SHAPES[name]


def test_a_model_of_bytes_is_one_of_tokens() -> None:
    plain = replace(SHAPES["space"], front=None, ngrams=None)
    model = build(replace(plain, front=BytesSpec()))
    assert stock(model).config.model_type == "llama"
    assert [*model.state_dict()] == [*build(plain).state_dict()]


@pytest.mark.parametrize(
    ("front", "more", "words"),
    [
        ({"kind": "patch"}, {}, ["unknown kind 'patch'", "patches"]),
        ({"rule": {"kind": "spaces"}}, {}, ["unknown kind 'spaces'", "space"]),
        ({"entropy": {}}, {}, ["front", "rule space asks no model"]),
        ({"rule": {"kind": "entropy"}, "entropy": {"vocabulary": 300}}, {}, ["front", "same tokens"]),
        ({"rule": {"kind": "static", "size": 0}}, {}, ["size", ">= 1"]),
        ({"rule": {"kind": "space", "shortest": 4, "longest": 3}}, {}, ["front", "shortest is 4"]),
        ({"rule": {"kind": "learned", "longest": 3}}, {}, ["front", "longest is 3"]),
        ({"rule": {"kind": "learned", "mean": 1.0}}, {}, ["mean", "> 1"]),
        ({"width": 30}, {}, ["front", "30", "4 heads"]),
        ({"encoder": {"pattern": "X"}}, {}, ["pattern 'X'", "no mixer"]),
        ({"encoder": {"layers": 0}}, {}, ["layers", ">= 1"]),
        ({"withs": 30}, {}, ["'withs'", "did you mean 'width'"]),
        ({}, {"exits": {"every": 1}}, ["front", "no early exits"]),
        ({}, {"mixers": {"A": {"value_embeddings": True}}}, ["front", "value_embeddings"]),
        ({"hashes": {"rows": 5}}, {"ngrams": {}}, ["front", "take one"]),
    ],
)
def test_a_wrong_front_is_refused_in_words(front: dict[str, Any], more: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(errors.SpecError) as caught:
        spec.parse(ModelSpec, {"vocabulary": 257, "front": {"kind": "patches", **front}, **more}, "r.toml")
    assert all(word in str(caught.value) for word in words), str(caught.value)


# --- costs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY)
def test_counted_flops_are_the_measured_ones(name: str) -> None:
    model, tokens = patched.patched(name), sentences(1, 40, seed=3)
    total = int(model.model.ends(tokens).sum())
    front: PatchesSpec = model.spec.front
    model.model.front = replace(front, mean=40 / total)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # computes every pair
        model(tokens)
    crosses = 1 + len(model.model.cross) * (front.queries > 1)
    by_hand = 40 * 4 * front.queries * front.width * crosses  # scores and sums that are no matrix products
    assert counter.get_total_flops() + by_hand == pytest.approx(40 * model.flops(40), rel=0.04)


def test_the_mean_size_counts_and_tables_do_not() -> None:
    base = SHAPES["space"]
    sizes = [replace(base, front=replace(base.front, mean=mean)) for mean in (2.0, 4.0, 8.0)]
    two, four, eight = (build(item).flops(64) for item in sizes)
    assert two - four > four - eight > 0
    assert build(replace(base, ngrams=None)).flops(64) == build(base).flops(64)
    assert build(replace(base, front=replace(base.front, rule=EntropySpec(), entropy=patched.ORACLE))).flops(64) > eight
