"""The codec in plain torch: slow, short, and the definition every fast path is held against.

Level 1, per block of `blocksize` weights, in float32:

    absmax = max|w|        scaled = w * (1 / max(absmax, 1e-38))        code = number of midpoints strictly below scaled

Level 2, over the scales, per 256 of them: subtract the mean of all, divide by the largest magnitude, round to the dynamic
map. Both follow bitsandbytes 0.50.2 on the CPU bit for bit, including what looks like an accident:

  * a ragged last block is *divided* by the clamped absmax (not multiplied by its inverse), and the clamped absmax is stored;
  * an odd number of weights is padded with a scaled 0, so the last low nibble is 7;
  * level 2 rounds through 65536 bins (codebook.py), and 0 * inf, which a block of zeros or of subnormals produces, becomes
    code 0: it is what x86 makes of NaN in a float-to-integer conversion;
  * the offset is torch's mean. Its last bit depends on the number of torch threads once there are more than some 32,768
    scales, so whoever wants equal files everywhere fixes that number (it does not depend on AVX2 or AVX512).

The catch: a multiplication by 1/absmax may differ in the last bit from a division, which moves codes at ties. So any
"equivalent" formula here is wrong, and subnormals must survive (no flush-to-zero, no fast-math).
"""

from __future__ import annotations

import threading

import torch
from torch.nn.functional import pad

from halfbyte.codec.codebook import (
    NESTED_BINS,
    NESTED_BLOCKSIZE,
    SMALLEST_SCALE,
    nested_code_table,
    nested_quant_map,
    nf4_levels,
    nf4_midpoints,
)
from halfbyte.codec.tensors import Nested

_torch_threads = threading.Lock()


def quantize_blocks(weight: torch.Tensor, blocksize: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Level 1.

    weight   bf16, f16 or f32 [n], any device; not checked for NaN or infinity (absmax of that block is then not finite)
    returns  packed uint8 [ceil(n/2)], absmax float32 [ceil(n/blocksize)], on the same device
    """
    flat = weight.float()
    full = flat.numel() - flat.numel() % blocksize
    body, tail = flat[:full].view(-1, blocksize), flat[full:]
    absmax = body.abs().amax(dim=1)
    scaled = (body * (1.0 / absmax.clamp(min=SMALLEST_SCALE))[:, None]).view(-1)
    if tail.numel():
        scale = tail.abs().amax(dim=0, keepdim=True).clamp(min=SMALLEST_SCALE)
        absmax = torch.cat([absmax, scale])
        scaled = torch.cat([scaled, tail / scale])
    codes = torch.bucketize(scaled, nf4_midpoints().to(flat.device), out_int32=True)
    return pack(codes), absmax


def pack(codes: torch.Tensor) -> torch.Tensor:
    """Two codes a byte, the earlier one high; an odd count is padded with 7, the code of zero. int [n] -> uint8 [ceil(n/2)]"""
    pairs = pad(codes, (0, codes.numel() % 2), value=7).to(torch.uint8).view(-1, 2)
    return (pairs[:, 0] << 4) | pairs[:, 1]


def unpack(packed: torch.Tensor, n: int) -> torch.Tensor:
    """The first `n` codes of packed bytes. uint8 [ceil(n/2)] -> uint8 [n]"""
    return torch.stack([packed >> 4, packed & 15], dim=1).view(-1)[:n]


def dequantize_blocks(
    packed: torch.Tensor, absmax: torch.Tensor, n: int, blocksize: int, dtype: torch.dtype
) -> torch.Tensor:
    """level[code] * absmax[block] in float32, then rounded to nearest even into `dtype`. Returns [n] on packed's device.

    A subnormal result stays subnormal. bitsandbytes' own AVX512-BF16 path flushes bf16 subnormals (|w| < 1.2e-38) to zero;
    its other paths do not.
    """
    values = nf4_levels().to(packed.device)[unpack(packed, n).to(torch.int32)]
    full = n - n % blocksize
    values[:full].view(-1, blocksize).mul_(absmax[: full // blocksize, None])
    values[full:].mul_(absmax[full // blocksize :])
    return values.to(dtype)


def centre(absmax: torch.Tensor, threads: int | None) -> tuple[torch.Tensor, float]:
    """Scales minus their mean, and the mean: float32 [blocks] -> float32 [blocks], float.

    threads  torch threads to sum with; None leaves the setting of the calling thread. The setting is put back.
    """
    if threads is None:
        mean = absmax.mean()
    else:
        with _torch_threads:
            before = torch.get_num_threads()
            torch.set_num_threads(threads)
            try:
                mean = absmax.mean()
            finally:
                torch.set_num_threads(before)
    return absmax - mean, mean.item()


def nest_absmax(absmax: torch.Tensor, threads: int | None = None) -> Nested:
    """Level 2: float32 [blocks] on the CPU -> Nested."""
    centred, offset = centre(absmax, threads)
    blocks = centred.numel()
    rows = pad(centred, (0, -blocks % NESTED_BLOCKSIZE)).view(-1, NESTED_BLOCKSIZE)
    largest = rows.abs().amax(dim=1)
    scaled = (rows * (1.0 / largest)[:, None]).nan_to_num(nan=-1.0).clamp(-1, 1)
    bins = ((scaled + 1.0) * 0.5 * (NESTED_BINS - 1) + 0.5).to(torch.int32)
    codes = nested_code_table()[bins].view(-1)[:blocks].contiguous()
    return Nested(codes, largest, offset, nested_quant_map())


def unnest_absmax(nested: Nested) -> torch.Tensor:
    """The scales a loader will see: uint8 [blocks] and the rest -> float32 [blocks], product and sum rounded separately."""
    scale = nested.nested_absmax.repeat_interleave(NESTED_BLOCKSIZE)[: nested.absmax.numel()]
    return nested.nested_quant_map[nested.absmax.to(torch.int32)] * scale + nested.nested_offset
