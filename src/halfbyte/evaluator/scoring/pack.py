"""A reference pack: a reference's hidden states in a file, so that its model need not be there to score a candidate.

A candidate of a 31B is then scored without the 58 GiB it was made from, and everybody scores against the very same
reference. Hidden states are stored exactly as computed, in bf16 or float32 (30k positions of a 31B: 0.32 GB in bf16); full
logits would be 31 GB, and their top 1,000 would lose 3 % of the mean KLD.

One safetensors file (no code in it, nothing is unpickled):

    rows.tokens int32, rows.scored uint8 [all tokens], rows.lengths int64 [rows]
    hidden                                 [n, hidden]   final norm's output at the scored positions, in the order of the rows
    reference.nll float64, reference.top_probability float32 [n]
    floor.kld, .nll, .delta_p float64, .agrees uint8 [n]  if it was measured
    head.weight [vocabulary, hidden], head.bias [vocabulary]  if wanted: the largest part
    __metadata__: `about`, JSON: rows, documents, digests of weights, tokenizer, template, head and every tensor, software,
                  device, attention kernel, dtype, batch;  `digest`, sha256 of `about`

Without a head in the pack, the candidate's own stands in if its values have the digest of the reference's: so it is for every
plan that leaves embeddings and head in bf16.

What reading checks: the digests, shapes and dtypes against each other, that no number is NaN or infinite, that rows are
rows. The catch: digests show damage and mix-ups. They cannot show that somebody made the pack with another model than it says.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halfbyte.errors import SourceError, UsageError
from halfbyte.evaluator.scoring.scorer import Candidate, KeptReference, Reference, in_row_order
from halfbyte.layers.head import Head
from halfbyte.layers.rows import Rows
from halfbyte.records import current_umask, digest
from halfbyte.texts.vision.rows import PictureRows

if TYPE_CHECKING:
    import torch

FORMAT = 1
#: how tensors are stored: name -> (dtypes, dimensions)
_TENSORS: dict[str, tuple[tuple[str, ...], int]] = {
    "rows.tokens": (("int32",), 1),
    "rows.scored": (("uint8",), 1),
    "rows.lengths": (("int64",), 1),
    "hidden": (("float32", "bfloat16"), 2),
    "reference.nll": (("float64",), 1),
    "reference.top_probability": (("float32",), 1),
    "floor.kld": (("float64",), 1),
    "floor.nll": (("float64",), 1),
    "floor.delta_p": (("float64",), 1),
    "floor.agrees": (("uint8",), 1),
    "head.weight": (("float32", "bfloat16", "float16"), 2),
    "head.bias": (("float32",), 1),
}
_FLOOR = ("floor.kld", "floor.nll", "floor.agrees", "floor.delta_p")
_OPTIONAL = {*_FLOOR, "head.weight", "head.bias"}
_FACTS = {"device": str, "device_name": str, "dtype": str, "attention": str, "streamed": bool, "versions": dict}


def write_pack(path: Path, kept: KeptReference, *, head: bool = False) -> dict[str, int]:
    """Write `kept` to `path`, atomically; returns {`bytes`: of the file, `head_bytes`: of the head's part}.

    head  store the head too (31B: 2.6 GiB): needed only for candidates whose head differs from the reference's
    """
    if isinstance(kept.rows, PictureRows):
        raise UsageError("packs hold no pixels", where=kept.rows.protocol, todo="write packs of text protocols")
    assert kept.head is not None, "a pack is written from a reference that has its head"
    tensors = _tensors_of(kept, head)
    about = json.dumps(_about(kept, tensors), ensure_ascii=False)
    _save(path, tensors, {"about": about, "digest": _sha256(about.encode())})
    return {
        "bytes": path.stat().st_size,
        "head_bytes": sum(t.nbytes for n, t in tensors.items() if n.startswith("head")),
    }


def read_pack(path: Path) -> KeptReference:
    """The reference in a file that `write_pack` wrote; raises SourceError, naming what is wrong with it."""
    about, tensors = _load(path)
    return _reference_of(path, about, tensors)


def _reference_of(path: Path, about: dict[str, Any], tensors: dict[str, torch.Tensor]) -> KeptReference:
    """`_reference`, its refusals as SourceError."""
    try:
        return _reference(about, tensors)
    except (LookupError, TypeError, ValueError, OverflowError) as error:
        raise _refuse(path, f"its description is not one of a reference ({error!r})") from None
    except _Lie as lie:
        raise _refuse(path, str(lie)) from None


class _Lie(Exception):
    """Something in a pack contradicts the rest of it."""


def _tensors_of(kept: KeptReference, head: bool) -> dict[str, torch.Tensor]:
    import numpy as np
    import torch

    *_, order = in_row_order(kept.rows.batches(kept.batch))
    rows = kept.rows
    arrays: dict[str, np.ndarray] = {
        "rows.tokens": np.concatenate(rows.tokens).astype(np.int32),
        "rows.scored": np.concatenate(rows.scored).astype(np.uint8),
        "rows.lengths": np.array([len(ids) for ids in rows.tokens], np.int64),
        "reference.nll": kept.own.nll,
        "reference.top_probability": kept.own.top_probability,
    }
    if kept.floor is not None:
        arrays |= {name: getattr(kept.floor, name.partition(".")[2]) for name in _FLOOR}
        arrays["floor.agrees"] = arrays["floor.agrees"].astype(np.uint8)
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    tensors["hidden"] = torch.cat(list(kept.states))[torch.from_numpy(order)]
    if head and kept.head is not None:
        tensors["head.weight"] = kept.head.weight.cpu()
        if kept.head.bias is not None:
            tensors["head.bias"] = kept.head.bias.cpu()
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def _about(kept: KeptReference, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    rows, head = kept.rows, kept.head
    assert head is not None
    return {
        "format": FORMAT,
        "rows": {
            "protocol": rows.protocol, "version": rows.version, "digest": rows.digest, "facts": rows.facts,
            "documents": list(rows.documents), "texts": None if rows.texts is None else list(rows.texts),
        },
        "weights": {"label": kept.own.label, "digest": kept.own.digest},
        "tokenizer": {key: rows.facts.get(key) for key in ("vocabulary", "template")},
        "head": {
            "digest": kept.head_digest or head.digest(), "shape": list(head.weight.shape),
            "scale": head.scale, "softcap": head.softcap,
        },
        "batch": kept.batch,
        "self_kld": kept.self_kld,
        "run": kept.facts,
        "tensors": {name: _digest(tensor) for name, tensor in tensors.items()},
    }  # fmt: skip


def _save(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """safetensors' own writer, into a file beside `path` that is renamed when it is whole (it leaves mode 0600)."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".halfbyte-part")
    os.close(handle)
    try:
        save_file(tensors, temporary, metadata=metadata)
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.chmod(temporary, 0o666 & ~current_umask())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _load(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """(`about`, tensors) with every digest checked; values are not."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if not {"about", "digest"} <= metadata.keys():
                raise _refuse(path, "it is a safetensors file, but not a reference pack")
            if _sha256(metadata["about"].encode()) != metadata["digest"]:
                raise _refuse(path, "its description does not have the digest it states")
            about = json.loads(metadata["about"])
            if not isinstance(about, dict) or about.get("format") != FORMAT:
                found = about.get("format") if isinstance(about, dict) else type(about).__name__
                raise _refuse(path, f"it has format {found!r}, this version reads {FORMAT}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError, RecursionError) as error:
        raise _refuse(path, f"it cannot be read ({error})") from None
    stated = about.get("tensors")
    if not isinstance(stated, dict) or stated.keys() != tensors.keys():
        raise _refuse(path, "its tensors are not the ones it lists")
    for name, tensor in tensors.items():
        if _digest(tensor) != stated[name]:
            raise _refuse(path, f"tensor {name} does not have the digest it states")
    return about, tensors


def _reference(about: dict[str, Any], tensors: dict[str, torch.Tensor]) -> KeptReference:
    import torch

    _check_tensors(tensors)
    for name in ("rows", "weights", "head", "run"):
        _need(isinstance(about[name], dict), f"{name!r} is {about[name]!r}")
    rows = _rows(about["rows"], tensors)
    batch, facts = about["batch"], about["run"]
    _need(type(batch) is int and batch > 0, f"batch is {batch!r}")
    _need(_is_number(about["self_kld"]) and about["self_kld"] >= 0, f"self_kld is {about['self_kld']!r}")
    for name, kind in _FACTS.items():
        _need(isinstance(facts.get(name), kind), f"its run says {name} = {facts.get(name)!r}")
    hidden = tensors["hidden"]
    _need(str(hidden.dtype) == f"torch.{facts['dtype']}", f"hidden states are {hidden.dtype}, its run {facts['dtype']}")
    for name, tensor in tensors.items():
        if name.partition(".")[0] in ("hidden", "reference", "floor"):
            _need(len(tensor) == rows.n, f"{name} has {len(tensor)} entries, the rows score {rows.n} positions")
    batches = rows.batches(batch)
    *_, order = in_row_order(batches)
    in_batches = torch.empty_like(hidden)
    in_batches[torch.from_numpy(order)] = hidden
    states = list(in_batches.split([len(b.labels) for b in batches]))
    vectors = {name: tensor.numpy() for name, tensor in tensors.items() if not name.startswith(("hidden", "head"))}
    weights = about["weights"]
    own = Reference(
        str(weights["label"]), str(weights["digest"]), vectors["reference.nll"], vectors["reference.top_probability"]
    )
    floor = None
    if "floor.kld" in vectors:
        kld, nll, agrees, delta_p = (vectors[name] for name in _FLOOR)
        floor = Candidate("floor", own.digest, kld, nll, agrees.astype(bool), delta_p)
    head = _head(about["head"], tensors)
    digest_of_head = str(about["head"]["digest"])
    return KeptReference(rows, batch, states, head, digest_of_head, own, floor, float(about["self_kld"]), dict(facts))


def _check_tensors(tensors: dict[str, torch.Tensor]) -> None:
    """Names, dtypes, dimensions and ranges, each tensor by itself."""
    missing, unknown = _TENSORS.keys() - _OPTIONAL - tensors.keys(), tensors.keys() - _TENSORS.keys()
    _need(not missing and not unknown, f"tensors missing: {sorted(missing)}, unknown: {sorted(unknown)}")
    _need(len({*_FLOOR} & tensors.keys()) in (0, len(_FLOOR)), "its floor is there in part")
    for name, tensor in tensors.items():
        dtypes, dimensions = _TENSORS[name]
        dtype = str(tensor.dtype).removeprefix("torch.")
        _need(dtype in dtypes and tensor.dim() == dimensions, f"{name} is {dtype} {list(tensor.shape)}")
        _need(tensor.numel() > 0, f"{name} is empty")
        _need(not tensor.is_floating_point() or bool(tensor.isfinite().all()), f"{name} holds NaN or infinity")
    for name in ("rows.scored", "floor.agrees"):
        _need(name not in tensors or int(tensors[name].max()) <= 1, f"{name} is no mask")
    top = tensors["reference.top_probability"]
    _need(float(top.min()) > 0 and float(top.max()) <= 1 + 1e-5, "a top probability is not in (0, 1]")
    _need(float(tensors["reference.nll"].min()) >= 0, "an NLL is negative")


def _rows(about: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Rows:
    import numpy as np

    tokens, scored, lengths = (tensors[f"rows.{name}"].numpy() for name in ("tokens", "scored", "lengths"))
    total = sum(lengths.tolist())  # Python's integers: a sum that wraps around could pass
    _need(int(lengths.min()) > 1 and total == len(tokens) == len(scored), "row lengths do not add up to the tokens")
    _need(int(tokens.min()) >= 0, "a token id is negative")
    cuts = np.cumsum(lengths)[:-1]
    documents, texts = about["documents"], about["texts"]
    for name, strings in (("documents", documents), ("texts", texts)):
        good = strings is None or (isinstance(strings, list) and all(isinstance(one, str) for one in strings))
        _need(good, f"its {name} are not a list of strings")
    _need(documents is not None and len(documents) == len(lengths), "it has not one document a row")
    masks: Sequence[Any] = np.split(scored.astype(bool), cuts)
    _need(not any(mask[-1] for mask in masks), "the last position of a row predicts nothing, but counts")
    rows = Rows(
        str(about["protocol"]),
        int(about["version"]),
        np.split(tokens, cuts),
        masks,
        documents,
        dict(about["facts"]),
        texts,
    )
    _need(rows.digest == about["digest"], "its rows do not have the digest it states")
    _need(rows.n > 0, "no position is scored")
    return rows


def _head(about: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Head | None:
    shape, softcap, scale = about["shape"], about["softcap"], about["scale"]
    _need(isinstance(shape, list) and [type(n) for n in shape] == [int, int], f"the head's shape is {shape!r}")
    _need(_is_number(scale) and scale != 0, f"the head's scale is {scale!r}")
    _need(softcap is None or (_is_number(softcap) and softcap > 0), f"the head's softcap is {softcap!r}")
    _need(shape[1] == tensors["hidden"].shape[1], f"head {shape} and hidden states {list(tensors['hidden'].shape)}")
    _need(int(tensors["rows.tokens"].max()) < shape[0], "a token id is beyond the vocabulary")
    if "head.weight" not in tensors:
        _need("head.bias" not in tensors, "a bias without a head")
        return None
    weight, bias = tensors["head.weight"], tensors.get("head.bias")
    _need(list(weight.shape) == shape, f"head.weight is {list(weight.shape)}, its description says {shape}")
    _need(bias is None or len(bias) == shape[0], "head.bias has not one entry a token")
    head = Head(weight, bias, scale, softcap)
    _need(head.digest() == about["digest"], "its head does not have the digest it states")
    return head


def _digest(tensor: torch.Tensor) -> str:
    import torch

    return digest([str(tensor.dtype), list(tensor.shape), _sha256(tensor.reshape(-1).view(torch.uint8).numpy())])


def _sha256(data: Any) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _need(condition: bool, otherwise: str) -> None:
    if not condition:
        raise _Lie(otherwise)


def _refuse(path: Path, what: str) -> SourceError:
    return SourceError(what, where=f"reference pack {path}", todo="get it again, or write it anew from the reference")
