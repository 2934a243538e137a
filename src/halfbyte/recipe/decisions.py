"""The plan as values: every tensor of a checkpoint with what becomes of it and why.

A `Plan` is data, nothing else: it is made by `halfbyte.recipe.plan`, written as a record, carried out by the
quantizer and held against the result by the verifier.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from halfbyte.records import digest

Action = Literal["nf4", "keep"]
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
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    action: Action
    reason: str
    area: str
    kind: str
    module: str | None


@dataclass(frozen=True)
class Plan:
    """Everything that is decided before a weight is read.

    model          {"model_type", "architecture", "auto_class" (`AutoModelForImageTextToText`|`AutoModelForCausalLM`)}
    preset         {"name", "why"}: which recipe
    blocksize      elements per absmax block
    skip_modules   `llm_int8_skip_modules` as it will be written
    linear_modules every module a loader could turn into Linear4bit (module paths of the transformers model)
    decisions      one per source tensor, in the source's order
    loaders        the linter's matrix: loader -> {"modules": count, "by_area": {...}, "agrees": bool}
    notes          things named, never skipped in silence: fused experts, tied weights, missing or unknown tensors
    summary        the numbers `halfbyte plan` prints: modules, bytes, areas, bits_per_weight, kv_cache, fit
    lattice        what halfbyte.recipe.probe found in the weights; None: nobody looked. Not part of the digest
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

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, body: dict[str, Any]) -> Plan:
        # records from before the probe have no `lattice`
        known = {key: body[key] for key in cls.__dataclass_fields__ if key != "lattice" or key in body}
        known["decisions"] = [Decision(**{**d, "shape": tuple(d["shape"])}) for d in body["decisions"]]
        return cls(**known)

    @property
    def digest(self) -> str:
        """Changes exactly when the bytes that quantize would write change."""
        names = [(d.name, d.dtype, list(d.shape), d.action) for d in self.decisions]
        return digest({"blocksize": self.blocksize, "skip_modules": self.skip_modules, "decisions": names})
