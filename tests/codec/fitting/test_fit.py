"""fit_weight as a whole: what each method promises, and what loaders make of it."""

from __future__ import annotations

import pytest
import torch
from codec.fitting.layers import layer
from codec.weights import oracle, same

from halfbyte import codec
from halfbyte.codec import Fit, Moments, NF4Tensor, fit_error, fit_weight
from halfbyte.errors import NonFiniteWeight, ShapeMismatch, UsageError


def equal(left: NF4Tensor, right: NF4Tensor) -> bool:
    mine, theirs = left.scales, right.scales
    return (
        same(left.packed, right.packed)
        and same(mine.absmax, theirs.absmax)
        and same(mine.nested_absmax, theirs.nested_absmax)
        and same(mine.nested_quant_map, theirs.nested_quant_map)
        and mine.nested_offset == theirs.nested_offset
    )


def by_bitsandbytes(nf4: NF4Tensor) -> torch.Tensor:
    """What bitsandbytes makes of the arrays of a file."""
    functional, nested = oracle(), nf4.scales
    second = functional.QuantState(
        absmax=nested.nested_absmax, blocksize=256, code=nested.nested_quant_map, dtype=torch.float32
    )
    state = functional.QuantState(
        absmax=nested.absmax, shape=torch.Size([nf4.n]), code=codec.nf4_levels(), blocksize=nf4.blocksize,
        quant_type="nf4", dtype=torch.bfloat16, offset=torch.tensor(nested.nested_offset), state2=second,
    )  # fmt: skip
    return functional.dequantize_4bit(nf4.packed.view(-1, 1), state).view(-1)


@pytest.mark.parametrize("blocksize", [64, 32])
def test_rtn_is_the_codecs_own_rounding_bit_for_bit(blocksize: int) -> None:
    weight, hessian = layer(40, 96)
    fitted = fit_weight(weight, Fit(method="rtn", blocksize=blocksize), hessian=hessian)
    assert equal(fitted.nf4, codec.quantize(weight.view(-1), blocksize))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("rows", "columns"), [(64, 128), (33, 70), (3, 5)])
def test_scale_is_never_worse_than_rtn_under_its_own_weighting(rows: int, columns: int, seed: int) -> None:
    weight, hessian = layer(rows, columns, seed)
    squares = hessian.diagonal()
    for given in (None, squares):
        fitted = fit_weight(weight, Fit(method="scale"), mean_squares=given)
        nearest = fit_weight(weight, Fit(method="rtn"))
        assert fit_error(weight, fitted.nf4, mean_squares=given) <= fit_error(weight, nearest.nf4, mean_squares=given)


