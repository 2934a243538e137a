"""Every bit of both levels, and of the way back, is what bitsandbytes computes on the CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from codec import golden
from codec.weights import DTYPES, awkward, make, oracle, same
from hypothesis import given, settings
from hypothesis import strategies as st

from halfbyte import codec

BLOCKSIZES = st.sampled_from(codec.BLOCKSIZES)


def quantize_both(weight: torch.Tensor, blocksize: int = 64):
    theirs, state = oracle().quantize_4bit(weight, blocksize=blocksize, compress_statistics=True, quant_type="nf4")
    return codec.quantize(weight, blocksize), theirs, state


@settings(max_examples=100, deadline=None)
@given(awkward, BLOCKSIZES)
def test_any_weight_quantizes_to_the_bits_of_bitsandbytes(weight, blocksize):
    ours, theirs, state = quantize_both(weight, blocksize)
    assert same(ours.packed, theirs.view(-1))
    assert same(ours.scales.absmax, state.absmax)
    assert same(ours.scales.nested_absmax, state.state2.absmax)
    assert same(ours.scales.nested_quant_map, state.state2.code)
    assert ours.scales.nested_offset == state.offset.item()


@settings(max_examples=60, deadline=None)
@given(awkward, BLOCKSIZES)
def test_scales_of_level_one_equal_bitsandbytes_bit_for_bit(weight, blocksize):
    _, absmax = codec.quantize_blocks(weight, blocksize)
    _, state = oracle().quantize_4bit(weight, blocksize=blocksize, compress_statistics=False, quant_type="nf4")
    assert same(absmax, state.absmax)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-(2.0**99), 2.0**99, width=32), min_size=1, max_size=600))
def test_any_scales_even_negative_ones_nest_as_in_bitsandbytes(values):
    absmax = torch.tensor(values, dtype=torch.float32)
    offset = absmax.mean()
    codes, state = oracle().quantize_blockwise(absmax - offset, blocksize=256)
    nested = codec.nest_absmax(absmax)
    assert same(nested.absmax, codes)
    assert same(nested.nested_absmax, state.absmax)
    assert nested.nested_offset == offset.item()


@pytest.mark.parametrize("n", [1, 63, 64, 65, 4097])
def test_ragged_last_block_equals_bitsandbytes(n):
    ours, theirs, _ = quantize_both(make("gaussian", n, torch.float32, seed=n))
    assert same(ours.packed, theirs.view(-1))


def test_ragged_last_block_is_divided_whole_blocks_are_multiplied():
    scales = torch.rand(300, generator=torch.Generator().manual_seed(0)) + 0.1
    levels = torch.cat([codec.nf4_midpoints(), torch.ones(1)])
    straddled = 0
    for scale in scales:
        tail = levels * scale
        whole = tail.repeat(4)
        for weight in (tail, whole):
            ours, theirs, _ = quantize_both(weight)
            assert same(ours.packed, theirs.view(-1))
        straddled += not same(codec.quantize_blocks(whole)[0][:8], codec.quantize_blocks(tail)[0])
    assert straddled > 0  # the two rules do part here, so this test can tell them apart


def test_odd_count_is_padded_with_the_code_of_zero():
    packed, _ = codec.quantize_blocks(torch.tensor([1.0, -1.0, 1.0]))
    assert packed.tolist() == [0xF0, 0xF7]


def test_offset_of_many_scales_equals_bitsandbytes_under_the_same_thread_count():
    weight = make("scales", 64 * 50_000, torch.bfloat16)
    ours, theirs, state = quantize_both(weight)
    assert same(ours.packed, theirs.view(-1))
    assert same(ours.scales.absmax, state.absmax)
    assert ours.scales.nested_offset == state.offset.item()


@settings(max_examples=60, deadline=None)
@given(awkward, st.sampled_from(DTYPES), st.sampled_from([32, 64, 1024]))
def test_dequantized_weights_equal_bitsandbytes(weight, dtype, blocksize):
    weight = weight[: weight.numel() // 2 * 2]  # bitsandbytes runs torch.compile for odd counts
    if not weight.numel():
        return
    ours, theirs, state = quantize_both(weight, blocksize)
    state.dtype = dtype
    expected = oracle().dequantize_4bit(theirs, state).view(-1)
    found = codec.dequantize(ours, dtype)
    if dtype == torch.bfloat16:  # its AVX512-BF16 instruction flushes subnormals; ours keeps them
        subnormal = (found != 0) & (found.abs() < torch.finfo(dtype).tiny)
        expected, found = expected[~subnormal], found[~subnormal]
    assert torch.equal(found, expected)


@settings(max_examples=40, deadline=None)
@given(awkward)
def test_unnested_scales_equal_bitsandbytes(weight):
    ours, _, state = quantize_both(weight)
    expected = oracle().dequantize_blockwise(state.absmax, state.state2) + state.offset
    assert same(codec.unnest_absmax(ours.scales), expected)


def test_golden_file_of_bitsandbytes_is_reproduced():
    stored = json.loads(Path(golden.FILE).read_text())
    ours = codec.quantize(golden.weights())
    assert stored["weights_sha256"] == golden.fingerprint()
    assert ours.packed.numpy().tobytes().hex() == stored["packed"]
    assert ours.scales.absmax.numpy().tobytes().hex() == stored["absmax"]
    assert [value.hex() for value in ours.scales.nested_absmax.tolist()] == stored["nested_absmax"]
    assert ours.scales.nested_offset.hex() == stored["nested_offset"]
