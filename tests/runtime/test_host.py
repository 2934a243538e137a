"""The kernels' own sources, compiled by a C++ compiler and run on a CPU: a thread for each lane, barriers for warps.

What the GPU's instructions do is in host_machine.h; everything else is the source that NVRTC gets, with the arguments that a launch
would pass. It finds what only a GPU would find otherwise: a wrong index, a copy read too early, a part never added.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runtime.stored_weights import dense, draw
from runtime.test_emulation import table_levels

from halfbyte.codec import nf4_levels
from halfbyte.runtime.kernels import build, launch, levels
from halfbyte.runtime.kernels.partition import Partition
from halfbyte.runtime.kernels.tensors import NAMES, Tensors
from halfbyte.runtime.kernels.variants import Variant
from halfbyte.runtime.linear import reference
from halfbyte.runtime.linear.weight import weight_from

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None, reason="no g++ to compile the kernels' sources for this CPU"
)

HERE = Path(__file__).parent
CASES = [
    # variant, parts, columns, m, blocks
    (Variant(warps=2), (64, 32), 320, 1, 1),
    (Variant(warps=3, stage_units=2, depth=3, x_stages=5), (64, 64, 32), 1600, 3, 4),
    (Variant(warps=2, stage_units=1, depth=2, x_stages=2), (96, 64), 448, 8, 4),
    (Variant(warps=2), (32,), 64, 3, 3),  # one step
    (Variant(warps=3), (64, 32), 192, 2, 8),  # as many blocks as steps
    (Variant(warps=5, x_stages=2), (64, 64), 1088, 5, 2),  # a warp without a row group
    (Variant(warps=2, groups=2, stage_units=4, depth=2, table_stride=128, alu_words=2), (64, 32), 448, 13, 5),
    (Variant(warps=3, early=True, ahead=2, table_stride=128), (96, 64), 448, 4, 1),
    (Variant(warps=1, row_tiles=1, groups=4, subs=2, alu_words=4), (48, 16), 320, 27, 6),
    (Variant(warps=2, x_stages=3), (64, 64), 832, 7, 7),
    (Variant(warps=2, stage_units=2, depth=3), (64, 64), 1024, 3, 3),  # whole chunks at once
    (Variant(warps=2, groups=2), (96,), 1280, 11, 2),
    (Variant(warps=2, groups=8, stage_units=2, x_stages=2), (64,), 576, 61, 3),
    (Variant(warps=1, subs=2, row_tiles=1), (48,), 1024, 6, 2),
]


@cache
def library(name: str, defines: tuple[str, ...], folder: Path) -> Any:
    """NAME.cu with host_machine.h in place of machine.cuh, as a library with one function `run`."""
    source = build.source_of(name, machine='#include "host_machine.h"')
    source += (
        'extern "C" void run(const Params* p, u32 blocks, u32 shared_bytes, const void* const* ranges) {\n'
        f"    run_blocks(blocks, WARPS, shared_bytes, ranges, [=] {{ {name}(*p); }});\n}}\n"
    )
    file = folder / f"{name}-{abs(hash(defines))}.cpp"
    file.write_text(source, encoding="utf-8")
    built = file.with_suffix(".so")
    command = [
        "g++",
        "-O1",
        "-std=c++17",
        "-ffp-contract=off",
        "-shared",
        "-fPIC",
        "-pthread",
        "-I",
        str(HERE),
        *defines,
    ]
    ended = subprocess.run([*command, "-o", str(built), str(file)], check=False, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return ctypes.CDLL(str(built))


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """A copy at an address that is a multiple of 64, as on a GPU."""
    room = torch.empty(tensor.numel() * tensor.element_size() + 64, dtype=torch.uint8)
    start = -room.data_ptr() % 64
    copy = room[start : start + room.numel() - 64].view(tensor.dtype).view(tensor.shape)
    return copy.copy_(tensor)


def ranges_of(*tensors: torch.Tensor) -> Any:
    ends = [(t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()) for t in tensors]
    return (ctypes.c_void_p * (2 * len(ends)))(*[address for pair in ends for address in pair])


def launched(weight: Tensors, x: torch.Tensor, variant: Variant, split: Partition, folder: Path) -> torch.Tensor:
    """y of a launch into NaN, with NaN where parts wait; the counters are as before."""
    m, row_groups, most_parts = x.shape[0], split.row_groups, split.most_parts
    y = torch.full((m, weight.rows), torch.nan, dtype=torch.bfloat16)
    partial = aligned(torch.full((row_groups * most_parts * variant.row_tiles * variant.groups * 128,), torch.nan))
    counters, table = torch.zeros(row_groups, dtype=torch.int32), levels.pair_table()
    arguments = launch._LinearArguments(
        **weight.pointers(), table=table.ctypes.data, x=x.data_ptr(), y=y.data_ptr(), partial=partial.data_ptr(),
        counters=counters.data_ptr(), cuts=launch._split(split, torch.device("cpu"))[0], parts=split.parts.ctypes.data, m=m, n=weight.rows,
        row_groups=row_groups, k_blocks=weight.k_blocks, row_blocks=split.row_blocks, maps_count=weight.maps.shape[0],
        most_parts=most_parts, reserved=0, unit=levels.UNIT,
    )  # fmt: skip
    ranges = ranges_of(weight.tiles, weight.codes, x)
    library("nf4_linear", variant.defines, folder).run(
        ctypes.byref(arguments), split.blocks, variant.shared_bytes(m), ranges
    )
    assert not counters.any()
    return y


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("host")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_source_of_the_kernel_multiplies(case, folder):
    variant, parts, columns, m, blocks = case
    stored = [draw(rows, columns, seed, 64 // variant.subs) for seed, rows in enumerate(parts)]
    made = weight_from(stored)
    weight = Tensors(*[aligned(getattr(made, name)) for name in NAMES])
    x = aligned(torch.randn(m, columns).to(torch.bfloat16))
    split = Partition.over(weight.groups.shape[0], weight.k_blocks, variant.warps, blocks)
    expected = (x.double() @ dense(stored, table_levels()).T).float()
    y = launched(weight, x, variant, split, folder)
    torch.testing.assert_close(y.float(), expected, rtol=2**-8, atol=2e-4)  # y is rounded to bf16, nothing else


@pytest.mark.parametrize(("parts", "blocksize"), [((64, 32), 64), ((48,), 32)])
def test_the_source_of_dequantize_gives_the_codecs_bits(parts, blocksize, folder):
    made = weight_from([draw(rows, 192, seed, blocksize) for seed, rows in enumerate(parts)])
    weight = Tensors(*[aligned(getattr(made, name)) for name in NAMES])
    out = aligned(torch.full((weight.rows, weight.columns), torch.nan, dtype=torch.bfloat16))
    arguments = launch._DequantizeArguments(
        **weight.pointers(), levels=nf4_levels().data_ptr(), out=out.data_ptr(), row_groups=weight.groups.shape[0],
        k_blocks=weight.k_blocks,
    )  # fmt: skip
    defines = (f"-DROW_TILES={weight.row_tiles}", f"-DSUBS={weight.subs}")
    library("nf4_dequantize", defines, folder).run(ctypes.byref(arguments), 1, 0, ranges_of(out, out, out))
    expected = reference.dequantize(made.tensors)
    assert np.array_equal(out.view(torch.int16).numpy(), expected.view(torch.int16).numpy())
