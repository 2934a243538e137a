"""Whose bf16 a candidate is held against.

KL divergence asks what a candidate lost *against the model it was made from*. A quantized QAT model measured against the
vanilla bf16 would carry two differences in one number, and nobody could take them apart. So every candidate belongs to a
base, and each base has a reference of its own:

    evaluate GEMMA GEMMA@nf4                                     one base, called `reference`
    evaluate GEMMA GEMMA@nf4 qat:GEMMA-QAT@nf4 --base qat=GEMMA-QAT    two; `qat:` in front says which

With two bases the 2 x 2 of base and precision can be computed (halfbyte.evaluator.job.effects).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

from halfbyte.errors import UsageError
from halfbyte.evaluator.packed import PackedReference, is_pack, open_pack
from halfbyte.layers.weights import Nf4Weights, PlainWeights, Rounded, Weights, Zeros, open_weights

FIRST = "reference"


@dataclass(eq=False)
class Entry:
    """One candidate: `id` is unique in the record and is what a person typed; kind is e.g. `NF4`, `q4_0`, `bf16`."""

    id: str
    weights: Weights
    kind: str


@dataclass(eq=False)
class Base:
    """A reference in full precision and what is measured against it."""

    name: str
    reference: Weights
    kind: str
    candidates: list[Entry] = field(default_factory=list)


def open_bases(
    reference: str, candidates: Sequence[str], base: Sequence[str], stack: ExitStack, *, alone: bool = False
) -> list[Base]:
    """Every model opened (headers, not weights), closed again with `stack`; a reference may be a pack.

    base    "NAME=REF" each
    alone   a reference without candidates has something to do: it becomes a pack
    raises  UsageError (no candidate, a pair that is none, a name or candidate twice, a base without candidates), SourceError
    """
    if not candidates and not alone:
        raise UsageError("no candidate", where="CANDIDATES...", todo="name one, e.g. SRC@nf4")
    if len(set(candidates)) < len(candidates):
        twice = next(spec for spec in candidates if candidates.count(spec) > 1)
        raise UsageError(f"{twice!r} is named twice", where="CANDIDATE...", todo="name each candidate once")
    references = {FIRST: reference, **dict(_pair(text) for text in base)}
    if len(references) < len(base) + 1:
        raise UsageError("a base is named twice", where="--base", todo=f"names must differ, and from {FIRST!r}")
    split = [(spec, *_split(spec, references)) for spec in candidates]
    if idle := [name for name in references if name not in {owner for _, owner, _ in split} and name != FIRST]:
        raise UsageError(
            f"no candidate belongs to base {idle[0]!r}", where="--base", todo=f"name one as {idle[0]}:CANDIDATE"
        )
    bases = {}
    for name, spec in references.items():
        weights = open_pack(spec) if is_pack(spec) else open_weights(spec)
        stack.callback(weights.close)
        bases[name] = Base(name, weights, kind_of(weights))
    for spec, owner, own in split:
        like = bases[owner].reference
        weights = open_weights(own, like=None if isinstance(like, PackedReference) else like)
        stack.callback(weights.close)
        bases[owner].candidates.append(Entry(spec, weights, kind_of(weights)))
    return list(bases.values())


def kind_of(weights: Weights) -> str:
    """`NF4`, `q4_0`, `uniform`, `GGUF`, `pack`, or the dtype that most bytes of a plain checkpoint have (`bf16`, `f32`, ...)."""
    if isinstance(weights, Rounded):
        return "NF4" if weights.rounding == "nf4" else weights.rounding
    if isinstance(weights, Nf4Weights):
        return "NF4"
    if isinstance(weights, Zeros):
        return "uniform"
    if isinstance(weights, PackedReference):
        return "pack"
    if isinstance(weights, PlainWeights):
        if weights.source.kind == "gguf":
            return "GGUF"
        sizes: dict[str, int] = {}
        for info in weights.source.tensors:
            sizes[info.dtype] = sizes.get(info.dtype, 0) + info.nbytes
        return max(sizes, key=lambda dtype: sizes[dtype]).lower()
    return type(weights).__name__


def _pair(text: str) -> tuple[str, str]:
    name, mark, reference = text.partition("=")
    if not mark or not name or not reference or not name.replace("-", "").replace("_", "").isalnum():
        raise UsageError(f"{text!r} is not NAME=REFERENCE", where="--base", todo="e.g. --base qat=FOLDER")
    return name, reference


def _split(spec: str, names: dict[str, str]) -> tuple[str, str]:
    """(base, what open_weights wants); a prefix that is no declared base belongs to the path."""
    name, mark, rest = spec.partition(":")
    return (name, rest) if mark and rest and name in names else (FIRST, spec)
