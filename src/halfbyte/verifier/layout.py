"""Every quantized weight by itself (docs/format.md sections 3 and 4): components, levels, quant state, scales.

All of it can be judged from the checkpoint alone. The codes themselves cannot: any code is a valid code. For those see
`against_source`, or without a source the digests.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from halfbyte.format.checkpoint import SafetensorsSource
from halfbyte.format.nf4_layout import (
    COMPONENTS,
    NESTED_BLOCKSIZE,
    QUANT_STATE_SUFFIX,
    component_sizes,
    quant_state_json,
    weight_of,
)
from halfbyte.format.tensors import TensorInfo
from halfbyte.progress import track
from halfbyte.verifier.checks import Check, Fault, verdict

if TYPE_CHECKING:
    import torch

    from halfbyte.codec import Nested

#: a real one has about 170 bytes; a header may claim any length
_LONGEST_STATE = 4096
_STATE_KEYS = ("quant_type", "blocksize", "dtype", "shape", "nested_blocksize", "nested_dtype", "nested_offset")


@dataclass(frozen=True)
class Weight:
    """One NF4 weight whose six tensors are in order: sizes and offsets may be relied on.

    parts   component -> TensorInfo; the packed codes are under `""`
    """

    name: str
    shape: tuple[int, ...]
    blocksize: int
    nested_offset: float
    parts: dict[str, TensorInfo]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def nf4_names(names: Iterable[str]) -> set[str]:
    """Weights of which at least one component is stored."""
    return {weight for name in names if (weight := weight_of(name)) is not None}


def check_layout(reader: SafetensorsSource) -> tuple[list[Check], list[Weight]]:
    """Checks F9 to F17 on every quantized weight, and the weights that may be worked on further."""
    infos = {info.name: info for info in reader.tensors}
    names = sorted(nf4_names(infos))
    faults: dict[str, list[Fault]] = {key: [] for key in ("F9", "F10", "F13", "F14", "F15", "F16", "F17")}
    faults["F9"] += [
        Fault("has the shape of packed codes and no quant state", info.name)
        for info in reader.tensors
        if info.dtype == "U8" and info.name not in names and weight_of(info.name) is None and info.shape[1:] == (1,)
    ]
    weights = []
    with track("quantized weights", len(names), "weights") as advance:
        for name in names:
            weight = _read_weight(reader, infos, name, faults)
            if weight is not None:
                weights.append(weight)
                _check_values(reader, weight, faults)
            advance(1)
    sizes = sorted({weight.blocksize for weight in weights})
    good = {
        "F9": f"{len(weights)} weights, {6 * len(weights)} tensors",
        "F10": f"the same 16 levels in {len(weights)} weights",
        "F13": f"block size {', '.join(map(str, sizes)) or '-'}",
        "F14": f"{sum(weight.numel % 2 for weight in weights)} weights of odd size",
        "F15": f"{len(weights)} quant states, byte for byte",
        "F16": f"{len(weights)} quant states",
        "F17": f"{sum(-(-w.numel // w.blocksize) for w in weights)} scales",
    }
    return [verdict(key, faults[key], good[key]) for key in faults], weights


def _read_weight(
    reader: SafetensorsSource, infos: dict[str, TensorInfo], name: str, faults: dict[str, list[Fault]]
) -> Weight | None:
    """The weight `name` if its tensors are all there with the right types and shapes; else the faults are noted."""
    wanted = ["", *COMPONENTS]
    parts = {part: infos.get(f"{name}.{part}" if part else name) for part in wanted}
    missing = [part or "the codes" for part in wanted if parts[part] is None]
    if missing:
        faults["F9"].append(Fault(f"lacks {', '.join(missing)}", name))
        return None
    whole = {part: info for part, info in parts.items() if info is not None}
    state = _read_state(reader, whole[QUANT_STATE_SUFFIX], name, faults)
    if state is None:
        return None
    shape, blocksize = tuple(state["shape"]), state["blocksize"]
    if blocksize not in {2**k for k in range(5, 13)}:
        faults["F13"].append(Fault(f"blocksize is {blocksize}, not a power of two from 32 to 4096", name))
        return None
    right = True
    for part, (dtype, size) in zip(wanted, component_sizes(name, shape, blocksize).values(), strict=True):
        info = whole[part]
        if part != QUANT_STATE_SUFFIX and (info.dtype, info.shape) != (dtype, size):
            what = f"is {info.dtype} {list(info.shape)}, its quant state asks for {dtype} {list(size)}"
            faults["F9"].append(Fault(what, info.name))
            right = False
    files = {info.file for info in whole.values()}
    if len(files) > 1:
        faults["F9"].append(Fault(f"lies in {len(files)} shards", name))
    return Weight(name, shape, blocksize, state["nested_offset"], whole) if right else None


def _read_state(
    reader: SafetensorsSource, info: TensorInfo, name: str, faults: dict[str, list[Fault]]
) -> dict[str, Any] | None:
    """The parsed quant state, None if it cannot be used. Notes faults of spelling (F15) and of value (F16)."""
    if info.dtype != "U8" or len(info.shape) != 1 or info.numel > _LONGEST_STATE:
        faults["F15"].append(Fault(f"is {info.dtype} {list(info.shape)}, not a short list of bytes", info.name))
        return None
    text = bytes(reader.read(info, 0, info.numel).numpy())
    try:
        state = json.loads(text)
    except ValueError:
        state = None
    if not isinstance(state, dict) or tuple(state) != _STATE_KEYS:
        faults["F15"].append(Fault(f"is not the seven keys in their order: {text[:80]!r}", info.name))
        return None
    fixed = {"quant_type": "nf4", "dtype": "bfloat16", "nested_dtype": "float32", "nested_blocksize": NESTED_BLOCKSIZE}
    wrong = [f"{key} is {state[key]!r}, not {value!r}" for key, value in fixed.items() if state[key] != value]
    shape, offset, blocksize = state["shape"], state["nested_offset"], state["blocksize"]
    if not isinstance(shape, list) or not shape or any(type(side) is not int or side < 1 for side in shape):
        wrong.append(f"shape is {shape!r}")
    if type(offset) is not float or not _is_float32(offset):
        wrong.append(f"nested_offset is {offset!r}, not a finite float32")
    if type(blocksize) is not int:
        wrong.append(f"blocksize is {blocksize!r}")
    if wrong:
        faults["F16"].append(Fault(", ".join(wrong), name))
        return None
    if text != quant_state_json(shape, blocksize, offset):
        faults["F15"].append(Fault(f"is not spelled as json.dumps spells it: {text[:80]!r}", info.name))
    return state


def _is_float32(value: float) -> bool:
    try:
        single: float = struct.unpack("<f", struct.pack("<f", value))[0]
    except OverflowError:
        return False
    return math.isfinite(value) and single == value


def read_part(reader: SafetensorsSource, weight: Weight, part: str) -> torch.Tensor:
    """A whole component of a weight as a 1-d tensor (the codes are larger: read those in slices)."""
    info = weight.parts[part]
    return reader.read(info, 0, info.numel)


def read_scales(reader: SafetensorsSource, weight: Weight) -> torch.Tensor:
    """The scales that a loader will use, float32 [blocks] (docs/format.md F12)."""
    from halfbyte.codec import unnest_absmax

    return unnest_absmax(read_nested(reader, weight))


def read_nested(reader: SafetensorsSource, weight: Weight) -> Nested:
    """The second level as it is stored."""
    from halfbyte.codec import Nested

    absmax, outer, levels = (
        read_part(reader, weight, part) for part in ("absmax", "nested_absmax", "nested_quant_map")
    )
    return Nested(absmax, outer, weight.nested_offset, levels)


def _check_values(reader: SafetensorsSource, weight: Weight, faults: dict[str, list[Fault]]) -> None:
    """Levels (F10), the spare nibble (F14) and scales (F17) of a weight whose shapes are right."""
    import torch

    from halfbyte.codec import NF4_LEVELS

    levels = read_part(reader, weight, "quant_map")
    if not torch.equal(levels, torch.tensor(NF4_LEVELS, dtype=torch.float32)):
        faults["F10"].append(Fault("holds other levels than NF4's", f"{weight.name}.quant_map"))
    if weight.numel % 2:
        codes = weight.parts[""]
        spare = int(reader.read(codes, codes.numel - 1, codes.numel)[0]) & 15
        if spare != 7:
            faults["F14"].append(Fault(f"the unused nibble is {spare}, not 7", weight.name))
    for part in ("nested_absmax", "nested_quant_map"):
        if not bool(torch.isfinite(read_part(reader, weight, part)).all()):
            faults["F17"].append(Fault("holds NaN or infinity", f"{weight.name}.{part}"))
    endless = int((~torch.isfinite(read_scales(reader, weight))).sum())
    if endless:
        faults["F17"].append(Fault(f"{endless} scales are not finite", weight.name))
