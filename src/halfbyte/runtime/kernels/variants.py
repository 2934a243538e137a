"""The compile-time choices of `nf4_linear.cu`, what they need, and how many warps a weight is split over.

Shared memory holds the table (64 or 32 KiB), the maps of scales, a ring of weights for each warp, and a few chunks of x: the chunks are
256 columns wide whatever K is, so nothing here depends on the columns of a weight. Registers decide the rest. A multiprocessor has
65,536 of them in four equal parts: 16 warps may have 128 registers a thread, 12 may have 168, 8 may have 255. A number of warps that four does
not divide leaves one quarter with less to do: its warps are done early, and the others late. What a block leaves of the registers is
room for a small kernel: then a launch behind one begins to fetch its weights while that one still runs.

The split of a weight is the same for 1 to 16 rows of x: it decides the order of additions, and a row of x must give the same bits in
any batch. So the number of warps may depend on the weight and on the device, not on the rows.

The catch: row groups that the number of warps does not divide leave warps idle in the last row block.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cache

from halfbyte.errors import UsageError

#: rows of x that share one split of the weight, hence their bits
SHARED_ROWS = 16
#: rows of x that one launch takes at most, and where shared memory is small
MOST_ROWS, FEWER_ROWS = 64, 32
#: registers a thread for as many groups: the loop has what it needs, and a small kernel has room beside a block
REGISTERS = {1: 104, 2: 112, 4: 168, 8: 255}
#: warps of a block, at most, for 1, 2, 4 and 8 groups of rows
MOST_WARPS = {1: 16, 2: 16, 4: 12, 8: 8}

_TABLE_AT, _MAPS, _X_ROW = 2048, 4096, 512


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

    warps         of a block
    row_tiles     of 16 rows in a unit; a property of the layout
    groups        of 8 rows of x
    stage_units   units in a stage of a warp's ring: 1, 2 or 4
    depth         stages of the ring
    x_stages      chunks of x on their way or in use
    alu_words     of the 4 words of a tile, decoded by permutes instead of the table
    table_stride  256 or 128 bytes
    subs          scales in 64 columns; a property of the weight
    early         weights are asked for before the previous kernel has ended
    ahead         with early: stages asked for meanwhile
    registers     a thread, at most
    """

    warps: int = 16
    row_tiles: int = 2
    groups: int = 1
    stage_units: int = 2
    depth: int = 2
    x_stages: int = 4
    alu_words: int = 0
    table_stride: int = 256
    subs: int = 1
    early: bool = False
    ahead: int = 1
    registers: int = 128

    @property
    def defines(self) -> tuple[str, ...]:
        """Compiler options that select it."""
        return tuple(f"-D{field.name.upper()}={int(getattr(self, field.name))}" for field in fields(self))

    @property
    def threads(self) -> int:
        """Of a block."""
        return 32 * self.warps

    @property
    def rows(self) -> int:
        """Rows of x it takes."""
        return 8 * self.groups

    def shared_bytes(self, rows: int) -> int:
        """Shared memory of a block with `rows` rows of x; the same sums as X_AT in the source."""
        table = 0 if self.alu_words == 4 else 256 * self.table_stride
        stage = self.stage_units * self.row_tiles * (512 + 16 * self.subs)
        before = _TABLE_AT + table + _MAPS + self.warps * self.depth * stage
        return -(-before // 128) * 128 + self.x_stages * rows * _X_ROW


def choose_warps(row_groups: int, most: int) -> int:
    """Warps of a block, `most` at most and three quarters of it at least: of the even numbers the one that leaves fewest idle.

    Fewer only where a weight has fewer row groups. With less than 12 warps a multiprocessor is slower, whatever divides.
    """
    if row_groups <= most:
        return row_groups
    tried = range(most, 3 * most // 4 - 1, -2)
    return max(tried, key=lambda warps: (row_groups / (-(-row_groups // warps) * warps), warps))


@cache
def default_variant(rows: int, row_tiles: int, subs: int, row_groups: int, device: Device) -> Variant:
    """The variant that runs unless another is asked for: rows 1..MOST_ROWS of x. The best of those measured on an H200 (docs/log.md)."""
    groups = next(groups for groups in MOST_WARPS if rows <= 8 * groups)
    warps = choose_warps(row_groups, MOST_WARPS[groups])
    variant = Variant(
        warps=warps, row_tiles=row_tiles, groups=groups, subs=subs,
        early=device.capability >= (9, 0), registers=REGISTERS[groups],
    )  # fmt: skip
    return fitting(variant, rows, device)


def rows_at_once(device: Device) -> int:
    """Rows of x that a launch takes on this device: x is kept in shared memory a few chunks at a time."""
    return MOST_ROWS if device.shared_bytes > 200_000 else FEWER_ROWS


def fitting(variant: Variant, rows: int, device: Device) -> Variant:
    """The variant with the larger table and all its stages if those fit, else with less. The bits are the same. raises UsageError"""
    units, depth, stages = variant.stage_units, variant.depth, variant.x_stages
    less = [(256, units, depth, n) for n in range(stages, 1, -1)] + [
        (128, units, depth, 2),
        (128, 2, depth, 2),
        (128, 1, 3, 2),
        (128, 1, 2, 2),
    ]
    for stride, units, depth, stages in less:
        tried = replace(variant, table_stride=stride, stage_units=units, depth=depth, x_stages=stages)
        if tried.shared_bytes(rows) <= device.shared_bytes:
            return tried
    raise UsageError(f"no room in shared memory for {rows} rows of x", where=str(variant), todo="use fewer stages")
