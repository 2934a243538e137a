"""Does a block of 16-bit weights lie on a 16-level grid? Answered by intervals, so that "exactly" is not a tolerance.

A stored weight w is a rounded number: it stands for every real number between the midpoints to its two neighbours,
[lo, hi]. A block lies on the grid  w = scale * level  if one scale puts every product into its weight's interval:

    lo_i / |level_i|  <=  scale  <=  hi_i / |level_i|      for all i: intersect the intervals; empty means no

which needs the levels' assignment first. The weight of largest magnitude sits on one of few levels (`tops`: -8 by
q4_0's rule, else 7, 6, 5, 4; smaller ones are covered by a multiple); each guess gives a scale that is right to half a
unit in the last place, far less than half a step, so the other weights' levels follow by rounding.

The affine grid  w = d * q + m  (llama.cpp's Q4_1) has two unknowns. m is eliminated exactly (Fourier-Motzkin): there is
an m for a given d if and only if  lo_j - d*q_j <= hi_i - d*q_i  for all pairs, and the pairs bound d from both sides.

Whether the scale was bf16 or fp16 is read off the same interval: it must contain such a number. The catch: any interval
may contain one by luck, so only many blocks together say so; and a block of few different weights fits any grid.
`tells` marks the blocks that can say no: at least 6 of the 16 levels in use, a step of at least 4 units in the last place.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from halfbyte.codec.codebook import nf4_levels

#: a block on fewer levels than these is no evidence: some scale fits it by chance
MIN_LEVELS = 6
#: and neither is one whose step is fewer units in the last place: rounding alone would put every weight on the grid
MIN_STEP_ULPS = 4
#: float32 arithmetic before the weight was stored (q4_0 expands in float32), relative
SLACK = 2.0**-21
#: scales tried downward from the upper end of an interval when asking whether an affine grid's two numbers are 16-bit
_SCALES_TRIED = 8
SCALE_DTYPES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, eq=False)
class Fit:
    """What became of each of B blocks.

    tells   bool [B]: the block could have said no
    exact   bool [B]: one scale reproduces every weight of the block to the bit
    error   float32 [B, n]: distance of each weight to the grid, in steps (0.5 is as far as it gets)
    codes   int64 [B, n], 0 to 15: the level of each weight
    stored  bool [B, 2]: the scale may have been stored as bf16, as fp16
    """

    tells: torch.Tensor
    exact: torch.Tensor
    error: torch.Tensor
    codes: torch.Tensor
    stored: torch.Tensor


@cache
def levels_of(grid: str) -> torch.Tensor:
    """The 16 levels of `int4` or `nf4`, float32, ascending. Shared: do not write to it."""
    return nf4_levels() if grid == "nf4" else torch.arange(-8, 8, dtype=torch.float32)


def fit_scaled(blocks: torch.Tensor, grid: str) -> Fit:
    """Fit w = scale * level.

    blocks  bf16 or f16 [B, n], finite, on the CPU
    grid    `int4` (-8 to 7) or `nf4`
    """
    tops = torch.tensor([1.0, -1.0] if grid == "nf4" else [-8.0, 7.0, 6.0, 5.0, 4.0])
    levels = levels_of(grid)
    weight = blocks.float()
    lo, hi = _magnitude_bounds(blocks)
    at = weight.abs().argmax(dim=1, keepdim=True)
    top = weight.gather(1, at)
    ulp = 2 * (hi.gather(1, at) - top.abs()).squeeze(1)
    step = top.abs().squeeze(1) * (1 / 7.5 if grid == "nf4" else 1 / 8)
    top = torch.where(top == 0, 1.0, top)
    first = _try_tops(weight, lo, hi, top / tops[:1], levels)
    codes, scale, low, high = first
    tells = (_levels_used(codes) >= MIN_LEVELS) & (step >= MIN_STEP_ULPS * ulp)
    rest = (low > high).nonzero().squeeze(1)
    others = _try_tops(weight[rest], lo[rest], hi[rest], top[rest] / tops[1:], levels)
    better = others[2] <= others[3]
    for mine, other in zip(first, others, strict=True):
        mine[rest[better]] = other[better]
    exact = low <= high
    centre = torch.where(exact, (low + high) / 2, 1.0)[:, None] * scale
    error = (weight / centre - levels[codes]).abs() * (15 / (levels[-1] - levels[0]))
    stored = torch.zeros((len(exact), 2), dtype=torch.bool)
    magnitude = scale[exact].abs().squeeze(1).double()
    for column, dtype in enumerate(SCALE_DTYPES):
        stored[exact, column] = _round_down(high[exact] * magnitude, dtype) >= low[exact] * magnitude
    return Fit(tells, exact, error, codes, stored)


def _try_tops(
    weight: torch.Tensor, lo: torch.Tensor, hi: torch.Tensor, scales: torch.Tensor, levels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of K guessed scales [B, K] the first that fits, else the first: codes [B, n], scale [B, 1], bounds on true / guessed."""
    ratio = weight[:, None, :] / scales[:, :, None]
    if levels[0] == -8:
        # a +8 is cut to 7, whose bounds no scale can meet
        codes = ratio.round_().clamp_(-8, 7).add_(8).long()
    else:
        codes = torch.bucketize(ratio, (levels[:-1] + levels[1:]) / 2)
    product = levels[codes].abs() * scales[:, :, None].abs()
    low = (lo[:, None, :] / product).amax(dim=2)
    high = (hi[:, None, :] / product).amin(dim=2)
    pick = (low <= high).to(torch.uint8).argmax(dim=1, keepdim=True)
    wide = pick[:, :, None].expand(-1, 1, weight.shape[1])
    return (
        codes.gather(1, wide).squeeze(1),
        scales.gather(1, pick),
        low.gather(1, pick).squeeze(1),
        high.gather(1, pick).squeeze(1),
    )


