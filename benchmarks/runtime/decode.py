"""How many tokens a second does a Gemma 4 in NF4 decode, by stock transformers and by ours, and how many would the memory allow?

    python benchmarks/runtime/decode.py --shape 31b                      about 3 minutes on an H200 with its build
    python benchmarks/runtime/decode.py --shape 31b --compiled --only "stock linears, compiled" --batches 1      transformers' compiled generate: 4 to 7 minutes
    python benchmarks/runtime/decode.py --config config.json             any Gemma 4 text config (the file's own, or its text_config)
    python benchmarks/runtime/decode.py --tiny --shape e4b               proves on a CPU that this script runs; its figures mean nothing

Weights are random, in the shape of the real model: the skeleton is made with its linears on meta, each is then filled with random
codes and scales in bitsandbytes' own structures, on the device. So every row's bitsandbytes is the released one. First
its rows are measured, then its linears are replaced in place by `halfbyte.runtime.loading`, as `halfbyte.load` does.

A rate is rows * (long - short) / (seconds of long - seconds of short): two generations that differ in their new tokens only, so the
prompt costs nothing. Median and range over repeats. The ceiling is the time in which the memory copies (reads and writes, measured first) as many
bytes as a token must read: all weights, the embedding once, as the head. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from ceiling import copy_rate, device_of
from gemma4_shapes import SHAPES, build, bytes_a_token, text_config

from halfbyte.errors import HalfbyteError

PROMPT = 16
#: steps of our loop between two looks of the host, and how many times as many it takes: ten times faster, it would be lost in the noise
BLOCK, LONGER = 8, 4


@dataclass
class Bench:
    """A model and what is asked of it.

    limit_s  seconds that a compiled row may take
    notes    what a row says beside its rate; empty again for each row
    """

    model: Any
    device: str
    new_tokens: tuple[int, int]
    repeats: int
    limit_s: float = 330.0
    notes: dict[str, Any] = field(default_factory=dict)

    def prompt(self, rows: int) -> torch.Tensor:
        """Random tokens [rows, PROMPT]."""
        return torch.randint(10, self.model.config.vocab_size, (rows, PROMPT), device=self.device)

    def seconds(self, work: Callable[[], Any]) -> float:
        """Of one run, with all of the device's work in it."""
        self.wait()
        start = time.perf_counter()
        work()
        self.wait()
        return time.perf_counter() - start

    def replace(self, fast: Any) -> dict[str, Any]:
        """Our linears in place of bitsandbytes', as `halfbyte.load` does it; seconds and the most memory it took."""
        from halfbyte.runtime.loading.checkpoint import choose_linears

        if self.device != "cpu":
            torch.cuda.reset_peak_memory_stats()
        seconds = self.seconds(lambda: choose_linears(self.model, self.device, fast))
        report = self.model.halfbyte
        peak = torch.cuda.max_memory_allocated() if self.device != "cpu" else None
        memory = "" if peak is None else f", peak {peak / 2**30:.2f} GiB"
        print(f"replaced in {seconds:.1f} s, {report.measuring_s:.1f} of it timing{memory}: {report.summary()}")
        return {"seconds": round(seconds, 2), "measuring_s": round(report.measuring_s, 2), "peak_gpu_bytes": peak}

    def wait(self) -> None:
        """For the GPU."""
        if self.device != "cpu":
            torch.cuda.synchronize()

    def rates(self, run: Callable[[int], Any], rows: int, new_tokens: tuple[int, int] | None = None) -> list[float]:
        """Tokens a second of all rows together, for each repeat; run(n) makes n new tokens."""
        short, long = new_tokens or self.new_tokens
        run(short)
        return [
            rows * (long - short) / (self.seconds(lambda: run(long)) - self.seconds(lambda: run(short)))
            for _ in range(self.repeats)
        ]


def by_generate(bench: Bench, rows: int, **settings: Any) -> list[float]:
    """Through transformers' own generate."""
    inputs = bench.prompt(rows)
    mask = torch.ones_like(inputs)

    def run(count: int) -> None:
        bench.model.generate(
            input_ids=inputs,
            attention_mask=mask,
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            **settings,
        )

    return bench.rates(run, rows)


def by_graph(bench: Bench, rows: int) -> list[float]:
    """One step of transformers' forward with a static cache, captured in a CUDA graph and replayed: no host, no sampling."""
    from transformers import StaticCache

    if bench.device == "cpu":
        raise NotMeasured("needs a GPU")
    short, long = bench.new_tokens
    room = PROMPT + 8 + bench.repeats * (long - short)
    cache = StaticCache(config=bench.model.config, max_cache_len=room)
    bench.model(input_ids=bench.prompt(rows), past_key_values=cache, use_cache=True, logits_to_keep=1)
    token = bench.prompt(rows)[:, :1].contiguous()
    place = torch.full((rows, 1), PROMPT, device=bench.device)

    def step() -> torch.Tensor:
        logits: torch.Tensor = bench.model(
            input_ids=token, position_ids=place, past_key_values=cache, use_cache=True
        ).logits
        return logits

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    step()  # and once on this stream: the kernels' buffers belong to a stream
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()

    def replay() -> None:
        for _ in range(long - short):
            graph.replay()

    return [rows * (long - short) / bench.seconds(replay) for _ in range(bench.repeats)]


