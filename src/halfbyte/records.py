"""Records: what each worker leaves beside the weights, and the only thing another worker may know of it (law 2).

A record is one JSON file in `OUT/halfbyte/`, written atomically, with a schema number, the versions it was made with
and the time. A reader refuses a schema it does not know. `weights_digest` ties a record to the weights it speaks of: a
card or report that finds another digest in the checkpoint is an error, never a footnote.

    plan.json       every tensor with its decision and reason           (recipe, written by quantize)
    quantize.json   what was written, hashes, seconds, peak memory      (quantizer)
    verify.json     every check with its verdict and figures            (verifier)
    generate.json   sanity prompts and answers                          (verifier)
    evaluate.json   what it lost against its reference, with intervals  (evaluator)
    lm-eval.json    lm-eval's tasks on two models, paired               (evaluator)
    sensitivity.json  what each module of a source costs in NF4, for a budget  (evaluator; in a folder of its own)
    qat.json        how a source was trained onto a grid                  (trainer)
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from halfbyte.errors import SourceError

FOLDER = "halfbyte"
SCHEMA = 1
#: ends the name of a file that is not yet what it will be; ours alone, so that it may be swept away
_UNFINISHED = ".halfbyte-part"
PACKAGES = ("halfbyte", "torch", "transformers", "bitsandbytes", "safetensors", "numpy", "numba", "gguf", "accelerate")


def versions() -> dict[str, str]:
    """Versions of everything a figure may depend on; read from package metadata, so nothing heavy is imported."""
    import platform

    found = {"python": platform.python_version(), "platform": platform.platform()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {"halfbyte": "not installed"} | found  # run from its sources: nobody's version


def write_text_atomic(path: Path, text: str) -> None:
    """`write_bytes_atomic` of `text` in UTF-8."""
    write_bytes_atomic(path, text.encode("utf-8"))


def write_bytes_atomic(path: Path, data: bytes) -> None:
    """Write `data` to `path` so that a reader sees the old file or the new one, never half of one.

    A temporary file in the same folder is fsynced and renamed over the target. Its mode follows the umask (tempfile
    and safetensors both leave 0600, which hides a file from the next user of the folder).

    The catch: a process killed before the rename leaves the temporary file behind (see `sweep_leftovers`). Its name is
    random all the same: with a fixed one, two writers of one file would rename each other's half-written bytes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=_UNFINISHED)
    try:
        with os.fdopen(handle, "wb") as out:
            out.write(data)
            out.flush()
            os.fsync(out.fileno())
        os.chmod(temporary, 0o666 & ~current_umask())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def sweep_leftovers(folder: Path) -> None:
    """Delete the temporary files that killed writers left in `folder` (which need not be there).

    Only for a process that holds the folder's lock: the temporary file of a writer at work has the same name.
    """
    for path in folder.glob(f".*{_UNFINISHED}"):
        path.unlink(missing_ok=True)


def current_umask() -> int:
    """The process's umask (there is no call that only reads it)."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def digest(value: Any) -> str:
    """sha256 of a JSON value in canonical form (sorted keys, no spaces): equal content, equal digest."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return "sha256:" + hashlib.sha256(canonical.encode()).hexdigest()


def write_record(folder: Path, name: str, body: Mapping[str, Any]) -> Path:
    """Write `body` as the record `name` of the checkpoint in `folder`; returns its path.

    Adds `schema`, `record`, `created` (UTC, ISO 8601) and `versions`; `body` may not carry these names itself.
    """
    stamped = {
        "schema": SCHEMA,
        "record": name,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
    }
    clash = stamped.keys() & body.keys()
    assert not clash, f"record {name} sets reserved keys {clash}"
    return put_record(folder, {**stamped, **body})


def put_record(folder: Path, record: Mapping[str, Any]) -> Path:
    """Write a record that has its stamp, under the name it bears; returns its path."""
    path = folder / FOLDER / f"{record['record']}.json"
    write_text_atomic(path, json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    return path


def read_record(folder: Path, name: str) -> dict[str, Any] | None:
    """The record `name` of the checkpoint in `folder`, or None if that worker has not run.

    raises SourceError if the file is not JSON or its schema is not the one this version reads.
    """
    path = folder / FOLDER / f"{name}.json"
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    try:
        body = json.loads(text)
    except json.JSONDecodeError as error:
        raise SourceError(f"record is not JSON ({error})", where=str(path), todo="run that command again") from None
    if not isinstance(body, dict) or body.get("schema") != SCHEMA:
        found = body.get("schema") if isinstance(body, dict) else type(body).__name__
        raise SourceError(
            f"record has schema {found!r}, this version reads {SCHEMA}",
            where=str(path),
            todo="run that command again with this version of halfbyte",
        )
    return body
