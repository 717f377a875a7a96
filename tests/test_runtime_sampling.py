"""Sampling against its definitions, and guesses that change no distribution."""

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from transformers import LogitsProcessorList, generation

from shrew.errors import RequestError
from shrew.runtime import Request
from shrew.runtime.sampling import Sampler, draw_index, greedy, is_close, log_probabilities
from shrew.runtime.speculative import check_drawn

SIZE = 50
rows = arrays.arrays(np.float32, SIZE, elements=st.floats(-20, 20, width=32))


def sampler(**more: Any) -> Sampler:
    return Sampler(Request(**{"prompt": [1, 2, 3], "seed": 0, **more}), SIZE)


@settings(max_examples=60)
@given(rows, st.floats(0.1, 3), st.integers(0, 60), st.floats(0.01, 1), st.floats(0, 1))
def test_probabilities_are_those_of_transformers(
    logits: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    steps: list[Any] = [generation.TemperatureLogitsWarper(temperature)]
    steps += [generation.TopKLogitsWarper(min(top_k, SIZE))] if top_k else []
    steps += [generation.TopPLogitsWarper(top_p)] if top_p < 1 else []
    steps += [generation.MinPLogitsWarper(min_p)] if min_p else []
    expected = LogitsProcessorList(steps)(torch.zeros(1, 1, dtype=torch.long), torch.tensor(logits)[None])[0]
    expected = expected.double().softmax(0).numpy()
    found = sampler(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p).dense(logits)
    assert found.sum() == pytest.approx(1)
    kept, others = set(np.flatnonzero(found)), set(np.flatnonzero(expected))
    if kept == others:
        np.testing.assert_allclose(found, expected, atol=1e-5)
    else:  # rounding, or the order of equals, decides about the last one; never about another
        at_border = {float(logits[token]) for token in kept ^ others}
        assert max(at_border) - min(at_border) < 1e-4
        assert max(at_border) <= min((logits[token] for token in kept & others), default=math.inf) + 1e-4


@given(rows, st.floats(0.01, 0.999), st.floats(0.2, 2))
def test_top_p_keeps_the_fewest_that_weigh_enough(logits: np.ndarray, top_p: float, temperature: float) -> None:
    everything = sampler(temperature=temperature).dense(logits)
    kept = np.flatnonzero(sampler(temperature=temperature, top_p=top_p).dense(logits))
    assert everything[kept].sum() >= top_p - 1e-6
    assert everything[kept].sum() - everything[kept].min() < top_p + 1e-6
    left_out = np.setdiff1d(np.arange(SIZE), kept)
    assert not len(left_out) or everything[left_out].max() <= everything[kept].min() + 1e-12


@given(rows, st.floats(1.01, 3), st.floats(-2, 2), st.floats(-2, 2), st.lists(st.integers(0, SIZE - 1), max_size=8))
def test_penalties_by_definition(
    logits: np.ndarray, repetition: float, presence: float, frequency: float, said: list[int]
) -> None:
    found = sampler(repetition_penalty=repetition, presence_penalty=presence, frequency_penalty=frequency,
                    logit_bias={4: 2.5, 49: -math.inf})  # fmt: skip
    for token in said:
        found.note(token)
    expected, kept = logits.astype(np.float64), logits.copy()
    expected[[4, 49]] += [2.5, -math.inf]
    for token in {1, 2, 3, *said}:
        expected[token] = expected[token] / repetition if expected[token] > 0 else expected[token] * repetition
    for token, count in Counter(said).items():
        expected[token] -= presence + frequency * count
    np.testing.assert_allclose(found.shape(logits, 9), expected, rtol=1e-4, atol=1e-4)
    assert np.array_equal(logits, kept)


@given(rows, st.floats(0.2, 3), st.integers(0, 2**32))
def test_draws_are_reproducible_and_never_impossible(logits: np.ndarray, temperature: float, seed: int) -> None:
    more = {"temperature": temperature, "top_p": 0.9, "seed": seed}
    first, second = sampler(**more), sampler(**more)
    drawn = [first.pick(logits) for _ in range(5)]
    assert drawn == [second.pick(logits) for _ in range(5)]
    assert all(first.dense(logits)[token] > 0 for token in drawn)


@given(arrays.arrays(np.float64, 8, elements=st.floats(0, 1)), st.floats(0, 1, exclude_max=True))
def test_an_index_is_drawn_by_its_share(p: np.ndarray, number: float) -> None:
    assume(p.sum() > 1e-100)
    at = draw_index(p, number)
    assert p[at] > 0
    assert p[:at].sum() <= number * p.sum() * (1 + 1e-12) + 1e-300


def chi_square(counts: np.ndarray, p: np.ndarray) -> float:
    expected = counts.sum() * p[p > 0]
    return float(((counts[p > 0] - expected) ** 2 / expected).sum())


def test_draws_follow_the_probabilities() -> None:
    logits = np.random.default_rng(0).standard_normal(12).astype(np.float32)
    one = Sampler(Request(prompt=[1], temperature=0.8, seed=5), 12)
    counts = np.bincount([one.pick(logits) for _ in range(20_000)], minlength=12)
    assert chi_square(counts, one.dense(logits)) < 31.3  # 11 degrees of freedom, one in a thousand


def test_drawn_guesses_leave_the_distribution_as_it_is() -> None:
    """Both the token that is decided first and the one after it, over a vocabulary of five, guessed from others."""
    draw = np.random.default_rng(1)
    p1, q1 = draw.dirichlet(np.ones(5)), draw.dirichlet(np.ones(5))
    p2, q2 = draw.dirichlet(np.ones(5), 5), draw.dirichlet(np.ones(5), 5)
    q1[2] = 0  # the draft never says it
    q1 /= q1.sum()
    p1[4] = 0  # the model never says it
    p1 /= p1.sum()
    counts, right = np.zeros((5, 5)), 0
    for _ in range(60_000):
        first = draw_index(q1, draw.random())
        guesses = [first, draw_index(q2[first], draw.random())]
        token, stands = check_drawn(guesses, [q1, q2[first]], p1, 0, (draw.random(), draw.random()))
        right += stands
        if stands:
            after, _ = check_drawn(guesses, [q1, q2[first]], p2[token], 1, (draw.random(), draw.random()))
        else:
            after = draw_index(p2[token], draw.random())
        counts[token, after] += 1
    assert counts[4].sum() == 0
    expected = (p1[:, None] * p2).ravel()
    assert chi_square(counts.ravel(), expected) < 43.8  # 19 degrees of freedom, one in a thousand
    assert right / 60_000 == pytest.approx(np.minimum(p1, q1).sum(), abs=0.01)


# --- log-probabilities and edges -------------------------------------------------------------------------------------


@given(arrays.arrays(np.float32, (3, SIZE), elements=st.floats(-50, 50, width=32)), st.integers(0, SIZE))
def test_log_probabilities_by_definition(logits: np.ndarray, count: int) -> None:
    expected = torch.tensor(logits).double().log_softmax(1).numpy()
    for row, (token, found) in enumerate(zip([0, 7, 49], log_probabilities(logits, [0, 7, 49], count), strict=True)):
        assert found[0] == pytest.approx(expected[row, token], abs=1e-4)
        values = [value for _, value in found[1]]
        assert values == pytest.approx(-np.sort(-expected[row])[:count], abs=1e-4)
        assert all(value == pytest.approx(expected[row, id], abs=1e-4) for id, value in found[1])


def test_what_is_not_a_number_is_an_error() -> None:
    for bad in (np.full(SIZE, -np.inf), np.full(SIZE, np.nan), np.where(np.arange(SIZE) == 3, np.nan, 0.0),
                np.where(np.arange(SIZE) == 3, np.inf, 0.0)):  # fmt: skip
        row = bad.astype(np.float32)
        with pytest.raises(RequestError, match="no usable"):
            greedy(row)
        for more in ({}, {"top_p": 0.5}, {"top_k": 5, "min_p": 0.1}):
            with pytest.raises(RequestError, match="no usable"):
                sampler(**more).pick(row)


def test_ties() -> None:
    row = np.array([0, 1, 1, 0.5], np.float32)
    assert greedy(row) == 1
    assert is_close(row, 0)
    row[1] = 1.5
    assert is_close(row, 0.6)
    assert not is_close(row, 0.4)
    assert row.tolist() == [0, 1.5, 1, 0.5]
