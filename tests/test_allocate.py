"""The knapsack of bits: against trying everything, and against a bound that holds for every way to choose."""

import itertools
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shrew.search.allocate import allocate

sizes_and_damages = st.integers(1, 4).flatmap(
    lambda count: st.tuples(
        st.lists(st.lists(st.integers(1, 5000), min_size=3, max_size=3), min_size=count, max_size=count),
        st.lists(st.lists(st.floats(0, 1), min_size=3, max_size=3), min_size=count, max_size=count),
    )
)


def damage_of(picked: list[int], damages: list[dict[int, float]]) -> float:
    return sum(table[bits] for bits, table in zip(picked, damages, strict=True))


@settings(max_examples=150)
@given(sizes_and_damages, st.floats(0.2, 1.1))
def test_allocation_against_trying_everything(drawn: Any, share: float) -> None:
    sizes = [dict(zip((2, 3, 4), sorted(row), strict=True)) for row in drawn[0]]
    damages = [dict(zip((2, 3, 4), row, strict=True)) for row in drawn[1]]
    budget = round(share * sum(max(row.values()) for row in sizes))
    ways = [list(way) for way in itertools.product((2, 3, 4), repeat=len(sizes))]
    spent = {tuple(way): sum(size[bits] for size, bits in zip(sizes, way, strict=True)) for way in ways}
    picked = allocate(sizes, damages, budget)
    if picked is None:
        assert min(spent.values()) > budget
        return
    assert spent[tuple(picked)] <= budget
    # Sizes are rounded up to 1/4096 of the budget each, so it is at least as good as anything that fits in a bit less.
    roomy = [way for way in ways if spent[tuple(way)] <= budget - len(sizes) * max(budget / 4096, 1)]
    if roomy:
        assert damage_of(picked, damages) <= min(damage_of(way, damages) for way in roomy) + 1e-12


def test_allocation_with_nothing_to_spare() -> None:
    sizes, damages = [{2: 100, 4: 200}, {2: 50, 4: 100}], [{2: 1.0, 4: 0.1}, {2: 0.2, 4: 0.1}]
    assert allocate(sizes, damages, 149) is None
    assert allocate(sizes, damages, 150) == [2, 2]
    assert allocate(sizes, damages, 250) == [4, 2]  # the first group gains more
    assert allocate(sizes, damages, 10**12) == [4, 4]


@pytest.mark.parametrize("groups", [43, 225, 400])
def test_allocation_of_many_groups_is_near_the_best_there_is(groups: int) -> None:
    """Whatever a byte is said to cost, no choice within the budget does less damage than the cheapest one at that price
    less the price of the budget (Lagrange)."""
    draw = np.random.default_rng(groups)
    weights = draw.integers(500_000, 6_000_000, groups)
    matter = draw.lognormal(0, 1.5, groups) * weights / 1e6
    kinds = [bits / 2 for bits in range(4, 16)]
    sizes = [{bits: int(count * (bits + 0.25) / 8) for bits in kinds} for count in weights]
    damages = [{bits: float(share * 4.0**-bits) for bits in kinds} for share in matter]
    budget = int(weights.sum() * 3.4 / 8)
    begun = time.process_time()
    picked = allocate(sizes, damages, budget)
    seconds = time.process_time() - begun
    assert picked is not None and seconds < 5
    assert 0.99 * budget < sum(table[bits] for table, bits in zip(sizes, picked, strict=True)) <= budget
    size, damage = (np.array([list(table.values()) for table in tables]) for tables in (sizes, damages))
    prices = np.geomspace(1e-12, 1e-6, 400) * float(matter.sum())
    bound = max(float((damage + price * size).min(1).sum()) - price * budget for price in prices)
    assert bound < damage_of(picked, damages) < 1.01 * bound
