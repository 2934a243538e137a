"""`halfbyte plan`: what quantizing would do to a source, from its headers and config alone (and a sample of its weights)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from halfbyte.errors import UsageError
from halfbyte.format.checkpoint import open_source, read_config
from halfbyte.format.hf_config import check_unquantized
from halfbyte.format.tensors import Source, TensorInfo
from halfbyte.recipe.decisions import Plan, PlanOptions, plan_options


def plan(
    source: str | Path,
    *,
    card_gb: float = 24,
    allow_disagreement: bool = True,
    probe: bool = False,
    **options: Any,
) -> Plan:
    """The plan of `source`; no weights are read unless `probe` asks for it.

    source              folder, .gguf file, hub id, or a bare config.json (tensors are then what transformers would build)
    card_gb             memory of the GPU to fit, in GB as printed on the box
    allow_disagreement  False raises LoaderDisagreement if loaders read the skip list differently
    probe               read a sample of the weights and say whether they lie on an int4 or NF4 grid (`Plan.lattice`)
    options             any field of `PlanOptions`: preset, blocksize, budget, sensitivity
    """
    decided, path = plan_options(options), Path(source)
    if path.is_file() and path.suffix == ".json":
        if probe:
            raise UsageError(
                "a config.json has no weights to probe",
                where=f"--probe, {source}",
                todo="name the checkpoint's folder or .gguf file, or leave --probe away",
            )
        config, tensors = read_config(path), None
        check_unquantized(config, str(source))
        return _made(config, tensors, decided, card_gb=card_gb, allow_disagreement=allow_disagreement)
    opened = open_source(source)
    try:
        made = plan_of(opened, card_gb=card_gb, allow_disagreement=allow_disagreement, **vars(decided))
        if probe:
            from halfbyte.recipe.probe import probe as look

            made = replace(made, lattice=look(opened, made))
        return made
    finally:
        opened.close()


def plan_of(source: Source, *, allow_disagreement: bool, card_gb: float = 24, **options: Any) -> Plan:
    """The plan of an open source, with what the source itself has to say among its notes; see `plan`."""
    check_unquantized(source.config, source.label)
    made = _made(
        source.config, source.tensors, plan_options(options), card_gb=card_gb, allow_disagreement=allow_disagreement
    )
    return replace(made, notes=[*made.notes, *source.notes])


def _made(
    config: Mapping[str, Any], tensors: Sequence[TensorInfo] | None, decided: PlanOptions,
    *, card_gb: float, allow_disagreement: bool,
) -> Plan:  # fmt: skip
    from halfbyte.recipe.budget.spending import budget_of
    from halfbyte.recipe.plan import make_plan

    return make_plan(
        config, tensors, preset=decided.preset, blocksize=decided.blocksize, card_gb=card_gb,
        allow_disagreement=allow_disagreement, budget=budget_of(decided),
    )  # fmt: skip
