"""How long does calibrated NF4 take on a 31B's shapes when it is streamed a layer at a time, and in how much memory?

    python benchmarks/streaming/stream_fitting.py --device cuda --dtype bfloat16                   2 layers: one sliding, one full; under two minutes
    python benchmarks/streaming/stream_fitting.py --layers 2 --tokens 256 --window 128 --hidden 512 two cores, seconds

The walk of `halfbyte quantize --method gptq` (halfbyte.layers.fitting.layerwise) over random weights in Gemma 4 31B's shapes and random rows. Random inputs
have Hessians that are nearly diagonal: the work is the same, the gain is not, so none is printed. Each linear is fitted and dropped; what
writing adds is in benchmarks/streaming/stream.py. Projected: 50 times the mean sliding layer, 10 times the full one, and what comes before them.
The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from stream_scoring import RandomWeights, config_31b, random_rows

from halfbyte import codec
from halfbyte.codec.fitting import Fit, Moments, fit_weight
from halfbyte.device import check_device
from halfbyte.layers.fitting.layerwise import Inputs, fit_layers
from halfbyte.layers.streaming import StreamedModel
from halfbyte.memory import peak_gpu_bytes, peak_rss_bytes
from halfbyte.records import versions

SLIDING, FULL = 50, 10


@dataclass(eq=False)
class Dropped:
    """Implements `layerwise.Store`: fits, notes when, keeps nothing."""

    weights: RandomWeights
    how: Fit
    device: str
    done: set[str] = field(default_factory=set)
    fitting: dict[str, float] = field(default_factory=dict)
    ended: dict[str, float] = field(default_factory=dict)

    def is_done(self, name: str) -> bool:
        return name in self.done

    def load(self, name: str) -> torch.Tensor:
        raise AssertionError(f"{name} is asked for once")

    def fit(self, name: str, inputs: Inputs | None) -> torch.Tensor:
        assert inputs is not None, name
        self._wait()
        start = time.perf_counter()
        weight = self.weights.load(name, self.device)
        nf4 = fit_weight(weight, self.how, mean_squares=inputs.mean_squares, hessian=inputs.hessian, threads=1).nf4
        found = codec.dequantize(nf4).view(weight.shape).to(self.device)
        self._wait()
        self.fitting[name] = time.perf_counter() - start
        self.ended[name] = time.perf_counter()
        self.done.add(name)
        print(f"{name:60}{list(weight.shape)!s:16}{self.fitting[name]:8.2f} s", flush=True)
        return found

    def _wait(self) -> None:
        if self.device != "cpu":
            torch.cuda.synchronize(self.device)


def layer_of(name: str) -> int:
    """model.layers.3.mlp... -> 3"""
    return int(name.split(".layers.")[1].partition(".")[0])


def run(options: argparse.Namespace) -> dict[str, Any]:
    weights = RandomWeights(config_31b(options.layers, options.hidden), nf4=False)
    wanted = {name for name in weights.names() if ".layers." in name and name.endswith("_proj.weight")}
    store = Dropped(weights, Fit(method=options.method, blocksize=options.blocksize), options.device)
    rows = random_rows(options.tokens, options.window)
    started = time.perf_counter()
    model = StreamedModel(weights, options.device, options.dtype)
    before = time.perf_counter() - started
    walked = time.perf_counter()
    moments = partial(Moments, full=options.method == "gptq", device=options.device)
    fit_layers(model, rows, wanted, store, moments, batch=options.batch, sequential=not options.at_once)
    model.close()
    ends = [max(end for name, end in store.ended.items() if layer_of(name) == n) for n in range(options.layers)]
    layers = [end - begin for begin, end in zip([walked, *ends], ends, strict=False)]
    sliding = sum(layers[:-1]) / max(1, len(layers) - 1)
    return {
        "benchmark": "stream_fitting", "gpu": torch.cuda.get_device_name(options.device) if options.device != "cpu" else None,
        "before_s": round(before, 2), "layers_s": [round(s, 2) for s in layers], "fit_s": {n: round(s, 3) for n, s in store.fitting.items()},
        "projected_60_layers_s": round(before + SLIDING * sliding + FULL * layers[-1], 1), "tokens": rows.n,
        "peak_gpu_bytes": peak_gpu_bytes(options.device), "peak_rss_bytes": peak_rss_bytes(),
        "options": {key: str(value) for key, value in vars(options).items()}, "versions": versions(),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--method", choices=("scale", "gptq"), default="gptq")
    parser.add_argument("--blocksize", type=int, choices=(64, 32), default=64)
    parser.add_argument("--layers", type=int, default=2, help="the last attends to everything, those before it slide")
    parser.add_argument("--tokens", type=int, default=65_536)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=5376)
    parser.add_argument("--at-once", action="store_true", help="measure all linears of a layer in one pass")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    check_device(options.device)
    found = run(options)
    gpu = "" if found["peak_gpu_bytes"] is None else f", GPU {found['peak_gpu_bytes'] / 2**30:.2f} GiB"
    print(f"layers {found['layers_s']} s; 60 layers: {found['projected_60_layers_s'] / 60:.1f} minutes")
    print(f"peak RSS {found['peak_rss_bytes'] / 2**30:.2f} GiB{gpu}")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
