"""The compile-time choices of `nf4_linear.cu`, what they need, and how a weight is split over a GPU.

Shared memory decides most of it. A block keeps the table (64 or 32 KiB), a ring of weights for each warp, and the rows of x it
multiplies with. x has 16 rows at most in the usual case, so the columns of W are cut into slices, few enough that 16
rows of a slice fit. The split is the same for 1 to 16 rows: it decides the order of additions, and a row of x must
give the same bits in any batch.

    blocks of the grid = slices * (multiprocessors // slices)      one a multiprocessor, all running at once

The catch: a multiprocessor count that slices do not divide leaves some idle, so a slice count that divides well is preferred to the smallest.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from halfbyte.errors import UsageError

#: rows of x that share one split of the weight, hence their bits
SHARED_ROWS = 16
#: rows of x that one launch takes at most
MOST_ROWS = 32
#: least share of the multiprocessors that a split should use
GOOD_USE = 0.98

_TABLE_AT, _MAPS, _BLOCK_COLUMNS = 2048, 4096, 64


@dataclass(frozen=True)
class Device:
    """What is asked of a GPU: multiprocessors, shared memory a block may have (bytes), compute capability."""

    multiprocessors: int
    shared_bytes: int
    capability: tuple[int, int]

    @property
    def arch(self) -> str:
        """The name nvcc and NVRTC have for it: sm_90a, sm_89, ..."""
        major, minor = self.capability
        return f"sm_{major}{minor}{'a' if major >= 9 else ''}"


@dataclass(frozen=True)
class Variant:
    """One way to compile the kernel. Defaults are what the source has.

    warps         in a block
    row_tiles     of 16 rows in a unit; a property of the layout
    groups        of 8 rows of x
    depth         units in a warp's ring
    alu_words     of the 4 words of a tile, decoded by permutes instead of the table
    table_stride  256 or 128 bytes
    subs          scales in 64 columns; a property of the weight
    early         weights are asked for before the previous kernel has ended
    prefetch      with early: units of each warp fetched as far as L2 meanwhile
    resident      blocks that have room on a multiprocessor: with 2, an early launch gets ready beside its predecessor
    """

    warps: int = 16
    row_tiles: int = 2
    groups: int = 1
    depth: int = 4
    alu_words: int = 0
    table_stride: int = 256
    subs: int = 1
    early: bool = False
    prefetch: int = 0
    resident: int = 1

    @property
    def defines(self) -> tuple[str, ...]:
        """Compiler options that select it."""
        names = ("warps", "row_tiles", "groups", "depth", "alu_words", "table_stride", "subs", "early", "prefetch")
        chosen = tuple(f"-D{name.upper()}={int(getattr(self, name))}" for name in names)
        return (*chosen, f"-DRESIDENT={self.beside}")

    @property
    def beside(self) -> int:
        """Blocks on a multiprocessor: more than one group of x leaves room for one."""
        return self.resident if self.groups == 1 else 1

    def room(self, device: Device) -> int:
        """Shared memory of a block, bytes; each block beside another costs 1024 more."""
        return device.shared_bytes if self.beside == 1 else device.shared_bytes // self.beside - 1024

    @property
    def rows(self) -> int:
        """Rows of x it takes."""
        return 8 * self.groups

    @property
    def fixed_bytes(self) -> int:
        """Shared memory without x; the same sums as X_AT in the source."""
        table = 0 if self.alu_words == 4 else 256 * self.table_stride
        stage = self.row_tiles * (512 + 16 * self.subs)
        return _TABLE_AT + table + _MAPS + self.warps * self.depth * stage

    def shared_bytes(self, rows: int, blocks: int) -> int:
        """Shared memory with `rows` rows of x of `blocks` * 64 columns; in the end two parts of results a warp lie there instead."""
        parts = _TABLE_AT + self.warps * 2 * self.row_tiles * self.groups * 512
        return max(parts, self.fixed_bytes + rows * (blocks * 2 * _BLOCK_COLUMNS + 64))

    def most_blocks(self, rows: int, device: Device) -> int:
        """Blocks of 64 columns that a slice may have, so that `rows` rows of it fit."""
        return ((self.room(device) - self.fixed_bytes) // rows - 64) // (2 * _BLOCK_COLUMNS)


def choose_slices(k_blocks: int, most_blocks: int, multiprocessors: int) -> int:
    """Slices of K: the fewest that fit and use GOOD_USE of the multiprocessors, else those that use most.

    raises  UsageError if a slice cannot even hold one block of 64 columns
    """
    if most_blocks < 1:
        raise UsageError("no room in shared memory for a block of x", where="variant", todo="use fewer warps or stages")
    fewest = -(-k_blocks // most_blocks)
    best, best_use = fewest, 0.0
    for slices in range(fewest, min(k_blocks, multiprocessors, 4 * fewest) + 1):
        use = slices * (multiprocessors // slices) / multiprocessors
        if use >= GOOD_USE:
            return slices
        if use > best_use:
            best, best_use = slices, use
    return best


def slices_for(variant: Variant, k_blocks: int, device: Device) -> int:
    """Slices of K for a variant; equal for all variants with one or two groups that agree in everything else but the table.

    So many that SHARED_ROWS rows of x fit beside the smaller table, and 8 rows also where two blocks share a multiprocessor.
    """
    small = replace(variant, table_stride=128)
    shared = replace(small, groups=max(variant.groups, SHARED_ROWS // 8))
    most = shared.most_blocks(shared.rows, device)
    if variant.groups <= SHARED_ROWS // 8:
        most = min(most, replace(small, groups=1).most_blocks(8, device))
    return choose_slices(k_blocks, most, device.multiprocessors)


def default_variant(rows: int, row_tiles: int, subs: int, k_blocks: int, device: Device) -> Variant:
    """The variant that runs unless another is asked for: rows 1..MOST_ROWS of x. The best of those measured on an H200 (docs/log.md)."""
    groups = 1 if rows <= 8 else 2 if rows <= 16 else 4
    roomy, early = device.shared_bytes > 200_000, device.capability >= (9, 0)
    warps, depth = (16, 3) if roomy and groups < 4 else (8, 4)
    variant = Variant(warps=warps, depth=depth, row_tiles=row_tiles, groups=groups, subs=subs, early=early)
    return fitting(variant, rows, k_blocks, device)


def fitting(variant: Variant, rows: int, k_blocks: int, device: Device) -> Variant:
    """The variant with the larger table if that fits, else with the smaller. The bits are the same."""
    blocks = -(-k_blocks // slices_for(variant, k_blocks, device))
    large = replace(variant, table_stride=256)
    fits = large.shared_bytes(rows, blocks) <= variant.room(device)
    return large if fits else replace(variant, table_stride=128)
