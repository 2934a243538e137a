"""An NF4 checkpoint of a real model's shapes with random bytes in it, written at the speed of the disk.

What becomes of each tensor is asked of `halfbyte.plan`, so the file is laid out as `halfbyte quantize` would lay out the real one: the same
names, dtypes, shapes, skip list. Only the values are drawn, from one pool of random bytes that every tensor takes its own piece of: a loader moves
bytes, it does not look at them. 31B: 19.08 GB, of which nothing is ever held in memory but the pool (64 MB).

    weight               random codes        absmax            random codes of the nested map
    nested_absmax        0.5 to 1.5          everything else   bf16 of about 0.02

config.json comes last: a folder without it is not finished, one with the same text in it is taken as it is.
"""

from __future__ import annotations

import json
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from gemma4_shapes import text_sizes

import halfbyte
from halfbyte.format.hf_config import config_json
from halfbyte.format.nf4_layout import quant_state_json
from halfbyte.format.shards import Shard, beginning, index_json, outputs_of, plan_shards

SHARD_BYTES = 5 * 10**9
POOL_BYTES = 1 << 26
#: where a plan's decision names no other
BLOCKSIZE = 64
#: of the published 31B (its tower has 0.57 G weights, kept in bf16)
VISION: dict[str, Any] = {
    "hidden_size": 1152, "intermediate_size": 4304, "num_attention_heads": 16, "num_key_value_heads": 16, "num_hidden_layers": 27,
    "head_dim": 72, "global_head_dim": 72, "position_embedding_size": 10240, "max_position_embeddings": 131072, "default_output_length": 280,
}  # fmt: skip
NESTED_OFFSET = 0.25


def config_of(shape: str, layers: int | None = None) -> dict[str, Any]:
    """config.json of a Gemma 4 that sees, in the spelling that is published: `31b`, or `tiny` with the same traits."""
    from halfbyte.demo.tiny_gemma4 import gemma4_config

    body = gemma4_config(262144 if shape != "tiny" else 2048, 6, False)
    body["text_config"] |= text_sizes("31b", shape == "tiny", layers)
    if shape != "tiny":
        body["vision_config"] |= VISION
        body["vision_soft_tokens_per_image"] = 280
    return dict(body)


def plan_of(config: dict[str, Any]) -> Any:
    """halfbyte.plan of a parsed config.json."""
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "config.json"
        source.write_text(json.dumps(config))
        return halfbyte.plan(source)


def planned_bytes(config: dict[str, Any]) -> int:
    """Bytes of tensor data that `write_checkpoint` would write."""
    return _data_bytes(_shards(plan_of(config), SHARD_BYTES))


def write_checkpoint(folder: Path, config: dict[str, Any], shard_bytes: int = SHARD_BYTES) -> int:
    """Write it unless it is there; returns bytes of tensor data."""
    plan = plan_of(config)
    shards = _shards(plan, shard_bytes)
    total, text = _data_bytes(shards), config_json(config, plan.skip_modules)
    done = folder / "config.json"
    if done.is_file() and done.read_text() == text:
        return total
    folder.mkdir(parents=True, exist_ok=True)
    done.unlink(missing_ok=True)
    for old in folder.glob("*.safetensors"):
        old.unlink()
    pools = _pools()
    with ThreadPoolExecutor(4) as threads:
        for work in [threads.submit(_write_shard, folder / shard.file, shard, states, pools) for shard, states in shards.items()]:  # fmt: skip
            work.result()
    (folder / "model.safetensors.index.json").write_text(index_json(list(shards), total))
    done.write_text(text)
    return total


def _shards(plan: Any, most: int) -> dict[Shard, dict[str, bytes]]:
    """The files as `halfbyte quantize` lays them out, each with the JSON of its quant states."""
    made = {d.name: (d.shape, d.blocksize or BLOCKSIZE) for d in plan.decisions}
    groups = [outputs_of(d.name, d.dtype, d.shape, d.action, d.blocksize or BLOCKSIZE) for d in plan.decisions]
    return {
        shard: {t.name: quant_state_json(*made[t.owner], NESTED_OFFSET) for t in shard.quant_states}
        for shard in plan_shards(groups, most)
    }


def _data_bytes(shards: dict[Shard, dict[str, bytes]]) -> int:
    return sum(shard.fixed_bytes + sum(map(len, states.values())) for shard, states in shards.items())


def _pools() -> dict[str, bytes]:
    """Bytes to take from, by what they are for."""
    from bitsandbytes.functional import create_dynamic_map, get_4bit_type

    maker = torch.Generator().manual_seed(0)
    random = torch.randint(0, 2**62, (POOL_BYTES // 8,), generator=maker)
    normal = (torch.randn(POOL_BYTES // 16, generator=maker) * 0.02).to(torch.bfloat16).repeat(8)
    nested = 0.5 + torch.rand(POOL_BYTES // 64, generator=maker)

    def raw(tensor: torch.Tensor) -> bytes:
        return tensor.contiguous().view(torch.uint8).numpy().tobytes()

    return {
        "U8": raw(random), "BF16": raw(normal), "F32": raw(nested),
        "quant_map": raw(get_4bit_type("nf4", device="cpu").float()), "nested_quant_map": raw(create_dynamic_map().float()),
    }  # fmt: skip


def _write_shard(path: Path, shard: Shard, states: dict[str, bytes], pools: dict[str, bytes]) -> None:
    with path.open("wb", buffering=0) as file:
        file.write(beginning(shard, {name: len(state) for name, state in states.items()}))
        for number, tensor in enumerate(shard.tensors):
            fixed = pools.get(tensor.name.rpartition(".")[2])
            pool, start = (pools[tensor.dtype], 4096 * number) if fixed is None else (fixed, 0)
            _write_all(file, pool, tensor.nbytes, start)
        file.write(b"".join(states.values()))


def _write_all(file: Any, pool: bytes, size: int, start: int) -> None:
    """`size` bytes of a pool, from `start` on and round again. Unbuffered writes may be short."""
    view, start = memoryview(pool), start % len(pool)
    while size:
        written = file.write(view[start : start + size])
        size, start = size - written, (start + written) % len(pool)
