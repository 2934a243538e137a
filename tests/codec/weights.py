"""Awkward weights for the codec's tests, and bitsandbytes as the oracle."""

from __future__ import annotations

import functools
from typing import Any

import torch
from hypothesis import strategies as st

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
KINDS = ("gaussian", "scales", "subnormal", "sparse", "zero", "ties", "near", "bits")


def make(kind: str, n: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """`n` finite weights of a kind, the same for the same arguments."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(n, generator=generator)
    if kind == "scales":  # every 32 weights another power of two, from subnormal to huge
        powers = torch.randint(-145, 100, (-(-n // 32),), generator=generator).repeat_interleave(32)[:n]
        noise = noise * torch.exp2(powers.double()).float()
    elif kind == "subnormal":  # below 1e-38, where bitsandbytes clamps the scale
        noise = noise * 3e-40
    elif kind == "sparse":
        noise = noise * (torch.rand(n, generator=generator) < 0.05) * -1.0  # many are -0.0
    elif kind == "zero":
        noise = noise * 0.0
    elif kind in ("ties", "near"):  # on the midpoints wherever the block's absmax is 1; or a rounding away from them
        from halfbyte.codec import nf4_midpoints

        noise = torch.cat([nf4_midpoints(), torch.tensor([1.0])])[torch.randint(0, 16, (n,), generator=generator)]
        if kind == "near":
            noise = noise * torch.rand(-(-n // 4096), generator=generator).repeat_interleave(4096)[:n]
    elif kind == "bits":  # any finite bit pattern
        return any_bits(n, dtype, generator)
    limit = 6e4 if dtype == torch.float16 else 1e30
    return noise.clamp(-limit, limit).to(dtype)


def any_bits(n: int, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Finite weights with random bits; magnitudes bounded so that the mean of the scales cannot overflow."""
    integer = torch.int32 if dtype == torch.float32 else torch.int16
    info = torch.iinfo(integer)
    bits = torch.randint(info.min, info.max + 1, (n,), generator=generator, dtype=torch.int64).to(integer)
    weights = bits.view(dtype)
    return torch.where(weights.float().abs() < 1e34, weights, torch.ones_like(weights))


#: Any awkward weight of 1 to 5000 elements.
awkward = st.builds(
    make,
    st.sampled_from(KINDS),
    st.integers(1, 5000) | st.sampled_from([63, 64, 65, 4095, 4096, 4097]),
    st.sampled_from(DTYPES),
    st.integers(0, 2**31),
)


@functools.cache
def oracle() -> Any:
    """bitsandbytes.functional; its import warns about an optional package that plays no part here."""
    import logging

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    import bitsandbytes.functional

    return bitsandbytes.functional


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Equal bit for bit: -0 differs from 0."""
    alike = left.dtype == right.dtype and left.shape == right.shape
    return alike and torch.equal(left.contiguous().view(torch.uint8), right.contiguous().view(torch.uint8))
