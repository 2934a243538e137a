"""Scored vectors on disk, under the digest of everything they depend on.

    key = digest of: metrics version, versions of packages, reference, candidate, rows, device, dtype, attention, batch

A changed byte of weights, another row, another torch: another key, and the vectors are scored anew beside the old ones.
A file whose content does not have the digest it states is not believed either. So nothing is ever silently stale, and a run
that was stopped goes on at the first candidate without vectors.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halfbyte.records import digest, write_bytes_atomic

if TYPE_CHECKING:
    import numpy as np

FORMAT = 1


@dataclass(frozen=True, eq=False)
class Stored:
    """Arrays by name, what was noted beside them, and the file they are in."""

    arrays: dict[str, np.ndarray]
    about: dict[str, Any]
    path: Path
    cached: bool


def load(folder: Path, name: str, key: str) -> Stored | None:
    """The vectors under `key`, None if there are none, they are another's, or the file is damaged."""
    import numpy as np

    path = _path(folder, name, key)
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {field: file[field] for field in file.files if field != "about"}
            about = json.loads(file["about"].tobytes())
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    if about.get("format") != FORMAT or about.get("key") != key or about.get("content") != _content(arrays):
        return None
    return Stored(arrays, about["notes"], path, True)


def save(folder: Path, name: str, key: str, arrays: Mapping[str, np.ndarray], notes: Mapping[str, Any]) -> Stored:
    """Write vectors and notes (JSON values), atomically; numpy alone reads them back."""
    import numpy as np

    about = {"format": FORMAT, "key": key, "content": _content(arrays), "notes": dict(notes)}
    buffer = io.BytesIO()
    packed: dict[str, Any] = {**arrays, "about": np.frombuffer(json.dumps(about).encode(), np.uint8)}
    np.savez_compressed(buffer, **packed)
    path = _path(folder, name, key)
    write_bytes_atomic(path, buffer.getvalue())
    return Stored(dict(arrays), dict(notes), path, False)


def _path(folder: Path, name: str, key: str) -> Path:
    slug = re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-.")[-60:].strip("-.")
    return folder / f"{slug}-{key.partition(':')[2][:16]}.npz"


def _content(arrays: Mapping[str, np.ndarray]) -> str:
    found = {}
    for name, array in arrays.items():
        found[name] = [str(array.dtype), list(array.shape), hashlib.sha256(array.tobytes()).hexdigest()]
    return digest(found)
