"""The lattice probe over a checkpoint: which of the tensors to be quantized lie on a 16-level grid already.

    every tensor decided nf4 -> pieces from all over it -> halfbyte.codec.lattice -> one finding each, and a sentence

A grid shows in any of its blocks, so a sample does: some 262,144 weights of a tensor, in at most 16 pieces spread evenly
from its first weight to its last. Pieces are whole rows and begin at multiples of 128 weights, hence no block is cut and
both ways of laying blocks (along rows, or running on over row ends as bitsandbytes does) stay aligned.

The catch: "exactly" speaks of the blocks looked at, and the record says how many weights that were. Memory is one sample
at a time, so a 31B model is probed in the memory of a small one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from math import gcd
from typing import Any

from halfbyte.format.tensors import Source, TensorInfo
from halfbyte.progress import track
from halfbyte.recipe.decisions import Plan

#: weights looked at in a tensor when a person asks; and when quantize asks on the way, in how many tensors
SAMPLE, QUICK_SAMPLE, QUICK_TENSORS = 1 << 18, 1 << 14, 32
_ALIGNMENT = 128
_PIECES = 16
VERDICTS = ("exactly", "mostly", "no", "undecided")


def probe(source: Source, plan: Plan, *, sample: int = SAMPLE, at_most: int | None = None) -> dict[str, Any]:
    """Look at a sample of every tensor that `plan` makes NF4.

    sample   weights to look at in a tensor, about; the whole tensor if it has no more
    at_most  look at no more tensors than these, evenly spread; None: at all
    returns  {"tensors": [{"name", "sampled", and the fields of codec.lattice.Lattice}],
              "summary": {"quantized": tensors, "verdicts": {verdict: tensors}, "grids": {grid: tensors}, "sentence"},
              "sampled_weights": n}
    raises   what `source.read` raises
    """
    from halfbyte.codec.lattice import probe_lattice

    infos = {info.name: info for info in source.tensors}
    chosen = [infos[d.name] for d in plan.decisions if d.action == "nf4"]
    quantized = len(chosen)
    if at_most is not None and quantized > at_most:
        chosen = [chosen[i * quantized // at_most] for i in range(at_most)]
    tensors: list[dict[str, Any]] = []
    with track("probe", len(chosen), "tensors") as advance:
        for info in chosen:
            pieces, columns = pieces_of(info, sample)
            weight = _read(source, info, pieces)
            found = asdict(probe_lattice(weight, columns))
            tensors.append({"name": info.name, "sampled": weight.numel(), **found})
            advance(1)
    return {
        "tensors": tensors,
        "summary": summarize(tensors, quantized),
        "sampled_weights": sum(tensor["sampled"] for tensor in tensors),
    }


def pieces_of(info: TensorInfo, sample: int) -> tuple[list[tuple[int, int]], int | None]:
    """Which elements to read, as [begin, end) in ascending order, and the row length if the pieces are whole rows.

    A piece is made of units that are whole rows and multiples of 128. Where such a unit is larger than the sample (long
    rows of an odd length), units are 128 weights, and nothing can be said of rows.
    """
    columns = info.shape[-1] if info.shape else 1
    if info.numel <= sample or not columns:
        return [(0, info.numel)], columns or None
    unit, row = columns * _ALIGNMENT // gcd(columns, _ALIGNMENT), True
    if unit > sample:
        unit, row = _ALIGNMENT, False
    total = -(-info.numel // unit) if row else info.numel // unit
    wanted = max(1, sample // unit)
    count = min(_PIECES, wanted)
    length = wanted // count
    begins = [(total - length) * i // max(1, count - 1) for i in range(count)]
    return [(b * unit, min((b + length) * unit, info.numel)) for b in begins], columns if row else None


def _read(source: Source, info: TensorInfo, pieces: Sequence[tuple[int, int]]) -> Any:
    """The pieces end to end, 1-d."""
    import torch

    return torch.cat([source.read(info, begin, end) for begin, end in pieces])


def summarize(tensors: Sequence[dict[str, Any]], quantized: int) -> dict[str, Any]:
    """Counts and the sentence a person reads; `quantized` is how many tensors become NF4, looked at or not."""
    verdicts = Counter(tensor["verdict"] for tensor in tensors)
    grids = Counter(_name(tensor) for tensor in tensors if tensor["grid"])
    return {
        "quantized": quantized,
        "verdicts": {verdict: verdicts[verdict] for verdict in VERDICTS},
        "grids": dict(grids.most_common()),
        "sentence": _sentence(len(tensors), quantized, verdicts, grids),
    }


def _name(tensor: dict[str, Any]) -> str:
    grid = {"int4": "an int4 grid", "int4 affine": "an affine int4 grid", "nf4": "the NF4 grid"}[tensor["grid"]]
    unit = "whole rows" if tensor["blocksize"] == "row" else f"blocks of {tensor['blocksize']}"
    return f"{grid} ({unit}, {tensor['scale_dtype']} scales)"


def _sentence(total: int, quantized: int, verdicts: Counter[str], grids: Counter[str]) -> str:
    if not total:
        return "no tensor becomes NF4, so none was looked at"
    of = (
        f"{total} quantized tensors" if total == quantized else f"{total} tensors looked at ({quantized} are quantized)"
    )
    parts = []
    on = verdicts["exactly"] + verdicts["mostly"]
    if on:
        name, count = grids.most_common(1)[0]
        how = "exactly" if not verdicts["mostly"] else "exactly or mostly"
        parts.append(f"the source lies {how} on {name} in {count} of {of}")
        if on > count:
            parts.append(f"on another 16-level grid in {on - count}")
        if verdicts["no"]:
            parts.append(f"on none in {verdicts['no']}")
    elif verdicts["no"]:
        parts.append(f"the source is not on an int4 or NF4 grid ({verdicts['no']} of {of})")
    if verdicts["undecided"]:
        parts.append(f"undecided in {verdicts['undecided']}: too few different weights to tell")
    return ", ".join(parts)
