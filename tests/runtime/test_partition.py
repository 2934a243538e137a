"""How a weight is split over a GPU: every unit once, evenly, the same for 1 to 16 rows of x, and it fits."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from halfbyte.errors import UsageError
from halfbyte.runtime.kernels import variants
from halfbyte.runtime.kernels.partition import Partition, first_unit, owner
from halfbyte.runtime.kernels.variants import Device, Variant

HOPPER = Device(132, 232448, (9, 0))
ADA = Device(128, 101376, (8, 9))
AMPERE = Device(108, 166912, (8, 0))
#: rows and columns of Gemma 4 31B's linears, fused where they share their input
SHAPES = [
    (43008, 5376),
    (5376, 21504),
    (16384, 5376),
    (18432, 5376),
    (5376, 8192),
    (5376, 16384),
    (8192, 5376),
    (576, 576),
]


@pytest.mark.parametrize("device", [HOPPER, ADA, AMPERE])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_batch_of_1_to_16_has_the_same_split_and_fits(shape, device):
    k_blocks = shape[1] // 64
    found = set()
    for rows in range(1, 33):
        variant = variants.default_variant(rows, 2, 1, k_blocks, device)
        slices = variants.slices_for(variant, k_blocks, device)
        assert variant.rows >= rows
        assert variant.shared_bytes(rows, -(-k_blocks // slices)) <= device.shared_bytes
        if rows <= 16:
            found.add((slices, variant.warps))
    assert len(found) == 1


@pytest.mark.parametrize("shape", SHAPES[:-1])
def test_on_hopper_the_31b_shapes_leave_no_multiprocessor_idle(shape):
    slices = variants.slices_for(Variant(), shape[1] // 64, HOPPER)
    assert slices * (132 // slices) >= 0.98 * 132


@pytest.mark.parametrize(
    "case", [(7, 9, 2, 3, 1), (1, 1, 1, 40, 8), (168, 336, 6, 352, 16), (3, 5, 5, 2, 2), (3, 3, 1, 2112, 16)]
)
def test_every_unit_belongs_to_one_warp_and_loads_differ_by_one(case):
    split = Partition(*case)
    for part in range(split.slices):
        first, end = split.blocks(part)
        units = split.row_groups * (end - first)
        starts = np.array([first_unit(w, units, split.warps) for w in range(split.warps + 1)])
        assert starts[0] == 0
        assert starts[-1] == units
        assert np.ptp(np.diff(starts)) <= 1
        assert np.array_equal(
            owner(np.arange(units), units, split.warps), np.repeat(np.arange(split.warps), np.diff(starts))
        )


@pytest.mark.parametrize(
    "case", [(7, 9, 2, 3, 2), (1, 1, 1, 5, 8), (168, 336, 6, 22, 16), (3, 5, 2, 50, 2), (3, 3, 1, 132, 16)]
)
def test_a_row_group_waits_for_as_many_parts_as_blocks_leave(case):
    split = Partition.over(*case)
    counted = np.diff(split.parts_of()).reshape(split.row_groups, split.slices)
    for part in range(split.slices):
        first, end = split.blocks(part)
        blocks = end - first
        warps = owner(np.arange(split.row_groups * blocks), split.row_groups * blocks, split.warps)
        left = [len(set(warps[g * blocks : (g + 1) * blocks] // split.block_warps)) for g in range(split.row_groups)]
        assert counted[:, part].tolist() == left


def test_a_weight_too_large_for_32_bits_is_refused():
    with pytest.raises(UsageError, match="too many"):
        Partition(1 << 20, 84, 2, 1056, 16).check_fits()


def test_no_room_for_x_is_an_error():
    with pytest.raises(UsageError, match="no room"):
        variants.slices_for(Variant(warps=16, depth=12), 84, ADA)


def test_the_arithmetic_of_shared_memory_is_that_of_the_source():
    """RING_AT + WARPS * DEPTH * STAGE_BYTES, and 64 bytes more for each row of x: read off the source, computed by hand."""
    variant = replace(Variant(), warps=12, depth=5, table_stride=128)
    assert variant.shared_bytes(3, 7) == 2048 + 32768 + 4096 + 12 * 5 * (1024 + 32) + 3 * (7 * 128 + 64)
    assert replace(variant, alu_words=4).fixed_bytes == variant.fixed_bytes - 32768
