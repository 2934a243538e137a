"""Anything that yields weights: the seam between files and the scorer.

A candidate is a way of obtaining the tensors of one model. It may be stored (a checkpoint, a GGUF file, NF4 written by us
or by stock bitsandbytes) or computed on the fly from a source; the scorer sees names and tensors and cannot tell.

    SRC           a folder in bf16, a .gguf file (expanded to bf16), a folder in NF4 (dequantized), a hub id
    SRC@nf4       what `halfbyte.quantize` would write of SRC, without writing it; SRC@nf4-32: in blocks of 32
    SRC@q4_0      llama.cpp's q4_0 grid: int4 x fp16 scale in blocks of 32, on the very tensors that NF4 would replace
    SRC@uniform   every tensor zero: all logits are equal, so perplexity must be the vocabulary size. Tests the harness
    uniform       the same, in the shape of the reference

Every candidate is *dequantized here*, in one place, and then computed with by one and the same arithmetic, so a difference
in score is a difference in weights. (How bitsandbytes' own kernels round while they multiply is another question; the
verifier runs them.) NF4 is expanded to the dtype in its quant_state, which is what bitsandbytes computes with: bf16.

The catch: q4_0 weights are not bf16 numbers (int4 times fp16 scale has up to 14 significant bits). They are handed out in float32; a
bf16 scorer rounds them once more, a float32 scorer does not.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

from halfbyte.errors import HeaderError, SourceError, UsageError
from halfbyte.format.checkpoint import open_source
from halfbyte.format.nf4_layout import NESTED_BLOCKSIZE, QUANT_STATE_SUFFIX, weight_of
from halfbyte.format.shards import hash_file
from halfbyte.format.tensors import Source, TensorInfo
from halfbyte.records import digest

if TYPE_CHECKING:
    import torch

#: how a source's weights may be rounded on the way: the part of a spec behind the last @
ROUNDINGS = ("nf4", "nf4-32", "q4_0", "uniform")
_hashes: dict[tuple[str, int, int], str] = {}


class Weights(Protocol):
    """The tensors of one model, by the names its files use.

    label   how a person calls it: the spec as given
    config  parsed config.json without `quantization_config`: what the model is, however its weights are stored
    digest  changes when a tensor may have changed: hashes of the files, and what is done to them on the way
    """

    label: str
    config: dict[str, Any]

    @property
    def digest(self) -> str: ...

    def names(self) -> Sequence[str]:
        """Every weight once, in file order; the parts of an NF4 weight count as that weight."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape as `load` gives it, without reading the weight."""
        ...

    def load(self, name: str, device: str = "cpu") -> torch.Tensor:
        """The tensor as the model computes with it (before any cast to the scorer's dtype), in its shape, on `device`."""
        ...

    def load_rows(self, name: str, begin: int, end: int, device: str = "cpu") -> torch.Tensor:
        """`load(name)[begin:end]`; of a plain tensor only these rows are read (an embedding is the largest tensor of all)."""
        ...

    def companions_folder(self) -> Path:
        """A folder with config.json, tokenizer and processor, as `AutoTokenizer.from_pretrained` wants it."""
        ...

    def close(self) -> None: ...


def open_weights(spec: str | Path, blocksize: int = 64, *, like: Weights | None = None) -> Weights:
    """The weights that `spec` names (see the top of this file).

    blocksize  of `SRC@nf4`; `SRC@nf4-32` says its own
    like       the reference: gives `uniform` its shapes, and its open file to a candidate rounded from the same source (a
               GGUF takes seconds to open)
    raises     SourceError (cannot be read, not NF4, another 4-bit type), UsageError (`uniform` without `like`)
    """
    text = str(spec)
    if text == "uniform":
        if like is None:
            raise UsageError(
                "uniform has no shape of its own", where="uniform", todo="name a reference, or write SRC@uniform"
            )
        return Zeros(_shared(like), "uniform")
    reference, _, rounding = text.rpartition("@")
    if not reference or rounding not in ROUNDINGS:
        return _stored(text, like)
    stored = _stored(reference, like)
    if rounding == "uniform":
        return Zeros(stored, text)
    if isinstance(stored, Nf4Weights):
        stored.close()
        raise SourceError("is quantized already", where=reference, todo="round the checkpoint it was made from")
    if rounding == "nf4-32":
        rounding, blocksize = "nf4", 32
    return Rounded(stored, rounding, blocksize, text)


def _shared(weights: Weights) -> Weights:
    return weights.share() if isinstance(weights, PlainWeights) else weights


