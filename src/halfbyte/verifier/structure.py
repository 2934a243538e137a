"""Files, names and headers (docs/format.md sections 1 and 2), before one byte of weight data is believed.

Nothing later in this room opens a file that these checks did not accept, and stock transformers is never started on a
folder that failed them: it follows `../` in an index.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from halfbyte.errors import HeaderError, SourceError, UnsafeName
from halfbyte.format.headers import (
    INDEX_NAME,
    SINGLE_NAME,
    check_shard_name,
    parse_json_object,
    read_header,
    read_index,
)
from halfbyte.format.tensors import DTYPES, TensorInfo
from halfbyte.verifier.checks import Check, Fault, verdict

_NUMBERED = re.compile(r"model-(\d{5})-of-(\d{5})\.safetensors")


def check_structure(folder: Path) -> tuple[list[Check], list[TensorInfo] | None]:
    """Checks F1 to F8 of the checkpoint in `folder`, and its tensors; None if the files cannot be read safely."""
    faults: dict[str, list[Fault]] = {key: [] for key in ("F1", "F2", "F3", "F4-F6", "F7", "F8")}
    weight_map = _read_names(folder, faults)
    shards = sorted(set(weight_map.values()))
    present = [shard for shard in shards if (folder / shard).is_file()]
    faults["F1"] += _name_faults(folder, shards)
    tensors = _read_headers(folder, present, faults)
    if weight_map and not faults["F4-F6"] and present == shards:
        faults["F2"] += _index_faults(folder, weight_map, tensors)
    faults["F7"] += _alignment_faults(folder, tensors)
    faults["F8"] += _mode_faults(folder, present)
    good = {
        "F1": f"{len(shards)} weight files",
        "F2": f"{len(tensors)} tensors, each in one shard",
        "F3": "every name is plain",
        "F4-F6": f"{len(present)} headers read",
        "F7": "every tensor begins at a multiple of its element size",
        "F8": "modes follow config.json",
    }
    checks = [verdict(key, faults[key], good[key]) for key in faults]
    usable = not any(faults[key] for key in ("F1", "F2", "F3", "F4-F6"))
    return checks, tensors if usable else None


def _read_names(folder: Path, faults: dict[str, list[Fault]]) -> dict[str, str]:
    has_index = (folder / INDEX_NAME).is_file()
    try:
        return read_index(folder)
    except UnsafeName as error:
        faults["F3"].append(Fault(error.what, error.where or str(folder)))
    except HeaderError as error:
        faults["F2" if has_index else "F4-F6"].append(Fault(error.what, error.where or str(folder)))
    except SourceError as error:
        faults["F1"].append(Fault(error.what, error.where or str(folder)))
    return {}


def _read_headers(folder: Path, shards: Sequence[str], faults: dict[str, list[Fault]]) -> list[TensorInfo]:
    tensors = []
    for shard in shards:
        try:
            tensors += read_header(folder / shard)
        except UnsafeName as error:
            faults["F3"].append(Fault(error.what, shard))
        except SourceError as error:
            faults["F4-F6"].append(Fault(error.what, error.where or shard))
    return tensors


def _name_faults(folder: Path, shards: Sequence[str]) -> list[Fault]:
    missing = [Fault("named in the index, not in the folder", s) for s in shards if not (folder / s).is_file()]
    stray = sorted(p.name for p in folder.glob("*.safetensors") if shards and p.name not in shards)
    faults = missing + [Fault("a weight file that no index names; some loaders read every one", name) for name in stray]
    if shards in ([], [SINGLE_NAME]):
        return faults
    count = len(shards)
    expected = [f"model-{k:05d}-of-{count:05d}.safetensors" for k in range(1, count + 1)]
    odd = sorted(set(shards) - set(expected))
    return faults + [Fault(f"not one of model-0000k-of-{count:05d}.safetensors", name) for name in odd]


def _index_faults(folder: Path, weight_map: dict[str, str], tensors: Sequence[TensorInfo]) -> list[Fault]:
    found: dict[str, str] = {}
    faults = []
    for info in tensors:
        if info.name in found:
            faults.append(Fault(f"is in {found[info.name]} and in {info.file}", info.name))
        found[info.name] = info.file
    for name in sorted(found.keys() | weight_map.keys()):
        says, lies = weight_map.get(name), found.get(name)
        if says != lies:
            faults.append(Fault(f"the index says {says or 'nothing'}, it is in {lies or 'no shard'}", name))
    index = folder / INDEX_NAME
    if not index.is_file():
        return faults
    metadata = parse_json_object(index.read_bytes(), str(index)).get("metadata")
    stated = metadata.get("total_size") if isinstance(metadata, dict) else None
    total = sum(info.nbytes for info in tensors)
    if stated != total:
        faults.append(Fault(f"total_size is {stated!r}, the tensors have {total} bytes", INDEX_NAME))
    return faults


def _alignment_faults(folder: Path, tensors: Sequence[TensorInfo]) -> list[Fault]:
    faults = []
    for shard in sorted({info.file for info in tensors}):
        with (folder / check_shard_name(shard, str(folder))).open("rb") as file:
            base = 8 + int.from_bytes(file.read(8), "little")
        if base % 8:
            faults.append(Fault(f"data starts at byte {base}, not a multiple of 8", shard))
    for info in tensors:
        if info.start % DTYPES[info.dtype][0]:
            faults.append(Fault(f"{info.dtype} begins at byte {info.start} of {info.file}", info.name))
    return faults


def _mode_faults(folder: Path, shards: Sequence[str]) -> list[Fault]:
    config = folder / "config.json"
    if not config.is_file():
        return [Fault("absent: no loader takes this folder for a model", "config.json")]
    wanted = config.stat().st_mode & 0o444
    modes = {shard: (folder / shard).stat().st_mode & 0o777 for shard in shards}
    return [
        Fault(f"mode {mode:03o} hides it from readers of config.json ({wanted:03o})", shard)
        for shard, mode in modes.items()
        if wanted & ~mode
    ]
