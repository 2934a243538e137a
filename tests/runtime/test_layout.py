"""The layout is a permutation of bytes: nothing is lost, and every byte is where the docstring says."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from halfbyte.runtime.linear.layout import tile, tile_codes, untile, untile_codes, why_unsupported

shapes = st.tuples(st.integers(1, 4), st.integers(1, 2), st.integers(1, 5), st.integers(1, 2))


@settings(max_examples=30, deadline=None)
@given(shapes)
def test_the_layout_gives_back_what_it_took(shape):
    row_groups, row_tiles, k_blocks, subs = shape
    rows = row_groups * row_tiles * 16
    packed = torch.randint(0, 256, (rows * k_blocks * 32,), dtype=torch.uint8)
    codes = torch.randint(0, 256, (rows * k_blocks * subs,), dtype=torch.uint8)
    assert torch.equal(untile(tile(packed, rows, row_tiles), rows, row_tiles), packed)
    assert torch.equal(untile_codes(tile_codes(codes, rows, row_tiles, subs), rows, row_tiles, subs), codes)


@pytest.mark.parametrize("row_tiles", [1, 2])
def test_every_byte_is_where_the_layout_says(row_tiles):
    rows, k_blocks = 32 * row_tiles, 3
    number = torch.arange(rows * k_blocks * 32)
    found = tile(number, rows, row_tiles).view(-1, k_blocks, row_tiles, 32, 16)
    for group, k, which, lane, byte in [(0, 0, 0, 0, 0), (1, 2, row_tiles - 1, 31, 15), (1, 1, 0, 22, 9)]:
        g, t, j, h, u = lane // 4, lane % 4, byte // 4, byte % 2, byte // 2 % 2
        row = (group * row_tiles + which) * 16 + 8 * h + g
        column = 64 * k + 32 * (j // 2) + 8 * t + 4 * (j % 2) + 2 * u
        assert found[group, k, which, lane, byte] == (row * k_blocks * 64 + column) // 2


def test_the_codes_of_a_unit_lie_in_the_order_of_the_lanes():
    rows, k_blocks, subs = 64, 3, 2
    number = torch.arange(rows * k_blocks * subs)
    found = tile_codes(number, rows, 2, subs).view(2, k_blocks, subs, 32)
    for group, k, sub, lane in [(0, 0, 0, 0), (1, 2, 1, 31), (1, 0, 1, 13)]:
        row = 32 * group + 8 * (lane % 4) + lane // 4
        assert found[group, k, sub, lane] == row * k_blocks * subs + k * subs + sub


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        ((24, 64, 64), "24 rows"),
        ((16, 96, 64), "96 columns"),
        ((16, 64, 128), "blocks of 128"),
        ((0, 64, 64), "0 rows"),
    ],
)
def test_what_does_not_fit_is_refused_with_a_reason(shape, reason):
    assert reason in (why_unsupported(*shape) or "")


def test_what_fits_is_not_refused():
    assert why_unsupported(43008, 5376, 64) is None
    assert why_unsupported(16, 64, 32) is None
