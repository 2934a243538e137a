"""JSON files of strangers: bounded before they are read, checked field by field, refused with the line number.

A file is at most 64 MiB, a line 1 MiB, a file 100,000 items; the largest that this was written for is 0.8 MB. Python's JSON reader
also takes NaN, and digs until the interpreter's stack ends: the first is refused here, the second becomes an error like any other.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halfbyte.errors import SourceError
from halfbyte.format.shards import hash_file

MAX_BYTES, MAX_LINE, MAX_ITEMS = 64 << 20, 1 << 20, 100_000


@dataclass(frozen=True)
class Entry:
    """One JSON object and where it stands."""

    body: Mapping[str, Any]
    where: str

    def text(self, name: str) -> str:
        """A field that must be a string with something in it."""
        found = self.body.get(name)
        if not isinstance(found, str) or not found.strip():
            raise self.wrong(f"{name} is {_shown(found)}, not a text")
        return found

    def texts(self, name: str) -> list[str]:
        """A field that must be a list of strings (possibly empty)."""
        found = self.body.get(name)
        if not isinstance(found, list) or not all(isinstance(each, str) for each in found):
            raise self.wrong(f"{name} is {_shown(found)}, not a list of texts")
        return found

    def name(self, field: str) -> str:
        """A field that must be a short string or a whole number: an id."""
        found = self.body.get(field)
        if isinstance(found, bool) or not isinstance(found, str | int) or not 0 < len(str(found)) <= 200:
            raise self.wrong(f"{field} is {_shown(found)}, not a name of at most 200 characters")
        return str(found)

    def wrong(self, what: str, todo: str = "mend that line, or fetch the file again") -> SourceError:
        return SourceError(what, where=self.where, todo=todo)


def read_lines(path: Path) -> list[Entry]:
    """The objects of a JSON-lines file, blank lines left out; raises SourceError, naming the line."""
    entries = []
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        if len(line) > MAX_LINE:
            raise SourceError(f"a line of {len(line):,} characters", where=where, todo=f"at most {MAX_LINE:,}")
        entries.append(Entry(_object(_parse(line, where), where), where))
    return _checked(entries, path)


def read_list(path: Path) -> list[Entry]:
    """The objects of a file that is one JSON list; raises SourceError, naming the entry."""
    found = _parse(_text(path), str(path))
    if not isinstance(found, list):
        raise SourceError("not a JSON list", where=str(path), todo="name the task's own file")
    entries = [
        Entry(_object(each, f"{path}, entry {n}"), f"{path}, entry {n}") for n, each in enumerate(found, start=1)
    ]
    return _checked(entries, path)


def about(path: Path) -> dict[str, Any]:
    """What ties figures to a file."""
    return {"name": path.name, "sha256": hash_file(path), "bytes": path.stat().st_size}


def unique(ids: Iterator[tuple[str, Entry]]) -> None:
    """Raises SourceError at the first entry whose id was there before."""
    seen: set[str] = set()
    for each, entry in ids:
        if each in seen:
            raise entry.wrong(f"the id {each[:80]!r} was used before", "give each its own")
        seen.add(each)


def _checked(entries: list[Entry], path: Path) -> list[Entry]:
    if not entries:
        raise SourceError("nothing in it", where=str(path), todo="name the task's own file")
    if len(entries) > MAX_ITEMS:
        raise SourceError(f"{len(entries):,} items", where=str(path), todo=f"at most {MAX_ITEMS:,}: cut it")
    return entries


def _text(path: Path) -> str:
    try:
        if not path.is_file():
            raise SourceError("no such file", where=str(path), todo="check the path")
        if path.stat().st_size > MAX_BYTES:
            raise SourceError("too large for a task", where=str(path), todo=f"at most {MAX_BYTES >> 20} MiB: cut it")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"cannot be read as UTF-8 ({error})", where=str(path), todo="name a text file") from None


def _parse(text: str, where: str) -> Any:
    def refuse(word: str) -> None:
        raise ValueError(f"{word} is no JSON")

    try:
        return json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise SourceError(f"not JSON ({error})", where=where, todo="mend it, or fetch the file again") from None


def _object(found: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(found, dict):
        raise SourceError("not a JSON object", where=where, todo="mend it, or fetch the file again")
    return found


def _shown(value: Any) -> str:
    return "missing" if value is None else repr(value)[:60]
