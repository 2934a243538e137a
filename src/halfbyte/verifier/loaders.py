"""What each loader will make of the written config: the recipe's skip-list linter, run on config.json as it stands."""

from __future__ import annotations

from typing import Any

from halfbyte.errors import PlanError, UsageError
from halfbyte.format.checkpoint import SafetensorsSource
from halfbyte.verifier.checks import Check, Fault, skipped, verdict
from halfbyte.verifier.layout import nf4_names


def check_loaders(reader: SafetensorsSource) -> tuple[Check, dict[str, Any]]:
    """Check F25, and the linter's matrix: loader -> counts by area, and where it departs from what is stored as NF4."""
    from halfbyte.recipe.linter import lint
    from halfbyte.recipe.skeleton import build_skeleton, model_names

    block = reader.config.get("quantization_config")
    skips = block.get("llm_int8_skip_modules") if isinstance(block, dict) else None
    if not isinstance(skips, list):
        return verdict("F25", [Fault("has no llm_int8_skip_modules", "config.json")], ""), {}
    try:
        skeleton = build_skeleton({k: v for k, v in reader.config.items() if k != "quantization_config"})
        keys = model_names(skeleton, sorted(nf4_names(info.name for info in reader.tensors)))
        stored = [key.rpartition(".")[0] for key, _ in keys.values() if key is not None]
        matrix = lint(skips, skeleton, wanted=stored)
    except UsageError as error:
        return verdict("F25", [Fault(error.what, "config.json")], ""), {}
    except PlanError as error:
        return skipped("F25", f"the model class cannot be asked: {error.what}"), {}
    faults = []
    for row in matrix.values():
        for kind, names in (
            ("make 4-bit what is not stored so", row["extra"]),
            ("leave in 16 bits what is stored as 4-bit", row["missing"]),
        ):
            if names:
                faults.append(Fault(f"would {kind}: {', '.join(names[:2])}", row["label"]))
    return verdict("F25", faults, f"{len(matrix)} loaders make {len(stored)} modules 4-bit"), matrix
