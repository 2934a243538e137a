"""How a weight is split over a GPU: every unit once, evenly, the same for 1 to 16 rows of x, and it fits."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from halfbyte.errors import UsageError
from halfbyte.runtime.kernels import variants
from halfbyte.runtime.kernels.partition import Partition
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
    found = set()
    for rows in range(1, variants.rows_at_once(device) + 1):
        variant = variants.default_variant(rows, 2, 1, shape[0] // 32, device)
        assert variant.rows >= rows
        assert variant.shared_bytes(rows) <= device.shared_bytes
        assert variant.threads * variant.registers <= 65536
        if rows <= 16:
            found.add(variant.warps)
    assert len(found) == 1


@pytest.mark.parametrize("row_groups", [168, 512, 1344, 120, 80, 18, 5, 1])
@pytest.mark.parametrize("most", variants.MOST_WARPS.values())
def test_few_warps_idle(row_groups, most):
    warps = variants.choose_warps(row_groups, most)
    assert warps == row_groups or (warps % 2 == 0 and 3 * most // 4 - 1 <= warps <= most)
    assert row_groups / (-(-row_groups // warps) * warps) >= (0.95 if row_groups > 100 else 0.75)


@pytest.mark.parametrize("case", [(7, 9, 2, 3), (1, 1, 1, 1), (168, 336, 16, 132), (3, 5, 2, 7), (1344, 84, 16, 132)])
def test_every_step_belongs_to_one_block_and_all_have_the_same_work_to_a_step(case):
    split = Partition.over(*case)
    cuts = split.cuts.astype(int)
    assert cuts[0] == 0
    assert cuts[-1] == split.steps
    last = split.row_groups - (split.row_blocks - 1) * split.warps
    work = np.where(np.arange(split.steps) < (split.row_blocks - 1) * split.k_blocks, split.warps, last)
    done = [work[a:b].sum() for a, b in itertools.pairwise(cuts)]
    assert min(done) > 0
    assert np.ptp(done) <= 2 * split.warps


@pytest.mark.parametrize("case", [(7, 9, 2, 3), (1, 1, 1, 5), (168, 336, 14, 132), (3, 5, 2, 50), (3, 3, 3, 132)])
def test_a_row_group_waits_for_as_many_parts_as_blocks_leave(case):
    split = Partition.over(*case)
    owners = np.repeat(np.arange(split.blocks), np.diff(split.cuts.astype(int))).reshape(split.row_blocks, -1)
    assert split.parts.tolist() == [[row[0], len(set(row))] for row in owners]
    assert split.most_parts == split.parts[:, 1].max()
    assert len(set(owners.ravel())) == split.blocks  # none without a step: it would be waited for


def test_a_weight_too_large_for_32_bits_is_refused():
    with pytest.raises(UsageError, match="too many"):
        Partition(1 << 30, 84, 15, 132).check_fits()


def test_no_room_for_x_is_an_error():
    with pytest.raises(UsageError, match="no room"):
        variants.fitting(Variant(groups=4), 32, replace(ADA, shared_bytes=49152))


def test_the_arithmetic_of_shared_memory_is_that_of_the_source():
    """X_AT + X_STAGES * m * X_ROW: read off the source, computed by hand."""
    variant = replace(Variant(), warps=12, x_stages=3, table_stride=128, depth=5, stage_units=4)
    ring = 12 * 5 * 4 * (1024 + 32)
    assert variant.shared_bytes(5) == 2048 + 32768 + 4096 + ring + 3 * 5 * 4 * 128
    assert replace(variant, alu_words=4).shared_bytes(5) == variant.shared_bytes(5) - 32768
