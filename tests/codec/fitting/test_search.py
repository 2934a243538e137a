"""The scale search against brute force, and its machine code against plain torch."""

from __future__ import annotations

import pytest
import torch

from halfbyte.codec import nf4_levels
from halfbyte.codec.fitting.search import factors, nearest_codes, search_plainly, search_scales


def loss(panel: torch.Tensor, importance: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Weighted squared error of each block, codes nearest, float64 [n]."""
    levels = nf4_levels().double()
    distance = (panel.double()[..., None] - scales.double()[:, None] * levels).abs().amin(dim=-1)
    return (distance.square() * importance).sum(dim=0)


def search(panel: torch.Tensor, importance: torch.Tensor | None, signed: bool = True) -> torch.Tensor:
    return search_scales(panel, importance, signed=signed, candidates=16, refit=2)


@pytest.mark.parametrize("size", [32, 64])
def test_the_search_is_within_a_percent_of_brute_force_over_2000_scales(size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    panel = torch.randn(size, 20, generator=generator)
    importance = torch.rand(size, 1, generator=generator)
    largest = panel.abs().amax(dim=0)
    grid = torch.linspace(-2, 2, 2001)
    best = torch.stack([loss(panel, importance, largest * factor) for factor in grid]).amin(dim=0)
    found = loss(panel, importance, search(panel, importance[:, 0]))
    assert bool((found >= best * 0.98).all())
    assert float(found.sum()) <= 1.01 * float(best.sum())


def test_a_block_upside_down_gets_the_scale_negated() -> None:
    levels = nf4_levels().repeat(4)[:, None]
    panel = torch.cat([0.3 * levels, -0.3 * levels], dim=1)
    scales = search(panel, None)
    assert torch.allclose(scales, torch.tensor([0.3, -0.3]))
    assert bool((search(panel, None, signed=False) > 0).all())


def test_importance_moves_the_scale_to_where_it_counts() -> None:
    panel = torch.randn(64, 30, generator=torch.Generator().manual_seed(3))
    importance = torch.ones(64, 30)
    importance[:8] = 1000.0
    weighted, plain = search(panel, importance), search(panel, None)
    assert float(loss(panel, importance, weighted).sum()) < 0.7 * float(loss(panel, importance, plain).sum())


def test_machine_code_and_plain_torch_find_equally_good_scales() -> None:
    generator = torch.Generator().manual_seed(5)
    panel = torch.randn(64, 1003, generator=generator)  # not a multiple of the lanes
    panel[:, 7] = 0.0
    importance = torch.rand(64, 1003, generator=generator)
    compiled = search(panel, importance)
    plain = search_plainly(panel, importance, [1.0, *factors(True, 16)], 2)
    ratio = loss(panel, importance, compiled).sum() / loss(panel, importance, plain).sum()
    assert abs(float(ratio) - 1) < 1e-6
    assert float(((compiled - plain).abs() < 1e-5 * plain.abs()).float().mean()) > 0.98
    assert compiled[7] == plain[7] == 0


def test_codes_are_nearest_also_under_a_negative_scale() -> None:
    values, scales = torch.randn(50), torch.where(torch.arange(50) % 2 == 0, 0.7, -1.3)
    distance = (values[:, None] - scales[:, None] * nf4_levels()).abs()
    assert torch.equal(nearest_codes(values, scales), distance.argmin(dim=1))


def test_a_scale_of_zero_takes_the_code_of_zero() -> None:
    assert nearest_codes(torch.tensor([1.0, -1.0]), torch.zeros(2)).tolist() == [7, 7]
