"""Error compensation against the textbook, descent against brute force, and Hessians that cannot be inverted."""

from __future__ import annotations

import pytest
import torch
from codec.fitting.layers import layer

from halfbyte.codec import Fit, fit_error, fit_weight, nf4_levels
from halfbyte.codec.fitting.compensation import compensate
from halfbyte.codec.fitting.descent import descend
from halfbyte.codec.fitting.hessian import Geometry, prepare
from halfbyte.codec.fitting.nesting import ScaleGrid
from halfbyte.errors import NonFiniteWeight


def textbook(weight: torch.Tensor, matrix: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Column by column in float64: round, then the exact least-squares update of the columns left. -> codes [rows, columns]

    weight, scales [rows, columns], matrix [columns, columns], the damped Hessian; its inverse over the columns left is made anew each time
    """
    left, levels = weight.double().clone(), nf4_levels().double()
    codes = torch.empty(weight.shape, dtype=torch.int64)
    for column in range(weight.shape[1]):
        scale = scales[:, column].double()[:, None]
        codes[:, column] = (left[:, column, None] - scale * levels).abs().argmin(dim=1)
        rounded = levels[codes[:, column]] * scale[:, 0]
        inverse = torch.linalg.inv(matrix.double()[column:, column:])
        error = (left[:, column] - rounded) / inverse[0, 0]
        left[:, column:] -= error[:, None] * inverse[0]
    return codes


def setting(fit: Fit, rows: int, columns: int) -> tuple[torch.Tensor, Geometry, ScaleGrid]:
    """A weight with its columns first and in the order of work, what to work with, and a grid that covers its scales."""
    weight, hessian = layer(rows, columns)
    geometry = prepare(hessian, fit)
    largest = weight.float().view(-1, fit.blocksize).abs().amax(dim=1)
    return weight.float().T[geometry.order], geometry, ScaleGrid.around(largest * 1.5, True)


def scales_of(scale_codes: torch.Tensor, geometry: Geometry, grid: ScaleGrid) -> torch.Tensor:
    """The scale of every weight, [columns, rows] in the order of work."""
    values = grid.values(scale_codes.T.reshape(-1).long(), slice(None)).view(scale_codes.shape[1], -1).T
    return values[torch.tensor(geometry.blocks)].repeat_interleave(len(geometry.order) // len(geometry.blocks), dim=0)


def loss_of(target: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    error = (target - nf4_levels()[codes.int()] * scales).double()
    return (error * (matrix.double() @ error)).sum(dim=0)


@pytest.mark.parametrize(("order", "blocksize"), [("natural", 64), ("activation", 64), ("activation", 32)])
def test_compensation_equals_the_textbook(order: str, blocksize: int) -> None:
    fit = Fit(order=order, blocksize=blocksize)  # type: ignore[arg-type]
    target, geometry, grid = setting(fit, 16, 192)
    codes, scale_codes = compensate(target, geometry, grid, fit)
    scales = scales_of(scale_codes, geometry, grid)
    expected = textbook(target.T, geometry.matrix, scales.T).T
    same_rows = (codes == expected).all(dim=0)
    assert int(same_rows.sum()) >= 15  # a weight on a midpoint in float32 may go the other way, and its row with it
    mine, theirs = loss_of(target, codes, scales, geometry.matrix), loss_of(target, expected, scales, geometry.matrix)
    assert float(mine.sum()) == pytest.approx(float(theirs.sum()), rel=1e-2)


def test_activation_order_keeps_blocks_together() -> None:
    _, hessian = layer(4, 192)
    order = prepare(hessian, Fit()).order.view(-1, 64)
    assert torch.equal(order.sort(dim=1).values, order.amin(dim=1, keepdim=True) + torch.arange(64))
    assert not torch.equal(order.reshape(-1), torch.arange(192))
    assert bool((hessian.diagonal()[order].diff(dim=1) <= 0).all())


def test_the_factor_is_that_of_the_inverse() -> None:
    geometry = prepare(layer(1, 128)[1], Fit())
    inverse = torch.linalg.inv(geometry.matrix.double())
    assert torch.allclose(geometry.inverse.T.double() @ geometry.inverse.double(), inverse, rtol=1e-3, atol=1e-5)
    assert torch.equal(geometry.inverse, geometry.inverse.triu())


def test_no_sweep_raises_the_loss_and_the_last_leaves_no_better_code() -> None:
    fit = Fit()
    target, geometry, grid = setting(fit, 12, 128)
    codes, scale_codes = compensate(target, geometry, grid, fit)
    losses = [loss_of(target, codes, scales_of(scale_codes, geometry, grid), geometry.matrix)]
    while descend(target, codes, scale_codes, geometry, grid) and len(losses) < 60:
        losses.append(loss_of(target, codes, scales_of(scale_codes, geometry, grid), geometry.matrix))
        assert bool((losses[-1] <= losses[-2] * (1 + 1e-5)).all())
    assert len(losses) < 60
    assert float(losses[-1].sum()) < 0.97 * float(losses[0].sum())
    scales = scales_of(scale_codes, geometry, grid)
    for column in range(0, 128, 9):
        for code in range(16):
            other = codes.clone()
            other[column] = code
            assert bool((loss_of(target, other, scales, geometry.matrix) >= losses[-1] * (1 - 1e-5)).all())


def test_a_singular_hessian_raises_the_damping_and_says_so() -> None:
    weight, _ = layer(8, 128)
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(1))
    fitted = fit_weight(weight, Fit(damping=0.0), hessian=x.T @ x)
    assert fitted.method == "gptq"
    assert fitted.damping is not None
    assert fitted.damping > 0
    assert "damping raised from 0 to" in fitted.notes[0]


def test_a_dead_input_is_rounded_and_disturbs_nothing() -> None:
    weight, hessian = layer(8, 128)
    hessian[5] = 0.0
    hessian[:, 5] = 0.0
    fitted = fit_weight(weight, Fit(), hessian=hessian)
    assert fitted.notes == ()
    assert fit_error(weight, fitted.nf4, hessian=hessian) < fit_error(
        weight, fit_weight(weight, Fit(method="rtn")).nf4, hessian=hessian
    )
    assert fit_error(weight, fitted.nf4) < 0.05


@pytest.mark.parametrize("hessian", [torch.zeros(128, 128), -torch.eye(128), torch.ones(128, 128) - 2 * torch.eye(128)])
def test_what_is_no_second_moment_still_gives_an_honest_fit(hessian: torch.Tensor) -> None:
    weight, _ = layer(8, 128)
    fitted = fit_weight(weight, Fit(), hessian=hessian)
    assert fitted.notes
    assert fit_error(weight, fitted.nf4) < 0.05


def test_a_hessian_that_is_not_finite_is_refused() -> None:
    weight, hessian = layer(8, 128)
    hessian[3, 4] = torch.nan
    with pytest.raises(NonFiniteWeight, match="not finite"):
        fit_weight(weight, Fit(), hessian=hessian)
