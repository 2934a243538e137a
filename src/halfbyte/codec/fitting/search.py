"""The best scale of a block, codes nearest: a search over candidates, then least squares.

For a block x of weights with importances d (1, or the mean squares of their inputs), minimise

    e(s) = sum_i d_i (x_i - s level[c_i])^2,   c_i = the level nearest to x_i / s

e is not convex in s: every change of a code makes a kink. But it is cheap, so it is tried: s = +-f max|x| for factors f from
`LOWEST` to `HIGHEST`. Below 1 the largest weight is cut and all others gain; above 1 it falls on an inner level (+1/0.72 = 1.38).
A negative s turns the levels around: they are not symmetric, and one block in two prefers that. Then, for fixed codes the
best scale has a closed form, and for a fixed scale the best codes are the nearest ones; taking turns can only lower e:

    s = sum_i d_i x_i level[c_i] / sum_i d_i level[c_i]^2

On Gaussian weights, blocks of 64: 0.846 % relative error by largest magnitude, 0.697 % with these candidates, 0.684 % after two
rounds of least squares, 0.682 % with ten times the candidates (20,000 blocks). Cost: 1 + 2 * candidates + 2 * refit passes
over the weights: on one CPU core 35 M weights a second (loops.py; plain torch 1 M).
"""

from __future__ import annotations

import torch

from halfbyte.codec.codebook import nf4_levels, nf4_midpoints
from halfbyte.codec.fitting import kernels
from halfbyte.codec.workers import for_each_step

LOWEST, HIGHEST = 0.7, 1.5
#: blocks in a CPU thread's hands at a time
_STEP_CPU = 1 << 12
#: weights in a GPU's hands at a time; five temporaries of this size are made
_CHUNK_GPU = 1 << 25


def nearest_codes(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The code of the level nearest to values / scales, int64; ties go down; 7 (the level 0) where the scale is 0."""
    inverse = torch.where(scales != 0, 1.0 / scales, 0.0)
    return torch.bucketize(values * inverse, nf4_midpoints().to(values.device))


def search_scales(
    panel: torch.Tensor, importance: torch.Tensor | None, *, signed: bool, candidates: int, refit: int
) -> torch.Tensor:
    """The best scale found for each block.

    panel       float32 [blocksize, n], contiguous: a block is a column of it
    importance  float32 [blocksize] or [blocksize, n], not negative; None: all alike
    returns     float32 [n]; 0 for a block of zeros
    """
    size, n = panel.shape
    if importance is None:
        importance = torch.ones(size, device=panel.device)
    weigh = importance.view(size, -1)
    tried = [1.0, *factors(signed, candidates)]  # first what rounding to nearest takes: ties stay there
    out = torch.empty(n, device=panel.device)
    if not panel.is_cuda:
        from halfbyte.codec.fitting.loops import compiled_search

        search, scales = compiled_search(), torch.tensor(tried)

        def job(begin: int, end: int) -> None:
            part = weigh if weigh.shape[1] == 1 else weigh[:, begin:end].contiguous()
            block = panel[:, begin:end].contiguous()
            search(block.numpy(), part.contiguous().numpy(), scales.numpy(), refit, out[begin:end].numpy())

        for_each_step(job, n, _STEP_CPU, torch.get_num_threads())
        return out
    if kernels.available(panel):
        return kernels.search(panel, weigh, tried, refit)
    step = max(1, _CHUNK_GPU // size)
    for begin in range(0, n, step):
        part = weigh if weigh.shape[1] == 1 else weigh[:, begin : begin + step]
        out[begin : begin + step] = search_plainly(panel[:, begin : begin + step], part, tried, refit)
    return out


def factors(signed: bool, candidates: int) -> list[float]:
    """Scales tried, over the largest magnitude."""
    positive = torch.linspace(LOWEST, HIGHEST, candidates).tolist() if candidates > 1 else [1.0]
    return [sign * factor for factor in positive for sign in ((1.0, -1.0) if signed else (1.0,))]


def search_plainly(panel: torch.Tensor, importance: torch.Tensor, tried: list[float], refit: int) -> torch.Tensor:
    """The search in torch, for GPUs and as the definition that loops.py is held against. importance [blocksize, 1 or n]"""
    largest = panel.abs().amax(dim=0)
    best = torch.zeros_like(largest)
    least = torch.full_like(largest, torch.inf)
    levels = nf4_levels().to(panel.device)

    def consider(scales: torch.Tensor) -> None:
        error = panel - levels[nearest_codes(panel, scales)] * scales
        total = error.square_().mul_(importance).sum(dim=0)
        better = total < least
        torch.where(better, scales, best, out=best)
        torch.where(better, total, least, out=least)

    for factor in tried:
        consider(factor * largest)
    for _ in range(refit):
        chosen = levels[nearest_codes(panel, best)]
        weighted = chosen * importance
        below = (weighted * chosen).sum(dim=0)
        consider(torch.where(below > 0, (weighted * panel).sum(dim=0) / below, best))
    return best
