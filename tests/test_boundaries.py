"""Patches start where the slow definition says, whatever the bytes, the cuts and the other rows of a batch."""

import dataclasses
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shrew.blocks.patches.boundaries import (
    EntropySpec,
    Open,
    SpaceSpec,
    StaticSpec,
    advance,
    boundaries,
    fit_threshold,
    mean_size,
    next_starts,
)  # fmt: skip
from shrew.errors import SpecError
from shrew.spec import dump, parse

BEGIN = 256


def naive(text: list[int], spec: Any, entropy: list[float]) -> list[bool]:
    """The definition, a byte at a time: it decides on t before it looks at text[t]."""
    starts: list[bool] = []
    patch: list[int] = []
    for t in range(len(text)):
        starts.append(t < 2 or not 0 <= text[t - 1] <= 255 or _ends(patch, entropy[: t + 1], starts, spec))
        patch = [text[t]] if starts[-1] else [*patch, text[t]]
    return starts


def _ends(patch: list[int], entropy: list[float], starts: list[bool], spec: Any) -> bool:
    """Whether the patch ends behind its last byte; `entropy` reaches to the byte that comes next."""
    if spec.kind == "static":
        return len(patch) == spec.size
    if len(patch) == spec.longest:
        return True
    if len(patch) < spec.shortest:
        return False
    if spec.kind == "space":
        return _spacelike(patch[-1]) and not all(map(_spacelike, patch))
    high, rises = entropy[-1] > spec.threshold, entropy[-1] - entropy[-2] > spec.rise
    line = spec.reset and patch[-1] == ord("\n")
    if spec.rule == "combined":
        return ((high and rises) or line) and not starts[-1]
    return line or (high if spec.rule == "global" else rises)


def _spacelike(byte: int) -> bool:
    return not (chr(byte).isascii() and chr(byte).isalnum()) and not 0x80 <= byte <= 0xBF


LIMITS = st.tuples(st.integers(1, 4), st.integers(0, 6)).filter(lambda pair: not 0 < pair[1] < pair[0])
SPECS = st.one_of(
    st.integers(1, 6).map(lambda size: StaticSpec(size=size)),
    LIMITS.map(lambda pair: SpaceSpec(shortest=pair[0], longest=pair[1])),
    st.builds(
        lambda pair, rule, threshold, rise, reset: EntropySpec(
            rule=rule, threshold=threshold, rise=rise, reset=reset, shortest=pair[0], longest=pair[1]
        ),
        LIMITS, st.sampled_from(["global", "monotonic", "combined"]),
        st.sampled_from([0.5, 1.0, 2.0]), st.sampled_from([-0.5, 0.0, 0.5]), st.booleans(),
    ),
)  # fmt: skip
BYTE = st.one_of(st.sampled_from([*b"ab  \n\n.", 0xC3, 0xA9, 0xFF, 0, BEGIN]), st.integers(0, 255))
ROW = st.lists(st.tuples(BYTE, st.sampled_from([0.0, 0.5, 0.75, 1.0, 1.5, 2.0, 2.5, 5.5])), max_size=24)
ROWS = st.lists(ROW, min_size=1, max_size=4)


