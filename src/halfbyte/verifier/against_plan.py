"""What should be there: the inventory of the checkpoint against the plan, the source or, without both, the model class.

Losing a tensor is the quietest way to ruin a model: transformers fills the gap with its initial value and warns once.
Gemma 4's `layer_scalar` buffers (initially 1) are the classic case.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from halfbyte.errors import PlanError
from halfbyte.format.checkpoint import SafetensorsSource
from halfbyte.format.nf4_layout import component_sizes
from halfbyte.format.tensors import Source
from halfbyte.recipe.decisions import AREAS, Plan
from halfbyte.verifier.checks import Check, Fault, skipped, verdict
from halfbyte.verifier.layout import Weight, nf4_names


@dataclass(frozen=True)
class Original:
    """One tensor of the source. `action` is None if no plan says what became of it, `blocksize` if none became NF4."""

    dtype: str
    shape: tuple[int, ...]
    action: str | None
    blocksize: int | None = None


def originals_of(plan: Plan | None, source: Source | None) -> dict[str, Original] | None:
    """What the source held, from the source itself or else as the plan lists it; None if there is neither."""
    decided: dict[str, tuple[str, int | None]] = {}
    for d in plan.decisions if plan else ():
        assert plan is not None
        decided[d.name] = (str(d.action), plan.blocksize_of(d) if d.action == "nf4" else None)
    if source is not None:
        none = (None, None)
        return {info.name: Original(info.dtype, info.shape, *decided.get(info.name, none)) for info in source.tensors}
    if plan is not None:
        return {d.name: Original(d.dtype, d.shape, *decided[d.name]) for d in plan.decisions}
    return None


def check_inventory(
    reader: SafetensorsSource, weights: list[Weight], originals: Mapping[str, Original] | None, plan: Plan | None
) -> list[Check]:
    """Checks F19 (all there, none extra, each as planned), F20 (tied weights once) and the areas of the plan."""
    found = {info.name: info for info in reader.tensors}
    if originals is None:
        inventory = _against_class(reader)
    else:
        faults = _against_originals(reader, {w.name: w for w in weights}, originals)
        what = "plan" if plan else "source"
        inventory = verdict("F19", faults, f"{len(originals)} tensors of the {what}, stored as {len(found)}")
    return [inventory, _tied(reader, originals), _areas(nf4_names(found), plan)]


def _against_originals(
    reader: SafetensorsSource, weights: Mapping[str, Weight], originals: Mapping[str, Original]
) -> list[Fault]:
    found = {info.name: info for info in reader.tensors}
    packed = nf4_names(found)
    expected: set[str] = set()
    faults = []
    for name, original in originals.items():
        if name not in found:
            faults.append(Fault("is in the source and not here", name))
            continue
        nf4 = name in packed
        if original.action is not None and nf4 != (original.action == "nf4"):
            faults.append(Fault(f"is {'quantized' if nf4 else 'not quantized'}, the plan says {original.action}", name))
        if nf4:
            expected |= component_sizes(name, original.shape).keys()
            stated = weights[name].shape if name in weights else original.shape
            if stated != original.shape:
                faults.append(Fault(f"says shape {list(stated)}, the source has {list(original.shape)}", name))
            blocks = weights[name].blocksize if name in weights else original.blocksize
            if original.blocksize is not None and blocks != original.blocksize:
                faults.append(Fault(f"has blocks of {blocks}, the plan says {original.blocksize}", name))
            continue
        expected.add(name)
        info = found[name]
        if (info.dtype, info.shape) != (original.dtype, original.shape):
            have, want = (f"{t.dtype} {list(t.shape)}" for t in (info, original))
            faults.append(Fault(f"is {have}, the source has {want}", name))
    return faults + [Fault("is here and not in the source", name) for name in sorted(found.keys() - expected)]


def _against_class(reader: SafetensorsSource) -> Check:
    """Without plan and source: does every tensor the model class keeps have a file entry, and the other way round?"""
    from halfbyte.recipe.skeleton import build_skeleton, model_names

    try:
        skeleton = build_skeleton({k: v for k, v in reader.config.items() if k != "quantization_config"})
    except PlanError as error:
        return skipped("F19", f"no plan, no source, and the model class cannot be built: {error.what}")
    packed = nf4_names(info.name for info in reader.tensors)
    parts = {part for name in packed for part in component_sizes(name, (1,)) if part != name}
    names = [info.name for info in reader.tensors if info.name not in parts]
    mapped = model_names(skeleton, names)
    if any(converted for _, converted in mapped.values()):
        return skipped("F19", "no plan and no source, and transformers rebuilds this model's tensors while loading")
    keys = {key for key, _ in mapped.values() if key is not None}
    wanted = skeleton.tensors.keys() - skeleton.tied.keys()
    faults = [Fault("belongs to the model and is not here", key) for key in sorted(wanted - keys)]
    faults += [Fault("is here and no part of the model", name) for name, (key, _) in mapped.items() if key is None]
    return verdict("F19", faults, f"{len(names)} tensors, all that {skeleton.architecture} keeps (no plan, no source)")


def _tied(reader: SafetensorsSource, originals: Mapping[str, Original] | None) -> Check:
    if not _ties_embeddings(reader.config):
        return skipped("F20", "the model does not tie its embeddings")
    here = "lm_head.weight" in {info.name for info in reader.tensors}
    if here and originals is None:
        return skipped("F20", "lm_head.weight is stored; whether the source stores it too cannot be told without it")
    twice = here and originals is not None and "lm_head.weight" not in originals
    faults = [Fault("is stored although it is tied and the source has none", "lm_head.weight")] if twice else []
    return verdict("F20", faults, "lm_head shares the embedding" if not here else "lm_head is stored, as in the source")


def _ties_embeddings(config: Mapping[str, Any]) -> bool:
    text = config.get("text_config")
    inner = text.get("tie_word_embeddings", False) if isinstance(text, dict) else False
    return bool(config.get("tie_word_embeddings", inner))


def _areas(packed: set[str], plan: Plan | None) -> Check:
    if plan is None:
        return skipped("areas", "no plan")
    areas = {d.name: d.area for d in plan.decisions}
    planned = Counter(d.area for d in plan.decisions if d.action == "nf4")
    found = Counter(areas.get(name, "other") for name in packed)
    tally = ", ".join(f"{area} {found[area]}" for area in AREAS if found[area] or planned[area])
    faults = [
        Fault(f"{found[area]} quantized weights, the plan has {planned[area]}", area)
        for area in AREAS
        if found[area] != planned[area]
    ]
    return verdict("areas", faults, tally or "none quantized, as planned")
