"""Rounding to NF4 without arithmetic: for a 16-bit weight type, 15 integer thresholds per absmax.

In a block, a weight w gets code  #{i : fl32(w * inv) > midpoint_i},  inv = fl32(1 / max(absmax, 1e-38)).  The product grows
with w, so each condition is `w > t` for some t that depends on absmax alone. And absmax is the magnitude of a weight, hence one
of at most 32,768 values. So all thresholds fit a table of 32768 x 15 int16 (1 MB), the products are never computed, and
rounding a weight is 15 integer comparisons: 16 weights per 256-bit vector instead of 8, and exact by construction.

Weights are compared as integers: reading the bits of a bf16 or f16 as a signed integer orders the positives; flipping the
15 low bits of the negatives makes the whole order right (`key = bits ^ ((bits >> 15) & 0x7fff)`, and back by the same).

Thresholds are found by bisection over the keys, all 32768 x 15 at once, with the float32 operations of the definition
itself. The catch: -0 and +0 are neighbouring keys, so a threshold may fall between them; the bisection compares them as
float32 would (equal), so it never does.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch

from halfbyte.codec.codebook import SMALLEST_SCALE, nf4_midpoints


@dataclass(frozen=True, eq=False)
class Thresholds:
    """The table of one 16-bit dtype. Rows are magnitudes' bits; rows from `limit` on (infinity, NaN) are never used.

    keys    int16 [32768, 15]: code = number of entries strictly below the weight's key
    values  float32 [32768]: the magnitude itself
    limit   bits of infinity: the first magnitude that is not finite
    """

    keys: torch.Tensor
    values: torch.Tensor
    limit: int


@cache
def thresholds(dtype: torch.dtype) -> Thresholds:
    """Thresholds of bfloat16 or float16. About a fifth of a second, once.

    In numpy, whose float32 is as exact as torch's: torch would wake its threads for each of these small steps.
    """
    table = torch.arange(32768, dtype=torch.int32).to(torch.int16).view(dtype).float()
    values = table.numpy()
    limit = int(np.isfinite(values).sum())
    inverse = (np.float32(1.0) / np.maximum(values[:limit], np.float32(SMALLEST_SCALE)))[:, None]
    midpoints = nf4_midpoints().numpy()
    # Invariant: the key `low` does not exceed the midpoint, the key `high` does (or is one past the largest finite).
    low = np.full((limit, midpoints.size), -limit - 1, dtype=np.int32)
    high = np.full_like(low, limit)
    with np.errstate(over="ignore", under="ignore"):
        while (high - low).max() > 1:
            middle = (low + high) >> 1
            above = _value_of(middle, values) * inverse > midpoints
            high = np.where(above, middle, high)
            low = np.where(above, low, middle)
    keys = torch.zeros((32768, midpoints.size), dtype=torch.int16)
    keys[:limit] = torch.from_numpy(low).to(torch.int16)
    return Thresholds(keys, table, limit)


def _value_of(keys: Any, values: Any) -> Any:
    """float32 values of ordered keys (int32 array, shape kept): k >= 0 is magnitude k, k < 0 is minus magnitude -k - 1."""
    magnitude = values[np.where(keys >= 0, keys, -keys - 1)]
    return np.where(keys >= 0, magnitude, -magnitude)
