"""A fitted weight, half of its scales negative, is the same weight to bitsandbytes, to the codec and to every path of ours, and multiplies alike."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from runtime.emulation import linear as walk
from runtime.stored_weights import dense, draw, fitted
from runtime.test_emulation import table_levels

from halfbyte import codec
from halfbyte.runtime.linear import portable, reference
from halfbyte.runtime.linear.module import Nf4Linear
from halfbyte.runtime.linear.tensors import StoredWeight
from halfbyte.runtime.linear.weight import weight_from

BLOCKSIZES = [64, 32]
#: rounding y to bf16 alone is 1.7e-3, of the levels 0.8e-3
BOUND = 2.5e-3


def nested_of(stored: StoredWeight) -> codec.Nested:
    return codec.Nested(
        stored.absmax.cpu(), stored.nested_absmax.cpu(), stored.offset, stored.nested_quant_map.cpu()
    )  # fmt: skip


def by_codec(stored: StoredWeight) -> torch.Tensor:
    """bf16 [rows, columns], on the CPU, by the codec's plain torch."""
    scales = codec.unnest_absmax(nested_of(stored))
    flat = codec.reference.dequantize_blocks(
        stored.packed.cpu(), scales, stored.rows * stored.columns, stored.blocksize, torch.bfloat16
    )
    return flat.view(stored.rows, stored.columns)


def linear4bit(stored: StoredWeight) -> Any:
    """bitsandbytes' layer, made of the file's tensors as transformers makes it; on a CPU without its path that rounds scales."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    layer = Linear4bit(stored.columns, stored.rows, False, torch.bfloat16, True, "nf4", device="meta")
    tensors = stored.to_dict()
    packed = tensors.pop("weight")
    layer.weight = Params4bit.from_prequantized(packed, tensors, device=packed.device, module=layer)
    layer.support_avx512bf16_for_cpu = False
    return layer.eval()


def by_bitsandbytes(layer: Any) -> torch.Tensor:
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(layer.weight.data, layer.weight.quant_state)


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    return torch.equal(left.cpu().view(torch.int16), right.cpu().view(torch.int16))


def error(y: torch.Tensor, x: torch.Tensor, stored: StoredWeight) -> float:
    truth = x.double() @ dense([stored]).T
    return float((y.double() - truth).norm() / truth.norm())


@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_half_of_the_scales_are_negative_and_one_reader_after_another_sees_the_same_bits(blocksize):
    stored = fitted(64, 128, blocksize)
    assert 0.3 < float((codec.unnest_absmax(nested_of(stored)) < 0).float().mean()) < 0.7
    expected = by_codec(stored)
    assert bool((expected.view(torch.int16) == -(2**15)).any()), "no negative zero: nothing to get wrong"
    assert same_bits(by_bitsandbytes(linear4bit(stored)), expected)
    assert same_bits(reference.dequantize(weight_from([stored]).tensors), expected)
    (back,) = weight_from([stored]).to_stored()
    assert all(torch.equal(tensor, back.to_dict()[name]) for name, tensor in stored.to_dict().items())


@pytest.mark.parametrize("blocksize", BLOCKSIZES)
@pytest.mark.parametrize("m", [1, 4, 16, 64])
def test_on_a_cpu_the_product_has_bitsandbytes_bits(blocksize, m):
    stored = fitted(64, 128, blocksize)
    x = torch.randn(m, 128, generator=torch.Generator().manual_seed(m)).to(torch.bfloat16)
    y = Nf4Linear(weight_from([stored]))(x)
    assert same_bits(y, linear4bit(stored)(x))
    assert error(y, x, stored) < 2 * BOUND


@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_the_walk_of_the_kernel_takes_a_fitted_part_beside_a_rounded_one(blocksize):
    parts = [fitted(64, 128, blocksize), draw(32, 128, 3, blocksize)]
    x = torch.randn(5, 128, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = torch.from_numpy(walk(x, weight_from(parts), 2, 3, 1).y)
    torch.testing.assert_close(found, x @ dense(parts, table_levels()).T, rtol=1e-6, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_on_a_gpu_every_reader_sees_the_codecs_bits(blocksize):
    from halfbyte.runtime.kernels import launch

    stored = fitted(96, 320, blocksize, "cuda")
    assert 0.3 < float((codec.unnest_absmax(nested_of(stored)) < 0).float().mean()) < 0.7
    expected, weight = by_codec(stored), weight_from([stored])
    out = torch.full((96, 320), torch.nan, dtype=torch.bfloat16, device="cuda")
    launch.dequantize(weight.tensors, out)
    assert same_bits(out, expected)
    assert same_bits(reference.dequantize(weight.tensors), expected)
    assert same_bits(by_bitsandbytes(linear4bit(stored)), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
@pytest.mark.parametrize("m", [1, 4, 16, 64])
def test_on_a_gpu_kernel_triton_and_bitsandbytes_multiply_it_alike(blocksize, m):
    from halfbyte.runtime.linear.module import nf4_linear

    stored = fitted(96, 320, blocksize, "cuda")
    x = torch.randn(m, 320, generator=torch.Generator().manual_seed(m)).to("cuda", torch.bfloat16)
    weight = weight_from([stored])
    assert error(nf4_linear(x, weight, "64:kernel expand"), x, stored) < BOUND
    assert error(nf4_linear(x, weight, "expand"), x, stored) < 2 * BOUND
    if portable.takes(x):
        assert error(portable.linear(x, weight.tensors), x, stored) < BOUND
    assert error(linear4bit(stored)(x), x, stored) < 4 * BOUND
