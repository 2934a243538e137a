"""Coordinate descent on codes and scales, after compensation: what one pass from left to right cannot see.

Compensation rounds a column knowing the errors before it, not those after. Now all are known, and each code may be chosen
again. For a row's error r = w - q and the Hessian H, the loss is r H r^T; as a function of q_c alone it is a parabola,

    minimum at  q_c + g_c / H_cc,   g = r H          so the best code is the level nearest to that, and  g <- g - delta H_c

and of the block's scale alone (l: its levels, H_BB its part of H) another,

    minimum at  s + g_B l / (l H_BB l^T)             so the best scale is the grid's nearest to that.

Each step goes to the exact minimum over what may be chosen, and where it stands may be chosen: no step can raise the loss. All rows take
the same step at once. g is made anew for each block by one matrix product, so rounding does not add up. Cost of a
sweep: that of a compensation without its search.
"""

from __future__ import annotations

import torch

from halfbyte.codec.codebook import nf4_levels, nf4_midpoints
from halfbyte.codec.fitting import kernels
from halfbyte.codec.fitting.hessian import Geometry
from halfbyte.codec.fitting.nesting import ScaleGrid


def descend(
    weight: torch.Tensor, codes: torch.Tensor, scale_codes: torch.Tensor, geometry: Geometry, grid: ScaleGrid
) -> bool:
    """One sweep; `codes` and `scale_codes` (as `compensate` returns them) are changed in place. Did any code change?

    weight   float32 [columns, rows], columns in the geometry's order
    """
    per_row = len(geometry.blocks)
    size = len(geometry.order) // per_row
    levels = nf4_levels().to(weight.device)
    error = weight.clone()
    for position, block in enumerate(geometry.blocks):
        here = slice(position * size, (position + 1) * size)
        error[here] -= levels[codes[here].int()] * grid.values(scale_codes[block].long(), slice(block, None, per_row))
    changed = torch.zeros((), dtype=torch.bool, device=weight.device)
    for position, block in enumerate(geometry.blocks):
        here, mine = slice(position * size, (position + 1) * size), slice(block, None, per_row)
        matrix = geometry.matrix[here, here]
        chosen = levels[codes[here].int()]
        gradient = geometry.matrix[here] @ error
        scales = grid.values(scale_codes[block].long(), mine)
        curvature = (chosen * (matrix @ chosen)).sum(dim=0)
        step = torch.where(curvature > 0, (gradient * chosen).sum(dim=0) / curvature, 0.0)
        scale_codes[block] = found = grid.snap(scales + step, mine)
        moved = grid.values(found, mine)
        gradient -= (matrix @ chosen) * (moved - scales)
        before = codes[here].clone()
        _choose_codes(gradient, chosen, matrix, moved, codes[here])
        changed |= (before != codes[here]).any()
        error[here] = weight[here] - levels[codes[here].int()] * moved
    return bool(changed)


def _choose_codes(
    gradient: torch.Tensor, chosen: torch.Tensor, matrix: torch.Tensor, scales: torch.Tensor, codes: torch.Tensor
) -> None:
    """The best code of each column of a block in turn. gradient, chosen [blocksize, rows] are used up; codes are written."""
    gradient.mul_(torch.where(scales != 0, 1.0 / scales, 0.0))
    inverse, table = matrix.diagonal().reciprocal(), matrix.contiguous()
    if kernels.available(gradient):
        kernels.walk(gradient, chosen, table, inverse, codes)
    elif not gradient.is_cuda:
        from halfbyte.codec.fitting import loops

        loops.walk(gradient, chosen, table, inverse, codes)
    else:
        choose_plainly(gradient, chosen, table, inverse, codes)


def choose_plainly(
    gradient: torch.Tensor, chosen: torch.Tensor, table: torch.Tensor, inverse: torch.Tensor, codes: torch.Tensor
) -> None:
    """The walk in torch: where there is no Triton, and as the definition of the fast paths. In units of the rows' scales."""
    levels, midpoints = nf4_levels().to(table.device), nf4_midpoints().to(table.device)
    for column in range(len(codes)):
        target = torch.addcmul(chosen[column], gradient[column], inverse[column])
        found = torch.bucketize(target, midpoints)
        codes[column] = found
        delta = levels[found].sub_(chosen[column])
        gradient[column + 1 :].addr_(table[column, column + 1 :], delta, alpha=-1)
