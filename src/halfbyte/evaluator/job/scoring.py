"""One base under one protocol: what is on disk is read, what is not is scored, and written as soon as it is.

The reference goes first and is kept (hidden states and head, no weights); then the candidates, one at a time, each of them
written before the next is opened. A run that was stopped pays for the reference's pass again, and for no candidate twice.

Beside the vectors a file holds, if it was asked for, the sums of the residual stream's errors (`residual_signal`,
`residual_noise`, `residual_sample`): vectors without them are scored again where they are wanted.
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
from halfbyte.evaluator.scoring.scorer import FLOOR_SEED, KeptReference, Scores, keep_reference, score_against
from halfbyte.layers.rows import Rows
from halfbyte.progress import note
from halfbyte.records import digest, versions
from halfbyte.texts.vision.rows import PictureRows

if TYPE_CHECKING:
    import numpy as np

    from halfbyte.layers.weights import Weights

#: raise it when a figure's definition changes: vectors of another version are never read
METRICS_VERSION = 1
_PER_TOKEN = frozenset({
    "row", "position", "label", "document", "nll", "top_probability", "floor_kld", "frame", "kld", "agrees", "delta_p",
})  # fmt: skip


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

    frame  of answers about pictures: the tokens that are frame; then this holds the content alone. None: nothing is set apart
    """

    base: Base
    rows: Rows
    reference: Stored
    candidates: dict[str, Stored] = field(default_factory=dict)
    frame: Scored | None = None


def score_base(
    base: Base, rows: Rows, machine: Machine, *, floor: bool, layers: bool = False,
    keep: Callable[[KeptReference], None] | None = None,
) -> Scored:  # fmt: skip
    """Vectors of the reference and all candidates of `base` over `rows`; raises what the scorer raises.

    layers  also the errors of the residual stream
    keep    is given what scoring needs of the reference, to write it down; that takes the reference's pass in any case
    """
    common = {
        "metrics": METRICS_VERSION, "versions": _depends_on(), "rows": rows.digest, "reference": base.reference.digest,
        **machine.facts(),
    }  # fmt: skip
    packed = base.reference if isinstance(base.reference, PackedReference) else None
    if packed is not None:  # a pack may lie about its reference: its vectors are no live run's
        common["pack"] = packed.file["sha256"]
        layers = False  # it holds no residuals
    own_key = digest({**common, "floor": FLOOR_SEED if floor else None})
    keys = {entry.id: digest({**common, "candidate": entry.weights.digest}) for entry in base.candidates}
    title = f"{rows.protocol}-{base.name}"
    own = _load(machine, title, own_key, layers and floor)
    found = {key: _load(machine, f"{title}-{key}", keys[key], layers) for key in keys}
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
                floor=floor and (own is None or keep is not None), layers=layers,
            )  # fmt: skip
        if keep is not None:
            keep(kept_reference)
        if own is None:
            own = _save_reference(machine, title, own_key, kept_reference, started)
        for entry in missing:
            name = f"{title}-{entry.id}"
            found[entry.id] = _save_candidate(machine, name, keys[entry.id], kept_reference, entry.weights)
    kept = {key: stored for key, stored in found.items() if stored is not None}
    return _apart(Scored(base, rows, own, kept))


def _load(machine: Machine, name: str, key: str, layers: bool) -> Stored | None:
    """Vectors on disk; None also if they lack the residual's errors and these are wanted."""
    stored = vectors.load(machine.folder, name, key)
    return None if stored is not None and layers and "residual_signal" not in stored.arrays else stored


def _apart(scored: Scored) -> Scored:
    """Content and frame as two, if the reference's vectors say which token is which."""
    frame = scored.reference.arrays.get("frame")
    if frame is None:
        return scored
    content = _part(scored, ~frame)
    return replace(content, frame=_part(scored, frame)) if frame.any() else content


def _part(scored: Scored, inside: np.ndarray) -> Scored:
    """The same with the tokens `inside` alone, and the documents that they are of."""
    import numpy as np

    def cut(stored: Stored) -> Stored:
        arrays = {
            name: a[inside] if a.shape == inside.shape and name in _PER_TOKEN else a
            for name, a in stored.arrays.items()
        }
        return replace(stored, arrays=arrays)

    own = cut(scored.reference)
    left, index = np.unique(own.arrays["document"], return_inverse=True)
    own.arrays.update(document=index.astype(np.int64), documents=own.arrays["documents"][left])
    return replace(scored, reference=own, candidates={key: cut(each) for key, each in scored.candidates.items()})


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
    if kept.residuals is not None:
        arrays |= {f"residual_{name}": array for name, array in kept.residuals.floor().items()}
    if isinstance(kept.rows, PictureRows):
        arrays["frame"] = np.isin(scores.label, kept.rows.frame_ids)
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
    arrays |= {f"residual_{name}": array for name, array in (found.residual or {}).items()}
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
