"""The Hessian made fit to work with: columns in the order of work, damped, factored. It never fails; it says what it had to do.

    order      blocks keep their 64 columns, for they share a scale. `activation`: blocks by the mean square of their inputs, largest
               first, and within a block likewise, so that the columns that matter most are rounded while all others can still
               make up for it. `natural`: as they are
    damping    d = damping * mean of the diagonal, added to it. A dead input (always 0) so gets a small weight, and
               is rounded like any other column; nothing is divided by 0
    factor     H = R R^T with R upper triangular, by Cholesky of H turned end to end. U = R^-1 is what error compensation
               needs: H^-1 = U^T U, the same U that the paper gets from two factorizations and an inverse

If Cholesky meets a pivot that is not positive, or the factor is not finite, damping is raised tenfold and the fit says so. Memory
beside the Hessian given: at most four matrices of its size (21504 inputs: 7.4 GB).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from halfbyte.codec.fitting.settings import Fit
from halfbyte.errors import NonFiniteWeight

#: the first damping tried when none was asked for and the Hessian is singular
_SMALLEST_DAMPING = 1e-4
#: at this share of the mean diagonal no positive semi-definite matrix is singular in float32
_LARGEST_DAMPING = 1.0


@dataclass(frozen=True, eq=False)
class Geometry:
    """What compensation and descent work with; row and column k of the matrices belong to input order[k].

    matrix   float32 [columns, columns], damped
    inverse  float32 [columns, columns], upper triangular: matrix^-1 = inverse^T inverse
    order    int64 [columns]: a permutation that keeps blocks together
    blocks   for each block in the order of work, which block of a row it is
    """

    matrix: torch.Tensor
    inverse: torch.Tensor
    order: torch.Tensor
    blocks: list[int]
    damping: float
    notes: tuple[str, ...]


def prepare(hessian: torch.Tensor, fit: Fit) -> Geometry:
    """Order, damp, factor. `hessian` float32 [columns, columns], columns a multiple of the block size; it is not changed.

    raises   NonFiniteWeight if the Hessian holds NaN or infinity
    """
    if not torch.isfinite(hessian).all():
        raise NonFiniteWeight("is not finite", where="hessian", todo="check the calibration inputs")
    energy = hessian.diagonal().view(-1, fit.blocksize)
    blocks = torch.arange(len(energy), device=hessian.device)
    inner = torch.arange(fit.blocksize, device=hessian.device).expand_as(energy)
    if fit.order == "activation":
        blocks = torch.argsort(energy.mean(dim=1), descending=True, stable=True)
        inner = torch.argsort(energy, dim=1, descending=True, stable=True)
    order = (blocks[:, None] * fit.blocksize + inner[blocks]).reshape(-1)
    matrix = hessian[order][:, order] if fit.order == "activation" else hessian.clone()
    mean = float(matrix.diagonal().double().mean())
    if mean <= 0:
        eye = torch.eye(len(matrix), device=matrix.device)
        return Geometry(
            eye, eye, order, blocks.tolist(), fit.damping, ("no input was ever non-zero: plain weight error",)
        )
    inverse, damping = _factor(matrix, fit.damping, mean)
    raised = f"the Hessian is singular: damping raised from {fit.damping:g} to {damping:g}"
    return Geometry(matrix, inverse, order, blocks.tolist(), damping, (raised,) if damping > fit.damping else ())


def _factor(matrix: torch.Tensor, damping: float, mean: float) -> tuple[torch.Tensor, float]:
    """U with (matrix + damping)^-1 = U^T U, and the damping it took; `matrix` is damped in place."""
    added = 0.0
    while True:
        matrix.diagonal().add_(damping * mean - added)
        added = damping * mean
        lower, info = torch.linalg.cholesky_ex(matrix.flip(0, 1))
        if not int(info):
            upper = lower.flip(0, 1)
            del lower
            eye = torch.eye(len(matrix), device=matrix.device)
            inverse = torch.linalg.solve_triangular(upper, eye, upper=True)
            if torch.isfinite(inverse).all():
                return inverse, damping
        if (
            damping >= _LARGEST_DAMPING
        ):  # not a second moment at all (negative directions): its diagonal is what is left
            diagonal = matrix.diagonal().clamp(min=added)
            matrix.copy_(torch.diag(diagonal))
            return torch.diag(diagonal.rsqrt()), damping
        damping = max(_SMALLEST_DAMPING, 10 * damping)
