"""Which device a person may name: `cpu`, `cuda` or `cuda:N`."""

from __future__ import annotations

import re

from halfbyte.errors import UsageError


def check_device(device: str) -> None:
    """Raises UsageError unless `device` is `cpu` or a GPU that torch sees."""
    if device == "cpu":
        return
    if not re.fullmatch(r"cuda(:(0|[1-9][0-9]*))?", device):
        raise UsageError(f"unknown device {device!r}", where="--device", todo="use cpu, cuda or cuda:N")
    import torch

    if not torch.cuda.is_available():
        raise UsageError("torch sees no CUDA device", where=f"--device {device}", todo="use --device cpu")
    count, number = torch.cuda.device_count(), int(device.partition(":")[2] or 0)
    if number >= count:
        there = ", ".join(f"cuda:{n}" for n in range(count))
        raise UsageError(f"there is no CUDA device {number}", where=f"--device {device}", todo=f"torch sees {there}")
