"""The kernel's index arithmetic, walked through without a GPU, multiplies exactly."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from runtime.emulation import byte_permute, linear
from runtime.stored_weights import dense, draw

from halfbyte.codec import nf4_levels
from halfbyte.runtime.kernels import build, levels
from halfbyte.runtime.linear.weight import weight_from

CASES = [
    # parts, columns, blocksize, warps, multiprocessors, m
    ((64,), 256, 64, 1, 1, 1),
    ((64,), 256, 64, 3, 1, 8),
    ((96,), 320, 64, 2, 4, 5),
    ((64, 32), 192, 64, 2, 3, 11),
    ((48, 16), 320, 64, 3, 2, 16),
    ((64, 32), 192, 32, 2, 5, 3),
    ((16,), 64, 64, 1, 7, 2),
    ((96, 96, 32), 704, 64, 3, 4, 4),
]


def table_levels() -> torch.Tensor:
    """The 16 levels as the tensor core sees them, after the division by their scale: float64."""
    bits = levels.bf16_bits(levels.LEVEL_SCALE * nf4_levels().double().numpy())
    return torch.from_numpy(levels.bf16_values(bits).astype(np.float64)) * levels.UNIT


@pytest.mark.parametrize("case", CASES)
def test_the_walk_of_the_kernel_multiplies_exactly_and_leaves_each_part_once(case):
    parts, columns, blocksize, warps, multiprocessors, m = case
    stored = [draw(rows, columns, seed, blocksize) for seed, rows in enumerate(parts)]
    weight = weight_from(stored)
    x = torch.randn(m, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    walk = linear(x, weight, warps, multiprocessors, 1 if m <= 8 else 2)
    expected = x @ dense(stored, table_levels()).T
    torch.testing.assert_close(torch.from_numpy(walk.y), expected, rtol=1e-6, atol=1e-6)
    assert (walk.left == (np.arange(walk.left.shape[1]) < walk.parts[:, None])).all()


def test_decoding_by_permutes_equals_the_table_for_every_byte():
    table = levels.pair_table()
    low = [sum((int(table[(4 * i + j) * 17]) & 255) << 8 * j for j in range(4)) for i in range(4)]
    high = [sum((int(table[(4 * i + j) * 17]) >> 8 & 255) << 8 * j for j in range(4)) for i in range(4)]
    for word in np.random.default_rng(0).integers(0, 2**32, 2000, dtype=np.uint64).tolist():
        shifted, index = word << 4 & 0xFFFFFFFF, word & 0x77777777
        for i in range(2):
            upper = byte_permute(shifted, word, 0xFBEA if i else 0xD9C8)
            select = index >> 16 if i else index
            found = [
                byte_permute(t[2], t[3], select) & upper | byte_permute(t[0], t[1], select) & ~upper
                for t in (low, high)
            ]
            for j, selector in enumerate((0x4051, 0x6273)):
                byte = word >> 8 * (2 * i + j) & 255
                assert byte_permute(*found, selector) == table[byte]


def test_an_address_in_the_table_is_one_permute():
    for lane in (0, 7, 31):
        for word in (0, 0xFFFFFFFF, 0x12345678):
            for i in range(4):
                assert byte_permute(word, lane * 4, 0x7604 | i << 4) == (word >> 8 * i & 255) * 256 + lane * 4


def test_the_permutes_tested_here_are_those_of_the_source():
    source = build.source_of("nf4_linear")
    assert set(re.findall(r"0x(?:fbea|d9c8|4051|6273|7604)\b", source)) == {
        "0xfbea", "0xd9c8", "0x4051", "0x6273", "0x7604",
    }  # fmt: skip


def test_scaled_levels_are_nearer_than_plain_ones():
    """Both at worst and in the mean square over the 16."""
    exact = nf4_levels().double()
    plain = exact.to(torch.bfloat16).double()
    worst = [((found - exact).abs() / exact.abs().clamp(min=1e-9)).max().item() for found in (table_levels(), plain)]
    assert worst[0] < 0.0018 < 0.003 < worst[1]
    assert (table_levels() - exact).square().sum() < 0.5 * (plain - exact).square().sum()