def by_compiled(bench: Bench, rows: int) -> list[float]:
    """transformers' compiled generate: one static cache, so that every run has the shapes that were compiled.

    For a bitsandbytes model that was loaded `generate` does not compile: it asks `model.hf_quantizer.is_compileable`, and that is False
    (transformers 5.17 and 5.23). A model that was built, not loaded, has no `hf_quantizer`, nobody is asked, and it compiles. That is
    what this row measures: more than users get who do not set that attribute to None. `generate` falls back to eager steps without
    a word; so compiled graphs are counted. There are two of the step: sliding layers of the static cache count their tokens in a Python
    int, which the compiler first takes for a constant.
    """
    from torch._dynamo.utils import counters
    from transformers import StaticCache
    from transformers.generation import CompileConfig

    model, inputs = bench.model, bench.prompt(rows)
    if getattr(model, "hf_quantizer", None) is not None:
        raise NotMeasured("hf_quantizer.is_compileable is False: generate would not compile")
    how = CompileConfig() if bench.device != "cpu" else CompileConfig(backend="eager", mode=None)
    how._compile_all_devices = True
    cache = StaticCache(config=model.config, max_cache_len=PROMPT + bench.new_tokens[1] + 8)

    def run(count: int) -> None:
        cache.reset()
        new = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False}
        model.generate(input_ids=inputs, attention_mask=torch.ones_like(inputs), past_key_values=cache, compile_config=how, **new)  # fmt: skip

    torch._dynamo.reset()  # graphs of another batch would make this one's sizes dynamic
    model.__dict__.pop("_compiled_call", None)
    counters.clear()
    with limited(bench.limit_s):
        # the second run records CUDA graphs, the third replays them
        bench.notes["compile_s"] = round(bench.seconds(lambda: [run(4) for _ in range(3)]), 1)
        bench.notes["graphs"] = counters["stats"]["unique_graphs"]
        bench.notes["graph_breaks"] = sum(counters["graph_break"].values())
        if not bench.notes["graphs"]:
            raise NotMeasured("transformers did not compile")
        print(
            f"    compiled in {bench.notes['compile_s']} s: {bench.notes['graphs']} graphs, {bench.notes['graph_breaks']} breaks"
        )
        return bench.rates(run, rows)


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """raises OutOfTime in the midst of the work when it has taken longer."""

    def stop(*_: Any) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class OutOfTime(BaseException):
    """No Exception: the compiler catches those and goes on without."""


