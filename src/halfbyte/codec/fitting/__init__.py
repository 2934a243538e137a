"""NF4 with codes and scales chosen to lose less: the same file, the same loaders, other numbers in it.

    Moments(columns).add(x) ...          -> mean_squares, hessian     what calibration knows of a layer's inputs
    fit_weight(weight, Fit(...), ...)    -> Fitted (an NF4Tensor)      codes and scales
    fit_error(weight, nf4, hessian=...)  -> float                      what it costs the layer's output

The maths is in docs/method.md. Pure tensors: no files, no models. CPU and CUDA; computed where `weight` lies.
"""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from halfbyte.codec import quantize
from halfbyte.codec.fitting.compensation import compensate
from halfbyte.codec.fitting.descent import descend
from halfbyte.codec.fitting.hessian import prepare
from halfbyte.codec.fitting.moments import Moments, fit_error
from halfbyte.codec.fitting.nesting import ScaleGrid
from halfbyte.codec.fitting.search import nearest_codes, search_scales
from halfbyte.codec.fitting.settings import FITTED_BLOCKSIZES, Fit, Fitted
from halfbyte.codec.reference import pack
from halfbyte.codec.tensors import NF4Tensor
from halfbyte.errors import NonFiniteWeight, ShapeMismatch, UsageError

__all__ = ["FITTED_BLOCKSIZES", "Fit", "Fitted", "Moments", "fit_error", "fit_weight"]

#: blocks converted to float32 at a time
_STEP = 1 << 17


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
    _check(weight, mean_squares, hessian)
    if fit.method == "rtn":
        return Fitted(quantize(weight.reshape(-1), fit.blocksize, threads=threads), "rtn")
    columns = weight.shape[1]
    if fit.method == "scale":
        return Fitted(_scale(weight, fit, hessian.diagonal() if hessian is not None else mean_squares), "scale")
    if hessian is None:
        raise UsageError("method gptq without a Hessian", where="hessian", todo="calibrate with Moments(full=True)")
    if columns % fit.blocksize:
        note = (
            f"{columns} columns are no multiple of {fit.blocksize}, so blocks cross rows: scale search instead of gptq"
        )
        return Fitted(_scale(weight, fit, hessian.diagonal()), "scale", notes=(note,))
    return _gptq(weight, fit, hessian.to(weight.device, torch.float32))


def _scale(weight: torch.Tensor, fit: Fit, mean_squares: torch.Tensor | None) -> NF4Tensor:
    """Search, fix the second level, round."""
    blocks, scales = _provisional(weight, fit, mean_squares if fit.weighted else None)
    grid = ScaleGrid.around(scales, fit.signed)
    scale_codes = grid.snap(scales, slice(None))
    values = grid.values(scale_codes, slice(None))
    codes = torch.empty(blocks.shape, dtype=torch.uint8, device=blocks.device)
    for begin in range(0, len(blocks), _STEP):
        part = slice(begin, begin + _STEP)
        codes[part] = nearest_codes(blocks[part].float(), values[part, None])
    flat = codes.view(-1)[: weight.numel()]
    return NF4Tensor(pack(flat).cpu(), grid.nest(scale_codes), weight.numel(), fit.blocksize)


def _gptq(weight: torch.Tensor, fit: Fit, hessian: torch.Tensor) -> Fitted:
    """Fix the second level, compensate, descend."""
    rows, columns = weight.shape
    _, scales = _provisional(weight, fit, hessian.diagonal())
    grid = ScaleGrid.around(scales, fit.signed)
    geometry = prepare(hessian, fit)
    target = weight.detach().T[geometry.order].float().contiguous()
    codes, scale_codes = compensate(target, geometry, grid, fit)
    for _ in range(fit.sweeps):
        if not descend(target, codes, scale_codes, geometry, grid):
            break
    stored = torch.empty_like(codes)
    stored[geometry.order] = codes
    nf4 = NF4Tensor(
        pack(stored.T.reshape(-1)).cpu(), grid.nest(scale_codes.T.reshape(-1)), rows * columns, fit.blocksize
    )
    return Fitted(nf4, "gptq", geometry.damping, geometry.notes)


def _provisional(
    weight: torch.Tensor, fit: Fit, mean_squares: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The flattened weight in blocks (the last filled up with zeros), and the best scale of each, each block for itself."""
    columns = weight.shape[1]
    flat = weight.detach().reshape(-1)
    blocks = pad(flat, (0, -len(flat) % fit.blocksize)).view(-1, fit.blocksize)
    scales = torch.empty(len(blocks), device=weight.device)
    squares = None if mean_squares is None else mean_squares.to(weight.device, torch.float32)
    for begin in range(0, len(blocks), _STEP):
        part = blocks[begin : begin + _STEP].T.float().contiguous()
        importance = None
        if squares is not None:
            index = torch.arange(begin * fit.blocksize, begin * fit.blocksize + part.numel(), device=weight.device)
            importance = squares[index % columns].view(-1, fit.blocksize).T
        scales[begin : begin + _STEP] = search_scales(
            part, importance, signed=fit.signed, candidates=fit.candidates, refit=fit.refit
        )
    return blocks, scales


def _check(weight: torch.Tensor, mean_squares: torch.Tensor | None, hessian: torch.Tensor | None) -> None:
    if weight.dim() != 2 or not weight.is_contiguous() or not weight.numel():
        raise ShapeMismatch(f"is {list(weight.shape)}", where="weight", todo="pass a contiguous matrix [rows, columns]")
    if not torch.isfinite(weight).all():
        raise NonFiniteWeight("holds NaN or infinity", where="weight", todo="check the download, or keep it out of NF4")
    columns = weight.shape[1]
    for name, given, shape in (("mean_squares", mean_squares, [columns]), ("hessian", hessian, [columns, columns])):
        if given is not None and list(given.shape) != shape:
            raise ShapeMismatch(f"is {list(given.shape)}, the weight needs {shape}", where=name)
