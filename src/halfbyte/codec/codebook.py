"""The numbers NF4 is made of: 16 levels, their 15 midpoints, and the 256-entry map of the second level.

A weight w in a block with scale s = max|w| is stored as the index of the level nearest to w/s. The levels are
quantiles of a normal distribution (QLoRA, https://arxiv.org/abs/2305.14314, appendix E), with an exact 0 and both ends
at +-1; they are fixed by the file format. "Nearest" means: the code of x is the number of midpoints strictly below x, so a
tie goes to the lower level.

The scales are stored in 8 bits, as an index into the "dynamic" map (https://arxiv.org/abs/1511.04561): sign, then one
decade of 10 per exponent step, the smaller the decade the fewer values in it:

    decade e = 0..6   2^e values each sign at the centres of 2^e equal parts of [0.1, 1], times 10^(e-6)
    and 0 and +1      so the map is not symmetric: the lowest value is -0.9929..., the highest is 1

The catch: bitsandbytes computes the map in float32 (0.49.2 as well as 0.50.2, but 0.49.2 on CPU ends at -1.0), and files
hold those very floats, so the order of float32 operations here is part of the format.
"""

from __future__ import annotations

from functools import cache

import torch

#: The 16 levels in the order of their codes; each decimal is an exact float32.
NF4_LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)

#: Blocks of the first level bitsandbytes accepts (32 since 0.49.2), and the one block size of the second level.
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCKSIZE = 256

#: bitsandbytes divides by max(absmax, this); as a float32 it is a subnormal, so nothing here may flush subnormals.
SMALLEST_SCALE = 1e-38

#: Bins of the table through which the second level rounds: -1..1 in 65536 steps.
NESTED_BINS = 65536


@cache
def nf4_levels() -> torch.Tensor:
    """The levels, float32 [16], ascending. Shared: do not write to it."""
    return torch.tensor(NF4_LEVELS, dtype=torch.float32)


@cache
def nf4_midpoints() -> torch.Tensor:
    """Half-way points between neighbouring levels, float32 [15], ascending. Shared: do not write to it."""
    levels = nf4_levels()
    return (levels[:-1] + levels[1:]) / 2


@cache
def nested_quant_map() -> torch.Tensor:
    """The signed dynamic map, float32 [256], ascending from -0.9929 to 1. Shared: do not write to it."""
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32)
        centres = (edges[:-1] + edges[1:]) / 2
        decade = (10 ** (exponent - 6) * centres).tolist()
        values += decade + [-value for value in decade]
    return torch.tensor(sorted(values), dtype=torch.float32)


@cache
def nested_code_table() -> torch.Tensor:
    """Bin -> code of the second level, uint8 [65536]. Shared: do not write to it.

    Bin i stands for -1 + 2i/65535; its code is the number of midpoints of the map strictly below that. Rounding through
    bins, rather than to the nearest map entry, is what bitsandbytes does on the CPU (csrc/cpu_ops.cpp); near a midpoint
    the two differ, and files must not.
    """
    entries = nested_quant_map()
    bins = torch.arange(NESTED_BINS, dtype=torch.float32) * 2.0 / (NESTED_BINS - 1) - 1.0
    return torch.bucketize(bins, 0.5 * (entries[:-1] + entries[1:])).to(torch.uint8)