def fit_affine(blocks: torch.Tensor) -> Fit:
    """Fit w = d * q + m with d > 0 and q from 0 to 15; `stored` asks of d and m both. Arguments as of `fit_scaled`."""
    weight = blocks.float()
    lo, hi = _magnitude_bounds(blocks)
    largest = weight.abs().amax(dim=1, keepdim=True)
    ulp = 2 * (hi.gather(1, weight.abs().argmax(dim=1, keepdim=True)) - largest).squeeze(1)
    spread = weight.amax(dim=1) - weight.amin(dim=1)
    # a sum near zero keeps the error of its large terms
    hi, lo = hi + largest * 2.0**-22, torch.where(weight == 0, -hi, lo) - largest * 2.0**-22
    below, above = torch.where(weight < 0, -hi, lo), torch.where(weight < 0, -lo, hi)
    first = _try_spans(weight, below, above, 15)
    codes, low, high = first[:3]
    tells = (_levels_used(codes) >= MIN_LEVELS) & (spread / 15 >= MIN_STEP_ULPS * ulp)
    for span in range(14, 7, -1):  # shorter spans are covered by a multiple
        rest = (low > high).nonzero().squeeze(1)
        others = _try_spans(weight[rest], below[rest], above[rest], span)
        better = others[1] <= others[2]
        for mine, other in zip(first, others, strict=True):
            mine[rest[better]] = other[better]
    exact = low <= high
    floor, roof = first[3:]
    step = torch.where(exact, (low + high) / 2, (spread.double() / 15).clamp(min=1e-300))[:, None]
    numbers = torch.arange(16, dtype=torch.float64)
    start = ((floor - numbers * step).amax(dim=1) + (roof - numbers * step).amin(dim=1))[:, None] / 2
    start = torch.where(exact[:, None], start, weight.amin(dim=1, keepdim=True).double())
    error = ((weight.double() - start) / step - codes).abs().float()
    stored = torch.zeros((len(exact), 2), dtype=torch.bool)
    if exact.any():
        for column, dtype in enumerate(SCALE_DTYPES):
            stored[exact, column] = _stored_affine(floor[exact], roof[exact], low[exact], high[exact], dtype)
    return Fit(tells, exact, error, codes, stored)


