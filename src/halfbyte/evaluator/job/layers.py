"""Where the loss enters: error of the weights themselves, tensor by tensor, pooled by layer.

    SQNR = 10 log10( sum w^2 / sum (w - w')^2 )  dB        w of the reference, w' of the candidate

20 dB is a relative error of a tenth. Pooled means that sums are added before the ratio is taken, so a large tensor weighs
what it weighs. Tensors that are equal in every element have no SQNR; they are counted, which also shows that a vision
tower was left alone.

The catch: error of the weights is a poor guide to error of the answers. It says where, not how bad; KLD says how bad.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halfbyte.errors import ShapeMismatch
from halfbyte.evaluator.diagnosis.kept import keep, load_kept
from halfbyte.layers.weights import Weights
from halfbyte.progress import track
from halfbyte.records import digest

if TYPE_CHECKING:
    import torch

VERSION = 2
_LAYER = re.compile(r"^(.*?\b(?:layers|blocks|h))\.(\d+)\.")
_SLICE = 1 << 24


def weight_errors(reference: Weights, candidate: Weights, folder: Path) -> dict[str, Any]:
    """{"identical", "changed", "missing", "sqnr_db", "layers": [...], "cached"}; kept in `folder` by content.

    layers  [{"stack", "layer", "tensors", "sqnr_db", "worst", "worst_db"}]; what lies in no layer has layer None
    raises  ShapeMismatch if a tensor has another shape
    """
    key = digest({"version": VERSION, "reference": reference.digest, "candidate": candidate.digest})
    path = folder / f"sqnr-{key.partition(':')[2][:16]}.json"
    stored = load_kept(path, key)
    if stored is not None:
        return {**stored, "cached": True}
    body = _grouped(*_compare(reference, candidate))
    keep(path, key, body)
    return {**body, "cached": False}


def _compare(reference: Weights, candidate: Weights) -> tuple[dict[str, tuple[float, float]], int, int]:
    """name -> (signal, noise) of tensors that differ; how many are identical; how many one of the two lacks."""
    theirs = set(candidate.names())
    names = [name for name in reference.names() if name in theirs]
    missing = len(set(reference.names()) ^ theirs)
    changed: dict[str, tuple[float, float]] = {}
    with track(f"weights of {candidate.label}", len(names), "tensors") as advance:
        for name in names:
            signal, noise = _sums(name, reference.load(name), candidate.load(name))
            if noise != 0:  # NaN is a change too
                changed[name] = (signal, noise)
            advance(1)
    return changed, len(names) - len(changed), missing


def _sums(name: str, w: torch.Tensor, other: torch.Tensor) -> tuple[float, float]:
    """Sum of squares of w and of w - other, in float64."""
    if w.shape != other.shape:
        raise ShapeMismatch(f"shapes {list(w.shape)} and {list(other.shape)}", where=f"tensor {name}", todo="compare like with like")  # fmt: skip
    w, other = w.reshape(-1), other.reshape(-1)
    signal = noise = 0.0
    for begin in range(0, w.numel(), _SLICE):
        a, b = w[begin : begin + _SLICE].double(), other[begin : begin + _SLICE].double()
        signal += float(a.square().sum())
        noise += float((a - b).square().sum())
    return signal, noise


def _grouped(changed: dict[str, tuple[float, float]], identical: int, missing: int) -> dict[str, Any]:
    groups: dict[tuple[str, int | None], dict[str, tuple[float, float]]] = {}
    for name, sums in changed.items():
        match = _LAYER.match(name)
        key = (match[1], int(match[2])) if match else ("other", None)
        groups.setdefault(key, {})[name] = sums
    layers = []
    for (stack, layer), members in sorted(groups.items(), key=lambda item: (item[0][0], item[0][1] or 0)):
        worst = min(members, key=lambda name: members[name][0] / members[name][1])
        layers.append({
            "stack": stack, "layer": layer, "tensors": len(members), "sqnr_db": _db(members.values()),
            "worst": worst, "worst_db": _db([members[worst]]),
        })  # fmt: skip
    return {
        "identical": identical, "changed": len(changed), "missing": missing,
        "sqnr_db": _db(changed.values()) if changed else None, "layers": layers,
    }  # fmt: skip


def _db(sums: Iterable[tuple[float, float]]) -> float | None:
    """Pooled SQNR; None if there is no signal."""
    pairs = list(sums)
    signal, noise = math.fsum(s for s, _ in pairs), math.fsum(n for _, n in pairs)
    return 10 * math.log10(signal / noise) if signal > 0 and noise > 0 else None
