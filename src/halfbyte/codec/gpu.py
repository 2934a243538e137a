"""The CUDA path: level 1 and its inverse as Triton kernels that give the CPU's bits.

A program takes a tile of whole blocks, 8192 weights. Their maximum is taken over the float32 bits as integers: magnitudes
order like integers, with NaN above infinity, so nothing non-finite hides. Then comes the definition:
scaled = w * (1 / max(absmax, 1e-38)), 15 comparisons, two codes to a byte.

Bits depend on instructions, so these are written out. In PTX `div.rn.f32` and `mul.rn.f32` are IEEE, keep subnormals (there
is no `.ftz`), and an explicit `.rn` product is never contracted into an FMA. A plain `/` in Triton is `div.full.f32` (2 ulp), and
`1/x` through libdevice may flush subnormals. This is also where bitsandbytes' CUDA kernel parts from its CPU path: it divides
approximately.

The ragged last block follows the reference path, on the device (torch divides exactly there). Without Triton everything does.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import struct
from functools import cache

import torch

from halfbyte.codec import reference
from halfbyte.codec.codebook import SMALLEST_SCALE, nf4_levels, nf4_midpoints

try:
    import triton
    import triton.language as tl
except ImportError:  # Windows, CPU-only builds of torch
    triton = None  # type: ignore[assignment]

#: Weights per program.
TILE = 8192

#: Bits of float32(1e-38). As a literal in a kernel it would be a double, since it is below the normal float32 numbers.
_SMALLEST_BITS = struct.unpack("<i", struct.pack("<f", SMALLEST_SCALE))[0]


@cache
def _on(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Levels and midpoints on `device`."""
    return nf4_levels().to(device), nf4_midpoints().to(device)


def quantize_blocks(weight: torch.Tensor, blocksize: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Level 1 of reference.quantize_blocks, bit for bit. bf16, f16 or f32 [n] on CUDA, contiguous.

    A NaN or infinity makes its block's absmax NaN or infinite; codes of such a block mean nothing.
    """
    n = weight.numel()
    blocks = n // blocksize
    if triton is None or not blocks:
        return reference.quantize_blocks(weight, blocksize)
    full = blocks * blocksize
    packed = torch.empty(-(-n // 2), dtype=torch.uint8, device=weight.device)
    absmax = torch.empty(-(-n // blocksize), dtype=torch.float32, device=weight.device)
    tile = TILE // blocksize
    with torch.cuda.device(weight.device):
        _quantize[(triton.cdiv(blocks, tile),)](
            weight,
            packed,
            absmax,
            _on(weight.device)[1],
            blocks,
            smallest=_SMALLEST_BITS,
            blocksize=blocksize,
            tile=tile,
            num_warps=8,
        )
    if full < n:
        packed[full // 2 :], absmax[blocks:] = reference.quantize_blocks(weight[full:], blocksize)
    return packed, absmax


def dequantize_blocks(
    packed: torch.Tensor, absmax: torch.Tensor, n: int, blocksize: int, dtype: torch.dtype
) -> torch.Tensor:
    """reference.dequantize_blocks, bit for bit (NaN payloads aside). Everything on one CUDA device, contiguous."""
    blocks = n // blocksize
    if triton is None or not blocks:
        return reference.dequantize_blocks(packed, absmax, n, blocksize, dtype)
    full = blocks * blocksize
    out = torch.empty(n, dtype=dtype, device=packed.device)
    tile = TILE // blocksize
    with torch.cuda.device(packed.device):
        _dequantize[(triton.cdiv(blocks, tile),)](
            packed,
            absmax,
            _on(packed.device)[0],
            out,
            blocks,
            blocksize=blocksize,
            tile=tile,
            num_warps=8,
        )
    if full < n:
        tail = packed[full // 2 :], absmax[blocks:]
        out[full:] = reference.dequantize_blocks(*tail, n - full, blocksize, dtype)
    return out


if triton is not None:

    @triton.jit
    def _multiply(x, y):
        """x * y, float32, rounded once, subnormals kept."""
        return tl.inline_asm_elementwise(
            "mul.rn.f32 $0, $1, $2;", "=f,f,f", [x, y], dtype=tl.float32, is_pure=True, pack=1
        )

    @triton.jit
    def _divide(x, y):
        """x / y, float32, rounded once, subnormals kept."""
        return tl.inline_asm_elementwise(
            "div.rn.f32 $0, $1, $2;", "=f,f,f", [x, y], dtype=tl.float32, is_pure=True, pack=1
        )

    @triton.jit
    def _quantize(
        weight, packed, absmax, midpoints, blocks, smallest: tl.constexpr, blocksize: tl.constexpr, tile: tl.constexpr
    ):
        block = tl.program_id(0).to(tl.int64) * tile + tl.arange(0, tile)
        here = (block < blocks)[:, None]
        at = block[:, None] * blocksize + tl.arange(0, blocksize)[None, :]
        w = tl.load(weight + at, mask=here, other=0.0).to(tl.float32)
        magnitude = w.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        top = tl.max(magnitude, axis=1)
        tl.store(absmax + block, top.to(tl.float32, bitcast=True), mask=block < blocks)
        scale = tl.maximum(top, smallest).to(tl.float32, bitcast=True)
        scaled = _multiply(w, _divide(tl.full((tile,), 1.0, tl.float32), scale)[:, None])
        codes = tl.zeros((tile, blocksize), tl.int32)
        for i in tl.static_range(15):
            codes += (scaled > tl.load(midpoints + i)).to(tl.int32)
        half: tl.constexpr = blocksize // 2
        high, low = tl.split(tl.reshape(codes, (tile, half, 2)))
        byte = block[:, None] * half + tl.arange(0, half)[None, :]
        tl.store(packed + byte, ((high << 4) | low).to(tl.uint8), mask=here)

    @triton.jit
    def _dequantize(packed, absmax, levels, out, blocks, blocksize: tl.constexpr, tile: tl.constexpr):
        half: tl.constexpr = blocksize // 2
        block = tl.program_id(0).to(tl.int64) * tile + tl.arange(0, tile)
        here = (block < blocks)[:, None]
        byte = block[:, None] * half + tl.arange(0, half)[None, :]
        codes = tl.load(packed + byte, mask=here, other=0).to(tl.int32)
        scale = tl.load(absmax + block, mask=block < blocks, other=0.0)[:, None]
        high = _multiply(tl.load(levels + (codes >> 4)), scale)
        low = _multiply(tl.load(levels + (codes & 15)), scale)
        values = tl.reshape(tl.join(high, low), (tile, blocksize))
        at = block[:, None] * blocksize + tl.arange(0, blocksize)[None, :]
        tl.store(out + at, values.to(out.dtype.element_ty), mask=here)
