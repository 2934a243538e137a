"""What does one step of the decode loop cost, where does it go, and what does a prompt cost?

    python benchmarks/runtime/step.py --shape 31b              about 3 minutes on an H200 with its build (benchmarks/runtime/decode.py)
    python benchmarks/runtime/step.py --tiny --shape e4b       proves on a CPU that this script runs; its figures mean nothing

A step is timed alone: texts of the given length are set down without their keys (zeros cost what keys cost), the step is recorded, and
replays are timed; median and range. T is the number of new tokens a row: 1 is plain decoding, 8 verifies 7 drafts. The ceiling of a
step is the time in which the memory copies (measured first) as many bytes as the step must read: weights, the embedding once as the
head, and the keys and values that are seen. Then the kernels of one step by name, and prompts against transformers' forward pass
(logits of the last token only, a fresh cache). The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from ceiling import copy_rate, device_of
from decode import Bench
from gemma4_shapes import SHAPES, build, bytes_a_token, text_config

from halfbyte.runtime.decode.description import Description, NotDescribed, describe
from halfbyte.runtime.decode.kernels import attention
from halfbyte.runtime.decode.kernels.where import launch_early
from halfbyte.runtime.decode.loop import Decoder
from halfbyte.runtime.decode.prompt import fill
from halfbyte.runtime.decode.sampling import Sampling
from halfbyte.runtime.decode.state import begin

#: rows, tokens of text, T
STEPS = [
    (1, 64, 1), (1, 64, 8), (2, 64, 8), (8, 64, 1), (16, 64, 1), (64, 64, 1), (1, 8192, 1), (1, 8192, 8), (8, 8192, 1),
    (1, 32768, 1),
]  # fmt: skip
PROMPTS = [512, 8192]


def seen_bytes(description: Description, rows: int, length: int) -> int:
    """Bytes of keys and values that a step reads."""
    size = torch.empty(0, dtype=description.dtype).element_size()
    return sum(
        2 * rows * layer.kv_heads * layer.head_dim * size * min(length, layer.window or length)
        for layer in description.layers
    )


def timed(work: Callable[[], Any], wait: Callable[[], None], repeats: int) -> list[float]:
    """Seconds of each of `repeats` runs, after one."""
    work()
    found = []
    for _ in range(repeats):
        wait()
        start = time.perf_counter()
        work()
        wait()
        found.append(time.perf_counter() - start)
    return found


def decoder_at(bench: Bench, rows: int, length: int) -> Decoder:
    """A decoder whose texts are `length` tokens long."""
    decoder = Decoder(bench.model, rows, length + 64)
    texts = torch.randint(10, bench.model.config.vocab_size, (rows, length)).tolist()
    with torch.inference_mode():
        begin(decoder.state, texts, 64, (), 0)
    return decoder


def step_row(
    bench: Bench, rows: int, length: int, width: int, rate: float, weights: int, replays: int
) -> dict[str, Any]:
    """One line of the table, printed too."""
    decoder = decoder_at(bench, rows, length)
    with torch.inference_mode():
        step = decoder._step(width, Sampling())

        def work() -> None:
            for _ in range(replays):
                step()

        found = [seconds / replays for seconds in timed(work, bench.wait, bench.repeats)]
    middle = statistics.median(found)
    ceiling = (weights + seen_bytes(decoder.description, rows, length)) / rate
    peak = torch.cuda.max_memory_allocated() / 2**30 if bench.device != "cpu" else 0.0
    print(
        f"{rows:5}{length:8}{width:4}{1e3 * middle:10.3f}{f'{1e3 * min(found):.2f}-{1e3 * max(found):.2f}':>14}"
        f"{1e3 * ceiling:9.2f}{100 * ceiling / middle:8.1f}{rows / middle:12.1f}{decoder.cache_bytes / 2**30:10.2f}{peak:8.2f}"
    )
    return {
        "rows": rows, "length": length, "new_tokens_a_step": width, "ms": round(1e3 * middle, 4), "min_ms": round(1e3 * min(found), 4),
        "max_ms": round(1e3 * max(found), 4), "n": len(found), "ceiling_ms": round(1e3 * ceiling, 4),
        "tokens_per_s_without_drafts": round(rows / middle, 1), "cache_bytes": decoder.cache_bytes,
    }  # fmt: skip


def kernels_of_a_step(bench: Bench, length: int, width: int) -> list[dict[str, Any]]:
    """Name, launches and microseconds of one replay's kernels, dearest first; empty on a CPU."""
    if bench.device == "cpu":
        return []
    from torch.profiler import ProfilerActivity, profile

    decoder = decoder_at(bench, 1, length)
    with torch.inference_mode():
        step = decoder._step(width, Sampling())
        step()
        bench.wait()
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            step()
            bench.wait()
    count: dict[str, int] = defaultdict(int)
    spent: dict[str, float] = defaultdict(float)
    for event in seen.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            count[event.name[:60]] += 1
            spent[event.name[:60]] += event.time_range.elapsed_us()
    rows = [{"kernel": name, "launches": count[name], "us": round(spent[name], 1)} for name in count]
    return sorted(rows, key=lambda row: -float(row["us"]))  # type: ignore[arg-type]


