"""The records of a checkpoint, read together and held against each other before a word is printed.

A record is a claim about certain weights. `weights_digest` says which; a verify record of other weights would put a
green table under a broken file. So everything that carries a digest is compared with the quantize record, and the files
on disk with the sizes it states. What is missing is missing; what contradicts is an error.

The catch: sizes, not hashes. Hashing 19 GB takes a minute, and `halfbyte verify` does it; a file of the right length
with a flipped bit passes here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from halfbyte.errors import CheckFailed, SourceError, UnsafeName
from halfbyte.records import FOLDER, digest, read_record


@dataclass(frozen=True)
class Evidence:
    """Everything that is known about one checkpoint.

    quantize     the record that must exist
    plan, verify, generate   None if that worker has not run
    evaluations  every record whose name begins with `evaluate`, by name
    """

    folder: Path
    quantize: dict[str, Any]
    plan: dict[str, Any] | None = None
    verify: dict[str, Any] | None = None
    generate: dict[str, Any] | None = None
    evaluations: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def failed_checks(self) -> list[dict[str, Any]]:
        """Checks of the verify record that say no."""
        return [c for c in (self.verify or {}).get("checks", []) if c["status"] == "failed"]


#: without these a record says nothing; everything else may be missing and is then "not measured"
_REQUIRED = {
    "quantize": ("plan_digest", "weights_digest", "source", "files", "tensors", "sizes"),
    "plan": ("decisions", "blocksize", "skip_modules"),
    "verify": ("checks",),
}


def gather(folder: Path) -> Evidence:
    """Read and cross-check the records in `folder`.

    raises SourceError: no quantize record, a record of other weights, files whose sizes are not the recorded ones
    """
    quantize = _read(folder, "quantize")
    if quantize is None:
        raise SourceError(
            "no quantize record: nothing is known of this checkpoint",
            where=str(folder / FOLDER / "quantize.json"),
            todo="make the checkpoint with halfbyte quantize",
        )
    check_files(folder, quantize)
    names = sorted(path.stem for path in (folder / FOLDER).glob("evaluate*.json"))
    others = {name: _read(folder, name) for name in ("verify", "generate", *names)}
    for name, record in others.items():
        if record is not None:
            _check_digest(folder, name, record, quantize["weights_digest"])
    return Evidence(
        folder,
        quantize,
        _read_plan(folder, quantize),
        others["verify"],
        others["generate"],
        {name: record for name in names if (record := others[name]) is not None},
    )


def _read(folder: Path, name: str) -> dict[str, Any] | None:
    """The record `name`, None if absent; raises SourceError if it lacks what it cannot do without."""
    record = read_record(folder, name)
    required = _REQUIRED.get(name, ("results",) if name.startswith("evaluate") else ())
    missing = [key for key in required if key not in (record or required)]
    if missing:
        raise SourceError(
            f"the {name} record lacks {', '.join(missing)}",
            where=str(folder / FOLDER / f"{name}.json"),
            todo="run that command again with this version of halfbyte",
        )
    return record


def check_files(folder: Path, quantize: Mapping[str, Any]) -> None:
    """Raises SourceError unless the recorded shards are in `folder` with the recorded sizes, and the record with itself."""
    where = folder / FOLDER / "quantize.json"
    stated = digest({name: entry["sha256"] for name, entry in quantize["files"].items()})
    if stated != quantize["weights_digest"]:
        raise SourceError(
            f"weights_digest is {quantize['weights_digest']}, its own files give {stated}",
            where=str(where),
            todo="the record was changed by hand: run halfbyte quantize again",
        )
    for name, entry in quantize["files"].items():
        path = _shard(folder, name, where)
        size = path.stat().st_size if path.is_file() else None
        if size != entry["bytes"]:
            found = "is missing" if size is None else f"has {size:,} bytes"
            raise SourceError(
                f"{name} {found}, the quantize record says {entry['bytes']:,}",
                where=str(path),
                todo="the weights are not the ones recorded: run halfbyte quantize again",
            )


def _shard(folder: Path, name: str, where: Path) -> Path:
    """The shard's path; raises UnsafeName if its name is more than a file name."""
    if "/" in name or "\\" in name or not name.endswith(".safetensors") or name.startswith("."):
        raise UnsafeName(
            f"{name[:120]!r} is not the name of a weight file", where=str(where), todo="do not trust this checkpoint"
        )
    return folder / name


def _check_digest(folder: Path, name: str, record: Mapping[str, Any], expected: str) -> None:
    found = record.get("weights_digest")
    if found == expected:
        return
    where = str(folder / FOLDER / f"{name}.json")
    if name == "verify" and record.get("passed") is False:
        # not an old record: it looked at these weights and says that they changed, or that they cannot be read at all
        raise CheckFailed(
            f"verification failed and found weights {found}, the quantize record says {expected}",
            where=where,
            todo="run halfbyte quantize again, then halfbyte verify",
        )
    raise SourceError(
        f"the {name} record speaks of weights {found}, the checkpoint holds {expected}",
        where=where,
        todo=f"run that command again: halfbyte {name.partition('-')[0]} {folder}",
    )


def _read_plan(folder: Path, quantize: Mapping[str, Any]) -> dict[str, Any] | None:
    """The plan record; raises SourceError if it decides otherwise than the quantize record did."""
    plan = _read(folder, "plan")
    if plan is None:
        return None
    decided = {decision["name"]: decision["action"] for decision in plan["decisions"]}
    done = {name: entry["action"] for name, entry in quantize["tensors"].items()}
    if decided != done:
        name = next(name for name in {**decided, **done} if decided.get(name) != done.get(name))
        raise SourceError(
            f"the plan says {decided.get(name)}, the quantize record {done.get(name)}",
            where=f"{folder / FOLDER / 'plan.json'}: tensor {name}",
            todo="the records belong to two jobs: run halfbyte quantize again",
        )
    return plan
