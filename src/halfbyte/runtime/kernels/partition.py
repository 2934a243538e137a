"""Which warp works on which part of a weight, in numbers. The kernel computes the same (`first_unit`, `owner`).

A slice of K has `row_groups * blocks` units, one row group after the other. Warp w of the slice's `warps` has units

    [w * units // warps, (w + 1) * units // warps)

so loads differ by one unit at most. There are never more warps than units: parts are counted from the first warp of a row group to
its last, and a warp without a unit between them would be waited for. A row group is cut where a warp ends, and by the slices. What
the warps of a block (`block_warps` of them) have of it is one part; parts are numbered in the order of K, all row groups after
one another: `parts_of[row_group * slices + slice] + (block - first block of the row group in that slice)`. The
results are added in this order.

The catch: the kernel computes in 32 bits. `check_fits` says so before anything is launched.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from halfbyte.errors import UsageError


@dataclass(frozen=True)
class Partition:
    """A weight of `row_groups` x `k_blocks` units, over `slices` slices of K with `warps` warps each, `block_warps` a block."""

    row_groups: int
    k_blocks: int
    slices: int
    warps: int
    block_warps: int

    @classmethod
    def over(cls, row_groups: int, k_blocks: int, slices: int, blocks: int, block_warps: int) -> Partition:
        """With up to `blocks` blocks a slice: as many warps as the smallest slice has units, if those are fewer."""
        warps = min(blocks * block_warps, row_groups * (k_blocks // slices))
        return cls(row_groups, k_blocks, slices, warps, block_warps)

    def blocks(self, part: int) -> tuple[int, int]:
        """First and last + 1 block of 64 columns of a slice."""
        return part * self.k_blocks // self.slices, (part + 1) * self.k_blocks // self.slices

    def parts_of(self) -> np.ndarray:
        """Number of the first part of (row group, slice), uint32 [row_groups * slices + 1]; the last is how many there are."""
        counts = np.empty((self.row_groups, self.slices), dtype=np.int64)
        group = np.arange(self.row_groups, dtype=np.int64)
        for part in range(self.slices):
            first, end = self.blocks(part)
            n = end - first
            units = self.row_groups * n
            from_block = owner(group * n, units, self.warps) // self.block_warps
            counts[:, part] = owner((group + 1) * n - 1, units, self.warps) // self.block_warps - from_block + 1
        return np.concatenate([[0], counts.reshape(-1).cumsum()]).astype(np.uint32)

    def check_fits(self) -> None:
        """Raises UsageError if a number would not fit 32 bits."""
        units = self.row_groups * -(-self.k_blocks // self.slices)
        if (units + 1) * (self.warps + 1) >= 2**32:
            raise UsageError(
                f"{self.row_groups} row groups of {self.k_blocks} blocks are too many for one launch",
                where="nf4_linear",
                todo="split the weight by rows",
            )


def first_unit(warp: int, units: int, warps: int) -> int:
    """The unit at which a warp begins."""
    return warp * units // warps


def owner(unit: np.ndarray, units: int, warps: int) -> np.ndarray:
    """The warp that has a unit."""
    return ((unit + 1) * warps - 1) // units
