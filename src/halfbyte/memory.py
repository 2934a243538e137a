"""Peak memory of this process, as the kernel counted it.

`VmHWM` and not `ru_maxrss`: the latter is inherited through fork and exec, so a small process started by a large one
reports the large one's peak.
"""

from __future__ import annotations

import resource
from pathlib import Path


def peak_rss_bytes() -> int:
    """Largest resident set of this process so far, in bytes (file mappings included)."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def peak_gpu_bytes(device: str) -> int | None:
    """Most bytes torch has held on `device` so far, None on the CPU."""
    if device == "cpu":
        return None
    import torch

    return int(torch.cuda.max_memory_allocated(device))
