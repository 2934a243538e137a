"""The sensitivity record, as a plan reads it: what storing one group coarsely costs, everything else as it is.

    groups   [{"name", "modules": [...], "costs": {"nf4-64": {"kld", "standard_error", ...}, "nf4-32": {...}},
               "saving_standard_error": of the paired difference, or null}]      nats a token
    joint    {"nf4-64": {"kld", "sum"}, ...}      all groups at once, beside the sum of the single ones
    rows     {"digest", "protocol", "n", "documents"}, data [{"name", "sha256", "bytes"}]
    weights  {"method", "calibration": {"name", "sha256", "tokens", "rows_digest", ...} or null, ...}: how weights were made whose loss was
             measured. Records from before that have none: they are of rtn
    source   {"label", "digest", "tensors": digest of names and shapes}

It is written by `halfbyte sensitivity` (halfbyte.evaluator.sensitivity) and comes from elsewhere as often as not, so nothing in it is
believed: numbers must be finite and not negative, and its tensors must be this source's. That the *values* of the weights are
those that were measured cannot be seen from headers; the source's digest is carried into the plan for whoever checks it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halfbyte.errors import SourceError
from halfbyte.recipe.decisions import METHODS
from halfbyte.records import SCHEMA, digest

NAME = "sensitivity"
#: choices that are measured; the third, to leave a group as it is, costs nothing
MEASURED = {"nf4-64": 64, "nf4-32": 32}
_TODO = "measure it again with halfbyte sensitivity"


@dataclass(frozen=True)
class Sensitivity:
    """A record that was found in order.

    costs  group -> choice (of MEASURED) -> nats
    modules  group -> module paths
    about  what a plan carries on: digest of the record, rows, data, source, joint, and of which weights the costs are
    """

    costs: Mapping[str, Mapping[str, float]]
    modules: Mapping[str, Sequence[str]]
    about: Mapping[str, Any]


def read_sensitivity(path: str | Path) -> Sensitivity:
    """The record in a folder that `halfbyte sensitivity` wrote, or a file of it; raises SourceError, saying what is wrong."""
    place = Path(path)
    file = place / "halfbyte" / f"{NAME}.json" if place.is_dir() else place
    try:
        body = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        what = error.strerror if isinstance(error, OSError) else "not JSON"
        raise SourceError(f"no sensitivity record ({what})", where=str(file), todo=_TODO) from None
    if not isinstance(body, dict) or body.get("record") != NAME or body.get("schema") != SCHEMA:
        raise SourceError("is not a sensitivity record of this version", where=str(file), todo=_TODO)
    try:
        groups = body["groups"]
        costs = {g["name"]: {choice: _nats(g["costs"][choice]["kld"]) for choice in MEASURED} for g in groups}
        modules = {g["name"]: tuple(str(module) for module in g["modules"]) for g in groups}
        about = {
            "digest": digest(body),
            **{key: body["rows"][key] for key in ("protocol", "n", "documents")},
            "rows": body["rows"]["digest"],
            "data": [{key: each[key] for key in ("name", "sha256", "bytes")} for each in body["data"]],
            "source": {key: body["source"][key] for key in ("label", "digest", "tensors")},
            "weights": _weights(body),
            "joint": {c: {key: _nats(body["joint"][c][key]) for key in ("kld", "sum")} for c in MEASURED},
        }
    except (KeyError, TypeError, ValueError) as error:
        raise SourceError(f"a field is missing or wrong: {error}", where=str(file), todo=_TODO) from None
    return Sensitivity(costs, modules, about)


def tensors_digest(tensors: Iterable[tuple[str, Sequence[int]]]) -> str:
    """Of a source's (name, shape) pairs, in any order: which architecture, not which values."""
    return digest(sorted([name, list(shape)] for name, shape in tensors))


def _weights(body: Mapping[str, Any]) -> dict[str, Any]:
    """{"method", "calibration"}; raises KeyError, TypeError, ValueError."""
    found = body.get("weights", {"method": "rtn", "calibration": None})
    if found["method"] not in METHODS:
        raise ValueError(f"method {str(found['method'])[:40]!r}")
    seen = found["calibration"]
    if seen is None:
        return {"method": found["method"], "calibration": None}
    texts = {key: str(seen[key]) for key in ("name", "sha256", "rows_digest")}
    return {"method": found["method"], "calibration": {**texts, "tokens": int(seen["tokens"])}}


def _nats(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise ValueError(f"{value!r} is no number of nats")
    return float(value)
