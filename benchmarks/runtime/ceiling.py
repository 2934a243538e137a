"""How many bytes a second the memory moves: what a kernel that reads its weights once is held against.

A copy on the device reads and writes; both count. The bytes are random: zeros have been seen to move at another speed.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

COPIES, WARM = 12, 2


def device_of(options: argparse.Namespace) -> str:
    """cuda, or cpu for `--tiny` without a GPU. Ends the script where a GPU is wanted and torch sees none."""
    if torch.cuda.is_available():
        return "cuda"
    if options.tiny:
        return "cpu"
    raise SystemExit("torch sees no CUDA device; nothing is measured (--tiny runs on a CPU)")


def copy_rate(device: str = "cuda", gigabytes: float = 2.0) -> float:
    """Bytes read and written a second; the median of some copies, the first ones left out."""
    source = torch.empty(int(gigabytes * 1e9) // 4, dtype=torch.int32, device=device).random_()
    target, times = torch.empty_like(source), []
    for _ in range(COPIES):
        if device == "cpu":
            start = time.perf_counter()
            target.copy_(source)
            times.append(time.perf_counter() - start)
        else:
            first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            first.record()
            target.copy_(source)
            last.record()
            last.synchronize()
            times.append(first.elapsed_time(last) / 1e3)
    return 2 * source.nbytes / statistics.median(times[WARM:])
