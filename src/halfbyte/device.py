"""Which device a person may name: `cpu`, `cuda` or `cuda:N`."""

from __future__ import annotations

import re

from halfbyte.errors import UsageError


def check_device(device: str) -> None:
    """Raises UsageError unless `device` is `cpu` or CUDA and torch sees a GPU."""
    if device == "cpu":
        return
    if not re.fullmatch(r"cuda(:\d+)?", device):
        raise UsageError(f"unknown device {device!r}", where="--device", todo="use cpu, cuda or cuda:N")
    import torch

    if not torch.cuda.is_available():
        raise UsageError("torch sees no CUDA device", where=f"--device {device}", todo="use --device cpu")
