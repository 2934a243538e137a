"""The plan: everything decided before a weight is read.

    config.json -> skeleton (which modules, which tensors)      halfbyte.recipe.skeleton
    + areas and preset -> a decision per tensor                  halfbyte.recipe.decide
    -> the skip list that says so                                halfbyte.recipe.skip_list
    -> what each loader makes of that list                       halfbyte.recipe.linter
    -> bytes, cache, fit                                         halfbyte.recipe.sizes

Nothing is dropped in silence: tied weights, fused experts, tensors the model does not know, parameters the source
lacks and patterns that match nothing each leave a note. What cannot be carried out is an error, before a byte is read.

The catch: a plan is only as true as the agreement of the loaders. If one of them would turn another set of modules into
Linear4bit than the plan writes, its users get noise or an exception, so that is an error, unless one asks to see it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from halfbyte.errors import LoaderDisagreement, PlanError, UsageError
from halfbyte.format.tensors import TensorInfo
from halfbyte.recipe.areas import Areas
from halfbyte.recipe.budget.spending import Budget, spend
from halfbyte.recipe.decide import decide_all, kind_of
from halfbyte.recipe.decisions import Decision, Plan
from halfbyte.recipe.linter import check_patterns, lint, matrix_lines
from halfbyte.recipe.preset import Preset, load_preset, matches
from halfbyte.recipe.sizes import GIB, source_bytes, summarize
from halfbyte.recipe.skeleton import Skeleton, build_skeleton, model_names, tensors_of
from halfbyte.recipe.skip_list import derive_skip_modules

#: what bitsandbytes' 4-bit kernels take (32 since 0.49.2)
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_NAMED = 4


def make_plan(
    config: Mapping[str, Any],
    tensors: Sequence[TensorInfo] | None,
    *,
    preset: str | Path = "decoder-only",
    blocksize: int = 64,
    allow_disagreement: bool = False,
    card_gb: float = 24,
    budget: Budget | None = None,
) -> Plan:
    """Decide for every tensor of a checkpoint.

    config              parsed config.json (not changed)
    tensors             the source's headers; None for a bare config.json: what a checkpoint of that model would hold
    preset              name of a built-in preset, or path of a TOML file (halfbyte.recipe.preset)
    blocksize           elements per absmax block, one of BLOCKSIZES
    allow_disagreement  return the plan even if a loader would read its skip list differently (see `plan.loaders`)
    card_gb             GPU memory that `summary["fit"]` is worked out for, in units of 2^30 bytes
    budget              how many bytes there are, and what each choice costs (halfbyte.recipe.budget)

    raises  UsageError (preset, blocksize, skip list, budget), PlanError (unknown model, missing or doubled tensors),
            ShapeMismatch (tensor and config disagree), LoaderDisagreement
    """
    _check_blocksize(blocksize)
    recipe = load_preset(preset)
    if recipe.skip_modules is not None:
        check_patterns(list(recipe.skip_modules))
    skeleton = build_skeleton(config)
    areas = Areas(skeleton)
    infos = list(tensors) if tensors is not None else tensors_of(skeleton)
    names = model_names(skeleton, (info.name for info in infos))
    decisions = decide_all(infos, names, skeleton, areas, recipe)
    present = {key for key, _ in names.values() if key is not None}
    missing = _missing(present, skeleton, areas, recipe)
    if budget is not None:
        _no_verbatim_list(recipe)
    decisions, spent = spend(budget, decisions, skeleton, blocksize) if budget else (decisions, None)
    nf4 = [d.module for d in decisions if d.action == "nf4" and d.module is not None]
    skip = derive_skip_modules(nf4, skeleton, areas) if recipe.skip_modules is None else list(recipe.skip_modules)
    loaders = lint(skip, skeleton, wanted=nf4, areas=areas)
    if not allow_disagreement and not all(row["agrees"] for row in loaders.values()):
        raise _disagreement(loaders, skip, recipe, nf4, skeleton, areas)
    return Plan(
        model={
            "model_type": skeleton.model_type,
            "architecture": skeleton.architecture,
            "auto_class": skeleton.auto_class,
        },
        preset={"name": recipe.name, "why": recipe.why},
        blocksize=blocksize,
        skip_modules=skip,
        linear_modules=list(skeleton.convertible),
        decisions=decisions,
        loaders=loaders,
        notes=_notes(decisions, skeleton, recipe, missing, present),
        summary=summarize(decisions, skeleton, areas, blocksize=blocksize, card_gb=card_gb),
        budget=spent,
    )


def _check_blocksize(blocksize: int) -> None:
    if blocksize not in BLOCKSIZES:
        sizes = ", ".join(map(str, BLOCKSIZES))
        raise UsageError(f"blocksize {blocksize} is not one that bitsandbytes takes", where="--blocksize", todo=sizes)


def _no_verbatim_list(recipe: Preset) -> None:
    if recipe.skip_modules is not None:
        raise UsageError(
            f"preset {recipe.name!r} writes its own skip list, a budget has to extend it",
            where="--budget",
            todo="use a preset with [[keep]] entries, such as decoder-only",
        )


def _missing(present: set[str], skeleton: Skeleton, areas: Areas, recipe: Preset) -> list[str]:
    """State-dict keys that the source lacks and that no tied tensor stands in for.

    raises PlanError if a linear of the decoder is among them: the model could not answer at all
    """
    shared = {origin: key for key, origin in skeleton.tied.items()} | dict(skeleton.tied)
    missing = [key for key in skeleton.tensors if key not in present and shared.get(key) not in present]
    for key in missing:
        tensor = skeleton.tensors[key]
        if kind_of(tensor, areas.area_of(tensor.module)) == "linear" and areas.area_of(tensor.module) == "decoder":
            raise PlanError(
                f"the source has no tensor for {key}",
                where=f"{len(missing)} tensors of {skeleton.architecture} are missing",
                todo="check that all shards are there and that config.json belongs to them",
            )
    return missing


def _notes(
    decisions: list[Decision], skeleton: Skeleton, recipe: Preset, missing: list[str], present: set[str]
) -> list[str]:
    """What must be said aloud, most important first."""
    notes = []
    experts = [d for d in decisions if d.kind == "fused_experts"]
    if experts:
        total, size = sum(map(source_bytes, decisions)), sum(map(source_bytes, experts))
        notes.append(
            f"FUSED EXPERTS STAY AS THEY ARE: {len(experts)} tensors, {size / GIB:.2f} GiB, "
            f"{100 * size / total:.0f} % of the weights, hold 3-d expert parameters; bitsandbytes does not touch them "
            "(they are not nn.Linear). vLLM makes its own expert layers 4-bit without asking the skip list: "
            "try it there before you publish"
        )
    if not any(d.action == "nf4" for d in decisions):
        notes.append("NOTHING BECOMES NF4: no tensor is the weight of an nn.Linear that the preset releases")
    if missing:
        notes.append(f"the source lacks {_some(missing)}: transformers will draw initial values for them")
    unknown = [d for d in decisions if d.kind == "unknown"]
    if unknown:
        size = sum(map(source_bytes, unknown))
        notes.append(
            f"carried byte for byte, {size / GIB:.3f} GiB, unknown to {skeleton.architecture}: "
            f"{_some([d.name for d in unknown])}"
        )
    tied = [f"{key} = {origin}" for key, origin in skeleton.tied.items() if key not in present or origin not in present]
    if tied:
        notes.append(f"tied, stored once: {_some(tied)}")
    modules = {name for name, _ in skeleton.model.named_modules()}
    for pattern in recipe.own_patterns:
        if not any(matches(pattern, module) for module in modules):
            notes.append(f"preset {recipe.name!r}: pattern {pattern!r} matches no module of {skeleton.architecture}")
    return notes


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:_NAMED]) + (", ..." if len(names) > _NAMED else "")
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''}: {shown}"


def _disagreement(
    loaders: dict[str, Any], skip: list[str], recipe: Preset, nf4: list[str], skeleton: Skeleton, areas: Areas
) -> LoaderDisagreement:
    todo = "use --preset decoder-only, or --allow-disagreement to go on"
    if recipe.skip_modules is not None:
        intended = [m for m in nf4 if load_preset("decoder-only").keep_reason(m, areas.area_of(m)) is None]
        intended = [m for m in intended if areas.area_of(m) == "decoder"]
        better = derive_skip_modules(intended, skeleton, areas)
        if all(row["agrees"] for row in lint(better, skeleton, wanted=intended, areas=areas).values()):
            todo = f"a list that all of them read alike: {', '.join(better)}; or --allow-disagreement to go on"
    return LoaderDisagreement(
        "\n".join(
            [f"loaders read this skip list differently; the plan has {len(nf4)} modules in NF4", *matrix_lines(loaders)]
        ),
        where=f"llm_int8_skip_modules = {skip}",
        todo=todo,
    )
