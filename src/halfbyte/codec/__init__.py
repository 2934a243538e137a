"""NF4 for one tensor: no files, no models. Same signatures whatever the device; every path is held against `reference`.

    quantize(weight)          -> NF4Tensor                       dequantize(nf4)           -> weights
      quantize_blocks(weight) -> packed codes, one scale a block   dequantize_blocks(...)  -> weights
      nest_absmax(scales)     -> the scales in 8 bits              unnest_absmax(nested)   -> the scales a loader sees

Who does the work: CPU tensors go to `cpu` (numba), CUDA tensors to `gpu` (Triton; plain torch where Triton is missing). All
give the bits of bitsandbytes 0.50.2's CPU path, also on the GPU: bitsandbytes' own CUDA kernel divides approximately and
sums in another order, so its files differ from machine to machine; ours do not.

Weights are flat: 1-d and contiguous. A tensor may be quantized in slices whose length is a multiple of `blocksize`: the
results concatenate to the result of the whole. Only then may level 2 run, over all scales at once, since it needs their mean.

All functions may be called from several threads at once.

That is rounding to nearest. Codes and scales chosen to lose less, from calibration data, come from `fit_weight` (`fitting`), in
the same NF4Tensor.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from halfbyte.codec import reference
from halfbyte.codec.codebook import (
    BLOCKSIZES,
    NESTED_BLOCKSIZE,
    NF4_LEVELS,
    nested_quant_map,
    nf4_levels,
    nf4_midpoints,
)
from halfbyte.codec.tensors import Nested, NF4Tensor
from halfbyte.errors import NonFiniteWeight, ShapeMismatch, UsageError

if TYPE_CHECKING:
    from halfbyte.codec.fitting import Fit, Fitted, Moments, fit_error, fit_weight

__all__ = [
    "BLOCKSIZES",
    "NESTED_BLOCKSIZE",
    "NF4_LEVELS",
    "Fit",
    "Fitted",
    "Moments",
    "NF4Tensor",
    "Nested",
    "dequantize",
    "dequantize_blocks",
    "fit_error",
    "fit_weight",
    "nest_absmax",
    "nested_quant_map",
    "nf4_levels",
    "nf4_midpoints",
    "quantize",
    "quantize_blocks",
    "unnest_absmax",
]

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_FITTING = ("Fit", "Fitted", "Moments", "fit_error", "fit_weight")


def __getattr__(name: str) -> Any:
    """Names of `fitting` are looked up there when first used: rounding to nearest does not pay for them."""
    if name not in _FITTING:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from halfbyte.codec import fitting

    return getattr(fitting, name)


def quantize_blocks(
    weight: torch.Tensor, blocksize: int = 64, *, threads: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Level 1: weights to 4-bit codes and one scale per block.

    weight   bfloat16, float16 or float32 [n], contiguous, on CPU or CUDA
    threads  CPU threads to use; None: as many as torch does. The result does not depend on it
    returns  packed uint8 [ceil(n/2)] (earlier weight in the high nibble; an odd last low nibble is 7) and
             absmax float32 [ceil(n/blocksize)], on the device of `weight`
    raises   NonFiniteWeight, ShapeMismatch if not flat, UsageError for another dtype, device or block size
    """
    _check_flat(weight, "weight", DTYPES)
    _check_options(blocksize, threads)
    weight = weight.detach()
    if weight.is_cuda:
        from halfbyte.codec import gpu

        packed, absmax = gpu.quantize_blocks(weight, blocksize)
    else:
        from halfbyte.codec import cpu

        packed, absmax = cpu.quantize_blocks(weight, blocksize, _threads(threads))
    if not torch.isfinite(absmax).all():
        raise _non_finite(weight, "weight")
    return packed, absmax


def nest_absmax(absmax: torch.Tensor, *, threads: int | None = None) -> Nested:
    """Level 2: scales to 8 bits, a float32 per 256 of them and one offset. Always computed on the CPU, where it is exact.

    absmax   float32 [blocks] of the whole tensor; CUDA scales are copied over (4 bytes per 64 weights)
    threads  torch threads for the mean; None: the current setting, which gives the offset bitsandbytes would compute in this
             process. Beyond some 32,768 scales the last bit of the offset depends on it: writers of files pass 1
    returns  Nested, on the CPU
    raises   NonFiniteWeight if a scale is not finite or the mean overflows, ShapeMismatch if not flat, UsageError if empty
    """
    _check_flat(absmax, "absmax", (torch.float32,))
    _check_options(64, threads)
    if not absmax.numel():
        raise UsageError("no scales to quantize", where="absmax", todo="skip tensors without elements")
    from halfbyte.codec import cpu

    here = absmax.detach().cpu()
    if not torch.isfinite(here).all():
        raise _non_finite(here, "absmax")
    nested = cpu.nest_absmax(here, threads)
    if not torch.isfinite(nested.nested_absmax).all():
        raise NonFiniteWeight(
            f"the mean of {here.numel()} scales overflows float32 (the largest is {here.max().item():g})",
            where="absmax",
            todo="keep this tensor out of NF4",
        )
    return nested


