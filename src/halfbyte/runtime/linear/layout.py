"""Where each byte of an NF4 weight goes, so that one 16-byte load is what a lane of a warp multiplies with.

bitsandbytes stores a weight [N, K] row after row, two elements a byte. A tensor core instruction (mma.m16n8k16) takes 16 rows x
16 columns, spread over 32 lanes: lane 4 g + t holds rows g and g + 8 (h = 0, 1), and of each row two pairs of columns (u = 0, 1).
Which 16 columns those are does not matter, if the activations are permuted alike. So a tile is 16 rows x 64 columns, a lane
owns columns 8 t .. 8 t + 7 of each 32, and the bytes of a lane are

    word j = 2 * half + step (one instruction each), byte h + 2 u:     row 8 h + g, columns 32 half + 8 t + 4 step + 2 u, + 1

A byte of bitsandbytes already holds a pair of columns: the layout is a permutation of bytes. The columns of a lane are
contiguous, so it reads its activations from plain row-major x, 16 bytes at a time. Tiles lie as

    [row group][64 columns][tile of the row group][lane][16 bytes]          a row group is ROW_TILES * 16 rows: 32 or 16

The scales' codes (one byte a block, bitsandbytes' own) lie beside: [row group][64 columns][block][g][tile, h], so that in a
unit of 32 rows lane 4 g + t reads the byte at its own number.

The catch: N must be a multiple of 16 and K of 64. `why_unsupported` says what does not fit; such a weight stays where it is.
"""

from __future__ import annotations

import torch

TILE_ROWS, TILE_COLUMNS = 16, 64
#: blocks of the first level that the kernels know: one or two scales in 64 columns
BLOCKSIZES = (64, 32)


def why_unsupported(rows: int, columns: int, blocksize: int) -> str | None:
    """Why a weight [rows, columns] cannot have this layout, or None if it can."""
    if rows < TILE_ROWS or rows % TILE_ROWS:
        return f"{rows} rows are not a multiple of {TILE_ROWS}"
    if columns < TILE_COLUMNS or columns % TILE_COLUMNS:
        return f"{columns} columns are not a multiple of {TILE_COLUMNS}"
    if blocksize not in BLOCKSIZES:
        return f"blocks of {blocksize} are not among {BLOCKSIZES}"
    return None


def tile(packed: torch.Tensor, rows: int, row_tiles: int) -> torch.Tensor:
    """bitsandbytes' bytes -> ours. uint8 [rows * columns / 2] -> uint8 of the same size."""
    #                    row group, tile,      h, g,  64s, half, t, step, u
    view = packed.reshape(-1, row_tiles, 2, 8, packed.numel() // rows // 32, 2, 4, 2, 2)
    return view.permute(0, 4, 1, 3, 6, 5, 7, 8, 2).reshape(-1)


def untile(tiles: torch.Tensor, rows: int, row_tiles: int) -> torch.Tensor:
    """The inverse of `tile`."""
    #                   row group, 64s, tile,      g, t, half, step, u, h
    view = tiles.reshape(-1, tiles.numel() // rows // 32, row_tiles, 8, 4, 2, 2, 2, 2)
    return view.permute(0, 2, 8, 3, 1, 5, 4, 6, 7).reshape(-1)


def tile_codes(codes: torch.Tensor, rows: int, row_tiles: int, subs: int) -> torch.Tensor:
    """Codes of the scales, row after row -> beside their tiles. Any dtype [rows * blocks of a row]; subs blocks in 64 columns."""
    #                   row group, tile,      h, g,  64s, block
    view = codes.reshape(-1, row_tiles, 2, 8, codes.numel() // rows // subs, subs)
    return view.permute(0, 4, 5, 3, 1, 2).reshape(-1)


def untile_codes(codes: torch.Tensor, rows: int, row_tiles: int, subs: int) -> torch.Tensor:
    """The inverse of `tile_codes`."""
    #                   row group, 64s, block, g, tile, h
    view = codes.reshape(-1, codes.numel() // rows // subs, subs, 8, row_tiles, 2)
    return view.permute(0, 4, 5, 3, 1, 2).reshape(-1)
