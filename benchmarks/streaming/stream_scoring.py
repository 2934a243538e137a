"""How long does scoring a 31B take when it is streamed a layer at a time, and in how much memory?

A model in Gemma 4 31B's own shapes (hidden 5376, 50 sliding and 10 full layers, vocabulary 262,144) with --layers of its 60, random weights
made on the fly in memory: bf16 (as a source hands them out) or NF4 (packed codes and scales, expanded by our codec). The
reference's pass goes over all rows, then the head over all scored positions. --write FOLDER puts the bf16 weights into safetensors
files first and reads them from there, so that GB/s are those of files (in the page cache, if they fit there).

    python benchmarks/streaming/stream_scoring.py --layers 6 --tokens 30000 --device cuda --dtype bfloat16 [--nf4] [--write FOLDER]
    python benchmarks/streaming/stream_scoring.py --layers 2 --tokens 256 --window 128 --hidden 512       # two cores, seconds

Projected: seconds of the layers x (60 / layers), plus what comes before them (skeleton, embedding) and the head as measured,
for the tokens given; --layers should be a multiple of 6, or full attention counts too often. GB/s: bytes that a file takes for
the layers, per second of reading *and* computing them. Peaks are this process's: RSS (files are read, not mapped: the page
cache is not in it) and what torch has held on the GPU, before the head and with it.
The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from halfbyte import codec
from halfbyte.device import check_device
from halfbyte.evaluator.scoring.scorer import POSITIONS
from halfbyte.layers.model import exact_float32
from halfbyte.layers.rows import Rows
from halfbyte.layers.streaming import StreamedModel
from halfbyte.layers.weights import Weights, open_weights
from halfbyte.memory import peak_gpu_bytes, peak_rss_bytes
from halfbyte.progress import listening
from halfbyte.recipe.skeleton import build_skeleton
from halfbyte.records import versions

LAYERS, PIECE, BLOCKSIZE = 60, 1 << 24, 64
#: what is neither norm nor embedding nor head: what a decoder-only plan puts into NF4
LINEAR = "_proj.weight"


def config_31b(layers: int, hidden: int) -> dict[str, Any]:
    """Gemma 4 31B's text part; another hidden size scales the widths with it."""
    kinds = ["sliding_attention" if (n + 1) % 6 and n + 1 < layers else "full_attention" for n in range(layers)]
    text = {
        "attention_k_eq_v": True, "final_logit_softcapping": 30.0, "global_head_dim": 512, "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh", "hidden_size": hidden, "hidden_size_per_layer_input": 0,
        "intermediate_size": 4 * hidden, "layer_types": kinds, "max_position_embeddings": 131072, "model_type": "gemma4_text",
        "num_attention_heads": max(1, 32 * hidden // 5376), "num_global_key_value_heads": 1 if hidden < 5376 else 4,
        "num_hidden_layers": layers, "num_key_value_heads": 1 if hidden < 5376 else 16, "num_kv_shared_layers": 0,
        "pad_token_id": 0, "rms_norm_eps": 1e-6, "sliding_window": 1024, "tie_word_embeddings": True,
        "rope_parameters": {
            "full_attention": {"partial_rotary_factor": 0.25, "rope_theta": 1000000.0, "rope_type": "proportional"},
            "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"},
        },
        "vocab_size": 262144, "vocab_size_per_layer_input": 262144,
    }  # fmt: skip
    return {**text, "dtype": "bfloat16"}


