"""Mistakes end in an error that names the value, the argument and the way out."""

from __future__ import annotations

import pytest
import torch
from codec.weights import DTYPES

from halfbyte import codec
from halfbyte.errors import NonFiniteWeight, ShapeMismatch, UsageError


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("at", [0, 70, 129])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_non_finite_weight_is_named_by_position(bad, at, dtype):
    weight = torch.ones(130, dtype=dtype)
    weight[at] = bad
    with pytest.raises(NonFiniteWeight, match=rf"1 of 130 values are not finite; the first is {bad} at {at}"):
        codec.quantize_blocks(weight)


def test_largest_finite_weight_is_accepted():
    for dtype in DTYPES:
        weight = torch.full((64,), torch.finfo(dtype).max, dtype=dtype)
        packed, absmax = codec.quantize_blocks(weight)
        assert set(packed.tolist()) == {0xFF}
        assert absmax[0].item() == weight[0].item()


@pytest.mark.parametrize("shape", [(2, 64), (1, 1, 64), ()])
def test_weights_must_be_flat(shape):
    with pytest.raises(ShapeMismatch, match=r"contiguous"):
        codec.quantize_blocks(torch.ones(shape))


def test_weights_must_be_contiguous():
    with pytest.raises(ShapeMismatch, match=r"is \[64\], strided"):
        codec.quantize_blocks(torch.ones(128)[::2])


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.float8_e4m3fn])
def test_other_dtypes_are_refused_by_name(dtype):
    with pytest.raises(UsageError, match=str(dtype)):
        codec.quantize_blocks(torch.ones(64).to(dtype))


@pytest.mark.parametrize("blocksize", [0, -64, 16, 48, 8192])
def test_block_sizes_bitsandbytes_refuses_are_refused(blocksize):
    with pytest.raises(UsageError, match=f"blocksize {blocksize}"):
        codec.quantize_blocks(torch.ones(64), blocksize)


def test_other_devices_are_refused():
    with pytest.raises(UsageError, match="meta"):
        codec.quantize_blocks(torch.ones(64, device="meta"))


def test_threads_must_be_positive():
    with pytest.raises(UsageError, match="threads 0"):
        codec.quantize_blocks(torch.ones(64), threads=0)


def test_nothing_gives_nothing_and_has_no_scales():
    packed, absmax = codec.quantize_blocks(torch.ones(0))
    assert packed.numel() == 0
    assert absmax.numel() == 0
    with pytest.raises(UsageError, match="no scales"):
        codec.nest_absmax(absmax)


def test_scales_whose_mean_overflows_are_refused():
    with pytest.raises(NonFiniteWeight, match="mean of 4 scales overflows"):
        codec.nest_absmax(torch.full((4,), 3e38))


def test_sizes_must_agree_when_dequantizing():
    packed, absmax = codec.quantize_blocks(torch.ones(130))
    for n in (128, 129 + 64, 132):
        with pytest.raises(ShapeMismatch, match=f"{n} weights"):
            codec.dequantize_blocks(packed, absmax, n)


def test_nested_scales_of_the_wrong_length_are_refused():
    nested = codec.nest_absmax(torch.rand(300))
    broken = codec.Nested(nested.absmax, nested.nested_absmax[:1], nested.nested_offset, nested.nested_quant_map)
    with pytest.raises(ShapeMismatch, match="300 scales need nested_absmax"):
        codec.unnest_absmax(broken)


def test_a_parameter_that_wants_gradients_is_quantized_all_the_same():
    packed, _ = codec.quantize_blocks(torch.nn.Parameter(torch.ones(64)))
    assert packed.numel() == 32
    assert not packed.requires_grad
