"""nf4_linear.cu walked through in numpy: the same index arithmetic, lane by lane, in float64.

It computes what the kernel computes if its layout is right: fragments of mma.m16n8k16 are filled and read as the PTX manual says,
bytes are fetched from where a lane fetches them, parts are numbered, left and added as the kernel does. A wrong index here
or in the layout gives a wrong product.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import torch

from halfbyte.runtime.kernels import levels
from halfbyte.runtime.kernels.partition import Partition
from halfbyte.runtime.linear.weight import Nf4Weight

LANE = np.arange(32)
G, T = LANE >> 2, LANE & 3


def byte_permute(a: int, b: int, selector: int) -> int:
    """PRMT: four bytes out of eight; a selector with its top bit set spreads the byte's sign."""
    source = [(a >> 8 * i) & 255 for i in range(4)] + [(b >> 8 * i) & 255 for i in range(4)]
    out = 0
    for i in range(4):
        nibble = selector >> 4 * i & 15
        byte = source[nibble & 7]
        out |= (byte if nibble < 8 else 255 * (byte >> 7)) << 8 * i
    return out


def multiply(acc: np.ndarray, a: np.ndarray, b: np.ndarray) -> None:
    """mma.m16n8k16: acc [32, 4] += A B. a [32, 4 registers, 2], b [32, 2 registers, 2]; PTX manual, section on this shape."""
    matrix_a, matrix_b = np.zeros((16, 16)), np.zeros((16, 8))
    for register in range(4):
        for half in range(2):
            matrix_a[G + 8 * (register & 1), 2 * T + half + 8 * (register >> 1)] = a[:, register, half]
    for register in range(2):
        for half in range(2):
            matrix_b[2 * T + half + 8 * register, G] = b[:, register, half]
    product = matrix_a @ matrix_b
    for c in range(4):
        acc[:, c] += product[G + 8 * (c >> 1), 2 * T + (c & 1)]


@dataclass
class Walk:
    """A launch: the result, how often each part of a row group was left, and how many it has."""

    y: np.ndarray
    left: np.ndarray
    parts: np.ndarray


def linear(x: torch.Tensor, weight: Nf4Weight, warps: int, multiprocessors: int, column_groups: int) -> Walk:
    """x [m, columns] float64 -> [m, rows], by at most `multiprocessors` blocks of `warps` warps each."""
    tiles, codes = weight.tiles.view(-1).numpy(), weight.codes.numpy()
    nested, groups, maps = weight.nested.numpy(), weight.groups.numpy(), weight.maps.numpy()
    r_tiles, k_blocks, subs = weight.row_tiles, weight.columns // 64, 64 // weight.blocksize
    table = levels.pair_table()
    pairs = np.stack([levels.bf16_values(table & 0xFFFF), levels.bf16_values(table >> 16)], axis=1).astype(np.float64)
    m, activations = x.shape[0], x.numpy()
    split = Partition.over(len(groups), k_blocks, warps, multiprocessors)
    first_block, parts = split.parts.astype(int).T
    cuts = split.cuts.tolist()
    partial = np.full((len(groups), split.most_parts, r_tiles, column_groups, 32, 4), np.nan)
    left = np.zeros((len(groups), split.most_parts), dtype=int)
    y = np.full((m, weight.rows), np.nan)
    own_row = 8 * (T & (2 * r_tiles - 1)) + G

    def write(sums: np.ndarray, group: int) -> None:
        for i in range(r_tiles):
            for q in range(column_groups):
                for c in range(4):
                    row = (group * r_tiles + i) * 16 + G + 8 * (c >> 1)
                    column = 8 * q + 2 * T + (c & 1)
                    keep = column < m
                    y[column[keep], row[keep]] = sums[i, q, keep, c] * levels.UNIT

    for block, warp in itertools.product(range(split.blocks), range(warps)):
        step, end = cuts[block], cuts[block + 1]
        while step < end:
            row_block, begin = divmod(step, k_blocks)
            stop = min(k_blocks, begin + end - step)
            group, step = row_block * warps + warp, step + stop - begin
            if group >= len(groups):
                continue
            sums = np.zeros((r_tiles, column_groups, 32, 4))
            for k in range(begin, stop):
                place = group * k_blocks + k
                scale_block = groups[group, 0] + own_row * (k_blocks * subs) + k * subs
                offset = groups[group, 1:2].view(np.float32)[0]
                scale = np.empty((subs, 32))
                for sub in range(subs):
                    at = place * 16 * r_tiles * subs + sub * 16 * r_tiles + G * 2 * r_tiles + (T & (2 * r_tiles - 1))
                    scale[sub] = maps[groups[group, 2], codes[at]].astype(float) * nested[scale_block >> 8] + offset
                acc = np.zeros_like(sums)
                for half in range(2):
                    for odd in range(2):
                        for i in range(r_tiles):
                            at = (place * r_tiles + i) * 512 + LANE * 16 + 4 * (2 * half + odd)
                            a = np.stack([pairs[tiles[at + register]] for register in range(4)], axis=1)
                            for q in range(column_groups):
                                row = np.minimum(8 * q + G, m - 1)
                                first = k * 64 + half * 32 + T * 8 + odd * 4
                                b = np.stack(
                                    [[activations[row, first + 2 * u + e] for e in range(2)] for u in range(2)]
                                )
                                multiply(acc[i, q], a, b.transpose(2, 0, 1))
                    if subs == 2 or half == 1:
                        for i in range(r_tiles):
                            s = [scale[half & (subs - 1)][(LANE & 28) | (2 * i + h)] for h in range(2)]
                            for c in range(4):
                                sums[i, :, :, c] += acc[i, :, :, c] * s[c >> 1]
                        acc[:] = 0
            if parts[row_block] == 1:
                write(sums, group)
                left[group, 0] += 1
                continue
            partial[group, block - first_block[row_block]] = sums
            left[group, block - first_block[row_block]] += 1
            if left[group].sum() == parts[row_block]:
                write(partial[group, : parts[row_block]].sum(axis=0), group)
    return Walk(y, left, np.repeat(parts, warps)[: len(groups)])
