"""What `halfbyte quantize` says when it is done."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from halfbyte.recipe.decisions import bitsandbytes_for


def quantize_lines(record: dict[str, Any], source: str, out: Path) -> list[str]:
    """Lines of text: what was written, how long it took, what it needs, and the command to go on with."""
    sizes, run = record["sizes"], record["run"]
    nf4 = sum(tensor["action"] == "nf4" for tensor in record["tensors"].values())
    needed = bitsandbytes_for(record["options"].get("blocksizes", ()))
    return [
        f"{nf4} of {len(record['tensors'])} tensors are NF4, the rest is byte-identical to the source",
        f"{sizes['source_bytes'] / 2**30:.2f} GiB -> {sizes['output_bytes'] / 2**30:.2f} GiB in {len(record['files'])} file(s), "
        f"{sizes['bits_per_weight']:.3f} bits a weight",
        f"{run['seconds']:.1f} s, {sizes['source_bytes'] / 1e9 / max(run['seconds'], 1e-9):.2f} GB/s of source, "
        f"peak memory {run['peak_rss_bytes'] / 2**30:.2f} GiB",
        *([f"needs bitsandbytes {needed} or newer: blocks of 32 on CPU and CUDA"] if needed else []),
        f"next: halfbyte verify {out} --source {source}",
    ]
