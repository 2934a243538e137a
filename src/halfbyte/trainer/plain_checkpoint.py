"""A source written again as plain safetensors, some of its tensors replaced: how trained weights leave the trainer.

Names, dtypes, order, config, tokenizer and licence stay the source's own. The trained model is not asked to save itself:
transformers rewrites Gemma 4's config on save, and refuses a model that came from a GGUF file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from halfbyte.errors import OutputError, ShapeMismatch
from halfbyte.format.tensors import DTYPES, Source
from halfbyte.records import current_umask, write_bytes_atomic, write_text_atomic

if TYPE_CHECKING:
    import torch

SHARD_BYTES = 4 << 30


def write_plain(source: Source, out: Path, replaced: Mapping[str, torch.Tensor]) -> Path:
    """Write `source` into the folder `out`, with the tensors of `replaced` (source name -> values, cast to its dtype).

    raises OutputError if `out` already holds a checkpoint, ShapeMismatch if a replacement does not fit
    """
    import torch
    from safetensors.torch import save_file

    if (out / "config.json").exists():
        raise OutputError("already holds a checkpoint", where=str(out), todo="name an empty folder")
    out.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, torch.Tensor]] = [{}]
    filled = 0
    for info in source.tensors:
        dtype = getattr(torch, DTYPES[info.dtype][1])
        if info.name in replaced:
            tensor = replaced[info.name].detach().to("cpu", dtype).contiguous()
            if tuple(tensor.shape) != info.shape:
                raise ShapeMismatch(f"{tuple(tensor.shape)} replaces {info.shape}", where=info.name)
        else:
            tensor = source.read(info, 0, info.numel).reshape(info.shape)
        if filled and filled + tensor.nbytes > SHARD_BYTES:
            shards.append({})
            filled = 0
        shards[-1][info.name] = tensor
        filled += tensor.nbytes
    names = [_shard_name(i, len(shards)) for i in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        save_file(shard, out / f".{name}.part", metadata={"format": "pt"})
        os.chmod(out / f".{name}.part", 0o666 & ~current_umask())  # save_file leaves 0600
        os.replace(out / f".{name}.part", out / name)
    if len(shards) > 1:
        weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        total = sum(tensor.nbytes for shard in shards for tensor in shard.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_text_atomic(out / "model.safetensors.index.json", json.dumps(index, indent=1) + "\n")
    for name, content in source.companions().items():
        write_bytes_atomic(out / name, content if isinstance(content, bytes) else content.read_bytes())
    write_text_atomic(out / "config.json", json.dumps(source.config, indent=2) + "\n")
    return out


def _shard_name(number: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"
