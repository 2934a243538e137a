"""What `halfbyte quantize` has written, as a person reads it on a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from halfbyte.cards.method import method_lines
from halfbyte.recipe.decisions import bitsandbytes_for


def render(record: Mapping[str, Any], source: str, out: Path) -> str:
    """Text of a quantize record, and what to do next."""
    sizes, run = record["sizes"], record["run"]
    nf4 = sum(tensor["action"] == "nf4" for tensor in record["tensors"].values())
    needed = bitsandbytes_for(record["options"].get("blocksizes", ()))
    lines = [
        f"{nf4} of {len(record['tensors'])} tensors are NF4, the rest is byte-identical to the source",
        *method_lines(record.get("method")),
        *(
            [f"the budget was spent by costs of {costs}: another method than this checkpoint's"]
            if (costs := _other_costs(record))
            else []
        ),
        f"{sizes['source_bytes'] / 2**30:.2f} GiB -> {sizes['output_bytes'] / 2**30:.2f} GiB in {len(record['files'])} file(s), "
        f"{sizes['bits_per_weight']:.3f} bits a weight",
        f"{run['seconds']:.1f} s, {sizes['source_bytes'] / 1e9 / max(run['seconds'], 1e-9):.2f} GB/s of source, "
        f"peak memory {run['peak_rss_bytes'] / 2**30:.2f} GiB",
        *([f"needs bitsandbytes {needed} or newer: blocks of 32 on CPU and CUDA"] if needed else []),
        f"next: halfbyte verify {out} --source {source}",
    ]
    return "\n".join(lines)


def _other_costs(record: Mapping[str, Any]) -> str | None:
    """The method that a budget's costs were measured with, if it is another than the record's."""
    costs = record["options"].get("budget_costs")
    own = (record.get("method") or {"name": "rtn"})["name"]
    return None if costs in (None, own) else str(costs)
