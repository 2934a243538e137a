"""Whether a tensor's work is done by a Triton kernel or by the torch reference, and how the kernels are launched.

Launched early ("programmatic dependent launch", Hopper and newer), a kernel is set up while the one before it still runs. Every kernel here
first lets its successor be set up, then waits, and only then touches what any kernel writes: so results are only ever read when all
kernels before have ended. A norm's weights, which no kernel writes, it reads before it waits, and an NF4 kernel behind a norm can
fetch its own meanwhile. Worth 4 % of a step on an H200 (docs/log.md); `launch_early(False)` turns it off.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

from typing import Any

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # Windows, CPU-only builds of torch
    triton = None  # type: ignore[assignment]

_settings = {"early": True}


def by_kernel(x: torch.Tensor) -> bool:
    """True on a GPU where Triton is installed."""
    return x.is_cuda and triton is not None


def launch_early(on: bool) -> None:
    """Whether kernels launched (or recorded) from now on are launched early. No effect on GPUs older than Hopper."""
    _settings["early"] = on


def launch_options(x: torch.Tensor) -> dict[str, Any]:
    """What every launch is given besides its own arguments."""
    early = _settings["early"] and x.is_cuda and torch.cuda.get_device_capability(x.device) >= (9, 0)
    return {"early": True, "launch_pdl": True} if early else {"early": False}


def power_of_two(n: int) -> int:
    """The smallest power of two that is not below n: what a Triton range must be."""
    return 1 << max(n - 1, 0).bit_length()


if triton is not None:

    @triton.jit
    def take_turn(early: tl.constexpr):
        """In every kernel, before anything that a kernel writes is read: let the next one be set up, then wait for the one before."""
        if early:
            tl.extra.cuda.gdc_launch_dependents()
            tl.extra.cuda.gdc_wait()

else:
    take_turn = None
