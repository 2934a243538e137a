"""Machine code -> a launch, through the CUDA driver that torch already uses.

torch owns the context, the streams and the memory; this adds functions to its context and puts launches on its current stream.
A launch takes one argument, a structure passed by value, so that it is the same call for every kernel.

The catch: an error of a kernel shows at a later call, as always in CUDA. A launch itself is checked at once.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

from halfbyte.runtime.kernels import build
from halfbyte.runtime.kernels.variants import Device


class LaunchFailed(RuntimeError):
    """The driver refused; a bug of ours or a broken machine."""


@cache
def device_of(index: int) -> Device:
    """What the kernels ask of GPU `index`."""
    import torch

    properties = torch.cuda.get_device_properties(index)
    return Device(
        properties.multi_processor_count, properties.shared_memory_per_block_optin, (properties.major, properties.minor)
    )


@cache
def function(index: int, name: str, defines: tuple[str, ...]) -> Any:
    """The kernel NAME of NAME.cu in the context of GPU `index`, allowed all its shared memory. raises NoCompiler, LaunchFailed"""
    import torch
    from cuda.bindings import driver

    device = device_of(index)
    code = build.cubin(name, device.arch, defines)
    with torch.cuda.device(index):
        torch.cuda.current_stream()  # creates the context if nothing has
        torch.zeros(1, device=f"cuda:{index}")
        module = _checked(driver.cuModuleLoadData(code), "cuModuleLoadData")
        kernel = _checked(driver.cuModuleGetFunction(module, name.encode()), "cuModuleGetFunction")
        most = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        own = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES
        fixed = _checked(driver.cuFuncGetAttribute(own, kernel), "cuFuncGetAttribute")
        _checked(driver.cuFuncSetAttribute(kernel, most, device.shared_bytes - fixed), "cuFuncSetAttribute")
    return kernel


def launch(
    kernel: Any,
    blocks: int,
    threads: int,
    shared_bytes: int,
    stream: int,
    arguments: ctypes.Structure,
    early: bool = False,
) -> None:
    """Put one launch on `stream` (its address). `early`: it may begin before the previous kernel has ended."""
    from cuda.bindings import driver

    pointer = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
    where = ctypes.addressof(pointer)
    if not early:
        answer = driver.cuLaunchKernel(kernel, blocks, 1, 1, threads, 1, 1, shared_bytes, stream, where, 0)
    else:
        attribute = driver.CUlaunchAttribute()
        attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        attribute.value.programmaticStreamSerializationAllowed = 1
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = blocks, 1, 1
        config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
        config.sharedMemBytes, config.hStream = shared_bytes, stream
        config.attrs, config.numAttrs = [attribute], 1
        answer = driver.cuLaunchKernelEx(config, kernel, where, 0)
    _checked(answer, "launch")


def _checked(answer: tuple[Any, ...], call: str) -> Any:
    status, *values = answer
    if int(status) != 0:
        raise LaunchFailed(f"{call}: {status}")
    return values[0] if values else None
