"""Error compensation with the NF4 codebook (GPTQ, https://arxiv.org/abs/2210.17323), scales chosen in the loop.

Columns are rounded one after the other. The error of a rounded column is made up for by the columns still free, as well as
the inputs' correlations allow. With H^-1 = U^T U (U upper triangular), for each row w and column c in turn:

    e = (w_c - q_c) / U_cc          w_k <- w_k - e U_ck   for all k > c          loss grows by e^2, exactly

So 1 / U_cc^2 is what an error in column c costs once the rest has made up for it, and it is the importance by which a block's
scale is searched, from the weights as the columns before left them. (The diagonal of H, as importance, ignores that; it
measured 2.6 % worse.) Scales are chosen on the grid of the nested scales, so the codes know them as the file will hold them.

Lazily: within a block of 64 columns each step touches that block alone; then one matrix product brings the rest up to date.
All is held with columns first, [columns, rows], so that a column is contiguous. Cost: columns^2 * rows multiplications. On a GPU the
steps within a block are one kernel (kernels.py).
"""

from __future__ import annotations

import torch

from halfbyte.codec.codebook import nf4_levels, nf4_midpoints
from halfbyte.codec.fitting import kernels
from halfbyte.codec.fitting.hessian import Geometry
from halfbyte.codec.fitting.nesting import ScaleGrid
from halfbyte.codec.fitting.search import search_scales
from halfbyte.codec.fitting.settings import Fit


def compensate(
    weight: torch.Tensor, geometry: Geometry, grid: ScaleGrid, fit: Fit
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scale codes of a weight.

    weight   float32 [columns, rows], columns in the geometry's order; not changed
    returns  codes uint8 [columns, rows] in that order, and scale codes uint8 [blocks of a row, rows] in the natural order
    """
    size = fit.blocksize
    left = weight.clone()
    per_row = len(geometry.blocks)
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    scale_codes = torch.empty((per_row, weight.shape[1]), dtype=torch.uint8, device=weight.device)
    importance = geometry.inverse.diagonal().square().reciprocal()
    for position, block in enumerate(geometry.blocks):
        here = slice(position * size, (position + 1) * size)
        mine = slice(block, None, per_row)
        panel = left[here]
        scales = search_scales(panel, importance[here], signed=fit.signed, candidates=fit.candidates, refit=fit.refit)
        scale_codes[block] = chosen = grid.snap(scales, mine)
        errors = round_panel(panel, geometry.inverse[here, here], grid.values(chosen.long(), mine), codes[here])
        left[here.stop :].addmm_(geometry.inverse[here, here.stop :].T, errors, alpha=-1)
    return codes, scale_codes


def round_panel(panel: torch.Tensor, inverse: torch.Tensor, scales: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Round the columns of one block, each making up for those before it.

    panel    float32 [blocksize, rows], used up
    inverse  float32 [blocksize, blocksize], the block's part of U
    scales   float32 [rows];  codes  uint8 [blocksize, rows], written
    returns  float32 [blocksize, rows], the errors e that later blocks have to make up for
    """
    # In units of the row's scale: a step is then a search, a look-up, a difference and a rank-one update.
    panel.mul_(torch.where(scales != 0, 1.0 / scales, 0.0))
    diagonal = inverse.diagonal()
    shares = (inverse / diagonal[:, None]).contiguous()
    errors = torch.empty_like(panel)
    if kernels.available(panel):
        kernels.compensate(panel, shares, codes, errors)
    elif not panel.is_cuda:
        from halfbyte.codec.fitting import loops

        loops.walk(panel, errors, shares, None, codes)
    else:
        compensate_plainly(panel, shares, codes, errors)
    return errors.mul_(scales).div_(diagonal[:, None])


def compensate_plainly(panel: torch.Tensor, shares: torch.Tensor, codes: torch.Tensor, errors: torch.Tensor) -> None:
    """The walk in torch: where there is no Triton, and as the definition of the fast paths. In units of the rows' scales."""
    levels, midpoints = nf4_levels().to(panel.device), nf4_midpoints().to(panel.device)
    for column in range(len(panel)):
        found = torch.bucketize(panel[column], midpoints)
        codes[column] = found
        error = torch.sub(panel[column], levels[found], out=errors[column])
        panel[column + 1 :].addr_(shares[column, column + 1 :], error, alpha=-1)
