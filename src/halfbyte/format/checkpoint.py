"""A checkpoint as a source of tensors: a folder of safetensors shards, a GGUF file, or a hub id that becomes a folder.

Weights are read with `pread` into our own buffers, not through a memory map: a map counts the whole file into the
process's resident memory, turns a truncated file into a bus error, and cannot say where it failed.
"""

from __future__ import annotations

import fnmatch
import os
import re
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halfbyte.errors import HeaderError, SourceError
from halfbyte.format.headers import parse_json_object, read_checkpoint
from halfbyte.format.tensors import DTYPES, Source, TensorInfo

if TYPE_CHECKING:
    import torch

#: carried over byte for byte if the source has them; everything else is named in the record as left behind
COMPANIONS = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "*.tiktoken",
    "*processor_config.json", "chat_template*", "*.jinja", "generation_config.json",
    "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*", "COPYING*", "TERMS*",
)  # fmt: skip
_FRONT_MATTER = re.compile(r"\A---\s*\n(.*?)\n---\s*(\n|\Z)", re.DOTALL)
_LINEAGE_KEYS = ("license", "license_name", "license_link", "base_model", "language", "pipeline_tag")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}(@[\w./-]{1,100})?")


class SafetensorsSource:
    """A folder with config.json and safetensors shards. All headers are validated when it is made."""

    kind = "safetensors"
    notes: Sequence[str] = ()

    def __init__(self, path: Path, label: str | None = None) -> None:
        self.path = path
        self.label = label or str(path)
        self.config: dict[str, Any] = read_config(path)
        self.tensors: Sequence[TensorInfo] = read_checkpoint(path)
        self._files: dict[str, int] = {}
        self._lock = threading.Lock()

    def companions(self) -> Mapping[str, Path | bytes]:
        """Tokenizer, processor, template, generation config and licence files at the top of the folder."""
        names = sorted(entry.name for entry in self.path.iterdir() if entry.is_file())
        return {name: self.path / name for name in names if _is_companion(name)}

    def lineage(self) -> dict[str, Any]:
        """What the YAML of the source's model card says of licence and origin; empty without a card."""
        card = self.path / "README.md"
        match = _FRONT_MATTER.match(card.read_text(encoding="utf-8", errors="replace")) if card.is_file() else None
        if not match:
            return {}
        import yaml

        try:
            body = yaml.safe_load(match.group(1))
        except yaml.YAMLError:
            return {}
        return {key: body[key] for key in _LINEAGE_KEYS if key in body} if isinstance(body, dict) else {}

    def left_behind(self) -> list[str]:
        """Files of the source that are neither weights nor carried over (a README, code, other formats)."""
        known = {info.file for info in self.tensors} | {"config.json", "model.safetensors.index.json"}
        names = sorted(entry.name for entry in self.path.iterdir() if not entry.name.startswith("."))
        return [name for name in names if name not in known and not _is_companion(name)]

    def _descriptor(self, file: str) -> int:
        with self._lock:
            if file not in self._files:
                self._files[file] = os.open(self.path / file, os.O_RDONLY | os.O_CLOEXEC)
            return self._files[file]

    def read(self, info: TensorInfo, begin: int, end: int) -> torch.Tensor:
        """Elements [begin, end) of the flattened tensor; see `Source.read`."""
        import numpy as np
        import torch

        itemsize, torch_name = DTYPES[info.dtype]
        buffer = np.empty(
            (end - begin) * itemsize, np.uint8
        )  # numpy asks for huge pages: fewer faults than torch.empty
        read_exactly(self._descriptor(info.file), buffer, info.start + begin * itemsize, f"{self.path / info.file}")
        return torch.from_numpy(buffer).view(getattr(torch, torch_name))

    def close(self) -> None:
        with self._lock:
            while self._files:
                os.close(self._files.popitem()[1])


def read_exactly(descriptor: int, buffer: Any, offset: int, where: str) -> None:
    """Fill `buffer` (anything with the buffer protocol) from `offset`; raises HeaderError if the file ends first."""
    view = memoryview(buffer).cast("B")
    done = 0
    while done < len(view):
        count = os.preadv(descriptor, [view[done:]], offset + done)
        if count == 0:
            raise HeaderError(
                f"file ended at byte {offset + done} although its header promised more",
                where=where,
                todo="the file changed or is cut short: download it again",
            )
        done += count


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a checkpoint folder (or that file itself) as a dict; raises SourceError if it is not there."""
    path = folder if folder.is_file() else folder / "config.json"
    try:
        return parse_json_object(path.read_bytes(), str(path))
    except OSError as error:
        raise SourceError(
            f"no readable config.json: {error.strerror}",
            where=str(path),
            todo="name a checkpoint folder of transformers",
        ) from None


def _is_companion(name: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in COMPANIONS)


def open_source(reference: str | Path) -> Source:
    """The source behind `reference`: a folder, a .gguf file, a folder with exactly one .gguf, or a hub id (`org/name[@revision]`).

    A hub id is downloaded with huggingface_hub (its cache makes that resumable), safetensors and small files only.
    """
    path = Path(reference)
    if path.is_file() and path.suffix.lower() == ".gguf":
        return _open_gguf(path, str(reference))
    if path.is_dir():
        ggufs = sorted(path.glob("*.gguf"))
        if len(ggufs) == 1 and not any(path.glob("*.safetensors")):
            return _open_gguf(ggufs[0], str(reference))
        return SafetensorsSource(path, str(reference))
    if path.exists():
        raise SourceError(
            f"{path.name} is neither a folder nor a .gguf file",
            where=str(reference),
            todo="name a checkpoint folder, a .gguf file or a hub id",
        )
    if _HUB_ID.fullmatch(str(reference)):
        return SafetensorsSource(_download(str(reference)), str(reference))
    raise SourceError(
        "no such file or folder", where=str(reference), todo="name a checkpoint folder, a .gguf file or a hub id"
    )


def _open_gguf(path: Path, label: str) -> Source:
    from halfbyte.format.gguf_source import GgufSource

    return GgufSource(path, label)


def _download(reference: str) -> Path:
    """Folder of a snapshot from the hub; weights as safetensors only, no code, no pickles."""
    from huggingface_hub import snapshot_download

    name, _, revision = reference.partition("@")
    patterns = ["*.safetensors", "*.safetensors.index.json", "config.json", "README.md", *COMPANIONS]
    try:
        return Path(
            snapshot_download(name, revision=revision or None, allow_patterns=patterns, ignore_patterns=["*/*"])
        )
    except Exception as error:  # huggingface_hub raises a dozen kinds: all mean the same to the reader
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise SourceError(
            f"not on this disk, and the hub did not give it: {reason[:200]}",
            where=reference,
            todo="check the name, `hf auth login` for gated models, or name a local folder",
        ) from None
