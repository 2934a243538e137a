"""How fast does a checkpoint stream through `quantize`, in how much memory, and how long would the 31B take?

Writes a source in Gemma 4 31B's own shapes (a few of its 60 layers and, as the largest tensor, its embedding; random bf16,
generated on the fly), quantizes it in a process of its own, and reports seconds, GB/s of source, peak memory and the time
projected for the whole model: measured seconds x (31B bytes / bytes here). With --stock, stock transformers does the same
job on the same files (load with quantization_config, save_pretrained) in a process of its own, beside it.

    uv run python benchmarks/streaming/stream.py --layers 2 --folder /tmp/stream [--device cuda] [--stock] [--repeats 3]

Last line: one JSON object. The ceiling printed is a plain copy of the same files (read + write), same machine, same run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from halfbyte.records import versions

#: nn.Linear shapes of the real model are kept; layers and the vision tower are fewer
WHOLE_BYTES = 62_546_177_752
CHILD = """
import json, time
from halfbyte.memory import peak_rss_bytes
start = time.perf_counter()
{body}
import torch
gpu = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
print(json.dumps({{"seconds": seconds, "total": time.perf_counter() - start, "gpu": gpu,
                   "rss": peak_rss_bytes()}}))
"""
OURS = """
import halfbyte
from halfbyte.recipe.survey import plan
plan({source!r})
begin = time.perf_counter()
halfbyte.quantize({source!r}, {out!r}, device={device!r}, overwrite=True)
seconds = time.perf_counter() - begin
"""
STOCK = """
import torch, transformers, bitsandbytes
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig
skip = json.load(open({out!r} + "/config.json"))["quantization_config"]["llm_int8_skip_modules"]
config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                            bnb_4bit_compute_dtype=torch.bfloat16, llm_int8_skip_modules=skip)
begin = time.perf_counter()
model = AutoModelForImageTextToText.from_pretrained({source!r}, dtype=torch.bfloat16, quantization_config=config,
                                                    device_map={{"": {device!r}}})
model.save_pretrained({out!r} + "-stock")
seconds = time.perf_counter() - begin
"""


def config(layers: int) -> dict[str, Any]:
    """Gemma 4 31B's text shapes with `layers` decoder layers (every sixth full) and a vision tower of one layer."""
    from halfbyte.demo.tiny_gemma4 import gemma4_config

    body = gemma4_config(262144, 6, False)
    kinds = ["full_attention" if i % 6 == 5 or i == layers - 1 else "sliding_attention" for i in range(layers)]
    body["text_config"] |= {
        "hidden_size": 5376, "intermediate_size": 21504, "num_attention_heads": 32, "num_key_value_heads": 16,
        "num_global_key_value_heads": 4, "head_dim": 256, "global_head_dim": 512, "num_hidden_layers": layers,
        "layer_types": kinds, "vocab_size": 262144, "vocab_size_per_layer_input": 262144,
    }  # fmt: skip
    return body


def write_source(folder: Path, layers: int) -> int:
    """Random weights for `config(layers)`, one shard a layer; returns bytes of tensor data."""
    from halfbyte.recipe.skeleton import build_skeleton, tensors_of

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config(layers)))
    groups: dict[str, dict[str, torch.Tensor]] = {}
    pool = torch.randn(1 << 24, dtype=torch.float32).mul_(0.02).to(torch.bfloat16)
    for info in tensors_of(build_skeleton(config(layers))):
        part = info.name.split(".layers.")
        key = "text-" + part[1].split(".")[0] if len(part) == 2 and "language_model" in info.name else "rest"
        copies = -(-info.numel // pool.numel())
        groups.setdefault(key, {})[info.name] = pool.repeat(copies)[: info.numel].reshape(info.shape).clone()
        if key == "rest" and info.numel > 1 << 28:
            save_file(groups["rest"], folder / "embedding.safetensors")
            groups["rest"] = {}
    weight_map, total = {}, 0
    for key, tensors in groups.items():
        save_file(tensors, folder / f"{key}.safetensors")
    from halfbyte.format.headers import read_header

    for shard in sorted(folder.glob("*.safetensors")):
        for info in read_header(shard):
            weight_map[info.name] = shard.name
            total += info.nbytes
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map})
    )
    return total


def child(body: str, **values: str) -> dict[str, Any]:
    """Run one measured process; returns what it printed last, or its error."""
    ended = subprocess.run(
        [sys.executable, "-c", CHILD.format(body=body.format(**values))], capture_output=True, text=True, check=False
    )
    if ended.returncode:
        return {
            "error": ended.stderr.strip().splitlines()[-1][:300] if ended.stderr.strip() else f"exit {ended.returncode}"
        }
    return dict(json.loads(ended.stdout.strip().splitlines()[-1]))


def copy_seconds(source: Path, target: Path) -> float:
    """A plain copy of the weights: what reading and writing alone cost."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    start = time.perf_counter()
    for shard in source.glob("*.safetensors"):
        with shard.open("rb") as read, (target / shard.name).open("wb") as write:
            shutil.copyfileobj(read, write, 1 << 24)
    seconds = time.perf_counter() - start
    shutil.rmtree(target)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--stock", action="store_true")
    options = parser.parse_args()
    source, out = options.folder / "source", options.folder / "out"
    total = write_source(source, options.layers)
    print(f"source: {total / 1e9:.2f} GB in {len(list(source.glob('*.safetensors')))} shards, read from page cache")
    copies = [copy_seconds(source, options.folder / "copy") for _ in range(options.repeats)]
    values = {"source": str(source), "out": str(out), "device": options.device}
    rows: dict[str, list[dict[str, Any]]] = {"halfbyte": [], "stock": []}
    for _ in range(options.repeats):
        rows["halfbyte"].append(child(OURS, **values))
        if options.stock:
            rows["stock"].append(child(STOCK, **values))
    result: dict[str, Any] = {
        "benchmark": "stream", "layers": options.layers, "device": options.device, "source_bytes": total,
        "cores": len(os.sched_getaffinity(0)), "machine": platform.machine(), "versions": versions(),
        "copy_seconds": sorted(copies), "rows": rows,
    }  # fmt: skip
    for name, measured in rows.items():
        good = [row for row in measured if "error" not in row]
        if not good:
            print(f"{name}: {measured[0]['error'] if measured else 'not measured'}")
            continue
        seconds = statistics.median(row["seconds"] for row in good)
        spread = f"{min(r['seconds'] for r in good):.2f}-{max(r['seconds'] for r in good):.2f}"
        print(
            f"{name:9} {seconds:8.2f} s ({spread}, n={len(good)})  {total / 1e9 / seconds:6.2f} GB/s  "
            f"{seconds / (total / 1e9):.3f} s/GB  RSS {max(r['rss'] for r in good) / 2**30:.2f} GiB  "
            f"GPU {max(r['gpu'] for r in good) / 2**30:.2f} GiB  31B: {seconds * WHOLE_BYTES / total / 60:.1f} min"
        )
    print(
        f"copy      {statistics.median(copies):8.2f} s  {total / 1e9 / statistics.median(copies):6.2f} GB/s (ceiling: read + write the source)"
    )
    shutil.rmtree(options.folder)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
