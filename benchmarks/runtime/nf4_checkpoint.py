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
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from math import prod
from pathlib import Path
from typing import Any

import torch
from gemma4_shapes import text_sizes

import halfbyte

SHARD_BYTES = 5 * 10**9
POOL_BYTES = 1 << 26
#: where a plan's decision names no other
BLOCKSIZE = 64
#: of the published 31B (its tower has 0.57 G weights, kept in bf16)
VISION: dict[str, Any] = {
    "hidden_size": 1152, "intermediate_size": 4304, "num_attention_heads": 16, "num_key_value_heads": 16, "num_hidden_layers": 27,
    "head_dim": 72, "global_head_dim": 72, "position_embedding_size": 10240, "max_position_embeddings": 131072, "default_output_length": 280,
}  # fmt: skip
SIZES = {"U8": 1, "BF16": 2, "F32": 4}

#: name, safetensors dtype, shape
Entry = tuple[str, str, tuple[int, ...]]


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
    return sum(_nbytes(entry) for decision in plan_of(config).decisions for entry in _entries(decision))


def write_checkpoint(folder: Path, config: dict[str, Any], shard_bytes: int = SHARD_BYTES) -> int:
    """Write it unless it is there; returns bytes of tensor data."""
    plan = plan_of(config)
    shards = list(_shards(plan.decisions, shard_bytes))
    total = sum(_nbytes(entry) for shard in shards for entry in shard)
    text = json.dumps(config | {"quantization_config": _quantization(plan.skip_modules)}, indent=2) + "\n"
    done = folder / "config.json"
    if done.is_file() and done.read_text() == text:
        return total
    folder.mkdir(parents=True, exist_ok=True)
    done.unlink(missing_ok=True)
    for old in folder.glob("*.safetensors"):
        old.unlink()
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    pools = _pools()
    with ThreadPoolExecutor(4) as threads:
        for work in [threads.submit(_write_shard, folder / name, shard, pools) for name, shard in zip(names, shards, strict=True)]:  # fmt: skip
            work.result()
    places = {entry[0]: name for name, shard in zip(names, shards, strict=True) for entry in shard}
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))})
    )
    done.write_text(text)
    return total


def _quantization(skip_modules: list[str]) -> dict[str, Any]:
    return {
        "_load_in_4bit": True, "_load_in_8bit": False, "bnb_4bit_compute_dtype": "bfloat16", "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False, "llm_int8_skip_modules": skip_modules, "llm_int8_threshold": 6.0, "load_in_4bit": True,
        "load_in_8bit": False, "quant_method": "bitsandbytes",
    }  # fmt: skip


def _state(shape: tuple[int, ...], blocksize: int) -> bytes:
    """The quant state (docs/format.md, F15)."""
    body = {
        "quant_type": "nf4", "blocksize": blocksize, "dtype": "bfloat16", "shape": list(shape), "nested_blocksize": 256,
        "nested_dtype": "float32", "nested_offset": 0.25,
    }  # fmt: skip
    return json.dumps(body).encode()


def _entries(decision: Any) -> list[Entry]:
    """What one tensor of the source becomes (docs/format.md, section 3)."""
    name, shape = decision.name, tuple(decision.shape)
    if decision.action == "keep":
        return [(name, decision.dtype, shape)]
    blocks = -(-prod(shape) // (decision.blocksize or BLOCKSIZE))
    return [
        (name, "U8", (-(-prod(shape) // 2), 1)), (f"{name}.absmax", "U8", (blocks,)), (f"{name}.quant_map", "F32", (16,)),
        (f"{name}.nested_absmax", "F32", (-(-blocks // 256),)), (f"{name}.nested_quant_map", "F32", (256,)),
        (f"{name}.quant_state.bitsandbytes__nf4", "U8", (len(_state(shape, decision.blocksize or BLOCKSIZE)),)),
    ]  # fmt: skip


def _shards(decisions: list[Any], most: int) -> Iterator[dict[Entry, bytes | None]]:
    """Entries of each file, with the bytes of those that are not random; a weight and its components stay together."""
    shard: dict[Entry, bytes | None] = {}
    size = 0
    for decision in decisions:
        group: dict[Entry, bytes | None] = dict.fromkeys(_entries(decision))
        for entry in group:
            if entry[0].endswith(".quant_state.bitsandbytes__nf4"):
                group[entry] = _state(tuple(decision.shape), decision.blocksize or BLOCKSIZE)
        added = sum(map(_nbytes, group))
        if shard and size + added > most:
            yield shard
            shard, size = {}, 0
        shard |= group
        size += added
    yield shard


def _nbytes(entry: Entry) -> int:
    return prod(entry[2]) * SIZES[entry[1]]


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


def _write_shard(path: Path, shard: dict[Entry, bytes | None], pools: dict[str, bytes]) -> None:
    """Header, then the data, widest types first so that all is aligned."""
    ordered = sorted(shard, key=lambda entry: -SIZES[entry[1]])
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for entry in ordered:
        header[entry[0]] = {"dtype": entry[1], "shape": list(entry[2]), "data_offsets": [position, position + _nbytes(entry)]}  # fmt: skip
        position += _nbytes(entry)
    text = json.dumps(header, separators=(",", ":")).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    with path.open("wb", buffering=0) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for number, entry in enumerate(ordered):
            fixed = shard[entry] or pools.get(entry[0].rpartition(".")[2])
            _write_all(
                file, fixed if fixed is not None else pools[entry[1]], _nbytes(entry), 0 if fixed else 4096 * number
            )


def _write_all(file: Any, pool: bytes, size: int, start: int) -> None:
    """`size` bytes of a pool, from `start` on and round again. Unbuffered writes may be short."""
    view, start = memoryview(pool), start % len(pool)
    while size:
        written = file.write(view[start : start + size])
        size, start = size - written, (start + written) % len(pool)
