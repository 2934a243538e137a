"""The CUDA path gives the CPU's bits; what can be known of it without a GPU is read from its machine code."""

from __future__ import annotations

import re
import warnings

import pytest
import torch
from codec.weights import DTYPES, KINDS, make, same

from halfbyte import codec
from halfbyte.codec import gpu, reference
from halfbyte.errors import NonFiniteWeight

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
needs_triton = pytest.mark.skipif(gpu.triton is None, reason="Triton is not installed")

LENGTHS = (1, 63, 64, 65, 4097, 8192 * 3 + 64 * 5 + 33)
TRITON_TYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}


def ptx(kernel, arguments: dict[str, str], constants: dict[str, int]) -> str:
    """PTX of a kernel for sm_90; compiling needs no GPU."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    signature = arguments | dict.fromkeys(constants, "constexpr")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Triton 3.9 announces another default for contraction
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
        return compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8}).asm["ptx"]


def float_instructions(code: str) -> set[str]:
    return set(re.findall(r"\b(?:div|rcp|mul|fma|mad|add|sub|max|min)\.\S*f(?:32|64)", code))


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
def test_quantize_kernel_divides_and_multiplies_exactly_once_rounded_and_flushes_nothing(dtype):
    arguments = {
        "weight": TRITON_TYPES[dtype],
        "packed": "*u8",
        "absmax": "*fp32",
        "midpoints": "*fp32",
        "blocks": "i32",
    }
    code = ptx(gpu._quantize, arguments, {"smallest": gpu._SMALLEST_BITS, "blocksize": 64, "tile": 128})
    assert float_instructions(code) == {"div.rn.f32", "mul.rn.f32"}
    assert ".ftz" not in code


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantize_kernel_multiplies_once_and_flushes_nothing(dtype):
    arguments = {"packed": "*u8", "absmax": "*fp32", "levels": "*fp32", "out": TRITON_TYPES[dtype], "blocks": "i32"}
    code = ptx(gpu._dequantize, arguments, {"blocksize": 64, "tile": 128})
    assert float_instructions(code) == {"mul.rn.f32"}
    assert ".ftz" not in code


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_cuda_quantizes_to_the_bits_of_the_cpu(kind, dtype):
    for n in LENGTHS:
        for blocksize in codec.BLOCKSIZES:
            weight = make(kind, n, dtype, seed=n)
            found = codec.quantize_blocks(weight.cuda(), blocksize)
            assert all(part.is_cuda for part in found)
            for there, here in zip(found, codec.quantize_blocks(weight, blocksize), strict=True):
                assert same(there.cpu(), here), f"n {n}, blocksize {blocksize}"


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_cuda_dequantizes_to_the_bits_of_the_cpu(kind, dtype):
    for n in LENGTHS:
        for blocksize in codec.BLOCKSIZES:
            packed, absmax = codec.quantize_blocks(make(kind, n, torch.float32, seed=n), blocksize)
            found = codec.dequantize_blocks(packed.cuda(), absmax.cuda(), n, blocksize, dtype)
            expected = codec.dequantize_blocks(packed, absmax, n, blocksize, dtype)
            assert same(found.cpu(), expected), f"n {n}, blocksize {blocksize}"


@pytest.mark.gpu
@needs_cuda
def test_both_levels_on_cuda_equal_the_cpu():
    weight = make("gaussian", 64 * 3000 + 9, torch.bfloat16)
    there, here = codec.quantize(weight.cuda(), threads=1), codec.quantize(weight, threads=1)
    assert same(there.packed.cpu(), here.packed)
    assert there.scales.nested_offset == here.scales.nested_offset
    assert same(there.scales.absmax, here.scales.absmax)
    assert same(codec.dequantize(there).cpu(), codec.dequantize(here))


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("dtype", DTYPES)
def test_plain_torch_on_cuda_gives_the_same_bits(dtype):
    for kind in KINDS:
        weight = make(kind, 64 * 40 + 33, dtype)
        for there, here in zip(
            reference.quantize_blocks(weight.cuda(), 64), codec.quantize_blocks(weight), strict=True
        ):
            assert same(there.cpu(), here), kind


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("at", [0, 70, 129])
def test_cuda_finds_non_finite_weights(bad, at):
    for dtype in DTYPES:
        weight = torch.ones(130, dtype=dtype, device="cuda")
        weight[at] = bad
        with pytest.raises(NonFiniteWeight, match=f"the first is {bad} at {at}"):
            codec.quantize_blocks(weight)
