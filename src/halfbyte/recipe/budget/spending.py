"""`--budget`: among NF4-64, NF4-32 and no quantization, module by module, what costs least in so many bytes.

    groups (what loaders fuse is one)  x  three choices  ->  bytes, counted     (halfbyte.format.nf4_layout)
                                                         ->  nats, measured     (halfbyte.recipe.budget.sensitivity)
    -> the cheapest choice within the budget, exactly                           (halfbyte.recipe.budget.knapsack)
    -> decisions with their reasons; the skip list is derived from them and proven in the loaders, as ever

A budget bounds the bytes of all tensors in the file, kept ones included; a quant_state text is counted at its longest, so the
file's tensors are never larger. Headers (some hundred KiB) and tokenizer are not counted, as nowhere in a plan.

Costs are of one method's weights (rtn, scale, gptq): a record says of which, a plan carries it on, and `quantize` says so if it writes
weights by another.

The catch: costs are measured one group at a time and added up. Where errors of groups meet, the whole is not the sum (the
record holds both for the two uniform checkpoints). And a cost has noise, so the smallest sum may be partly luck. The
choice is exact for the sum; what the checkpoint loses is for `halfbyte evaluate` to say, on other text. A module that was not
measured stays as the preset has it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from halfbyte.errors import UsageError
from halfbyte.format.nf4_layout import STATE_MAY_ADD
from halfbyte.format.shards import parse_size
from halfbyte.recipe.budget.groups import Group, groups_of
from halfbyte.recipe.budget.knapsack import NAT, Option, solve
from halfbyte.recipe.budget.sensitivity import MEASURED, Sensitivity, read_sensitivity, tensors_digest
from halfbyte.recipe.decisions import BUDGET, Decision, PlanOptions
from halfbyte.recipe.sizes import nf4_bytes, source_bytes
from halfbyte.recipe.skeleton import Skeleton

KEEP = "keep"
CHOICES = (*MEASURED, KEEP)
_BITS = re.compile(r"\s*(\d+(?:\.\d+)?)\s*bpw\s*", re.IGNORECASE)


@dataclass(frozen=True)
class Budget:
    """How much there is (as it was asked for), and what choices cost."""

    asked: str
    sensitivity: Sensitivity


def budget_of(options: PlanOptions) -> Budget | None:
    """The budget that the options ask for, None if they do not; raises UsageError, SourceError (record)."""
    if options.budget is None:
        if options.sensitivity is not None:
            raise UsageError("nothing is decided by it", where="--sensitivity", todo="give --budget too, e.g. 20GiB")
        return None
    if options.sensitivity is None:
        raise UsageError(
            "a budget is spent by measured costs, and none are given",
            where=f"--budget {options.budget}",
            todo="run halfbyte sensitivity SOURCE OUT --data FILE, then give --sensitivity OUT",
        )
    if options.blocksize != 64:
        raise UsageError("a budget chooses block sizes itself", where="--blocksize", todo="leave --blocksize away")
    _limit(options.budget, 8)  # before anything is read
    return Budget(options.budget, read_sensitivity(options.sensitivity))


def costs_method(spent: Mapping[str, Any]) -> str:
    """How the weights were made whose costs a plan's `budget` was spent by; of plans from before that was asked, rtn."""
    return str(spent["sensitivity"].get("weights", {}).get("method", "rtn"))


def unlike(spent: Mapping[str, Any] | None, method: str) -> str | None:
    """A sentence if a budget was spent by the costs of another method than `method`, which will write the weights; else None."""
    if spent is None or (costs := costs_method(spent)) == method:
        return None
    return (
        f"the budget was spent by costs of {costs}, the weights are written by {method}: the choice is exact for the former "
        f"(halfbyte sensitivity --method {method} measures the latter)"
    )


def spend(
    budget: Budget, decisions: Sequence[Decision], skeleton: Skeleton, blocksize: int
) -> tuple[list[Decision], dict[str, Any]]:
    """Decisions within the budget, and what was asked and chosen (`Plan.budget`).

    raises  UsageError (too small, or no bound at all), SourceError (the record is of another model)
    """
    by_name = {d.name: d for d in decisions}
    _check_source(budget, decisions)
    every = groups_of(decisions, skeleton)
    groups = [group for group in every if _is_measured(budget, group)]
    sizes = {g.name: _sizes(g, by_name) for g in groups}
    inside = {name for group in groups for name in group.tensors}
    rest = sum(_at_most(d, blocksize) for d in decisions if d.name not in inside)
    limit = _limit(budget.asked, sum(prod(d.shape) for d in decisions))
    bounds = rest + sum(s["nf4-64"] for s in sizes.values()), rest + sum(s[KEEP] for s in sizes.values())
    _check_bounds(budget.asked, limit, bounds)
    costs = {g.name: {**budget.sensitivity.costs[g.name], KEEP: 0.0} for g in groups}
    found = solve(
        [[Option(sizes[g.name][c], round(NAT * costs[g.name][c])) for c in CHOICES] for g in groups], limit - rest
    )
    assert found is not None, "the smallest choice was found to fit"
    chosen = {group.name: CHOICES[at] for group, at in zip(groups, found.chosen, strict=True)}
    changed = {
        name: _decided(by_name[name], group, chosen[group.name], costs[group.name], sizes[group.name])
        for group in groups
        for name in group.tensors
    }
    spent = {
        "asked": budget.asked, "bytes": limit, "at_most": rest + found.nbytes, "smallest": bounds[0], "largest": bounds[1],
        "nats": found.cost / NAT,
        "uniform": {choice: sum(costs[g.name][choice] for g in groups) for choice in MEASURED},
        "tally": _tally(groups, chosen, by_name),
        "states": found.states,
        "unmeasured": [module for group in every if group.name not in sizes for module in group.modules],
        "sensitivity": dict(budget.sensitivity.about),
        "groups": [
            {"name": g.name, "modules": list(g.modules), "choice": chosen[g.name], "nats": costs[g.name], "bytes": sizes[g.name]}
            for g in groups
        ],
    }  # fmt: skip
    return [changed.get(d.name, d) for d in decisions], spent


