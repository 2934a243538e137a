"""A reference pack where a reference is wanted: `halfbyte evaluate FILE.pack CANDIDATE...`.

The pack holds what scoring needs of a reference (halfbyte.evaluator.scoring.pack): rows, final hidden states, hashes. It does not
hold weights. So what asks for weights (their size, their error tensor by tensor, answers that they would write) gets "not
measured", and what a pack fixes cannot be asked otherwise: protocol, rows, dtype and batch are those of the run that wrote it.

The tokenizer is not in it either. Only people need one, to read the worst tokens: a candidate's serves, if its vocabulary has
the digest that the pack names; else token ids are shown.

A file is taken for a pack if its name ends in `.pack` or if it is a safetensors file that describes itself as one. What then does
not hold together is refused by name; nothing in it is run.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halfbyte.errors import SourceError, UsageError
from halfbyte.evaluator.scoring.pack import read_pack, write_pack
from halfbyte.evaluator.scoring.scorer import KeptReference
from halfbyte.format.shards import hash_file
from halfbyte.layers.weights import Weights
from halfbyte.progress import note
from halfbyte.texts.protocols import VERSIONS, load_tokenizer, tokenizer_facts

if TYPE_CHECKING:
    import torch

SUFFIX = ".pack"


class PackedReference:
    """A pack in the place of a reference's `Weights`: label and digest are the reference's, tensors there are none.

    kept   what was read, checked
    file   {"name", "sha256", "bytes"} of the pack
    data   {"name", "sha256", "bytes"} each: the files its rows were made of, [] if it does not say
    raises SourceError (not a pack, or one that lies; a protocol or version that is not known here)
    """

    def __init__(self, path: Path) -> None:
        self.kept: KeptReference = read_pack(path)
        self.label, self.digest = self.kept.own.label, self.kept.own.digest
        self.config: dict[str, Any] = {}
        self.file = {"name": path.name, "sha256": hash_file(path), "bytes": path.stat().st_size}
        rows, facts = self.kept.rows, self.kept.facts
        if VERSIONS.get(rows.protocol) != rows.version:
            raise SourceError(
                f"protocol {rows.protocol!r} version {rows.version} is not known here",
                where=f"reference pack {path}",
                todo="write it anew from the reference with this version",
            )
        _check_text(path, [self.label, self.digest, rows.facts, list(rows.documents), facts])
        self.data = _files(facts.get("data"))
        facts["versions"] = {str(name): str(version) for name, version in facts["versions"].items()}

    @property
    def instruct(self) -> bool:
        return bool(self.kept.rows.facts.get("instruct", False))

    def names(self) -> Sequence[str]:
        return []

    def shape(self, name: str) -> tuple[int, ...]:
        raise self._no_weights()

    def load(self, name: str, device: str = "cpu") -> torch.Tensor:
        raise self._no_weights()

    def load_rows(self, name: str, begin: int, end: int, device: str = "cpu") -> torch.Tensor:
        raise self._no_weights()

    def companions_folder(self) -> Path:
        raise self._no_weights()

    def close(self) -> None:
        pass

    def _no_weights(self) -> SourceError:
        return SourceError("a reference pack holds no weights", where=self.label, todo="name the reference itself")


def is_pack(spec: str) -> bool:
    """Whether `spec` names a file that is, or says it is, a reference pack."""
    from safetensors import SafetensorError, safe_open

    path = Path(spec)
    if not path.is_file():
        return False
    if path.suffix.lower() == SUFFIX:
        return True
    try:
        with safe_open(path, framework="np") as file:
            return {"about", "digest"} <= (file.metadata() or {}).keys()
    except (OSError, SafetensorError):
        return False


def open_pack(spec: str) -> PackedReference:
    """The pack in the file `spec`; raises SourceError as PackedReference does."""
    return PackedReference(Path(spec))


def write_reference_pack(path: Path, data: Sequence[dict[str, Any]], kept: KeptReference, *, head: bool) -> None:
    """`kept` as a pack that also names the data files behind its rows; says how large it became."""
    kept.facts["data"] = [dict(file) for file in data]
    sizes = write_pack(path, kept, head=head)
    note(f"reference pack {path}: {sizes['bytes'] / 1e6:,.1f} MB, of which the head {sizes['head_bytes'] / 1e6:,.1f}")


def lent_tokenizer(packed: PackedReference, candidates: Sequence[Weights]) -> Any | None:
    """The tokenizer of the first candidate whose vocabulary is the one the pack's rows were made with; None: none has it."""
    wanted = packed.kept.rows.facts.get("vocabulary")
    for weights in candidates:
        try:
            tokenizer = load_tokenizer(weights)
        except SourceError:
            continue
        if tokenizer_facts(tokenizer)["vocabulary"] == wanted:
            return tokenizer
    return None


def check_protocol(packed: PackedReference, requested: Sequence[str]) -> tuple[str, ...]:
    """The pack's own protocol; raises UsageError if others were asked for."""
    own = packed.kept.rows.protocol
    if other := [name for name in requested if name != own]:
        raise UsageError(
            f"the pack was written under {own}", where=f"--protocol {other[0]}", todo="leave the option out"
        )
    return (own,)


def check_writing(path: Path, packs: Sequence[PackedReference], protocols: Sequence[str]) -> None:
    """Raises UsageError unless exactly one live reference under one protocol is to be written, to a place that may be one."""
    where = f"--write-reference {path}"
    if packs:
        raise UsageError("the reference is a pack already", where=where, todo="copy the file")
    if len(protocols) != 1:
        told = ", ".join(protocols)
        raise UsageError(
            f"a pack holds one protocol of one base, here are {told}", where=where, todo="give one --protocol"
        )
    if path.is_dir():
        raise UsageError("is a folder", where=where, todo="name a file, e.g. reference.pack")


def arithmetic_of(packs: Sequence[PackedReference], dtype: str, batch: int | None) -> tuple[str, int]:
    """(dtype, batch) of the run that wrote `packs` (one or more); what was asked for, `auto` and None being nothing, may not differ.

    raises  UsageError, also if two packs differ
    """
    found = {(packed.kept.facts["dtype"], packed.kept.batch) for packed in packs}
    told = " and ".join(f"{kind}, batch {rows}" for kind, rows in sorted(found))
    if len(found) > 1:
        raise UsageError(f"packs written in {told}", where="REFERENCE, --base", todo="score them one by one")
    fixed = next(iter(found))
    for option, asked, given in (("dtype", None if dtype == "auto" else dtype, fixed[0]), ("batch", batch, fixed[1])):
        if asked is not None and asked != given:
            raise UsageError(f"the pack was written in {told}", where=f"--{option}", todo="leave the option out")
    return fixed


def _check_text(path: Path, said: Any) -> None:
    """Raises SourceError if what a record will repeat of the pack cannot be written as JSON: a NaN, half a character."""
    try:
        json.dumps(said, ensure_ascii=False, allow_nan=False).encode()
    except ValueError as error:
        raise SourceError(
            f"its description cannot be repeated ({error})", where=f"reference pack {path}", todo="do not trust it"
        ) from None


def _files(stated: Any) -> list[dict[str, Any]]:
    kinds = {"name": str, "sha256": str, "bytes": int}
    entries = stated if isinstance(stated, list) else []
    good = [e for e in entries if isinstance(e, dict) and all(isinstance(e.get(k), kind) for k, kind in kinds.items())]
    return [{key: entry[key] for key in kinds} for entry in good]
