"""One call of a kernel: its variant, its workspace, its arguments.

Two buffers outlive a call: `partial`, where parts of results wait for the others, and the counters of those that have arrived (zero
between launches; a kernel leaves them so). They are kept per device and stream, and grow. A captured CUDA graph has
its own pair: run the same call once outside of a graph first, which sizes both, loads the kernel and copies the small tables.

The catch: a graph's buffers are shared by all graphs of a device, so two graphs must not run at the same time.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import numpy as np
import torch

from halfbyte.codec import nf4_levels
from halfbyte.errors import UsageError
from halfbyte.runtime.kernels import driver, levels, variants
from halfbyte.runtime.kernels.partition import MOST_BLOCKS, Partition
from halfbyte.runtime.kernels.tensors import POINTERS, Tensors
from halfbyte.runtime.kernels.variants import Variant


class _LinearArguments(ctypes.Structure):
    """`Params` of nf4_linear.cu."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in (*POINTERS, "table", "x", "y", "partial", "counters", "parts")),
        *((name, ctypes.c_uint32) for name in ("m", "n", "row_groups", "k_blocks", "row_blocks")),
        *((name, ctypes.c_uint32) for name in ("maps_count", "most_parts", "reserved")),
        ("unit", ctypes.c_float),
        ("cuts", ctypes.c_uint32 * (MOST_BLOCKS + 1)),
    ]


class _DequantizeArguments(ctypes.Structure):
    """`Params` of nf4_dequantize.cu."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in (*POINTERS, "levels", "out")),
        ("row_groups", ctypes.c_uint32),
        ("k_blocks", ctypes.c_uint32),
    ]


class _Workspace:
    """Buffers that outlive a call; grown ones are kept too, since a graph may hold their addresses."""

    def __init__(self) -> None:
        self.kept: list[torch.Tensor] = []
        self.partial = self.counters = torch.empty(0)

    def ensure(self, floats: int, counters: int, device: torch.device) -> None:
        """At least so many."""
        with torch.inference_mode(False):  # they live on: nobody may be kept from writing into them later
            if self.partial.numel() < floats:
                self.partial = torch.empty(floats, dtype=torch.float32, device=device)
                self.kept.append(self.partial)
            if self.counters.numel() < counters:
                self.counters = torch.zeros(max(counters, 8192), dtype=torch.int32, device=device)
                self.kept.append(self.counters)


_workspaces: dict[tuple[int, int], _Workspace] = {}
#: stands for a stream's address while a graph is captured
_GRAPH = -1


def _workspace(device: torch.device, stream: int, floats: int, counters: int) -> _Workspace:
    index = device.index or 0
    capturing = torch.cuda.is_current_stream_capturing()
    for key in (_GRAPH,) if capturing else (_GRAPH, stream):
        space = _workspaces.setdefault((index, key), _Workspace())
        if capturing and (space.partial.numel() < floats or space.counters.numel() < counters):
            raise UsageError(
                "a graph is captured before its buffers are there",
                where="nf4_linear",
                todo="run the same call once before the capture",
            )
        space.ensure(floats, counters, device)
    return space


@cache
def _small_tables(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    table = torch.from_numpy(levels.pair_table().view(np.int32)).to(device)
    return table, nf4_levels().to(device)


@cache
def partition_of(variant: Variant, row_groups: int, k_blocks: int, device: variants.Device) -> Partition:
    """How the variant splits a weight over a device. raises UsageError"""
    partition = Partition.over(row_groups, k_blocks, variant.warps, device.multiprocessors)
    partition.check_fits()
    return partition


@cache
def _split(partition: Partition, device: torch.device) -> tuple[Any, torch.Tensor]:
    """Its cuts as the kernel's argument, its parts on the device."""
    cuts = (ctypes.c_uint32 * (MOST_BLOCKS + 1))(*partition.cuts.tolist())
    return cuts, torch.from_numpy(partition.parts.view(np.int32)).to(device)


def rows_at_once(device: torch.device) -> int:
    """Rows of x that one launch takes on this GPU."""
    return variants.rows_at_once(driver.device_of(device.index or 0))


def linear(
    x: torch.Tensor, weight: Tensors, variant: Variant | None = None, out: torch.Tensor | None = None
) -> torch.Tensor:
    """x [m, columns] bf16, contiguous, 1 <= m <= MOST_ROWS, on the weight's GPU -> [m, rows] bf16.

    variant  None: `variants.default_variant`
    out      bf16 [m, rows], contiguous, to write into
    raises   NoCompiler, UsageError (the variant does not fit)
    """
    m, index = x.shape[0], x.device.index or 0
    device = driver.device_of(index)
    row_groups, k_blocks = weight.groups.shape[0], weight.k_blocks
    if variant is None:
        variant = variants.default_variant(m, weight.row_tiles, weight.subs, row_groups, device)
    partition = partition_of(variant, row_groups, k_blocks, device)
    shared, most_parts = variant.shared_bytes(m), partition.most_parts
    if not 1 <= m <= variant.rows or shared > device.shared_bytes or x.data_ptr() % 16:
        raise UsageError(f"{m} rows of x and {shared} bytes of shared memory do not fit", where=str(variant))
    kernel = driver.function(index, "nf4_linear", variant.defines)
    cuts, parts = _split(partition, x.device)
    stream = torch.cuda.current_stream(x.device).cuda_stream
    space = _workspace(x.device, stream, row_groups * most_parts * variant.row_tiles * variant.groups * 128, row_groups)
    y = torch.empty(m, weight.rows, dtype=torch.bfloat16, device=x.device) if out is None else out
    arguments = _LinearArguments(
        **weight.pointers(), table=_small_tables(x.device)[0].data_ptr(), x=x.data_ptr(), y=y.data_ptr(),
        partial=space.partial.data_ptr(), counters=space.counters.data_ptr(), cuts=cuts, parts=parts.data_ptr(),
        m=m, n=weight.rows, row_groups=row_groups, k_blocks=k_blocks, row_blocks=partition.row_blocks,
        maps_count=weight.maps.shape[0], most_parts=most_parts, reserved=0, unit=levels.UNIT,
    )  # fmt: skip
    with torch.cuda.device(x.device):
        driver.launch(kernel, partition.blocks, variant.threads, shared, stream, arguments, variant.early)
    return y


def dequantize(weight: Tensors, out: torch.Tensor) -> None:
    """Write the weight into `out`, bf16 [rows, columns], contiguous, on the weight's GPU. raises NoCompiler"""
    index = out.device.index or 0
    device = driver.device_of(index)
    kernel = driver.function(index, "nf4_dequantize", (f"-DROW_TILES={weight.row_tiles}", f"-DSUBS={weight.subs}"))
    arguments = _DequantizeArguments(
        **weight.pointers(), levels=_small_tables(out.device)[1].data_ptr(), out=out.data_ptr(),
        row_groups=weight.groups.shape[0], k_blocks=weight.k_blocks,
    )  # fmt: skip
    with torch.cuda.device(out.device):
        stream = torch.cuda.current_stream(out.device).cuda_stream
        units = weight.groups.shape[0] * weight.k_blocks
        driver.launch(kernel, min(-(-units // 8), 16 * device.multiprocessors), 256, 0, stream, arguments)
