"""The plan as values: every tensor of a checkpoint with what becomes of it and why.

A `Plan` is data, nothing else: it is made by `halfbyte.recipe.plan`, written as a record, carried out by the
quantizer and held against the result by the verifier.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from halfbyte.errors import UsageError
from halfbyte.records import digest

Action = Literal["nf4", "keep"]
#: what begins the reason of a decision that a budget made; what follows the colon is that tensor's own
BUDGET = "budget "
#: blocks of 32 on CPU and CUDA: earlier releases refuse them
BITSANDBYTES_FOR_32 = "0.49.2"
#: how codes and scales are chosen (halfbyte.layers.fitting.method)
METHODS = ("rtn", "scale", "gptq")
#: where a tensor lives; the order is the order of every table
AREAS = ("decoder", "vision", "audio", "projector", "embeddings", "head", "other")


@dataclass(frozen=True)
class Decision:
    """One tensor of the source.

    name          as in the source file
    dtype, shape  as in the source file
    action        `nf4` (becomes six tensors) or `keep` (copied byte for byte)
    reason        one clause a person can read: "linear of the decoder", "embeddings stay bf16: ..."
    area          one of AREAS
    kind          what holds it: `linear`, `embedding`, `buffer`, `fused_experts`, `conv1d`, `parameter`, `unknown`
    module        module path in the transformers model, None if the model has no such tensor
    blocksize     elements per absmax block of this tensor; None: the plan's (or it is kept)
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    action: Action
    reason: str
    area: str
    kind: str
    module: str | None
    blocksize: int | None = None


@dataclass(frozen=True)
class Plan:
    """Everything that is decided before a weight is read.

    model          {"model_type", "architecture", "auto_class" (`AutoModelForImageTextToText`|`AutoModelForCausalLM`)}
    preset         {"name", "why"}: which recipe
    blocksize      elements per absmax block, where a decision names no other
    skip_modules   `llm_int8_skip_modules` as it will be written
    linear_modules every module a loader could turn into Linear4bit (module paths of the transformers model)
    decisions      one per source tensor, in the source's order
    loaders        the linter's matrix: loader -> {"modules": count, "by_area": {...}, "agrees": bool}
    notes          things named, never skipped in silence: fused experts, tied weights, missing or unknown tensors
    summary        the numbers `halfbyte plan` prints: modules, bytes, areas, bits_per_weight, kv_cache, fit
    lattice        what halfbyte.recipe.probe found in the weights; None: nobody looked. Not part of the digest
    budget         what halfbyte.recipe.budget was asked and chose, group by group; None: no budget. Not part of the digest
    """

    model: dict[str, Any]
    preset: dict[str, str]
    blocksize: int
    skip_modules: list[str]
    linear_modules: list[str]
    decisions: list[Decision]
    loaders: dict[str, Any]
    notes: list[str]
    summary: dict[str, Any] = field(default_factory=dict)
    lattice: dict[str, Any] | None = None
    budget: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, body: dict[str, Any]) -> Plan:
        # records from before the probe have no `lattice`, from before budgets no `budget`
        later = ("lattice", "budget")
        known = {key: body[key] for key in cls.__dataclass_fields__ if key not in later or key in body}
        known["decisions"] = [Decision(**{**d, "shape": tuple(d["shape"])}) for d in body["decisions"]]
        return cls(**known)

    @property
    def digest(self) -> str:
        """Changes exactly when the bytes that quantize would write change."""
        names: list[tuple[Any, ...]] = [
            (d.name, d.dtype, list(d.shape), d.action, *self._own_blocksize(d)) for d in self.decisions
        ]
        return digest({"blocksize": self.blocksize, "skip_modules": self.skip_modules, "decisions": names})

    def blocksize_of(self, decision: Decision) -> int:
        """Elements per absmax block of one NF4 tensor."""
        return decision.blocksize or self.blocksize

    @property
    def blocksizes(self) -> list[int]:
        """Every block size that will be written, largest first; [] if nothing becomes NF4."""
        return sorted({self.blocksize_of(d) for d in self.decisions if d.action == "nf4"}, reverse=True)

    def _own_blocksize(self, decision: Decision) -> tuple[int, ...]:
        """Nothing for a tensor in the plan's blocks, so that a plan without a budget keeps the digest it always had."""
        other = decision.action == "nf4" and self.blocksize_of(decision) != self.blocksize
        return (self.blocksize_of(decision),) if other else ()


@dataclass(frozen=True)
class PlanOptions:
    """What `plan` and `quantize` may be told of the decisions, by the names of the command line.

    preset       `decoder-only`, `unsloth`, or the path of a TOML file
    blocksize    elements per absmax block: 64, or 32 (finer, 0.125 bits a weight more; bitsandbytes >= 0.49.2)
    budget       `20GiB`, `18.5GB`, `4.5bpw`: decide module by module what fits (halfbyte.recipe.budget); needs `sensitivity`
    sensitivity  a record of `halfbyte sensitivity`, or the folder that it wrote
    """

    preset: str | Path = "decoder-only"
    blocksize: int = 64
    budget: str | None = None
    sensitivity: str | Path | None = None


PLAN_OPTIONS = tuple(PlanOptions.__dataclass_fields__)


def plan_options(options: Mapping[str, Any]) -> PlanOptions:
    """The options as values; raises UsageError for a name that is none."""
    if unknown := options.keys() - set(PLAN_OPTIONS):
        raise UsageError(f"unknown option {min(unknown)!r}", where="plan", todo=f"known: {', '.join(PLAN_OPTIONS)}")
    return PlanOptions(**options)


def bitsandbytes_for(blocksizes: Iterable[int]) -> str | None:
    """The oldest bitsandbytes that loads these block sizes, None if any does."""
    return BITSANDBYTES_FOR_32 if 32 in blocksizes else None


def shared_reason(reason: str) -> str:
    """The part of a reason by which tensors are counted together: a budget's own figures are left out."""
    return reason.partition(":")[0] if reason.startswith(BUDGET) else reason
