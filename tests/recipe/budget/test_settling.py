"""Measured savings drawn towards the common one: by their noise, and not where groups truly differ."""

from __future__ import annotations

import numpy as np
import pytest

from halfbyte.recipe.budget.settling import settle


def measured(
    truth: np.ndarray, noise: float, seed: int = 0
) -> tuple[dict[str, dict[str, float]], dict[str, float | None]]:
    """Groups with costs over two decades whose NF4-32 costs `truth` of NF4-64's, measured with this relative noise."""
    rng = np.random.default_rng(seed)
    coarse = 10 ** rng.uniform(-4, -2, len(truth))
    fine = coarse * (truth + noise * rng.standard_normal(len(truth)))
    costs = {
        f"g{i}": {"nf4-64": float(c), "nf4-32": float(f)} for i, (c, f) in enumerate(zip(coarse, fine, strict=True))
    }
    return costs, {f"g{i}": float(noise * c) for i, c in enumerate(coarse)}


def ratios(costs: object) -> np.ndarray:
    return np.array([c["nf4-32"] / c["nf4-64"] for c in costs.values()])  # type: ignore[attr-defined]


def test_pure_noise_is_all_given_the_common_value() -> None:
    found = settle(*measured(np.full(120, 0.85), 0.15))
    assert found.ratio == pytest.approx(0.85, abs=0.03)
    assert found.spread is not None
    assert found.spread < 0.06
    assert ratios(found.costs).std() < 0.04


def test_true_differences_measured_well_stand() -> None:
    truth = np.random.default_rng(1).uniform(0.5, 1.0, 120)
    costs, errors = measured(truth, 0.01)
    found = settle(costs, errors)
    assert found.spread == pytest.approx(truth.std(), rel=0.2)
    assert np.abs(ratios(found.costs) - ratios(costs)).max() < 0.01


def test_settled_ratios_are_nearer_the_truth_than_measured_ones() -> None:
    rng = np.random.default_rng(2)
    for seed in range(10):
        truth = 0.85 + 0.08 * rng.standard_normal(120)
        costs, errors = measured(truth, 0.15, seed)
        apart, settled = (np.square(ratios(c) - truth).mean() for c in (costs, settle(costs, errors).costs))
        assert settled < 0.5 * apart


def test_costs_of_coarse_blocks_are_left_alone_and_unknown_noise_settles_nothing() -> None:
    costs, errors = measured(np.full(20, 0.8), 0.1)
    assert [c["nf4-64"] for c in settle(costs, errors).costs.values()] == [c["nf4-64"] for c in costs.values()]
    unknown = settle(costs, dict.fromkeys(errors))
    assert (unknown.costs, unknown.ratio) == (costs, None)
    costs["g0"]["nf4-64"] = 0.0
    assert settle(costs, errors).costs["g0"] == costs["g0"]
