"""The CPU path: compiled loops (loops.py) over slices of torch memory, on our own threads (workers.py).

numba because no compiler is needed on the user's machine: machine code is made for the CPU at hand on first use (some
seconds, then cached on disk, keyed by the CPU's features). The loops release the interpreter lock.

The ragged last block takes the reference path: it has rules of its own (reference.py) and fewer than 4096 weights. So does
the mean of the scales, which must be torch's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from halfbyte.codec import loops, reference
from halfbyte.codec.codebook import (
    NESTED_BLOCKSIZE,
    nested_code_table,
    nested_quant_map,
    nf4_levels,
    nf4_midpoints,
)
from halfbyte.codec.tables import thresholds
from halfbyte.codec.tensors import Nested
from halfbyte.codec.workers import for_each_step

#: Weights per step of work: small enough to share out evenly, large enough to hide the 20 us a step costs.
STEP = 1 << 20

#: dtype of a result -> how numpy and the compiled loop see its memory (loops._KINDS)
_VIEWS = {torch.bfloat16: torch.int16, torch.float16: torch.uint16, torch.float32: torch.float32}


def _compiled(loop: Callable[..., Any]) -> Callable[..., Any]:
    """Machine code of one of the loops (loops.py)."""
    return loops.compiled(loop, loops.SIGNATURES[loop])


def fresh(n: int, dtype: torch.dtype) -> torch.Tensor:
    """Uninitialised [n] of `dtype` on the CPU, in memory that numpy asked the kernel to back with huge pages.

    At these speeds a result's page faults cost as much as computing it: 4 KiB at a time they halve the rate.
    """
    return torch.from_numpy(np.empty(n * dtype.itemsize, np.uint8)).view(dtype)


def quantize_blocks(weight: torch.Tensor, blocksize: int, threads: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Level 1 of reference.quantize_blocks, bit for bit. bf16, f16 or f32 [n] on the CPU, contiguous.

    A NaN or infinity makes its block's absmax NaN or infinite; codes of such a block mean nothing.
    """
    n = weight.numel()
    full = n - n % blocksize
    packed = fresh(-(-n // 2), torch.uint8)
    absmax = torch.empty(-(-n // blocksize), dtype=torch.float32)
    if full:
        quantize = _quantize_f32_body if weight.dtype == torch.float32 else _quantize_16bit_body
        quantize(weight[:full], packed[: full // 2], absmax[: full // blocksize], blocksize, threads)
    if full < n:
        packed[full // 2 :], absmax[full // blocksize :] = reference.quantize_blocks(weight[full:], blocksize)
    return packed, absmax


def _quantize_16bit_body(
    weight: torch.Tensor, packed: torch.Tensor, absmax: torch.Tensor, blocksize: int, threads: int
) -> None:
    loop, table = _compiled(loops.quantize_16bit), thresholds(weight.dtype)
    bits, codes, scales = weight.view(torch.int16).numpy(), packed.numpy(), absmax.numpy()
    keys, values = table.keys.numpy(), table.values.numpy()

    def job(begin: int, end: int) -> None:
        blocks = slice(begin // blocksize, end // blocksize)
        loop(bits[begin:end], keys, values, codes[begin // 2 : end // 2], scales[blocks], blocksize)

    for_each_step(job, weight.numel(), STEP, threads)


def _quantize_f32_body(
    weight: torch.Tensor, packed: torch.Tensor, absmax: torch.Tensor, blocksize: int, threads: int
) -> None:
    loop, midpoints = _compiled(loops.quantize_f32), nf4_midpoints().numpy()
    bits, floats, codes = weight.view(torch.int32).numpy(), weight.numpy(), packed.numpy()
    tops, scales = absmax.view(torch.int32).numpy(), absmax.numpy()

    def job(begin: int, end: int) -> None:
        blocks = slice(begin // blocksize, end // blocksize)
        part = codes[begin // 2 : end // 2]
        loop(bits[begin:end], floats[begin:end], midpoints, part, tops[blocks], scales[blocks], blocksize)

    for_each_step(job, weight.numel(), STEP, threads)


def nest_absmax(absmax: torch.Tensor, threads: int | None) -> Nested:
    """reference.nest_absmax, bit for bit. float32 [blocks] on the CPU, finite."""
    centred, offset = reference.centre(absmax, threads)
    blocks = centred.numel()
    codes = torch.empty(blocks, dtype=torch.uint8)
    largest = torch.empty(-(-blocks // NESTED_BLOCKSIZE), dtype=torch.float32)
    _compiled(loops.nest)(centred.numpy(), nested_code_table().numpy(), codes.numpy(), largest.numpy())
    return Nested(codes, largest, offset, nested_quant_map())


def dequantize_blocks(
    packed: torch.Tensor, absmax: torch.Tensor, n: int, blocksize: int, dtype: torch.dtype, threads: int
) -> torch.Tensor:
    """reference.dequantize_blocks, bit for bit (NaN payloads aside). Everything on the CPU, contiguous."""
    full = n - n % blocksize
    out = fresh(n, dtype)
    if full:
        _dequantize_body(packed[: full // 2], absmax[: full // blocksize], out[:full], blocksize, threads)
    if full < n:
        tail = packed[full // 2 :], absmax[full // blocksize :]
        out[full:] = reference.dequantize_blocks(*tail, n - full, blocksize, dtype)
    return out


def _dequantize_body(
    packed: torch.Tensor, absmax: torch.Tensor, out: torch.Tensor, blocksize: int, threads: int
) -> None:
    loop = _compiled(loops.dequantize)
    codes, scales, levels = packed.numpy(), absmax.numpy(), nf4_levels().numpy()
    values = out.view(_VIEWS[out.dtype]).numpy()

    def job(begin: int, end: int) -> None:
        blocks = slice(begin // blocksize, end // blocksize)
        loop(codes[begin // 2 : end // 2], scales[blocks], levels, values[begin:end], blocksize)

    for_each_step(job, out.numel(), STEP, threads)
