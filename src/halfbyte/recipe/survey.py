"""`halfbyte plan`: what quantizing would do to a source, from its headers and config alone (and a sample of its weights)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from halfbyte.errors import UsageError
from halfbyte.format.checkpoint import open_source, read_config
from halfbyte.format.hf_config import check_unquantized
from halfbyte.format.tensors import Source
from halfbyte.recipe.decisions import Plan


def plan(
    source: str | Path,
    *,
    preset: str | Path = "decoder-only",
    card_gb: float = 24,
    allow_disagreement: bool = True,
    probe: bool = False,
) -> Plan:
    """The plan of `source`; no weights are read unless `probe` asks for it.

    source              folder, .gguf file, hub id, or a bare config.json (tensors are then what transformers would build)
    preset              `decoder-only`, `unsloth`, or the path of a TOML file
    card_gb             memory of the GPU to fit, in GB as printed on the box
    allow_disagreement  False raises LoaderDisagreement if loaders read the skip list differently
    probe               read a sample of the weights and say whether they lie on an int4 or NF4 grid (`Plan.lattice`)
    """
    from halfbyte.recipe.plan import make_plan

    path = Path(source)
    if path.is_file() and path.suffix == ".json":
        if probe:
            raise UsageError(
                "a config.json has no weights to probe",
                where=f"--probe, {source}",
                todo="name the checkpoint's folder or .gguf file, or leave --probe away",
            )
        config, tensors = read_config(path), None
        check_unquantized(config, str(source))
        return make_plan(config, tensors, preset=preset, card_gb=card_gb, allow_disagreement=allow_disagreement)
    opened = open_source(source)
    try:
        made = plan_of(opened, preset=preset, card_gb=card_gb, allow_disagreement=allow_disagreement)
        if probe:
            from halfbyte.recipe.probe import probe as look

            made = replace(made, lattice=look(opened, made))
        return made
    finally:
        opened.close()


def plan_of(source: Source, *, preset: str | Path, allow_disagreement: bool, card_gb: float = 24) -> Plan:
    """The plan of an open source, with what the source itself has to say among its notes; see `plan`."""
    from halfbyte.recipe.plan import make_plan

    check_unquantized(source.config, source.label)
    made = make_plan(
        source.config, source.tensors, preset=preset, card_gb=card_gb, allow_disagreement=allow_disagreement
    )
    return replace(made, notes=[*made.notes, *source.notes])
