"""Every byte on disk, by area of the model: an account that must balance.

    sum over areas of tensor bytes  +  8 + N of every safetensors header  =  size of the files

The left side is counted from the headers on disk, tensor by tensor, each given to the area of the source tensor that it
came from. What the plan does not explain is an error, not a remainder row. For a weight of n elements and blocks of b:

    kept   n x bytes of its dtype
    nf4    ceil(n/2) codes + B = ceil(n/b) scale codes + 4 ceil(B/256) + (16 + 256) x 4 of levels + the quant_state text

The text's length hangs on how many digits its offset prints, so it is the one size that a plan can only estimate; it is
counted apart and printed. Only headers are read here: this room needs records and no weights.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from halfbyte.errors import SourceError
from halfbyte.format.headers import read_header
from halfbyte.format.nf4_layout import QUANT_STATE_SUFFIX, component_sizes
from halfbyte.format.tensors import DTYPES
from halfbyte.recipe.decisions import AREAS, shared_reason

_STATE = f".{QUANT_STATE_SUFFIX}"
#: bytes by which one quant_state text can differ from a plan's estimate (a double prints in 1 to 24 characters)
_TEXT_VARIES = 24
_TODO = "the checkpoint and its records disagree: run halfbyte quantize again"


@dataclass
class Area:
    """One area: source tensors, how many became NF4, bytes before and after.

    reasons  (action, reason) -> number of source tensors; reasons of a budget without each tensor's own figures
    """

    name: str
    tensors: int = 0
    nf4: int = 0
    source_bytes: int = 0
    output_bytes: int = 0
    reasons: Counter[tuple[str, str]] = field(default_factory=Counter)


@dataclass(frozen=True)
class Inventory:
    """The balanced account.

    areas         in the order of AREAS; empty without a plan
    data_bytes    tensor data in all files
    header_bytes  8 + N of every file
    file_bytes    size of the weight files = data_bytes + header_bytes
    state_bytes   the quant_state texts, part of data_bytes
    """

    areas: list[Area]
    data_bytes: int
    header_bytes: int
    file_bytes: int
    state_bytes: int


def take_inventory(folder: Path, quantize: Mapping[str, Any], plan: Mapping[str, Any] | None) -> Inventory:
    """Count the weight files in `folder` and balance them against the records.

    raises SourceError (HeaderError for an unreadable file) at the first thing that does not add up
    """
    sizes: dict[str, int] = {}
    header_bytes = file_bytes = 0
    for name in quantize["files"]:
        tensors = read_header(folder / name)
        size = (folder / name).stat().st_size
        header_bytes += tensors[0].start if tensors else size
        file_bytes += size
        sizes |= {info.name: info.nbytes for info in tensors}
    areas = _by_area(folder, sizes, plan) if plan is not None else []
    data_bytes = sum(area.output_bytes for area in areas) if areas else sum(sizes.values())
    if data_bytes + header_bytes != file_bytes:
        raise SourceError(
            f"tensors hold {data_bytes:,} bytes and headers {header_bytes:,}, the files have {file_bytes:,}",
            where=str(folder),
            todo=_TODO,
        )
    recorded = quantize["sizes"]["output_bytes"]
    if data_bytes != recorded:
        raise SourceError(
            f"files hold {data_bytes:,} bytes of tensors, the quantize record says {recorded:,}",
            where=str(folder),
            todo=_TODO,
        )
    _check_forecast(folder, data_bytes, plan)
    states = sum(size for name, size in sizes.items() if name.endswith(_STATE))
    return Inventory(areas, data_bytes, header_bytes, file_bytes, states)


def _check_forecast(folder: Path, data_bytes: int, plan: Mapping[str, Any] | None) -> None:
    """The plan's own total may be off by what the texts can vary, and by nothing else."""
    foreseen = (plan or {}).get("summary", {}).get("bytes", {}).get("file")
    texts = sum(decision["action"] == "nf4" for decision in (plan or {}).get("decisions", []))
    if foreseen is not None and abs(data_bytes - foreseen) > _TEXT_VARIES * texts:
        raise SourceError(
            f"files hold {data_bytes:,} bytes of tensors, the plan's summary says {foreseen:,}",
            where=str(folder),
            todo=_TODO,
        )


def _by_area(folder: Path, sizes: Mapping[str, int], plan: Mapping[str, Any]) -> list[Area]:
    accounts = {name: Area(name) for name in AREAS}
    left = dict(sizes)
    for decision in plan["decisions"]:
        planned = planned_bytes(decision, plan["blocksize"])
        absent = [name for name in planned if name not in left]
        if absent:
            raise SourceError("planned, but not on disk", where=f"{folder}: tensor {absent[0]}", todo=_TODO)
        found = {name: left.pop(name) for name in planned}
        wrong = [name for name, size in planned.items() if found[name] != size and not name.endswith(_STATE)]
        if wrong:
            raise SourceError(
                f"{found[wrong[0]]:,} bytes on disk, {planned[wrong[0]]:,} by its plan",
                where=f"{folder}: tensor {wrong[0]}",
                todo=_TODO,
            )
        account = accounts.setdefault(decision["area"], Area(decision["area"]))
        account.tensors += 1
        account.nf4 += decision["action"] == "nf4"
        account.reasons[decision["action"], shared_reason(decision["reason"])] += 1
        account.source_bytes += source_bytes(decision)
        account.output_bytes += sum(found.values())
    if left:
        raise SourceError(
            f"{len(left)} tensors on disk, not in the plan", where=f"{folder}: tensor {next(iter(left))}", todo=_TODO
        )
    return [account for account in accounts.values() if account.tensors]


def source_bytes(decision: Mapping[str, Any]) -> int:
    """Bytes of the tensor in the source."""
    elements: int = prod(decision["shape"])
    return elements * DTYPES[decision["dtype"]][0]


def planned_bytes(decision: Mapping[str, Any], blocksize: int) -> dict[str, int]:
    """Tensor name -> bytes that it must have on disk (its quant_state text: about).

    blocksize  the plan's; a decision may name its own
    """
    name = decision["name"]
    if decision["action"] == "keep":
        return {name: source_bytes(decision)}
    parts = component_sizes(name, decision["shape"], decision.get("blocksize") or blocksize)
    return {part: prod(shape) * DTYPES[dtype][0] for part, (dtype, shape) in parts.items()}
