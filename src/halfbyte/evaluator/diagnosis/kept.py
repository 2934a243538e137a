"""A measurement as JSON under the digest of everything it depends on: computed once, believed only if whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from halfbyte.records import digest, write_text_atomic


def load_kept(path: Path, key: str) -> dict[str, Any] | None:
    """The body under `key`; None if there is none, it is another's, or its content is not what its digest says."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        body: dict[str, Any] = found["body"]
        whole = found["key"] == key and found["content"] == digest(body)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return body if whole else None


def keep(path: Path, key: str, body: dict[str, Any]) -> None:
    write_text_atomic(path, json.dumps({"key": key, "body": body, "content": digest(body)}) + "\n")