def unnest_absmax(nested: Nested) -> torch.Tensor:
    """The scales a loader computes from `nested`: float32 [blocks], on the CPU.

    raises   ShapeMismatch if nested_absmax has not one entry per 256 scales or the map not 256 entries
    """
    groups = -(-nested.absmax.numel() // NESTED_BLOCKSIZE)
    if nested.nested_absmax.numel() != groups or nested.nested_quant_map.numel() != 256:
        raise ShapeMismatch(
            f"{nested.absmax.numel()} scales need nested_absmax [{groups}] and nested_quant_map [256], found "
            f"{list(nested.nested_absmax.shape)} and {list(nested.nested_quant_map.shape)}",
            where="nested scales",
        )
    return reference.unnest_absmax(nested)


def dequantize_blocks(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    n: int,
    blocksize: int = 64,
    dtype: torch.dtype = torch.bfloat16,
    *,
    threads: int | None = None,
) -> torch.Tensor:
    """Expand codes to weights: level[code] * absmax[block] in float32, rounded to nearest even.

    packed   uint8 [ceil(n/2)];  absmax   float32 [ceil(n/blocksize)], moved to the device of `packed` if elsewhere
    returns  [n] of `dtype` on the device of `packed`
    raises   ShapeMismatch if the sizes disagree with `n`, UsageError for another dtype or block size
    """
    _check_flat(packed, "packed", (torch.uint8,))
    _check_flat(absmax, "absmax", (torch.float32,))
    _check_options(blocksize, threads)
    if dtype not in DTYPES:
        raise UsageError(f"cannot dequantize to {dtype}", where="dtype", todo=f"use one of {_names(DTYPES)}")
    if packed.numel() != -(-n // 2) or absmax.numel() != -(-n // blocksize):
        raise ShapeMismatch(
            f"{n} weights in blocks of {blocksize} need {-(-n // 2)} bytes and {-(-n // blocksize)} scales, found "
            f"{packed.numel()} and {absmax.numel()}",
            where="packed, absmax",
        )
    if packed.is_cuda:
        from halfbyte.codec import gpu

        return gpu.dequantize_blocks(packed, absmax.to(packed.device), n, blocksize, dtype)
    from halfbyte.codec import cpu

    return cpu.dequantize_blocks(packed, absmax.cpu(), n, blocksize, dtype, _threads(threads))


def quantize(weight: torch.Tensor, blocksize: int = 64, *, threads: int | None = None) -> NF4Tensor:
    """Both levels: a flat weight to what a bitsandbytes checkpoint stores of it. Errors as of the two functions it calls."""
    packed, absmax = quantize_blocks(weight, blocksize, threads=threads)
    return NF4Tensor(packed, nest_absmax(absmax, threads=threads), weight.numel(), blocksize)


def dequantize(nf4: NF4Tensor, dtype: torch.dtype = torch.bfloat16, *, threads: int | None = None) -> torch.Tensor:
    """The weights a loader will compute with, [n] of `dtype`, on the device of `nf4.packed`."""
    return dequantize_blocks(nf4.packed, unnest_absmax(nf4.scales), nf4.n, nf4.blocksize, dtype, threads=threads)


def _threads(threads: int | None) -> int:
    return torch.get_num_threads() if threads is None else threads


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def _check_flat(tensor: torch.Tensor, name: str, dtypes: tuple[torch.dtype, ...]) -> None:
    if tensor.device.type not in ("cpu", "cuda"):
        raise UsageError(f"cannot work on device {tensor.device}", where=name, todo="move it to cpu or cuda")
    if tensor.dtype not in dtypes:
        raise UsageError(f"has dtype {tensor.dtype}", where=name, todo=f"convert it to one of {_names(dtypes)}")
    if tensor.dim() != 1 or not tensor.is_contiguous():
        layout = "contiguous" if tensor.is_contiguous() else "strided"
        raise ShapeMismatch(f"is {list(tensor.shape)}, {layout}", where=name, todo="pass tensor.contiguous().view(-1)")


def _check_options(blocksize: int, threads: int | None) -> None:
    if blocksize not in BLOCKSIZES:
        raise UsageError(f"blocksize {blocksize}", where="blocksize", todo=f"use one of {BLOCKSIZES}")
    if threads is not None and threads < 1:
        raise UsageError(f"threads {threads}", where="threads", todo="use 1 or more, or None")


def _non_finite(tensor: torch.Tensor, name: str) -> NonFiniteWeight:
    bad = ~torch.isfinite(tensor)
    index = int(bad.to(torch.uint8).argmax())
    return NonFiniteWeight(
        f"{int(bad.sum())} of {tensor.numel()} values are not finite; the first is {tensor[index].item()} at {index}",
        where=name,
        todo="check the download, or keep this tensor out of NF4",
    )
