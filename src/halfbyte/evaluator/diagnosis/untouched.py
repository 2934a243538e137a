"""Proof that a recipe kept its word: vision tower, projector, embeddings and head are the reference's, value by value.

"Only the decoder was quantized" is easily said and easily wrong: the same skip list means different things to different loaders,
and a tower in NF4 shows in no text score. So every tensor outside the decoder is read from both models and compared after
dequantization, by the names the model gives them, whatever the files call them. One changed weight is a changed tensor.

Equal means equal values: a bf16 tensor and its float32 copy are identical, NaN equals nothing. A head that is tied to the
embeddings has no tensor of its own and is proven with them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from halfbyte.evaluator.diagnosis.kept import keep, load_kept
from halfbyte.layers.weights import Weights
from halfbyte.progress import track
from halfbyte.recipe.areas import Areas
from halfbyte.recipe.skeleton import Skeleton, build_skeleton, model_names
from halfbyte.records import digest

VERSION = 1
#: as halfbyte.recipe.decisions.AREAS, without the decoder
PROVEN = ("vision", "audio", "projector", "embeddings", "head", "other")
#: elements compared at a time
_SLICE = 1 << 24


def untouched_areas(reference: Weights, candidate: Weights, folder: Path) -> dict[str, Any]:
    """{"areas": [{"area", "tensors", "identical", "missing", "same", "first"}], "head_tied", "cached"}; kept in `folder`.

    tensors  of either model; those that one of the two lacks are `missing`, and the area is then not the same
    first    name of the first tensor that differs or is missing, None if there is none
    """
    key = digest({"version": VERSION, "reference": reference.digest, "candidate": candidate.digest})
    path = folder / f"untouched-{key.partition(':')[2][:16]}.json"
    body = load_kept(path, key)
    if body is not None:
        return {**body, "cached": True}
    body = _compare(reference, candidate)
    keep(path, key, body)
    return {**body, "cached": False}


def _compare(reference: Weights, candidate: Weights) -> dict[str, Any]:
    skeleton = build_skeleton(reference.config)
    areas = Areas(skeleton)
    mine, theirs = _by_key(skeleton, reference), _by_key(skeleton, candidate)
    found: dict[str, dict[str, bool | None]] = {area: {} for area in PROVEN}
    named = [(key, areas.area_of(key.rpartition(".")[0])) for key in dict.fromkeys([*mine, *theirs])]
    wanted = [(key, area) for key, area in named if area in found]
    with track(f"areas of {candidate.label}", len(wanted), "tensors") as advance:
        for key, area in wanted:
            both = key in mine and key in theirs
            found[area][key] = _equal(reference, mine[key], candidate, theirs[key]) if both else None
            advance(1)
    head_tied = areas.head is not None and f"{areas.head}.weight" in skeleton.tied
    return {"areas": [_row(area, tensors) for area, tensors in found.items() if tensors], "head_tied": head_tied}


def _row(area: str, tensors: Mapping[str, bool | None]) -> dict[str, Any]:
    identical = sum(same is True for same in tensors.values())
    return {
        "area": area, "tensors": len(tensors), "identical": identical,
        "missing": sum(same is None for same in tensors.values()), "same": identical == len(tensors),
        "first": next((key for key, same in tensors.items() if not same), None),
    }  # fmt: skip


def _by_key(skeleton: Skeleton, weights: Weights) -> dict[str, str]:
    """The model's name of each tensor (the file's, where loading would merge it) -> the file's. Tied copies are left out."""
    found = {}
    for name, (key, converted) in model_names(skeleton, weights.names()).items():
        if key not in skeleton.tied:
            found[name if key is None or converted else key] = name
    return found


def _equal(reference: Weights, mine: str, candidate: Weights, theirs: str) -> bool:
    import torch

    shape = reference.shape(mine)
    if shape != candidate.shape(theirs):
        return False
    numel = torch.Size(shape).numel()
    if not shape or numel <= _SLICE:
        return bool((reference.load(mine).double() == candidate.load(theirs).double()).all())
    step = max(1, _SLICE * shape[0] // numel)
    return all(
        bool((reference.load_rows(mine, at, end).double() == candidate.load_rows(theirs, at, end).double()).all())
        for at in range(0, shape[0], step)
        for end in [min(at + step, shape[0])]
    )
