"""The knapsack against brute force, against a dense table, and on the shapes of a 31B."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from halfbyte.errors import PlanError
from halfbyte.recipe.budget import knapsack
from halfbyte.recipe.budget.knapsack import NAT, Choice, Option, solve

#: bytes of codes of Gemma 4 31B's fused groups, and how many layers have them
LAYERS = [
    ((8192 + 2 * 4096) * 5376, 50), (5376 * 8192, 50), ((16384 + 2048) * 5376, 10), (5376 * 16384, 10),
    (2 * 21504 * 5376, 60), (21504 * 5376, 60),
]  # fmt: skip


def drawn(rng: np.random.Generator, groups: int, largest: int = 40) -> list[list[Option]]:
    """Groups of 1 to 4 options in no order; now and then two are equal, or a larger one costs more."""
    return [
        [Option(int(rng.integers(1, largest)), int(rng.integers(0, 30))) for _ in range(rng.integers(1, 5))]
        for _ in range(groups)
    ]


def gemma(rng: np.random.Generator) -> list[list[Option]]:
    """240 groups of a 31B in NF4-64, NF4-32 and bf16; costs spread over two decades, texts of a few bytes' difference."""
    found = []
    for weights, layers in LAYERS:
        for _ in range(layers):
            cost = 10 ** rng.uniform(-5, -3) * NAT
            ratio = rng.uniform(0.6, 0.95)
            sizes = [int(weights * bits / 8) + int(rng.integers(0, 5)) for bits in (4.127, 4.252, 16)]
            found.append([Option(s, int(c)) for s, c in zip(sizes, (cost, cost * ratio, 0), strict=True)])
    return found


def brute_force(groups: list[list[Option]], capacity: int) -> int | None:
    costs = [sum(o.cost for o in chosen) for chosen in product(*groups) if sum(o.nbytes for o in chosen) <= capacity]
    return min(costs, default=None)


def dense(groups: list[list[Option]], capacity: int) -> int:
    """A table over every byte: the textbook's way."""
    best = np.zeros(capacity + 1)
    for options in groups:
        worth = np.full((len(options), capacity + 1), np.inf)
        for row, option in enumerate(options):
            worth[row, option.nbytes :] = best[: capacity + 1 - option.nbytes] + option.cost
        best = worth.min(axis=0)
    return int(best[capacity])


def assert_adds_up(found: Choice, groups: list[list[Option]], capacity: int) -> None:
    taken = [options[at] for options, at in zip(groups, found.chosen, strict=True)]
    assert (found.nbytes, found.cost) == (sum(o.nbytes for o in taken), sum(o.cost for o in taken))
    assert found.nbytes <= capacity


def test_it_is_exactly_what_brute_force_finds() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        groups = drawn(rng, int(rng.integers(1, 6)))
        capacity = int(rng.integers(1, 40 * len(groups)))
        found, best = solve(groups, capacity), brute_force(groups, capacity)
        assert (found.cost if found else None) == best, (groups, capacity)
        if found:
            assert_adds_up(found, groups, capacity)


def test_it_is_exactly_what_a_dense_table_finds() -> None:
    rng = np.random.default_rng(1)
    for _ in range(10):
        groups = [
            [
                Option(0, int(1000 * rng.random())),
                Option(int(rng.integers(1, 9)), int(600 * rng.random())),
                Option(90, 0),
            ]
            for _ in range(60)
        ]
        capacity = int(rng.integers(50, 3000))
        found = solve(groups, capacity)
        assert found is not None
        assert found.cost == dense(groups, capacity)
        assert_adds_up(found, groups, capacity)


def test_the_relaxation_bounds_the_answer_on_a_31bs_shapes_and_few_states_are_held() -> None:
    groups = gemma(np.random.default_rng(2))
    smallest, largest = (sum(options[at].nbytes for options in groups) for at in (0, 2))
    for share in (0.001, 0.02, 0.3):
        capacity = smallest + int(share * (largest - smallest))
        found = solve(groups, capacity)
        assert found is not None
        assert_adds_up(found, groups, capacity)
        assert found.states < 200_000
        # one group alone may be off the relaxation: its gap is less than the dearest step
        assert found.nbytes > capacity - max(o[2].nbytes - o[0].nbytes for o in groups)


def test_too_small_a_capacity_has_no_answer_and_a_large_one_the_cheapest() -> None:
    groups = drawn(np.random.default_rng(3), 5)
    assert solve(groups, sum(min(o.nbytes for o in g) for g in groups) - 1) is None
    found = solve(groups, 10**6)
    assert found is not None
    assert found.cost == sum(min(o.cost for o in g) for g in groups)


def test_among_equal_costs_the_smaller_option_is_taken() -> None:
    found = solve([[Option(9, 5), Option(3, 5), Option(4, 7)]], 100)
    assert found is not None
    assert found.chosen == (1,)


def test_too_many_partial_choices_are_an_error_and_not_all_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knapsack, "MOST_STATES", 2)
    groups = [[Option(0, 1000), Option(7 + k, 1000 - 7 - k)] for k in range(20)]
    with pytest.raises(PlanError, match="none better than another"):
        solve(groups, 103)
