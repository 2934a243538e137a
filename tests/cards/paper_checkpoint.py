"""Checkpoints on paper: real safetensors headers over files of holes, and the records that go with them.

The card reads lengths, never weights, so a 19 GB checkpoint costs a few kilobytes of disk here.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

from halfbyte.records import digest, write_record

STATE_BYTES = 170
VERSIONS = {
    "python": "3.11.9",
    "platform": "this-machine",
    "halfbyte": "0.1.0",
    "transformers": "5.23.0",
    "bitsandbytes": "0.50.2",
}


def decision(name: str, shape: list[int], action: str, area: str, reason: str) -> dict[str, Any]:
    module = name.rpartition(".")[0]
    fixed = {"dtype": "BF16", "kind": "linear", "module": module}
    return {"name": name, "shape": shape, "action": action, "reason": reason, "area": area, **fixed}


def small_plan() -> dict[str, Any]:
    """A plan of four tensors, one of them NF4; hand-made, with every section's figures."""
    decisions = [
        decision("model.layers.0.mlp.up_proj.weight", [128, 64], "nf4", "decoder", "linear of the decoder"),
        decision("model.layers.0.layer_scalar", [1], "keep", "decoder", "buffer of the model, carried byte for byte"),
        decision("model.vision_tower.q_proj.weight", [64, 64], "keep", "vision", "vision tower stays as it is"),
        decision("model.embed_tokens.weight", [256, 64], "keep", "embeddings", "embeddings stay bf16"),
    ]
    row = {"modules": 1, "by_area": {"decoder": 1}, "agrees": True}
    return {
        "model": {"model_type": "tiny", "architecture": "TinyModel", "auto_class": "AutoModelForImageTextToText"},
        "preset": {"name": "decoder-only", "why": "the decoder's linears hold nearly all weights"},
        "blocksize": 64,
        "skip_modules": ["lm_head", "vision_tower"],
        "linear_modules": ["model.layers.0.mlp.up_proj", "model.vision_tower.q_proj"],
        "decisions": decisions,
        "loaders": {"vllm": {"label": "vLLM", **row}, "transformers_4": {"label": "transformers 4.x", **row}},
        "notes": ["tied, stored once: lm_head.weight = model.embed_tokens.weight"],
        "summary": {
            "modules": {"linear": 3, "nf4": 1, "by_area": {"decoder": {"linear": 1, "nf4": 1}, "vision": {"linear": 1, "nf4": 0}, "head": {"linear": 1, "nf4": 0}}},
            "bytes": {"source": 57346, "file": 46445, "gpu": 46275, "nf4": 5483, "keep": 40962},
            "bits_per_weight_nf4": 5.354,
            "kv_cache": {"at": {"1024": 4096}},
            "fit": {"card_gb": 24, "max_context_tokens": 51746, "fits": True},
            "assumptions": "Cache: batch 1, bfloat16.",
        },
    }  # fmt: skip


