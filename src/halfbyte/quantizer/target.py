"""The output folder: may we write there, is there room, and what does an unfinished job of ours leave in it.

empty or missing              start
unfinished, same job          continue
unfinished, another job       refuse (overwrite=True starts over)
finished, same job            nothing to do
finished, another job         refuse (overwrite=True removes what halfbyte wrote, nothing else)
anything else                 refuse, always: it is not ours to delete
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from halfbyte.errors import OutputError, UsageError
from halfbyte.format.headers import INDEX_NAME
from halfbyte.format.tensors import Source
from halfbyte.quantizer.journal import WORK_FOLDER, Journal
from halfbyte.records import FOLDER, read_record, sweep_leftovers

#: room left for journal, records and companions
_SPARE_BYTES = 64 << 20


def check_place(source: Source, out: Path) -> None:
    """Raises UsageError if `out` is the source, inside it or around it; OutputError if it is a file."""
    if out.exists() and not out.is_dir():
        raise OutputError("is a file, not a folder", where=str(out), todo="choose another output folder")
    here, there = out.resolve(), source.path.resolve()
    if here == there or there in here.parents or (here in there.parents and source.kind == "safetensors"):
        raise UsageError(
            "output and source overlap", where=f"{out} and {source.path}", todo="choose a folder outside the source"
        )


def finished_job(out: Path) -> dict[str, Any] | None:
    """The quantize record of a finished job in `out`, None if there is none."""
    return read_record(out, "quantize") if not (out / WORK_FOLDER).exists() else None


def check_ours(out: Path) -> None:
    """Raises OutputError if `out` holds files and none of them says that halfbyte put them there."""
    if not out.is_dir():
        return
    entries = [entry.name for entry in out.iterdir()]
    if entries and WORK_FOLDER not in entries and not (out / FOLDER / "quantize.json").is_file():
        raise OutputError(
            f"folder is not empty and not a halfbyte checkpoint (holds {entries[0]!r})",
            where=str(out),
            todo="choose an empty folder",
        )


def remove_finished(out: Path, record: dict[str, Any]) -> None:
    """Delete what a finished job wrote, by its own record; files it did not write stay."""
    (out / "config.json").unlink(missing_ok=True)
    for name in (*record["files"], *record["companions"], INDEX_NAME, "README.md"):
        (out / name).unlink(missing_ok=True)
    shutil.rmtree(out / FOLDER, ignore_errors=True)


def check_room(out: Path, needed: int) -> None:
    """Raises OutputError if the filesystem of `out` has less than `needed` bytes and a spare left."""
    place = out
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed + _SPARE_BYTES:
        raise OutputError(
            f"needs {(needed + _SPARE_BYTES) / 2**30:.2f} GiB, {free / 2**30:.2f} GiB are free",
            where=str(out),
            todo="free some space or choose another disk",
        )


def open_journal(out: Path, identity: str, detail: dict[str, Any], *, overwrite: bool) -> Journal:
    """The journal of this job in `out`: continued if it is the same job, begun if there is none.

    Whatever a killed run left half-written under a temporary name goes first: now nobody else writes here.

    raises OutputError if `out` holds an unfinished job that is not this one and `overwrite` is off
    """
    out.mkdir(parents=True, exist_ok=True)
    journal = Journal(out)
    try:
        for folder in (out, out / FOLDER):
            sweep_leftovers(folder)
        if journal.job is not None and journal.job["job"] != identity:
            if not overwrite:
                raise OutputError(
                    "holds an unfinished job that is not this one: " + _difference(journal.job["detail"], detail),
                    where=str(out),
                    todo="run it as it was begun to finish it, or start over with --overwrite",
                )
            for name in ("config.json", INDEX_NAME, *journal.shards):
                (out / name).unlink(missing_ok=True)
            journal.forget()
        if journal.job is None:
            journal.append({"job": identity, "detail": detail})
    except BaseException:
        journal.close()
        raise
    return journal


def _difference(was: dict[str, Any], now: dict[str, Any]) -> str:
    was, now = _flat(was), _flat(now)
    changed = [key for key in {**now, **was} if was.get(key) != now.get(key)]
    return (
        ", ".join(f"{key} was {str(was.get(key))[:60]!r}, is {str(now.get(key))[:60]!r}" for key in changed)
        or "older layout"
    )


def _flat(detail: dict[str, Any]) -> dict[str, Any]:
    """The options of a method stand beside the rest, each by itself."""
    method = detail.get("method") or {}
    return {**{key: value for key, value in detail.items() if key != "method"}, **method}