def _try_spans(weight: torch.Tensor, below: torch.Tensor, above: torch.Tensor, span: int) -> tuple[torch.Tensor, ...]:
    """The smallest weight on q = 0, the largest on q = span.

    returns  codes int64 [B, n]; bounds on d, float64 [B] (crossed: none fits); bounds on d*q + m for each q, float64 [B, 16]
    """
    smallest = weight.amin(dim=1, keepdim=True)
    step = ((weight.amax(dim=1, keepdim=True) - smallest) / span).clamp(min=1e-38)
    codes = ((weight - smallest) / step).round_().clamp_(0, span).long()
    shape = (weight.shape[0], 16)
    floor = torch.full(shape, -torch.inf).scatter_reduce_(1, codes, below, "amax").double()
    roof = torch.full(shape, torch.inf).scatter_reduce_(1, codes, above, "amin").double()
    low, high = torch.full(shape[:1], 1.0).double(), torch.full(shape[:1], 0.0).double()
    maybe = (floor <= roof).all(dim=1).nonzero().squeeze(1)  # each q one value: what nearly every stray block fails
    numbers = torch.arange(16, dtype=torch.float64)
    gap = numbers[None, :] - numbers[:, None]
    upper = gap > 0
    f, r = floor[maybe], roof[maybe]
    low[maybe] = ((f[:, None, :] - r[:, :, None])[:, upper] / gap[upper]).amax(dim=1)
    high[maybe] = ((r[:, None, :] - f[:, :, None])[:, upper] / gap[upper]).amin(dim=1)
    return codes, low, high, floor, roof


def _stored_affine(
    floor: torch.Tensor, roof: torch.Tensor, low: torch.Tensor, high: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """bool [B]: some d of `dtype` within its bounds leaves room for an m of `dtype`."""
    numbers = torch.arange(16, dtype=torch.float64)
    found = torch.zeros_like(low, dtype=torch.bool)
    step = _round_down(high, dtype)
    for _ in range(_SCALES_TRIED):
        line = numbers * step[:, None]
        start = _round_down((roof - line).amin(dim=1), dtype)
        found |= (step >= low) & (start >= (floor - line).amax(dim=1))
        step = _next_down(step, dtype)
    return found


def _levels_used(codes: torch.Tensor) -> torch.Tensor:
    """How many different codes each block holds, int64 [B]."""
    used = torch.zeros((codes.shape[0], 16), dtype=torch.int64)
    return used.scatter_(1, codes, torch.ones_like(codes)).sum(dim=1)


def _magnitude_bounds(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The magnitudes that round to |w|, float32 each; a zero gets -1 and the smallest half: only level 0 meets that."""
    bits = blocks.view(torch.int16) & 0x7FFF
    magnitude = bits.view(blocks.dtype).float()
    lo = (magnitude + (bits - 1).clamp(min=0).view(blocks.dtype).float()) * (0.5 - SLACK)
    hi = magnitude * (0.5 + SLACK) + (bits + 1).view(blocks.dtype).float() * (0.5 + SLACK)
    return torch.where(magnitude == 0, -1.0, lo), hi


def _round_down(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The largest number of `dtype` that is not above, as float64."""
    nearest = values.to(dtype).double()
    return torch.where(nearest > values, _next_down(nearest, dtype), nearest)


def _next_down(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The next number of `dtype` below each of `values`, which are numbers of `dtype` held in float64."""
    bits = values.to(dtype).view(torch.int16)
    key = torch.where(bits < 0, bits ^ 0x7FFF, bits) - 1
    return torch.where(key < 0, key ^ 0x7FFF, key).view(dtype).double()