def prompt_row(bench: Bench, length: int) -> dict[str, Any]:
    """Seconds of a prompt into our cache, and through transformers."""
    decoder = Decoder(bench.model, 1, length + 8)
    text = torch.randint(10, bench.model.config.vocab_size, (1, length), device=bench.device)
    with torch.inference_mode():
        ours = timed(lambda: fill(decoder.description, decoder.cache, text.tolist()), bench.wait, bench.repeats)
        theirs = timed(lambda: bench.model(input_ids=text, use_cache=True, logits_to_keep=1), bench.wait, bench.repeats)
    row = {
        "prompt": length,
        "ours_s": round(statistics.median(ours), 4),
        "transformers_s": round(statistics.median(theirs), 4),
    }
    print(
        f"prompt of {length} tokens: ours {row['ours_s']:.3f} s, transformers with the same linears {row['transformers_s']:.3f} s"
    )
    return row


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Build, replace the linears by ours, measure."""
    device = device_of(options)
    torch.manual_seed(0)
    launch_early(options.early)
    attention.CHUNK = options.chunk
    rate = copy_rate(device, 0.05 if options.tiny else 2.0)
    model = build(text_config(options.shape, options.tiny, options.config), device)
    try:
        describe(model)
    except NotDescribed as error:
        print(f"not supported: {error.what}")
        return {"benchmark": "step", "shape": str(options.config or options.shape), "not_supported": error.what}
    weights = bytes_a_token(model)
    bench = Bench(model, device, (1, 2), options.repeats)
    bench.replace(True if device == "cpu" else options.fast)
    print(
        " rows  length   T   ms/step         range  ceiling  % ceil  tokens/s*  cache GiB    peak     * one a row and step"
    )
    steps = [(1, 40, 1), (2, 90, 3)] if options.tiny else STEPS
    replays = 2 if options.tiny else 20
    found = [step_row(bench, *step, rate, weights, replays) for step in steps]
    kernels = {width: kernels_of_a_step(bench, steps[0][1], width) for width in (1, 8)}
    for width, rows in kernels.items():
        print(
            f"T = {width}: {sum(row['launches'] for row in rows)} launches, {sum(row['us'] for row in rows) / 1e3:.3f} ms in kernels"
        )
        for row in rows[:14]:
            print(f"{row['us']:10.1f} us {row['launches']:5} x  {row['kernel']}")
    prompts = [prompt_row(bench, length) for length in ([40] if options.tiny else PROMPTS)]
    return {
        "benchmark": "step", "device": torch.cuda.get_device_name() if device == "cuda" else "CPU", "copy_bytes_per_s": rate,
        "shape": ("tiny " if options.tiny else "") + str(options.config or options.shape), "bytes_per_token": weights, "steps": found,
        "kernels": {width: rows[:20] for width, rows in kernels.items()}, "prompts": prompts, "early": options.early, "chunk": options.chunk, "torch": torch.__version__,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="31b")
    parser.add_argument("--config", type=Path, help="config.json of a Gemma 4 instead of --shape")
    parser.add_argument("--chunk", type=int, default=attention.CHUNK, help="slots of the cache that one program reads")
    parser.add_argument("--tiny", action="store_true", help="a few MB, also on a CPU")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--all-ours", dest="fast", action="store_const", const=True, default="auto",
                        help="our linears also where bitsandbytes is measured to be faster")  # fmt: skip
    parser.add_argument("--late", dest="early", action="store_false", help="do not launch the small kernels early")
    print(json.dumps(run(parser.parse_args())))


if __name__ == "__main__":
    main()