def _stored(reference: str, like: Weights | None) -> PlainWeights:
    if isinstance(like, PlainWeights) and like.label == reference:
        return like.share()
    source = open_source(reference)
    block = source.config.get("quantization_config")
    if not block:
        return PlainWeights(source)
    if block.get("quant_method") != "bitsandbytes" or block.get("bnb_4bit_quant_type", "fp4") != "nf4":
        source.close()
        kind = f"{block.get('quant_method', '?')} {block.get('bnb_4bit_quant_type', '')}".strip()
        raise SourceError(f"cannot dequantize {kind}", where=reference, todo="candidates are bf16, GGUF or NF4")
    return Nf4Weights(source)


class PlainWeights:
    """A source as it is: safetensors in any float dtype, or GGUF expanded to bf16."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.label = source.label
        self.config = {key: value for key, value in source.config.items() if key != "quantization_config"}
        self._infos: dict[str, TensorInfo] = {info.name: info for info in source.tensors}
        self._scratch: Path | None = None
        self._users = 1

    def share(self) -> Self:
        """These weights for one more user; the file is closed when the last of them closes."""
        self._users += 1
        return self

    @property
    def digest(self) -> str:
        root = self.source.path if self.source.path.is_dir() else self.source.path.parent
        files = sorted({info.file for info in self._infos.values()})
        return digest({"config": self.config, "files": {name: _hash(root / name) for name in files}})

    def names(self) -> Sequence[str]:
        return list(self._infos)

    def load(self, name: str, device: str = "cpu") -> torch.Tensor:
        info = self._infos[name]
        return self.source.read(info, 0, info.numel).view(info.shape).to(device)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._infos[name].shape

    def load_rows(self, name: str, begin: int, end: int, device: str = "cpu") -> torch.Tensor:
        info = self._infos[name]
        width = info.numel // info.shape[0]
        return self.source.read(info, begin * width, end * width).view(-1, *info.shape[1:]).to(device)

    def companions_folder(self) -> Path:
        if self.source.path.is_dir() and self.source.kind == "safetensors":
            return self.source.path
        if self._scratch is None:  # a GGUF carries its tokenizer inside: write it out once
            self._scratch = Path(tempfile.mkdtemp(prefix="halfbyte-"))
            (self._scratch / "config.json").write_text(json.dumps(self.config), encoding="utf-8")
            _write_companions(self.source.companions(), self._scratch)
        return self._scratch

    def close(self) -> None:
        self._users -= 1
        if self._users > 0:
            return
        self.source.close()
        self.forget_scratch()

    def forget_scratch(self) -> None:
        """Delete the tokenizer that was written out, if one was; the source stays open."""
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)
            self._scratch = None


class Nf4Weights(PlainWeights):
    """A checkpoint in bitsandbytes' NF4 layout, ours or stock's, with or without nested scales (docs/format.md)."""

    def names(self) -> Sequence[str]:
        return [name for name in self._infos if weight_of(name) not in self._infos]

    def load(self, name: str, device: str = "cpu") -> torch.Tensor:
        state_info = self._infos.get(f"{name}.{QUANT_STATE_SUFFIX}")
        if state_info is None:
            return super().load(name, device)
        return self._expand(name, self._state(state_info), device)

    def shape(self, name: str) -> tuple[int, ...]:
        state_info = self._infos.get(f"{name}.{QUANT_STATE_SUFFIX}")
        if state_info is None:
            return super().shape(name)
        return tuple(int(size) for size in self._state(state_info)["shape"])

    def load_rows(self, name: str, begin: int, end: int, device: str = "cpu") -> torch.Tensor:
        if f"{name}.{QUANT_STATE_SUFFIX}" in self._infos:  # blocks may straddle rows, and nobody packs embeddings
            return self.load(name, device)[begin:end]
        return super().load_rows(name, begin, end, device)

    def _state(self, info: TensorInfo) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(bytes(self._read(info).tolist()))
        return found

    def _expand(self, name: str, state: Mapping[str, Any], device: str) -> torch.Tensor:
        import torch

        from halfbyte import codec

        parts = {key: self._read(self._info(f"{name}.{key}")) for key in ("absmax", "quant_map")}
        levels = torch.tensor(codec.NF4_LEVELS, dtype=torch.float32)
        if state.get("quant_type") != "nf4" or not torch.equal(parts["quant_map"], levels):
            raise HeaderError("its 16 levels are not NF4's", where=f"tensor {name}", todo="write it again as NF4")
        absmax = parts["absmax"]
        if "nested_offset" in state:
            if state.get("nested_blocksize") != NESTED_BLOCKSIZE:
                raise HeaderError("nested_blocksize is not 256", where=f"tensor {name}", todo="write it again")
            nested = [self._read(self._info(f"{name}.{key}")) for key in ("nested_absmax", "nested_quant_map")]
            absmax = codec.unnest_absmax(codec.Nested(absmax, nested[0], state["nested_offset"], nested[1]))
        packed = self._read(self._info(name)).view(-1).to(device)
        shape = [int(size) for size in state["shape"]]
        n = torch.Size(shape).numel()
        dtype: torch.dtype = getattr(torch, str(state["dtype"]))
        return codec.dequantize_blocks(packed, absmax, n, int(state["blocksize"]), dtype).view(shape)

    def _read(self, info: TensorInfo) -> torch.Tensor:
        return self.source.read(info, 0, info.numel)

    def _info(self, name: str) -> TensorInfo:
        if name not in self._infos:
            raise HeaderError("is missing", where=f"tensor {name}", todo="download the checkpoint again")
        return self._infos[name]


class Rounded:
    """A source whose tensors are put on a coarser grid as they are read: those that the default plan calls nf4, no other.

    raises SourceError or PlanError as the plan does
    """

    def __init__(self, plain: PlainWeights, rounding: str, blocksize: int, label: str) -> None:
        from halfbyte.recipe.survey import plan_of

        self.plain, self.rounding, self.blocksize, self.label = plain, rounding, blocksize, label
        self.config = plain.config
        self.plan = plan_of(plain.source, preset="decoder-only", allow_disagreement=True)
        self.rounded = frozenset(d.name for d in self.plan.decisions if d.action == "nf4")

    @property
    def digest(self) -> str:
        grid = {"nf4": {"blocksize": self.blocksize}, "q4_0": {"scale_dtype": "f16"}}[self.rounding]
        return digest({"of": self.plain.digest, "to": self.rounding, "grid": grid, "tensors": sorted(self.rounded)})

    def names(self) -> Sequence[str]:
        return self.plain.names()

    def load(self, name: str, device: str = "cpu") -> torch.Tensor:
        weight = self.plain.load(name, device)
        return self._round(weight) if name in self.rounded else weight

    def shape(self, name: str) -> tuple[int, ...]:
        return self.plain.shape(name)

    def load_rows(self, name: str, begin: int, end: int, device: str = "cpu") -> torch.Tensor:
        if name in self.rounded:  # blocks may straddle rows
            return self.load(name, device)[begin:end]
        return self.plain.load_rows(name, begin, end, device)

    def _round(self, weight: torch.Tensor) -> torch.Tensor:
        if self.rounding == "q4_0":
            from halfbyte.codec.q4_0 import round_to_q4_0

            return round_to_q4_0(weight, scale_dtype="f16")
        return round_to_nf4(weight, self.blocksize)

    def companions_folder(self) -> Path:
        return self.plain.companions_folder()

    def close(self) -> None:
        self.plain.close()


def round_to_nf4(weight: torch.Tensor, blocksize: int) -> torch.Tensor:
    """What a loader will make of `weight` once the quantizer has written it: bf16, in its shape, on its device."""
    import torch

    from halfbyte import codec

    flat = weight.to(torch.bfloat16).reshape(-1)
    packed, absmax = codec.quantize_blocks(flat, blocksize)
    nested = codec.nest_absmax(absmax.cpu(), threads=1)  # one thread: as the quantizer writes it
    scales = codec.unnest_absmax(nested)
    return codec.dequantize_blocks(packed, scales, flat.numel(), blocksize, torch.bfloat16).view(weight.shape)


class Zeros:
    """A model that knows nothing: every tensor of `like` as zeros, so every logit is 0 and every token has probability 1/V."""

    def __init__(self, like: Weights, label: str) -> None:
        self.like, self.label, self.config = like, label, like.config

    @property
    def digest(self) -> str:
        return digest({"uniform": self.like.digest})

    def names(self) -> Sequence[str]:
        return self.like.names()

    def load(self, name: str, device: str = "cpu") -> torch.Tensor:
        import torch

        return torch.zeros_like(self.like.load(name, device))

    def shape(self, name: str) -> tuple[int, ...]:
        return self.like.shape(name)

    def load_rows(self, name: str, begin: int, end: int, device: str = "cpu") -> torch.Tensor:
        import torch

        return torch.zeros_like(self.like.load_rows(name, begin, end, device))

    def companions_folder(self) -> Path:
        return self.like.companions_folder()

    def close(self) -> None:
        if self.label != "uniform" or isinstance(self.like, PlainWeights):  # else `like` was lent, not shared
            self.like.close()


def _write_companions(companions: Mapping[str, Path | bytes], folder: Path) -> None:
    for name, content in companions.items():
        if isinstance(content, Path):
            shutil.copyfile(content, folder / name)
        else:
            (folder / name).write_bytes(content)


def _hash(path: Path) -> str:
    """sha256 of a file, computed once a process as long as its size and time stay (62 GB take about a minute)."""
    stat = path.stat()
    key = (str(path.resolve()), stat.st_size, stat.st_mtime_ns)
    if key not in _hashes:
        _hashes[key] = hash_file(path)
    return _hashes[key]
