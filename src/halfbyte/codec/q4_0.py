"""Rounding to llama.cpp's q4_0, the int4 grid that quantization-aware training (QAT) of Gemma aims at.

32 weights along a row share one scale d, stored as fp16; a weight is d * q with an integer q from -8 to 7. The grid has one
level more on the negative side, so the scale takes the sign of the weight that is largest in magnitude:

    d  = max_by_magnitude / -8                  that weight becomes q = -8, exactly: there is no 8 to give a positive one
    q  = floor(w * (1 / d) + 8.5) - 8, cut to -8..7      with d as float32, before it is rounded for storage
    w' = fp16(d) * q

(ggml-quants.c, quantize_row_q4_0_ref, https://github.com/ggml-org/llama.cpp; of equal magnitudes the first counts.)

With `scale_dtype="bf16"` the stored scale is one that bf16 can hold as well. A checkpoint is kept in bf16, and bf16(d * -8)
is then -8d without an error, so whoever reads the checkpoint finds d again, and with it every q: q4_0 of the checkpoint is
the checkpoint. With an fp16 scale of eleven significant bits that is not so: bf16 keeps eight of them, and the scale moves.

The catch: an fp16 scale is infinite from |w| = 524,160 on and zero below |w| = 2.4e-7; as in llama.cpp, nothing is checked
here (a check would make a GPU wait in every training step). And `w * (1 / d) + 8.5` must be a product and a sum, each rounded:
a compiler that fuses them moves codes at ties.
"""

from __future__ import annotations

from typing import Literal

import torch

from halfbyte.errors import ShapeMismatch, UsageError

#: weights that share a scale
Q4_0_BLOCKSIZE = 32
ScaleDtype = Literal["f16", "bf16"]


def quantize_q4_0(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The codes and scales of llama.cpp's q4_0, bit for bit.

    weight   bf16, f16 or f32, any shape whose rows (last dimension) are whole blocks of 32; any device
    returns  codes int8 [blocks, 32], -8 to 7; scales float32 [blocks], each an fp16 number; row-major order of blocks
    raises   ShapeMismatch if rows are not whole blocks
    """
    codes, scales = _quantize(_blocks(weight), "f16")
    return codes.to(torch.int8), scales.squeeze(1)


def round_to_q4_0(weight: torch.Tensor, scale_dtype: ScaleDtype = "f16") -> torch.Tensor:
    """The weights that q4_0 stands for: quantized and expanded again, for a straight-through estimator or an export.

    weight       as for `quantize_q4_0`; no gradient flows through
    scale_dtype  `f16`: as llama.cpp; `bf16`: scales that bf16 and fp16 both hold. Only then does the result, rounded to
                 bf16, come out of a second rounding unchanged (tests/codec/test_q4_0.py)
    returns      float32 of the same shape, on the same device
    raises       ShapeMismatch if rows are not whole blocks of 32, UsageError for another scale_dtype
    """
    codes, scales = _quantize(_blocks(weight), scale_dtype)
    return (codes * scales).view(weight.shape)


def _blocks(weight: torch.Tensor) -> torch.Tensor:
    """float32 [blocks, 32]; raises ShapeMismatch if a block would run over the end of a row."""
    columns = weight.shape[-1] if weight.dim() else 1
    if columns % Q4_0_BLOCKSIZE:
        raise ShapeMismatch(
            f"rows of {columns} weights are not whole blocks of {Q4_0_BLOCKSIZE}",
            where=f"weight {list(weight.shape)}",
            todo="keep this tensor out of q4_0",
        )
    return weight.detach().float().reshape(-1, Q4_0_BLOCKSIZE)


def _quantize(blocks: torch.Tensor, scale_dtype: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes as float32 [blocks, 32] and stored scales as float32 [blocks, 1]."""
    if scale_dtype not in ("f16", "bf16"):
        raise UsageError(f"scale_dtype {scale_dtype!r}", where="scale_dtype", todo="use f16 or bf16")
    largest = blocks.gather(1, blocks.abs().argmax(dim=1, keepdim=True))
    scale = largest / -8
    inverse = torch.where(scale == 0, scale, 1 / scale)
    shifted = blocks * inverse + 8.5
    # 1/d of a subnormal d is infinite: what x86 makes of that in a conversion to an integer is 0 (the stored scale is 0 too)
    codes = torch.where(shifted.isfinite(), shifted, 0).floor_().clamp_(0, 15) - 8
    stored = scale.bfloat16() if scale_dtype == "bf16" else scale
    return codes, stored.half().float()