def batch(rows: list[list[tuple[int, float]]], fill: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Bytes, lengths and entropies of rows, with `fill` behind the shorter ones."""
    width = max(map(len, rows))
    text = [[byte for byte, _ in row] + [fill] * (width - len(row)) for row in rows]
    entropy = [[value for _, value in row] + [float(fill)] * (width - len(row)) for row in rows]
    lengths = torch.tensor([len(row) for row in rows])
    return torch.tensor(text).view(len(rows), width).long(), lengths, torch.tensor(entropy).view(len(rows), width)


@settings(max_examples=200)
@given(ROWS, SPECS)
def test_patches_start_where_the_definition_says(rows: Any, spec: Any) -> None:
    text, lengths, entropies = batch(rows)
    found = boundaries(text, lengths, spec, entropies)
    assert found.dtype == torch.bool
    assert found.shape == text.shape
    for row, starts in zip(rows, found.tolist(), strict=True):
        assert starts[: len(row)] == naive([byte for byte, _ in row], spec, [value for _, value in row])
        assert not any(starts[len(row) :])


@given(ROWS, SPECS)
def test_rows_do_not_depend_on_each_other_or_on_what_fills_them(rows: Any, spec: Any) -> None:
    text, lengths, entropies = batch(rows, fill=7)
    together = boundaries(text, lengths, spec, entropies)
    for number, row in enumerate(rows):
        alone, length, own = batch([row])
        assert together[number, : len(row)].tolist() == boundaries(alone, length, spec, own)[0].tolist()


@given(ROWS, SPECS, st.lists(st.integers(0, 24), max_size=4), st.data())
def test_any_cut_gives_the_same(rows: Any, spec: Any, cuts: list[int], data: Any) -> None:
    text, lengths, entropies = batch(rows)
    whole, state, parts = boundaries(text, lengths, spec, entropies), Open.new(len(rows)), []
    places = sorted({0, text.shape[1], *(cut for cut in cuts if cut < text.shape[1])})
    for low, high in pairwise(places):
        left = (lengths - low).clamp(0, high - low)
        asked = next_starts(state, spec, entropies[:, low])  # before the byte is known
        assert (asked & (left > 0)).tolist() == whole[:, low].tolist()
        starts, state = advance(text[:, low:high], left, spec, entropies[:, low:high], state)
        parts.append(starts)
    assert torch.equal(torch.cat([*parts, whole[:, :0]], 1), whole)
    assert state.seen.tolist() == lengths.tolist()
    turned = torch.tensor(data.draw(st.permutations(range(len(rows)))))
    high = torch.full((len(rows),), 9.0)
    assert next_starts(state.rows(turned), spec, high).tolist() == next_starts(state, spec, high)[turned].tolist()


@given(ROW.filter(len), SPECS, st.data())
def test_a_byte_says_nothing_about_its_own_start_or_earlier_ones(row: Any, spec: Any, data: Any) -> None:
    text, lengths, entropies = batch([row])
    at = data.draw(st.integers(0, len(row) - 1))
    changed, later = text.clone(), entropies.clone()
    changed[:, at:] = torch.tensor(data.draw(st.lists(BYTE, min_size=len(row) - at, max_size=len(row) - at)))
    later[:, at + 1 :] += 1.25  # the entropy of byte `at` depends on the bytes before it
    before, after = (boundaries(*pair) for pair in ((text, lengths, spec, entropies), (changed, lengths, spec, later)))
    assert before[:, : at + 1].tolist() == after[:, : at + 1].tolist()


@pytest.mark.parametrize("spec", [StaticSpec(size=4), SpaceSpec(), EntropySpec(threshold=9.0)], ids=lambda s: s.kind)
def test_the_first_patch_is_one_byte_long(spec: Any) -> None:
    starts = boundaries(torch.full((1, 9), ord("a")), torch.tensor([9]), spec, torch.zeros(1, 9))
    assert starts[0, :3].tolist() == [True, True, False]


def split(text: bytes, spec: Any, entropies: Tensor | None = None) -> list[bytes]:
    """The patches of one text."""
    starts = boundaries(torch.tensor([list(text)]), torch.tensor([len(text)]), spec, entropies)[0].tolist()
    places = [at for at, start in enumerate(starts) if start] + [len(text)]
    return [text[low:high] for low, high in pairwise(places)]


def test_words_keep_the_space_behind_them() -> None:
    assert split(b"The cat,  sat on\n\n  12 mats.", SpaceSpec()) == [
        b"T", b"he ", b"cat,", b"  sat ", b"on\n", b"\n  12 ", b"mats."
    ]  # fmt: skip
    assert split("aé你".encode(), SpaceSpec()) == [b"a", b"\xc3\xa9\xe4", b"\xbd\xa0"]


def test_limits_hold_and_special_tokens_end_a_patch() -> None:
    assert split(b"abcdefghij klm", SpaceSpec(shortest=3, longest=5)) == [b"a", b"bcdef", b"ghij ", b"klm"]
    text = torch.tensor([[BEGIN, 97, 98, 99, BEGIN, 97, 98]])
    starts = boundaries(text, torch.tensor([7]), StaticSpec(size=5))
    assert starts.int().tolist() == [[1, 1, 0, 0, 0, 1, 0]]
    with pytest.raises(SpecError, match="shortest is 4 bytes and longest 2"):
        boundaries(text, torch.tensor([7]), SpaceSpec(shortest=4, longest=2))
    with pytest.raises(SpecError, match="no entropies given"):
        boundaries(text, torch.tensor([7]), EntropySpec())


def test_nothing_in_nothing_out() -> None:
    for shape in ((0, 5), (2, 0), (0, 0)):
        lengths = torch.zeros(shape[0], dtype=torch.long)
        assert boundaries(torch.zeros(shape).long(), lengths, SpaceSpec()).shape == shape


def test_a_spec_goes_through_toml_and_back() -> None:
    spec = EntropySpec(rule="combined", threshold=0.7, rise=0.1, reset=True, shortest=2, longest=9)
    assert parse(EntropySpec, dump(spec), "test") == spec


@settings(max_examples=60)
@given(ROWS.filter(any), SPECS.filter(lambda spec: spec.kind == "entropy"), st.floats(1, 12))
def test_no_threshold_comes_nearer_to_a_mean_size(rows: Any, spec: EntropySpec, mean: float) -> None:
    text, lengths, entropies = batch(rows)
    shortest = max(spec.shortest, 2) if spec.rule == "combined" else spec.shortest
    if mean < shortest or 0 < spec.longest < mean:
        with pytest.raises(SpecError, match="the limits allow"):
            fit_threshold(text, lengths, spec, entropies, mean)
        return
    fitted = fit_threshold(text, lengths, spec, entropies, mean)
    name = "rise" if spec.rule == "monotonic" else "threshold"
    off = abs(mean_size(boundaries(text, lengths, fitted, entropies), lengths) - mean)
    for value in [step / 4 - 6.125 for step in range(50)]:  # between all differences that there can be
        other = dataclasses.replace(spec, **{name: value})
        assert off <= abs(mean_size(boundaries(text, lengths, other, entropies), lengths) - mean) + 1e-12
    assert dataclasses.replace(fitted, **{name: getattr(spec, name)}) == spec


def test_neighbouring_values_are_told_apart() -> None:
    low = torch.tensor(1.0, dtype=torch.float64)
    high = torch.nextafter(low, low + 1)
    entropies = torch.stack([low, low, high, low, high, high, low, low])[None]
    text, lengths = torch.zeros(1, 8).long(), torch.tensor([8])
    fitted = fit_threshold(text, lengths, EntropySpec(), entropies, 8 / 5)
    assert boundaries(text, lengths, fitted, entropies).int().tolist() == [[1, 1, 1, 0, 1, 1, 0, 0]]
