"""One base under one protocol: what is on disk is read, what is not is scored, and written as soon as it is.

The reference goes first and is kept (hidden states and head, no weights); then the candidates, one at a time, each of them
written before the next is opened. A run that was stopped pays for the reference's pass again, and for no candidate twice.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halfbyte.evaluator.job import vectors
from halfbyte.evaluator.job.bases import Base
from halfbyte.evaluator.job.vectors import Stored
from halfbyte.evaluator.packed import PackedReference
from halfbyte.evaluator.rows import Rows
from halfbyte.evaluator.scoring.scorer import FLOOR_SEED, KeptReference, Scores, keep_reference, score_against
from halfbyte.progress import note
from halfbyte.records import digest, versions

if TYPE_CHECKING:
    from halfbyte.evaluator.weights import Weights

#: raise it when a figure's definition changes: vectors of another version are never read
METRICS_VERSION = 1


@dataclass(frozen=True)
class Machine:
    """Where and how models are run, and where vectors are kept."""

    device: str
    dtype: str
    batch: int
    folder: Path

    def facts(self) -> dict[str, Any]:
        return {"device": self.device, "dtype": self.dtype, "batch": self.batch}


@dataclass(eq=False)
class Scored:
    """A base under a protocol: the reference's vectors (`row`, `position`, `label`, `document`, `documents`, `nll`,
    `top_probability`, perhaps `floor_kld`) and each candidate's (`kld`, `nll`, `agrees`, `delta_p`), by id.
    """

    base: Base
    rows: Rows
    reference: Stored
    candidates: dict[str, Stored] = field(default_factory=dict)


def score_base(
    base: Base, rows: Rows, machine: Machine, *, floor: bool, keep: Callable[[KeptReference], None] | None = None
) -> Scored:
    """Vectors of the reference and all candidates of `base` over `rows`; raises what the scorer raises.

    keep  is given what scoring needs of the reference, to write it down; that takes the reference's pass in any case
    """
    common = {
        "metrics": METRICS_VERSION, "versions": _depends_on(), "rows": rows.digest, "reference": base.reference.digest,
        **machine.facts(),
    }  # fmt: skip
    packed = base.reference if isinstance(base.reference, PackedReference) else None
    if packed is not None:  # a pack may lie about its reference: its vectors are no live run's
        common["pack"] = packed.file["sha256"]
    own_key = digest({**common, "floor": FLOOR_SEED if floor else None})
    keys = {entry.id: digest({**common, "candidate": entry.weights.digest}) for entry in base.candidates}
    title = f"{rows.protocol}-{base.name}"
    own = vectors.load(machine.folder, title, own_key)
    found = {key: vectors.load(machine.folder, f"{title}-{key}", keys[key]) for key in keys}
    missing = [entry for entry in base.candidates if found[entry.id] is None]
    for name, stored in ((base.name, own), *found.items()):
        if stored is not None:
            note(f"{rows.protocol}, {name}: vectors from {stored.path.name}")
    if own is None or missing or keep is not None:
        started = time.perf_counter()
        if packed is not None:
            kept_reference = packed.kept if floor else replace(packed.kept, floor=None)
        else:
            kept_reference = keep_reference(
                base.reference, rows, device=machine.device, dtype=machine.dtype, batch=machine.batch,
                floor=floor and (own is None or keep is not None),
            )  # fmt: skip
        if keep is not None:
            keep(kept_reference)
        if own is None:
            own = _save_reference(machine, title, own_key, kept_reference, started)
        for entry in missing:
            name = f"{title}-{entry.id}"
            found[entry.id] = _save_candidate(machine, name, keys[entry.id], kept_reference, entry.weights)
    kept = {key: stored for key, stored in found.items() if stored is not None}
    return Scored(base, rows, own, kept)


def _save_reference(machine: Machine, name: str, key: str, kept: KeptReference, started: float) -> Stored:
    import numpy as np

    scores: Scores = score_against(kept, [], device=machine.device)
    names, index = np.unique(scores.document.astype(str), return_inverse=True)
    arrays = {
        "row": scores.row, "position": scores.position, "label": scores.label,
        "document": index.astype(np.int64), "documents": names,
        "nll": kept.own.nll, "top_probability": kept.own.top_probability,
    }  # fmt: skip
    if kept.floor is not None:
        arrays["floor_kld"] = kept.floor.kld
    notes = {
        "seconds": time.perf_counter() - started,
        "self_kld": kept.self_kld,
        "device_name": kept.facts["device_name"],
        "streamed": kept.facts["streamed"],
        "versions": kept.facts["versions"],
    }
    return vectors.save(machine.folder, name, key, arrays, notes)


def _save_candidate(machine: Machine, name: str, key: str, kept: KeptReference, weights: Weights) -> Stored:
    started = time.perf_counter()
    (found,) = score_against(kept, [weights], device=machine.device).candidates
    arrays = {vector: getattr(found, vector) for vector in ("kld", "nll", "agrees", "delta_p")}
    return vectors.save(machine.folder, name, key, arrays, {"seconds": time.perf_counter() - started})


def device_name(device: str) -> str:
    """The device as a person knows it."""
    import torch

    if device == "cpu":
        return f"cpu ({torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads)"
    return str(torch.cuda.get_device_name(device))


def _depends_on() -> dict[str, str]:
    """Versions that can move a logit."""
    return {name: version for name, version in versions().items() if name in ("halfbyte", "torch", "transformers")}
