"""A sensitivity record made on paper: drawn costs for the groups of a plan, in the form that `halfbyte sensitivity` writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from halfbyte.recipe.budget.groups import Group, groups_of
from halfbyte.recipe.budget.sensitivity import tensors_digest
from halfbyte.recipe.decisions import Plan
from halfbyte.recipe.skeleton import build_skeleton
from halfbyte.records import write_record


def groups(config: dict[str, Any], plan: Plan) -> list[Group]:
    return groups_of(plan.decisions, build_skeleton(config))


def write_costs(folder: Path, config: dict[str, Any], plan: Plan, seed: int = 0) -> Path:
    """Costs over four decades; NF4-32 saves 2 to 40 percent. Returns `folder`."""
    rng = np.random.default_rng(seed)
    listed = []
    for group in groups(config, plan):
        cost = float(10 ** rng.uniform(-7, -3))
        costs = {"nf4-64": {"kld": cost}, "nf4-32": {"kld": cost * float(rng.uniform(0.6, 0.98))}}
        listed.append(
            {"name": group.name, "modules": list(group.modules), "costs": costs, "saving_standard_error": None}
        )
    body = {
        "groups": listed,
        "joint": {choice: {"kld": 0.02, "sum": 0.03} for choice in ("nf4-64", "nf4-32")},
        "rows": {"digest": "sha256:rows", "protocol": "ppl[raw]", "n": 640, "documents": 10},
        "data": [{"name": "paper.txt", "sha256": "0" * 64, "bytes": 1}],
        "source": {
            "label": "on paper", "digest": "sha256:paper",
            "tensors": tensors_digest((d.name, d.shape) for d in plan.decisions),
        },
    }  # fmt: skip
    write_record(folder, "sensitivity", body)
    return folder


def change(folder: Path, **fields: Any) -> Path:
    path = folder / "halfbyte" / "sensitivity.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    return folder
