"""NF4 with codes and scales chosen to lose less: the same file, the same loaders, other numbers in it.

    Moments(columns).add(x) ...          -> mean_squares, hessian     what calibration knows of a layer's inputs
    fit_weight(weight, Fit(...), ...)    -> Fitted (an NF4Tensor)      codes and scales
    fit_error(weight, nf4, hessian=...)  -> float                      what it costs the layer's output

The maths is in docs/method.md. Pure tensors: no files, no models. CPU and CUDA; computed where `weight` lies.
"""

from __future__ import annotations

import torch

from halfbyte.codec.fitting.moments import Moments, fit_error
from halfbyte.codec.fitting.settings import FITTED_BLOCKSIZES, Fit, Fitted
from halfbyte.errors import ShapeMismatch

__all__ = ["FITTED_BLOCKSIZES", "Fit", "Fitted", "Moments", "fit_error", "fit_weight"]


def fit_weight(
    weight: torch.Tensor,
    fit: Fit,
    *,
    mean_squares: torch.Tensor | None = None,
    hessian: torch.Tensor | None = None,
    threads: int | None = None,
) -> Fitted:
    """Quantize one linear layer's weight.

    weight        bfloat16, float16 or float32 [rows, columns], finite, contiguous; CPU or CUDA, and there the work is done
    mean_squares  float32 [columns], E[x^2] of the layer's inputs; taken from `hessian` where that is given
    hessian       float32 [columns, columns], E[x x^T]; `gptq` needs it. Read only: one copy of it is made, and its inverse
    threads       CPU threads of method `rtn` and of the mean of the scales (codec.quantize); the others use torch's setting
    returns       Fitted; the tensor lies on the CPU. The same inputs give the same bytes on the same device and version
    raises        ShapeMismatch, NonFiniteWeight, UsageError (`gptq` without a Hessian)
    """
    if weight.dim() != 2:
        raise ShapeMismatch(f"is {list(weight.shape)}", where="weight", todo="pass a matrix [rows, columns]")
    from halfbyte.codec import quantize

    return Fitted(quantize(weight.reshape(-1), fit.blocksize, threads=threads), "rtn")
