"""The journal of a job: what is done, so that a killed job continues instead of starting over.

One JSON object a line in `OUT/.halfbyte-work/journal.jsonl`, appended after the bytes it speaks of were written:

    {"job": identity, "detail": {...}}                     first line: which source, plan and layout this is
    {"tensor": name, "source_sha256": ..., "output_sha256": ..., "quant_state": JSON or null}
    {"shard": file, "sha256": ..., "bytes": ...}           the shard has its final name
    {"calibration": {...}}                                 what a fitted job reads (halfbyte.texts.calibration)

The catch: a journal line may outlive the bytes (power loss) or miss them (killed between write and line). So a resumed
job believes no line: it reads the bytes back and compares their sha256, and redoes what does not match. A torn last line
is what a kill leaves; it is dropped.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import threading
from pathlib import Path
from typing import Any

from halfbyte.errors import OutputError

WORK_FOLDER = ".halfbyte-work"


class Journal:
    """Append-only record of one job in `out`; holds a lock on the folder while it is open."""

    def __init__(self, out: Path) -> None:
        self.work = out / WORK_FOLDER
        self.work.mkdir(parents=True, exist_ok=True)
        self._lock_file = (self.work / "lock").open("w")
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock_file.close()
            raise OutputError(
                "another halfbyte process is writing there",
                where=str(out),
                todo="wait for it, or choose another folder",
            ) from None
        self.path = self.work / "journal.jsonl"
        self.tensors: dict[str, dict[str, Any]] = {}
        self.shards: dict[str, dict[str, Any]] = {}
        self.job: dict[str, Any] | None = None
        self.calibration: dict[str, Any] | None = None
        self._mutex = threading.Lock()
        self._read()
        self._file = self.path.open("a", encoding="utf-8")

    def _read(self) -> None:
        if not self.path.exists():
            return
        data = self.path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) != len(data):
            os.truncate(self.path, len(whole))
        for line in whole.splitlines():
            self._take(json.loads(line))

    def append(self, entry: dict[str, Any]) -> None:
        """Add one line and hand it to the operating system (a killed process loses nothing of it)."""
        with self._mutex:
            self._file.write(json.dumps(entry) + "\n")
            self._file.flush()
            self._take(entry)

    def _take(self, entry: dict[str, Any]) -> None:
        if "job" in entry:
            self.job = entry
        elif "tensor" in entry:
            self.tensors[entry["tensor"]] = entry
        elif "shard" in entry:
            self.shards[entry["shard"]] = entry
        elif "calibration" in entry:
            self.calibration = entry["calibration"]

    def forget(self) -> None:
        """Throw the whole job away: journal, partial shards."""
        self._file.close()
        for entry in self.work.iterdir():
            if entry.name != "lock":
                entry.unlink()
        self.tensors, self.shards, self.job, self.calibration = {}, {}, None, None
        self._file = self.path.open("a", encoding="utf-8")

    def close(self, *, finished: bool = False) -> None:
        """Release the lock; a finished job takes its work folder with it."""
        self._file.close()
        if finished:
            shutil.rmtree(self.work, ignore_errors=True)
        self._lock_file.close()