@pytest.mark.parametrize("blocksize", [64, 32])
def test_each_method_beats_the_one_before_it_on_what_calibration_saw(blocksize: int) -> None:
    weight, hessian = layer(96, 256)
    errors = [
        fit_error(weight, fit_weight(weight, fit, hessian=hessian).nf4, hessian=hessian)
        for fit in (
            Fit(method="rtn", blocksize=blocksize),
            Fit(method="scale", blocksize=blocksize),
            Fit(sweeps=0, blocksize=blocksize),
            Fit(blocksize=blocksize),
        )
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.5 * errors[0]


@pytest.mark.parametrize("method", ["scale", "gptq"])
def test_the_same_inputs_give_the_same_bytes(method: str) -> None:
    weight, hessian = layer(32, 128)
    before = hessian.clone()
    fit = Fit(method=method)  # type: ignore[arg-type]
    assert equal(fit_weight(weight, fit, hessian=hessian).nf4, fit_weight(weight, fit, hessian=hessian).nf4)
    assert same(hessian, before)


@pytest.mark.parametrize("method", ["scale", "gptq"])
@pytest.mark.parametrize("blocksize", [64, 32])
def test_bitsandbytes_reads_negative_scales_as_we_do(method: str, blocksize: int) -> None:
    weight, hessian = layer(64, 256)
    nf4 = fit_weight(weight, Fit(method=method, blocksize=blocksize), hessian=hessian).nf4  # type: ignore[arg-type]
    assert 0.2 < float((codec.unnest_absmax(nf4.scales) < 0).float().mean()) < 0.8
    assert torch.equal(by_bitsandbytes(nf4), codec.dequantize(nf4))


@pytest.mark.parametrize("method", ["scale", "gptq"])
def test_unsigned_scales_stay_positive(method: str) -> None:
    weight, hessian = layer(64, 128)
    nf4 = fit_weight(weight, Fit(method=method, signed=False), hessian=hessian).nf4  # type: ignore[arg-type]
    assert bool((codec.unnest_absmax(nf4.scales) > 0).all())


def test_gptq_falls_back_to_scale_where_blocks_cross_rows_and_says_so() -> None:
    weight, hessian = layer(16, 96)
    fitted = fit_weight(weight, Fit(), hessian=hessian)
    assert fitted.method == "scale"
    assert "no multiple of 64" in fitted.notes[0]
    assert equal(fitted.nf4, fit_weight(weight, Fit(method="scale"), mean_squares=hessian.diagonal()).nf4)


def test_a_weight_of_zeros_stays_zero() -> None:
    _, hessian = layer(8, 128)
    for fit in (Fit(method="scale"), Fit()):
        nf4 = fit_weight(torch.zeros(8, 128).bfloat16(), fit, hessian=hessian).nf4
        assert not codec.dequantize(nf4).any()


def test_fit_error_is_the_mean_square_of_the_outputs_error() -> None:
    weight, _ = layer(16, 64)
    x = torch.randn(100, 64, generator=torch.Generator().manual_seed(2))
    moments = Moments(64)
    for part in x.split(30):
        moments.add(part.view(-1, 2, 64) if len(part) % 2 == 0 else part)
    nf4 = codec.quantize(weight.view(-1))
    restored = codec.dequantize(nf4, torch.float32).view(16, 64)
    measured = (x @ (weight.float() - restored).T).square().sum() / (x @ weight.float().T).square().sum()
    assert fit_error(weight, nf4, hessian=moments.hessian) == pytest.approx(float(measured), rel=1e-4)
    assert torch.allclose(moments.mean_squares, x.square().mean(dim=0), rtol=1e-5)
    diagonal = Moments(64, full=False)
    diagonal.add(x)
    assert diagonal.hessian is None
    assert torch.allclose(diagonal.mean_squares, moments.mean_squares, rtol=1e-5)


@pytest.mark.parametrize(
    "wrong",
    [
        {"method": "awq"}, {"blocksize": 128}, {"order": "random"}, {"candidates": 0},
        {"damping": -0.1}, {"damping": float("nan")}, {"refit": -1}, {"sweeps": 101},
    ],
)  # fmt: skip
def test_a_setting_that_cannot_be_is_refused_by_name(wrong: dict[str, object]) -> None:
    with pytest.raises(UsageError) as refused:
        Fit(**wrong)  # type: ignore[arg-type]
    assert refused.value.where == next(iter(wrong))


def test_inputs_that_do_not_fit_are_refused() -> None:
    weight, hessian = layer(8, 64)
    with pytest.raises(UsageError, match="without a Hessian"):
        fit_weight(weight, Fit())
    with pytest.raises(ShapeMismatch, match="64, 64"):
        fit_weight(weight, Fit(), hessian=hessian[:32, :32])
    with pytest.raises(ShapeMismatch, match="matrix"):
        fit_weight(weight.view(-1), Fit(method="rtn"))
    with pytest.raises(NonFiniteWeight):
        fit_weight(torch.full((8, 64), torch.inf), Fit(method="rtn"))
    with pytest.raises(NonFiniteWeight):
        Moments(64).add(torch.full((1, 64), torch.nan))
    with pytest.raises(ShapeMismatch):
        Moments(64).add(torch.zeros(1, 63))
    with pytest.raises(ShapeMismatch):
        fit_error(weight, codec.quantize(torch.zeros(64)))
