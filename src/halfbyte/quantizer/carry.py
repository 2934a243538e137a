"""Everything beside the weights: tokenizer, processor, template and licence byte for byte, config.json, the index.

They are written after the last shard, config.json last of all: until it is there, no loader takes the folder for a model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from halfbyte.format.headers import INDEX_NAME
from halfbyte.format.hf_config import config_json
from halfbyte.format.shards import Shard, hash_file, index_json
from halfbyte.format.tensors import Source
from halfbyte.records import write_bytes_atomic, write_text_atomic


def carry_companions(source: Source, out: Path) -> dict[str, str]:
    """Copy the source's companions into `out`; returns file name -> sha256 of what was written."""
    hashes = {}
    for name, content in source.companions().items():
        data = content if isinstance(content, bytes) else content.read_bytes()
        write_bytes_atomic(out / name, data)
        hashes[name] = hashlib.sha256(data).hexdigest()
    return hashes


def write_index_and_config(
    source: Source, out: Path, shards: Sequence[Shard], total_size: int, skip_modules: Sequence[str]
) -> dict[str, str]:
    """Write the index (only if there are several shards) and config.json; returns file name -> sha256."""
    written = []
    if len(shards) > 1:
        write_text_atomic(out / INDEX_NAME, index_json(shards, total_size))
        written.append(INDEX_NAME)
    write_text_atomic(out / "config.json", config_json(source.config, skip_modules))
    written.append("config.json")
    return {name: hash_file(out / name) for name in written}
