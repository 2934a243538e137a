"""Two bases and what quantization did to each: D, T and I of the 2 x 2 (halfbyte.evaluator.statistics.figures).

The first base stands where the design says `vanilla`, the second where it says `QAT`; the record names both. Cells are
paired by kind: the first NF4 of one with the first NF4 of the other, q4_0 with q4_0.

    on KLD    D is the mean (or median) KLD of each base's candidate from its own bf16. There is no T
    on NLL    D, T and I; only where both bases are scored on the same tokens (not on answers that each wrote itself)

Documents in which one base has no tokens (an empty answer) are left out of both, and counted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from halfbyte.evaluator.job.bases import Base
from halfbyte.evaluator.job.figures import SEED
from halfbyte.evaluator.job.scoring import Scored
from halfbyte.evaluator.statistics import Cell, Mean, Quantile, two_by_two, verdict

VANILLA, QAT = "vanilla", "QAT"


def effects_of(first: Scored, second: Scored, resamples: int, margin: float) -> list[dict[str, Any]]:
    """Every effect that the two bases' vectors under one protocol allow, as record values; [] if no kinds match."""
    import numpy as np

    names = np.intersect1d(first.reference.arrays["documents"], second.reference.arrays["documents"])
    if not len(names):
        return []
    pairs = pairs_of(first.base, second.base)
    same_tokens = first.rows.digest == second.rows.digest
    found = []
    for kind, left, right in pairs:
        about = {
            "protocol": first.rows.protocol, "precision": kind,
            "cells": {VANILLA: left, QAT: right}, "bases": {VANILLA: first.base.name, QAT: second.base.name},
            "documents_left_out": max(len(s.reference.arrays["documents"]) for s in (first, second)) - len(names),
            "margin": margin,
        }  # fmt: skip
        cells = {
            (VANILLA, "NF4"): _cell(first, first.candidates[left].arrays["kld"], names),
            (QAT, "NF4"): _cell(second, second.candidates[right].arrays["kld"], names),
        }
        for metric, of in _STATISTICS.items():
            made = two_by_two(cells, divergence=True, of=of, resamples=resamples, seed=SEED)
            found += [{**about, "metric": metric, **_effect(name, e, margin)} for name, e in made.items()]
        if same_tokens:
            cells = {
                (VANILLA, "bf16"): _cell(first, first.reference.arrays["nll"], names),
                (VANILLA, "NF4"): _cell(first, first.candidates[left].arrays["nll"], names),
                (QAT, "bf16"): _cell(second, second.reference.arrays["nll"], names),
                (QAT, "NF4"): _cell(second, second.candidates[right].arrays["nll"], names),
            }
            made = two_by_two(cells, resamples=resamples, seed=SEED)
            found += [{**about, "metric": "nll mean", **_effect(name, e, margin)} for name, e in made.items()]
    return found


def _median(cell: str) -> Quantile:
    return Quantile(cell, 0.5)


_STATISTICS: Mapping[str, Callable[[str], Mean | Quantile]] = {"kld mean": Mean, "kld median": _median}


def pairs_of(first: Base, second: Base) -> Sequence[tuple[str, str, str]]:
    """(kind, id in the first base, id in the second), in the order in which candidates of a kind were named."""
    kinds = list(dict.fromkeys(entry.kind for entry in first.candidates))
    pairs = []
    for kind in kinds:
        ids = [[entry.id for entry in base.candidates if entry.kind == kind] for base in (first, second)]
        pairs += [(kind, left, right) for left, right in zip(*ids, strict=False)]
    return pairs


def _cell(scored: Scored, values: Any, names: Any) -> Cell:
    """The values of the documents in `names`, under ids that both bases share: places in the sorted names."""
    import numpy as np

    own = scored.reference.arrays
    of_token = own["documents"][own["document"]]
    inside = np.isin(of_token, names)
    return Cell(values[inside], np.searchsorted(names, of_token[inside]))


def _effect(name: str, e: Any, margin: float) -> dict[str, Any]:
    record = e.as_record()
    return {
        "effect": name, "value": record["point"], "low": record["low"], "high": record["high"], "unit": "nats",
        "n": e.tokens, "documents": e.documents, "method": e.method, "verdict": verdict(e.low, e.high, margin),
    }  # fmt: skip