def _limit(asked: str, elements: int) -> int:
    bits = _BITS.fullmatch(asked)
    if bits is None:
        return parse_size(asked, "--budget")
    return int(float(bits.group(1)) * elements / 8)


def _check_source(budget: Budget, decisions: Sequence[Decision]) -> None:
    stated = budget.sensitivity.about["source"]
    if stated["tensors"] != tensors_digest((d.name, d.shape) for d in decisions):
        raise UsageError(
            f"the costs were measured on other tensors ({stated['label']})",
            where="--sensitivity",
            todo="measure this source with halfbyte sensitivity",
        )


def _is_measured(budget: Budget, group: Group) -> bool:
    return tuple(budget.sensitivity.modules.get(group.name, ())) == group.modules


def _check_bounds(asked: str, limit: int, bounds: tuple[int, int]) -> None:
    smallest, largest = bounds
    if limit < smallest:
        raise UsageError(
            f"{limit:,} bytes are too few: with everything in NF4-64 the tensors take {smallest:,}",
            where=f"--budget {asked}",
            todo=f"give at least {smallest}B ({smallest / 2**30:.3f} GiB)",
        )
    if limit >= largest:
        raise UsageError(
            f"{limit:,} bytes are enough to quantize nothing that was measured ({largest:,})",
            where=f"--budget {asked}",
            todo=f"give less than {largest / 2**30:.3f} GiB, or leave the model as it is",
        )


def _at_most(decision: Decision, blocksize: int) -> int:
    """Bytes of the tensor in the file, its quant_state text at its longest."""
    if decision.action != "nf4":
        return source_bytes(decision)
    return nf4_bytes(decision.shape, decision.blocksize or blocksize) + STATE_MAY_ADD


def _sizes(group: Group, by_name: Mapping[str, Decision]) -> dict[str, int]:
    members = [by_name[name] for name in group.tensors]
    found = {choice: sum(_at_most(d, size) for d in members) for choice, size in MEASURED.items()}
    return {**found, KEEP: sum(map(source_bytes, members))}


def _decided(
    decision: Decision, group: Group, choice: str, nats: Mapping[str, float], sizes: Mapping[str, int]
) -> Decision:
    """The tensor's decision with its reason: the nats saved against NF4-64, and their price."""
    label = _label(choice, decision)
    if choice == "nf4-64":
        saved, price = nats[choice] - nats["nf4-32"], sizes["nf4-32"] - sizes[choice]
        would = f"would save {saved:.2g}" if saved > 0 else "was measured to save nothing"
        why = f"costs {nats[choice]:.2g} nats; NF4-32 {would}"
    else:
        why, price = f"saves {nats['nf4-64'] - nats[choice]:.2g} nats", sizes[choice] - sizes["nf4-64"]
    reason = f"{BUDGET}{label}: {why} for {_megabytes(price)}"
    if len(group.modules) > 1:
        leaves = ", ".join(module.rpartition(".")[2] for module in group.modules)
        reason += f" ({leaves} as one)"
    if choice == KEEP:
        return replace(decision, action="keep", reason=reason)
    return replace(decision, reason=reason, blocksize=None if choice == "nf4-64" else MEASURED[choice])


def _label(choice: str, decision: Decision) -> str:
    return f"stays {decision.dtype}" if choice == KEEP else choice.upper()


def _tally(groups: Sequence[Group], chosen: Mapping[str, str], by_name: Mapping[str, Decision]) -> dict[str, int]:
    """Label -> modules, in the order of CHOICES."""
    found = Counter(
        _label(chosen[g.name], by_name[name]) for choice in CHOICES for g in groups if chosen[g.name] == choice
        for name in g.tensors
    )  # fmt: skip
    return dict(found)


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB" if size >= 10**5 else f"{size / 1e3:.1f} kB"