def by_decode_loop(bench: Bench, rows: int) -> list[float]:
    """The whole step as ours (halfbyte.runtime.decode)."""
    try:
        from halfbyte.runtime.decode.loop import Decoder
    except ImportError:
        raise NotMeasured("halfbyte.runtime.decode is not in this checkout") from None
    inputs = bench.prompt(rows)
    # the loop steps once, then BLOCK at a time: other counts would be given steps that they do not use
    counts = (1 + BLOCK, 1 + BLOCK + BLOCK * -(-LONGER * bench.new_tokens[1] // BLOCK))
    decoder = Decoder(bench.model, rows, PROMPT + counts[1] + 32)

    def run(count: int) -> None:
        for _ in decoder.tokens({"input_ids": inputs}, count, stops=(), every=BLOCK):
            pass

    return bench.rates(run, rows, counts)


class NotMeasured(Exception):
    """Why a row has no figure."""


def why_not(error: BaseException, bench: Bench) -> str:
    """One line."""
    if isinstance(error, OutOfTime):
        return f"not done after {bench.limit_s:g} s (--limit-s)"
    what = (str(error).strip().splitlines() or [""])[0][:200]
    return what if isinstance(error, (NotMeasured, HalfbyteError)) else f"{type(error).__name__}: {what}"


def measure(
    name: str, bench: Bench, rows: int, ceiling: float, way: Callable[[Bench, int], list[float]]
) -> dict[str, Any]:
    """One row, printed too. A row that fails says so and does not end the run."""
    row: dict[str, Any] = {"row": name, "batch": rows}
    bench.notes = {}
    if bench.device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    try:
        with torch.inference_mode():
            found = way(bench, rows)
    except (Exception, OutOfTime) as error:  # a row must not end the run
        row |= {"not_measured": why_not(error, bench)} | bench.notes
        print(f"{name:34}{rows:6}  not measured: {row['not_measured']}")
        return row
    middle = statistics.median(found)
    row |= {
        "tokens_per_s": round(middle, 2), "min": round(min(found), 2), "max": round(max(found), 2), "n": len(found),
        "ms_per_step": round(1e3 * rows / middle, 3), "percent_of_ceiling": round(100 * middle / (ceiling * rows), 1),
        "peak_gpu_bytes": torch.cuda.max_memory_allocated() if bench.device != "cpu" else None, **bench.notes,
    }  # fmt: skip
    memory = "" if row["peak_gpu_bytes"] is None else f"{row['peak_gpu_bytes'] / 2**30:9.2f}"
    span = f"{min(found):.1f}-{max(found):.1f}"
    print(
        f"{name:34}{rows:6}{middle:10.1f}{span:>16}{row['ms_per_step']:10.2f}{row['percent_of_ceiling']:8.1f}{memory}"
    )
    return row


#: what is measured unless asked otherwise: our linears in transformers' own loop are bound by the host, as stock's are
USUAL_ROWS = ("stock linears, generate", "step in a graph", "compiled", "decode loop")


def rows_of(kind: str, compiled: bool) -> dict[str, Callable[[Bench, int], list[float]]]:
    """Name -> way, for the model as it is: `stock` or `ours`."""
    static: dict[str, Any] = {"cache_implementation": "static"}
    found: dict[str, Callable[[Bench, int], list[float]]] = (
        {"ours, decode loop": by_decode_loop} if kind == "ours" else {}
    )
    found |= {
        f"{kind} linears, generate": by_generate,
        f"{kind} linears, static cache": lambda b, n: by_generate(b, n, **static, disable_compile=True),
        f"{kind} linears, step in a graph": by_graph,
    }
    if compiled:
        found[f"{kind} linears, compiled"] = by_compiled
    return found


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Build, measure stock, replace, measure ours."""
    device = device_of(options)
    torch.manual_seed(0)
    rate = copy_rate(device, 0.05 if options.tiny else 2.0)
    start = time.perf_counter()
    model = build(text_config(options.shape, options.tiny, options.config), device)
    built, needed = time.perf_counter() - start, bytes_a_token(model)
    ceiling = rate / needed
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    print(
        f"{name}: copy {rate / 1e12:.3f} TB/s; {needed / 1e9:.2f} GB a token: ceiling {ceiling:.0f} tokens/s a row; built in {built:.1f} s"
    )
    print(
        f"{'':34}{'batch':>6}{'tokens/s':>10}{'min-max':>16}{'ms/step':>10}{'% ceil':>8}{'GiB' if device == 'cuda' else '':>9}"
    )
    bench = Bench(model, device, tuple(options.new_tokens), options.repeats, options.limit_s)
    rows, replacing = [], {}
    for kind in ("stock", "ours"):
        asked = {
            label: way
            for label, way in rows_of(kind, options.compiled).items()
            if any(word in label for word in options.only)
        }
        if kind == "ours" and asked:
            replacing = bench.replace(True if device == "cpu" else options.fast)
        for label, way in asked.items():
            rows += [measure(label, bench, batch, ceiling, way) for batch in options.batches]
    installed = ("torch", "transformers", "bitsandbytes", "triton", "cuda-bindings")
    return {
        "benchmark": "decode", "device": name, "shape": ("tiny " if options.tiny else "") + str(options.config or options.shape),
        "copy_bytes_per_s": rate, "bytes_per_token": needed, "ceiling_tokens_per_s": round(ceiling, 1), "build_s": round(built, 1),
        "replacement": (model.halfbyte.to_dict() if options.names else model.halfbyte.summary()) if replacing else None,
        "replacing": replacing, "new_tokens": options.new_tokens,
        "versions": {n: _version(n) for n in installed}, "rows": rows,
    }  # fmt: skip


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="31b")
    parser.add_argument("--config", type=Path, help="config.json of a Gemma 4 instead of --shape")
    parser.add_argument("--tiny", action="store_true", help="a few MB, also on a CPU, under a minute")
    parser.add_argument(
        "--compiled", action="store_true", help="also transformers' compiled generate (3 to 6 minutes a row)"
    )
    parser.add_argument("--limit-s", type=float, default=330.0, help="seconds that a compiled row may take")
    parser.add_argument("--only", nargs="+", default=USUAL_ROWS, help="rows whose name contains one of these; '': all")
    parser.add_argument("--batches", type=lambda text: [int(n) for n in text.split(",")], default=[1, 8])
    parser.add_argument("--new-tokens", type=int, nargs=2, default=[8, 40], help="short and long generation")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--all-ours", dest="fast", action="store_const", const=True, default="auto",
                        help="ours also where bitsandbytes is measured to be faster")  # fmt: skip
    parser.add_argument("--names", action="store_true", help="every linear's name and reason in the JSON")
    options = parser.parse_args()
    if options.tiny:
        options.new_tokens, options.repeats = [2, 6], min(options.repeats, 2)
    print(json.dumps(run(options)))


if __name__ == "__main__":
    main()
