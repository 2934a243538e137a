"""Everything beside the weights: config.json, tokenizer and the rest, and the sha256 of every file in the quantize record."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from halfbyte.format.checkpoint import SafetensorsSource
from halfbyte.format.hf_config import quantization_config
from halfbyte.format.shards import hash_file
from halfbyte.format.tensors import Source
from halfbyte.progress import track
from halfbyte.verifier.checks import Check, Fault, skipped, verdict


def check_config(reader: SafetensorsSource, source: Source | None) -> list[Check]:
    """Checks F23 (config.json is the source's) and F24 (quantization_config is transformers' own spelling)."""
    block = reader.config.get("quantization_config")
    if not isinstance(block, dict):
        faults = [Fault("has no quantization_config: loaders would take the codes for weights", "config.json")]
    else:
        listed = block.get("llm_int8_skip_modules")
        wanted = quantization_config(listed if isinstance(listed, list) else [])
        wrong = [key for key in sorted(block.keys() | wanted.keys()) if block.get(key, ...) != wanted.get(key, ...)]
        faults = [
            Fault(f"{key} is {_short(block.get(key, 'absent'))}, not {_short(wanted.get(key, 'there'))}", "config.json")
            for key in wrong
        ]
        if not faults and list(block) != list(wanted):
            faults = [Fault("quantization_config is not sorted by key", "config.json")]
    spelled = verdict("F24", faults, "nf4, double quantization, bfloat16 compute, uint8 storage")
    return [_against_source_config(reader, source), spelled]


def _against_source_config(reader: SafetensorsSource, source: Source | None) -> Check:
    if source is None:
        return skipped("F23", "no source")
    here, there = reader.config, source.config
    keys = [*there, *(key for key in here if key not in there and key != "quantization_config")]
    faults = [
        Fault(
            f"{key} is {_short(here.get(key, 'absent'))}, the source has {_short(there.get(key, 'none'))}",
            "config.json",
        )
        for key in keys
        if json.dumps(here.get(key, ...), default=str) != json.dumps(there.get(key, ...), default=str)
    ]
    if not faults and list(here) != [*there, "quantization_config"]:
        faults = [Fault("the keys are not in the source's order with quantization_config last", "config.json")]
    return verdict("F23", faults, f"{len(there)} keys of the source, and quantization_config")


def _short(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def check_companions(folder: Path, source: Source | None, record: Mapping[str, Any] | None) -> Check:
    """Check F26: against the source's files, else against the sha256 in the quantize record."""
    faults = []
    if source is not None:
        wanted = source.companions()
        for name, content in wanted.items():
            there = content if isinstance(content, bytes) else content.read_bytes()
            here = folder / name
            if not here.is_file():
                faults.append(Fault("is in the source and not here", name))
            elif here.read_bytes() != there:
                faults.append(Fault("differs from the source's file", name))
        return verdict("F26", faults, f"{len(wanted)} files equal the source's")
    stated = (record or {}).get("companions")
    if not isinstance(stated, dict) or not stated:
        return skipped("F26", "no source, and no quantize record")
    return verdict("F26", _hash_faults(folder, stated), f"{len(stated)} files have the sha256 of the quantize record")


def check_digests(folder: Path, files: list[str], record: Mapping[str, Any] | None) -> tuple[Check, dict[str, str]]:
    """The weight files against the quantize record, and their sha256 (file name -> hexadecimal) for the verify record."""
    with track("sha256 of the weight files", sum((folder / f).stat().st_size for f in files), "B") as advance:
        found = {}
        for name in files:
            found[name] = hash_file(folder / name)
            advance((folder / name).stat().st_size)
    stated = (record or {}).get("files")
    if not isinstance(stated, dict) or not stated:
        return skipped("digests", "no quantize record"), found
    faults = []
    for name in sorted(found.keys() | stated.keys()):
        entry = stated.get(name) or {}
        if name not in found:
            faults.append(Fault("is in the quantize record and not here", name))
        elif found[name] != entry.get("sha256"):
            size = (folder / name).stat().st_size
            what = f"changed since it was written: {size} bytes, the record says {entry.get('bytes', 'nothing')}"
            faults.append(Fault(what, name))
    return verdict("digests", faults, f"{len(found)} weight files are as they were written"), found


def _hash_faults(folder: Path, stated: Mapping[str, Any]) -> list[Fault]:
    faults = []
    for name, sha256 in stated.items():
        path = folder / Path(name).name
        if not path.is_file():
            faults.append(Fault("is in the quantize record and not here", name))
        elif hash_file(path) != sha256:
            faults.append(Fault("changed since it was written", name))
    return faults
