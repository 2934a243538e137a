"""Whether a tensor's work is done by a Triton kernel or by the torch reference."""

from __future__ import annotations

import torch

try:
    import triton
except ImportError:  # Windows, CPU-only builds of torch
    triton = None  # type: ignore[assignment]


def by_kernel(x: torch.Tensor) -> bool:
    """True on a GPU where Triton is installed."""
    return x.is_cuda and triton is not None


def power_of_two(n: int) -> int:
    """The smallest power of two that is not below n: what a Triton range must be."""
    return 1 << max(n - 1, 0).bit_length()
