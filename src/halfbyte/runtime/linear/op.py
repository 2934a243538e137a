"""torch.ops.halfbyte.nf4_linear: y = x W^T, by whichever path is right for the batch and the device.

    CUDA, bf16                        what the weight's table says for so many rows of x (halfbyte.runtime.linear.table):
                                      the kernel, 64 rows at a time (halfbyte.runtime.kernels), or
                                      the weight expanded into one reused buffer, then cuBLAS
    CUDA, otherwise, 1 to 16 rows     a Triton kernel (halfbyte.runtime.linear.portable)
    anything else                     halfbyte.runtime.linear.reference

A batch of 1 to 16 gives each of its rows the bits it would have alone. The op has a fake, so torch.compile and CUDA graphs take it as
one node; it has no gradient, and says so.

The catch: without NVRTC, or on a GPU older than Ampere, the kernels are off: slower paths are taken, with one warning.
"""

from __future__ import annotations

import warnings
from functools import cache

import torch

from halfbyte.errors import ShapeMismatch, UsageError
from halfbyte.runtime.kernels.build import NoCompiler
from halfbyte.runtime.kernels.tensors import Tensors
from halfbyte.runtime.linear import portable, reference, table


@torch.library.custom_op("halfbyte::nf4_linear", mutates_args=())
def nf4_linear(
    x: torch.Tensor,
    tiles: torch.Tensor,
    codes: torch.Tensor,
    nested: torch.Tensor,
    groups: torch.Tensor,
    maps: torch.Tensor,
    paths: str = table.DEFAULT,
) -> torch.Tensor:
    """x [..., columns] -> [..., rows] in x's dtype; the other tensors are those of `Nf4Weight`.

    paths   which path for how many rows, on a GPU (halfbyte.runtime.linear.table)
    raises  ShapeMismatch if x has not the weight's columns, UsageError if `paths` is no table
    """
    weight = Tensors(tiles, codes, nested, groups, maps)
    check_columns(x, weight)
    table.steps(paths)
    return reference.linear(x, weight)


@nf4_linear.register_fake
def _(
    x: torch.Tensor,
    tiles: torch.Tensor,
    codes: torch.Tensor,
    nested: torch.Tensor,
    groups: torch.Tensor,
    maps: torch.Tensor,
    paths: str = table.DEFAULT,
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], tiles.shape[0]))


def _no_gradient(context: object, *gradients: torch.Tensor) -> None:
    raise UsageError(
        "this layer has no gradient", where="nf4_linear", todo="train with bitsandbytes' layers: load(..., fast=False)"
    )


nf4_linear.register_autograd(_no_gradient)


@nf4_linear.register_kernel("cuda")
def _(
    x: torch.Tensor,
    tiles: torch.Tensor,
    codes: torch.Tensor,
    nested: torch.Tensor,
    groups: torch.Tensor,
    maps: torch.Tensor,
    paths: str = table.DEFAULT,
) -> torch.Tensor:
    weight = Tensors(tiles, codes, nested, groups, maps)
    check_columns(x, weight)
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    reason = "x is not bf16" if x.dtype != torch.bfloat16 else why_no_kernel(x.device)
    path = table.path_for(paths, flat.shape[0])
    if reason is None and path != "triton":
        y = _by_kernel(flat, weight, path)
    else:
        if x.dtype == torch.bfloat16 and reason is not None:
            _warn_once(reason)
        with torch.cuda.device(x.device):
            y = (portable if portable.takes(flat) else reference).linear(flat, weight)
    return y.view(*x.shape[:-1], weight.rows)


def _by_kernel(flat: torch.Tensor, weight: Tensors, path: str) -> torch.Tensor:
    from halfbyte.runtime.kernels import launch  # late: most machines have no GPU

    if flat.data_ptr() % 16:
        flat = flat.clone()
    rows = flat.shape[0]
    if rows == 0:
        y = flat.new_empty(0, weight.rows)
    elif path == "kernel":
        y = flat.new_empty(rows, weight.rows)
        most = launch.rows_at_once(flat.device)
        for piece, place in zip(flat.split(most), y.split(most), strict=True):
            launch.linear(piece, weight, out=place)
    else:
        expanded = buffer(flat.device, weight.rows * weight.columns).view(weight.rows, weight.columns)
        launch.dequantize(weight, expanded)
        y = torch.nn.functional.linear(flat, expanded)
    return y


def check_columns(x: torch.Tensor, weight: Tensors) -> None:
    """raises ShapeMismatch if the sizes of x and the weight's tensors cannot belong together"""
    if x.dim() and x.shape[-1] == weight.columns and x.shape[-1] % 64 == 0 and len(weight.groups):
        rows, columns, row_tiles, subs = weight.rows, weight.columns, weight.row_tiles, weight.subs
        fits = rows == weight.groups.shape[0] * 16 * row_tiles and weight.codes.numel() * 64 == rows * columns * subs
        if fits and row_tiles in (1, 2) and subs in (1, 2):
            return
    raise ShapeMismatch(
        f"x of {list(x.shape)} does not fit a weight {[weight.rows, weight.columns]}", where="nf4_linear"
    )


@cache
def why_no_kernel(device: torch.device) -> str | None:
    """Why the kernels cannot run on a GPU, or None: its age, its shared memory, or a compiler that is not there."""
    from halfbyte.runtime.kernels import driver

    found = driver.device_of(device.index or 0)
    if found.capability < (8, 0):
        return f"compute capability {found.capability[0]}.{found.capability[1]} has no bf16 tensor cores"
    if found.shared_bytes < 96 << 10:
        return f"{found.shared_bytes} bytes of shared memory are too few"
    try:
        driver.function(device.index or 0, "nf4_dequantize", ("-DROW_TILES=2", "-DSUBS=1"))
    except (NoCompiler, driver.LaunchFailed, ImportError) as error:
        return str(error)
    return None


@cache
def _warn_once(reason: str | None) -> None:
    warnings.warn(f"NF4 kernels are off, a slower path is taken: {reason}", stacklevel=2)


_buffers: dict[torch.device, torch.Tensor] = {}


def buffer(device: torch.device, elements: int) -> torch.Tensor:
    """The reused bf16 buffer of a GPU, its first `elements`. It grows to the largest weight (462 MB for 43008 x 5376).

    A captured graph gets one of its own: the shared one may be replaced by a larger one.
    """
    if torch.cuda.is_current_stream_capturing():
        return torch.empty(elements, dtype=torch.bfloat16, device=device)
    found = _buffers.get(device)
    if found is None or found.numel() < elements:
        _buffers[device] = found = torch.empty(elements, dtype=torch.bfloat16, device=device)
    return found[:elements]