def on_disk(plan: dict[str, Any]) -> dict[str, int]:
    """Name -> bytes of what a plan becomes, written down here independently of the code under test."""
    sizes = {}
    for d in plan["decisions"]:
        n, name = prod(d["shape"]), d["name"]
        if d["action"] == "keep":
            sizes[name] = 2 * n
            continue
        blocks = (n + plan["blocksize"] - 1) // plan["blocksize"]
        sizes |= {name: (n + 1) // 2, f"{name}.absmax": blocks, f"{name}.quant_map": 64}
        sizes |= {f"{name}.nested_absmax": 4 * ((blocks + 255) // 256), f"{name}.nested_quant_map": 1024}
        sizes[f"{name}.quant_state.bitsandbytes__nf4"] = STATE_BYTES
    return sizes


def write_shard(path: Path, sizes: dict[str, int]) -> None:
    header, position = {}, 0
    for name, size in sizes.items():
        header[name] = {"dtype": "U8", "shape": [size], "data_offsets": [position, position + size]}
        position += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + position)


def verify_body(quantize: dict[str, Any], plan: dict[str, Any]) -> dict[str, Any]:
    checks = [
        {"id": "F1", "title": "shards are complete", "status": "passed", "detail": "1 file", "where": None},
        {
            "id": "load",
            "title": "stock transformers loads it",
            "status": "passed",
            "detail": "made TinyModel",
            "where": None,
        },
        {
            "id": "F26",
            "title": "companions are the source's",
            "status": "skipped",
            "detail": "no companions",
            "where": None,
        },
    ]
    names = [d["name"] for d in plan["decisions"] if d["action"] == "nf4"]
    answer = {
        "prompt": "Name three primary colors.",
        "image": False,
        "answer": "Red, yellow and blue.",
        "tokens": 7,
        "tokens_per_second": 11.42,
    }
    return {
        "weights_digest": quantize["weights_digest"],
        "passed": True,
        "checks": checks,
        "tensors": [{"name": name, "sqnr_db": 20.712, "scales_differing": 0} for name in names],
        "with_source": "google/tiny",
        "stock": {"device": "cpu", "answers": [answer]},
    }


def quantize_body(folder: Path, plan: dict[str, Any], label: str) -> dict[str, Any]:
    files = {"model.safetensors": {"sha256": "ab" * 32, "bytes": (folder / "model.safetensors").stat().st_size}}
    numel = sum(prod(d["shape"]) for d in plan["decisions"])
    total = sum(on_disk(plan).values())
    return {
        "job": "sha256:job",
        "plan_digest": "sha256:" + "cd" * 32,
        "weights_digest": digest({name: entry["sha256"] for name, entry in files.items()}),
        "source": {
            "label": label,
            "kind": "safetensors",
            "lineage": {"license": "gemma"},
            "left_behind": ["README.md"],
        },
        "files": files,
        "companions": {"tokenizer.json": "12" * 32, "LICENSE": "34" * 32, "config.json": "56" * 32},
        "tensors": {d["name"]: {"sha256": "ef" * 32, "action": d["action"]} for d in plan["decisions"]},
        "sizes": {
            "source_bytes": 2 * numel,
            "output_bytes": total,
            "parameters": numel,
            "bits_per_weight": round(8 * total / numel, 4),
        },
        "lattice": {
            "tensors": [
                {"name": "model.layers.0.mlp.up_proj.weight", "verdict": "exactly", "grid": "int4", "blocksize": 32}
            ],
            "summary": {
                "quantized": 1,
                "sentence": "the source lies exactly on an int4 grid in 1 of 1 quantized tensors",
            },
            "sampled_weights": 8192,
        },
        "run": {
            "device": "cpu",
            "cores": 2,
            "seconds": 12.345,
            "resumed_tensors": 0,
            "peak_rss_bytes": 3 * 10**8,
            "peak_gpu_bytes": None,
        },
    }


def write_checkpoint(folder: Path, plan: dict[str, Any] | None = None, label: str = "google/tiny") -> Path:
    """A complete checkpoint on paper: weights of holes, companions, records plan, quantize and verify."""
    plan = plan or small_plan()
    folder.mkdir(parents=True, exist_ok=True)
    write_shard(folder / "model.safetensors", on_disk(plan))
    for name in ("tokenizer.json", "LICENSE", "config.json"):
        (folder / name).write_text("{}\n", encoding="utf-8")
    write_record(folder, "plan", plan)
    quantize = quantize_body(folder, plan, label)
    write_record(folder, "quantize", quantize)
    write_record(folder, "verify", verify_body(quantize, plan))
    for name in ("plan", "quantize", "verify"):
        edit(folder, name, lambda body: body.update(created="2026-01-02T03:04:05+00:00", versions=VERSIONS))
    return folder


def edit(folder: Path, name: str, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a record on disk."""
    path = folder / "halfbyte" / f"{name}.json"
    body = json.loads(path.read_text(encoding="utf-8"))
    change(body)
    path.write_text(json.dumps(body), encoding="utf-8")
