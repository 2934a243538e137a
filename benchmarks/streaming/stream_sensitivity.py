"""How long does `halfbyte sensitivity` take on a 31B, and in how much memory? Random weights in its shapes, a few of its layers.

    python benchmarks/streaming/stream_sensitivity.py --layers 6 --tokens 1024 --device cuda                        float32, as the command's default
    python benchmarks/streaming/stream_sensitivity.py --layers 2 --tokens 64 --window 32 --hidden 512 --vocabulary 4096      a CPU, seconds

Every group of every layer in NF4-64 and NF4-32, as the command does (skeleton and weights as in stream_scoring.py), once without any
variant and once with all. A variant that begins at layer k is run through the layers from k on, so L layers of g groups take
2 g L (L + 1) / 2 runs of a layer. Projected for 60 layers:

    seconds   (with - without - rounding) / runs here  x  runs of 60 layers, + (without + rounding) x 60 / layers, + the head for
              every variant; rounding is timed apart
    CPU       480 residuals of tokens x hidden x 4 bytes, if they do not stay on the GPU; carried in several passes where memory ends

The head is measured on a few variants. --layers should be a multiple of 6. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import torch
from stream_scoring import LAYERS, RandomWeights, config_31b, random_rows

from halfbyte.device import check_device
from halfbyte.evaluator.sensitivity.carrying import CarryingModel, Variant
from halfbyte.evaluator.sensitivity.costs import klds_of
from halfbyte.layers.weights import Weights, round_to_nf4
from halfbyte.memory import peak_gpu_bytes, peak_rss_bytes
from halfbyte.recipe.budget.groups import groups_of
from halfbyte.recipe.budget.sensitivity import MEASURED
from halfbyte.recipe.plan import make_plan
from halfbyte.recipe.skeleton import build_skeleton
from halfbyte.records import versions

_HEADS = 4


def variants_of(config: dict[str, Any], model: CarryingModel) -> list[Variant]:
    found = []
    for group in groups_of(make_plan(config, None).decisions, build_skeleton(config)):
        keys = frozenset(f"{module}.weight" for module in group.modules)
        first = model.layer_of(next(iter(keys)))
        if first is not None:
            found += [Variant(group.name, choice, keys, size, first) for choice, size in MEASURED.items()]
    return found


def timed(work: Any, device: str) -> tuple[float, Any]:
    started = time.perf_counter()
    found = work()
    if device != "cpu":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started, found


def rounding_seconds(model: CarryingModel, variants: list[Variant], device: str) -> float:
    """What it takes to round every weight of every variant once."""
    total = 0.0
    for variant in variants:
        for key in sorted(variant.keys):
            weight = model.places.load(key, device)
            total += timed(lambda w=weight, size=variant.blocksize: round_to_nf4(w, size), device)[0]
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--window", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=5376)
    parser.add_argument("--vocabulary", type=int, default=262144)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    check_device(options.device)
    config = {**config_31b(options.layers, options.hidden), "vocab_size": options.vocabulary}
    weights: Weights = RandomWeights(config, nf4=False)
    batches = random_rows(options.tokens, options.window).batches(options.batch)
    for batch in batches:
        batch.tokens[:] = 3 + batch.tokens % (options.vocabulary - 3)
    model = CarryingModel(weights, options.device, options.dtype)
    variants = variants_of(config, model)
    runs = sum(options.layers - v.first for v in variants)
    alone, _ = timed(lambda: model.carry(batches, []), options.device)
    rounding = rounding_seconds(model, variants, options.device)  # the first time compiles
    rounding = rounding_seconds(model, variants, options.device)
    together, states = timed(lambda: model.carry(batches, variants), options.device)
    before_head = peak_gpu_bytes(options.device)
    labels = [batch.labels % options.vocabulary for batch in batches]
    for batch, own in zip(batches, labels, strict=True):
        batch.labels[:] = own
    head, _ = timed(lambda: klds_of(model.head, batches, states, variants[:_HEADS]), options.device)
    a_layer = len(variants) / options.layers
    all_runs = a_layer * LAYERS * (LAYERS + 1) / 2
    a_run = (together - alone - rounding) / runs
    projected = a_run * all_runs + (alone + rounding) * LAYERS / options.layers + head / _HEADS * a_layer * LAYERS
    residual = model.residual_bytes(batches)
    result = {
        "benchmark": "stream_sensitivity", "variants": len(variants), "runs": runs, "alone_s": alone, "together_s": together,
        "head_s_a_variant": head / _HEADS, "s_a_run": a_run, "rounding_s": rounding, "projected_60_layers_s": projected,
        "residuals_60_layers_bytes": int(residual * a_layer * LAYERS), "peak_gpu_bytes_before_head": before_head,
        "peak_gpu_bytes": peak_gpu_bytes(options.device), "peak_rss_bytes": peak_rss_bytes(),
        "gpu": None if options.device == "cpu" else torch.cuda.get_device_name(options.device),
        "options": vars(options), "versions": versions(),
    }  # fmt: skip
    print(
        f"{len(variants)} variants of {options.layers} layers, {options.tokens} tokens, {options.dtype} on {options.device}"
    )
    print(
        f"without {alone:.1f} s, with {together:.1f} s, of which rounding {rounding:.1f} s: {a_run * 1e3:.1f} ms a run of a layer; head {head / _HEADS:.2f} s a variant"
    )
    print(f"60 layers: {projected:.0f} s, residuals {result['residuals_60_layers_bytes'] / 2**30:.1f} GiB; "
          f"peak RSS {result['peak_rss_bytes'] / 2**30:.1f} GiB")  # fmt: skip
    print(json.dumps(result))


if __name__ == "__main__":
    main()