class RandomWeights:
    """Implements Weights: one random piece, repeated to every shape."""

    def __init__(self, config: dict[str, Any], nf4: bool) -> None:
        self.config, self.label, self.digest, self.nf4 = config, "random", "random", nf4
        skeleton = build_skeleton(config)
        self._shapes = {key: t.shape for key, t in skeleton.tensors.items() if key not in skeleton.tied}
        generator = torch.Generator().manual_seed(0)
        self._piece = (torch.randn(PIECE, generator=generator) / 64).bfloat16()
        self._codes = torch.randint(0, 256, (PIECE // 2,), generator=generator, dtype=torch.uint8)

    def names(self) -> list[str]:
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def load(self, name: str, device: str = "cpu") -> torch.Tensor:
        size = torch.Size(self._shapes[name])
        if self.nf4 and name.endswith(LINEAR):
            packed, absmax = _repeat(self._codes, size.numel() // 2), torch.full((size.numel() // BLOCKSIZE,), 1 / 32)
            return codec.dequantize_blocks(packed.to(device), absmax, size.numel(), BLOCKSIZE, torch.bfloat16).view(
                size
            )
        return self._plain(name, size).to(device)

    def load_rows(self, name: str, begin: int, end: int, device: str = "cpu") -> torch.Tensor:
        return self._plain(name, torch.Size((end - begin, *self._shapes[name][1:]))).to(device)

    def _plain(self, name: str, size: torch.Size) -> torch.Tensor:
        if "norm" in name or name.endswith("layer_scalar"):
            return torch.ones(size, dtype=torch.bfloat16)
        return _repeat(self._piece, size.numel()).view(size)

    def layer_bytes(self) -> int:
        """What a file takes for the decoder layers: bf16, or half a byte and a 64th for NF4 with double quantization."""
        sizes = {name: torch.Size(shape).numel() for name, shape in self._shapes.items() if ".layers." in name}
        packed = sum(size for name, size in sizes.items() if self.nf4 and name.endswith(LINEAR))
        return 2 * (sum(sizes.values()) - packed) + packed // 2 + packed // BLOCKSIZE

    def companions_folder(self) -> Path:
        raise NotImplementedError

    def close(self) -> None: ...


def _repeat(piece: torch.Tensor, n: int) -> torch.Tensor:
    found = torch.empty(n, dtype=piece.dtype)
    for begin in range(0, n, len(piece)):
        found[begin : begin + len(piece)] = piece[: n - begin]
    return found


def write_files(weights: RandomWeights, folder: Path) -> Path:
    """The same weights as a checkpoint of one shard a layer or so."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(weights.config))
    weight_map, shard, size = {}, {}, 0
    for name in weights.names():
        shard[name] = weights.load(name)
        size += shard[name].nbytes
        if size > 1 << 30 or name == weights.names()[-1]:
            file = f"model-{len(set(weight_map.values())):05d}.safetensors"
            save_file(shard, folder / file)
            weight_map |= dict.fromkeys(shard, file)
            shard, size = {}, 0
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def random_rows(tokens: int, window: int) -> Rows:
    """`tokens` ids of the vocabulary in rows of `window`; all but the last position of a row count."""
    ids = np.random.default_rng(0).integers(3, 262144, (max(1, tokens // window), window)).astype(np.int32)
    scored = np.ones(window, bool)
    scored[-1] = False
    return Rows("random", 1, list(ids), [scored] * len(ids), [str(row) for row in range(len(ids))])


class FirstBytes:
    """A progress listener that keeps the time at which the first layer's first weight was there."""

    at: float | None = None

    @contextmanager
    def task(self, title: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
        def advance(amount: int) -> None:
            self.at = self.at or time.perf_counter()

        yield advance

    def note(self, text: str) -> None: ...


def measure(weights: Weights, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds before the layers (skeleton, embedding, masks), of the layers, and of the head over their output."""
    rows = random_rows(options.tokens, options.window)
    batches = rows.batches(options.batch)
    heard, started = FirstBytes(), time.perf_counter()
    with listening(heard):
        model = StreamedModel(weights, options.device, options.dtype)
        model.prepare([(batches, None)])
    ended, gpu = time.perf_counter(), peak_gpu_bytes(options.device)
    assert heard.at is not None
    with torch.inference_mode(), exact_float32():
        for states in model.hidden_states(batches):
            for begin in range(0, len(states), POSITIONS):
                torch.log_softmax(model.head.logits(states[begin : begin + POSITIONS]), dim=-1)
    if options.device != "cpu":
        torch.cuda.synchronize(options.device)
    head = time.perf_counter() - ended
    model.close()
    return {
        "positions": rows.n, "before_s": heard.at - started, "layers_s": ended - heard.at, "head_s": head,
        "peak_gpu_bytes_before_head": gpu,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=30000)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=5376)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--nf4", action="store_true")
    parser.add_argument("--write", type=Path)
    options = parser.parse_args()
    if options.nf4 and options.write:
        parser.error("--write is for bf16")
    check_device(options.device)
    drawn = RandomWeights(config_31b(options.layers, options.hidden), options.nf4)
    folder = write_files(drawn, options.write) if options.write else None
    weights: Weights = drawn if folder is None else open_weights(folder)
    found = measure(weights, options)
    weights.close()
    if folder is not None:
        shutil.rmtree(folder)
    read = drawn.layer_bytes()
    projected = found["before_s"] + found["layers_s"] * LAYERS / options.layers + found["head_s"]
    result = {
        **found, "layer_bytes": read, "gb_per_s": read / found["layers_s"] / 1e9, "projected_60_layers_s": projected,
        "peak_rss_bytes": peak_rss_bytes(), "peak_gpu_bytes": peak_gpu_bytes(options.device),
        "options": {key: str(value) for key, value in vars(options).items()}, "versions": versions(),
    }  # fmt: skip
    if options.device != "cpu":
        result["gpu"] = torch.cuda.get_device_name(options.device)
    gpu = "" if result["peak_gpu_bytes"] is None else f", GPU {result['peak_gpu_bytes'] / 2**30:.2f} GiB"
    print(f"{options.layers} layers, {found['positions']} positions, {options.dtype} on {options.device}")
    print(f"before {found['before_s']:.1f} s, layers {found['layers_s']:.1f} s ({result['gb_per_s']:.2f} GB/s of weights), "
          f"head {found['head_s']:.1f} s")  # fmt: skip
    print(f"peak RSS {result['peak_rss_bytes'] / 2**30:.2f} GiB{gpu}")
    print(f"60 layers: {projected:.0f} s ({projected / 3600:.2f} h), memory as here (it does not grow with layers)")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
