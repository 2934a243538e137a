"""How fast is y = x W^T with an NF4 weight, against bitsandbytes, bf16 and the memory's speed?

    python benchmarks/runtime/linear.py --quick                          Gemma 4 31B's linears, the default variants, under 3 minutes
    python benchmarks/runtime/linear.py --tune --shapes gate_up,down     many variants of the kernel, M = 1, 8, 16
    python benchmarks/runtime/linear.py --rows 1,4 --shapes o --seconds 60

Needs a GPU. Weights are random; of each there are so many copies that one does not stay in the L2 cache until its next turn. Calls
are captured in a CUDA graph, each with the next copy, and the graph is replayed: the time of a call is that of a replay over its calls;
median and range over replays. The ceiling is a device-to-device copy (bytes read and written), measured first; the
bytes that count for a linear are those of the weight (0.516 a weight), of x and of y. Every contender is checked against the
exact weights in float64 before it is timed: a wrong one is not timed. `early` is the same kernel launched so that it may
read weights before its predecessor has ended (`early2`: two stages of the ring). Names of variants: warps, stages
times units of the ring, stages of x, words decoded by permutes, bytes between table entries. The last line is one JSON object, the table in short;
`--out` writes every row.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from ceiling import copy_rate

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
from runtime.stored_weights import dense, drawn

from halfbyte.runtime.kernels import build, driver, launch, variants
from halfbyte.runtime.kernels.variants import Variant
from halfbyte.runtime.linear.module import Nf4Linear
from halfbyte.runtime.loading.timing import replay_seconds

#: name -> rows of the parts, columns: what shares its input is one linear
SHAPES: dict[str, tuple[tuple[int, ...], int]] = {
    "gate_up": ((21504, 21504), 5376),
    "down": ((5376,), 21504),
    "qkv": ((8192, 4096, 4096), 5376),
    "q": ((8192,), 5376),
    "o": ((5376,), 8192),
    "qk_full": ((16384, 2048), 5376),
    "o_full": ((5376,), 16384),
    "gate": ((21504,), 5376),
    "k": ((4096,), 5376),
}
QUICK_SHAPES = ("gate_up", "down", "qkv", "o")
QUICK_ROWS = (1, 2, 4, 8, 16, 32, 64, 256, 2048)
#: units in a stage, stages, stages asked for while the previous kernel runs
RINGS = ((2, 2, 2), (2, 3, 1), (4, 2, 1), (4, 2, 2))
TRIED = (Variant(early=True), Variant(early=True, stage_units=4), Variant(early=True, alu_words=1), Variant())
TUNED = (
    Variant(early=True), *(Variant(early=True, stage_units=n, depth=d, ahead=a) for n, d, a in RINGS), Variant(),
    *(Variant(early=True, x_stages=n) for n in (2, 3, 6)), Variant(early=True, alu_words=1), *(Variant(early=True, registers=n) for n in (96, 104, 112)),
)  # fmt: skip
#: warps that --tune tries beside the number that divides the weight best
TUNED_WARPS = (12, 14)
#: relative error above which a contender is wrong (y itself is rounded to bf16: 1.7e-3)
WRONG = 1e-2
CALLS = 12
#: a call with copy number i: y, or the parts of y
Job = Callable[[int], torch.Tensor | list[torch.Tensor]]


@dataclass
class Contest:
    """What is timed for one shape and batch: name -> call with copy number i."""

    shape: str
    m: int
    jobs: dict[str, Job]


class Weights:
    """Copies of one NF4 weight, ours and bitsandbytes', and a dense bf16 pair."""

    def __init__(self, parts: tuple[int, ...], columns: int, cache_bytes: int) -> None:
        first = drawn(parts, columns, device="cuda", seed=7)
        self.rows, self.columns = first.rows, columns
        self.bytes = first.tiles.numel() + first.codes.numel() + 4 * first.nested.numel()
        self.count = max(2, -(-4 * cache_bytes // self.bytes))
        stored = first.to_stored()
        self.exact = dense(stored)
        self.ours = first.copies(self.count)
        self.modules = [Nf4Linear(weight) for weight in self.ours]
        self.plain = [self.exact.to(torch.bfloat16) for _ in range(max(2, -(-2 * cache_bytes // (4 * self.bytes))))]
        self.theirs = self._theirs([part.to_dict() for part in stored])

    def _theirs(self, parts: list[dict[str, torch.Tensor]]) -> list[list[tuple[Any, Any]]]:
        """Per copy, per part: packed and QuantState; empty without bitsandbytes."""
        try:
            from bitsandbytes.functional import QuantState
        except (ImportError, OSError, RuntimeError) as error:
            print(f"bitsandbytes: not measured ({error})")
            return []
        copies = []
        for _ in range(self.count):
            states = [{k: v.clone() for k, v in part.items() if k != "weight"} for part in parts]
            made = [QuantState.from_dict(state, device=torch.device("cuda")) for state in states]
            copies.append([(p["weight"].clone(), state) for p, state in zip(parts, made, strict=True)])
        return copies


def contenders(weights: Weights, x: torch.Tensor, tried: tuple[Variant, ...]) -> dict[str, Job]:
    """Name -> call. Variants only where a launch takes all rows of x."""
    jobs: dict[str, Job] = {
        "bf16": lambda i: torch.nn.functional.linear(x, weights.plain[i % len(weights.plain)]),
    }
    if weights.theirs:
        from bitsandbytes import matmul_4bit

        jobs["bitsandbytes"] = lambda i: [matmul_4bit(x, *part) for part in weights.theirs[i % weights.count]]
    jobs["ours"] = lambda i: weights.modules[i % weights.count](x)
    ours = [weight.tensors for weight in weights.ours]
    for name, variant in fitting_variants(x.shape[0], weights.rows // 32, tried).items():
        jobs[name] = lambda i, variant=variant: launch.linear(x, ours[i % weights.count], variant)
    return jobs


def fitting_variants(m: int, row_groups: int, tried: tuple[Variant, ...]) -> dict[str, Variant]:
    """Those that fit this device, with the warps that suit the weight, under a short name; the first one also with other warps."""
    device, found = driver.device_of(0), {}
    best = variants.choose_warps(row_groups, variants.MOST_WARPS[1])
    counts = TUNED_WARPS if len(tried) > len(TRIED) else ()
    for variant in (*(replace(v, warps=best) for v in tried), *(replace(tried[0], warps=n) for n in counts if tried)):
        if m > variants.rows_at_once(device):
            continue
        chosen = replace(variant, groups=next(groups for groups in variants.MOST_WARPS if m <= 8 * groups))
        if chosen.groups >= 4:  # more registers a thread, so fewer warps, and more of x
            warps = variants.choose_warps(row_groups, variants.MOST_WARPS[chosen.groups])
            chosen = replace(chosen, registers=variants.REGISTERS[chosen.groups], warps=warps)
        if chosen.shared_bytes(m) <= device.shared_bytes:
            name = f"w{chosen.warps} d{chosen.depth}x{chosen.stage_units} x{chosen.x_stages} alu{chosen.alu_words} t{chosen.table_stride} r{chosen.registers}"
            found[name + (f" early{chosen.ahead}" if chosen.early else "")] = chosen
    return found


def warm(weights: Weights, seconds: float = 0.3) -> None:
    """Work until the clocks are up: they fall while weights are made, and the first row of a shape was 10 % slower for everybody."""
    x, until = torch.randn(8, weights.columns, device="cuda").to(torch.bfloat16), time.perf_counter() + seconds
    while time.perf_counter() < until:
        for plain in weights.plain:
            torch.nn.functional.linear(x, plain)
        torch.cuda.synchronize()


def contests(options: argparse.Namespace, cache_bytes: int) -> Iterator[tuple[Contest, Weights, torch.Tensor]]:
    """Every shape and batch asked for."""
    for name in options.shapes:
        parts, columns = SHAPES[name]
        weights = Weights(parts, columns, cache_bytes)
        warm(weights)
        for m in options.rows:
            x = torch.randn(m, columns, device="cuda").to(torch.bfloat16)
            tried = TUNED if options.tune else TRIED if m in options.tried_rows else ()
            yield Contest(name, m, contenders(weights, x, tried)), weights, x
        del weights
        torch.cuda.empty_cache()


def measure(contest: Contest, weights: Weights, x: torch.Tensor, ceiling: float, replays: int) -> list[dict[str, Any]]:
    """One row for each contender, printed too."""
    truth = x.double() @ weights.exact.T
    rows = []
    for name, job in contest.jobs.items():
        row: dict[str, Any] = {"shape": contest.shape, "m": contest.m, "contender": name}
        try:
            y = job(0)
            y = y if isinstance(y, torch.Tensor) else torch.cat(y, dim=-1)
            wrong = float((y.double() - truth).norm() / truth.norm())
            row["relative_error"] = wrong
            if not wrong < WRONG:
                raise ArithmeticError(f"WRONG: relative error {wrong:.3g}")
            times = replay_seconds(job, CALLS, replays)
        except Exception as error:  # one contender must not end the run
            row["failed"] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
            print(f"{contest.shape:9}{contest.m:6}  {name:34} {row['failed']}")
            rows.append(row)
            continue
        wide = weights.plain[0].numel() * 2 if name == "bf16" else weights.bytes
        moved = wide + 2 * contest.m * (weights.columns + weights.rows)
        middle = statistics.median(times)
        row |= {
            "median_s": middle,
            "min_s": min(times),
            "max_s": max(times),
            "fraction_of_copy": moved / middle / ceiling,
        }
        span = f"{1e6 * min(times):.1f}-{1e6 * max(times):.1f}"
        print(
            f"{contest.shape:9}{contest.m:6}  {name:34}{1e6 * middle:9.1f}{span:>16}{100 * row['fraction_of_copy']:8.1f}"
            f"{1e3 * wrong:9.2f}"
        )
        rows.append(row)
    return rows


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each shape and batch: microseconds of bitsandbytes, bf16, ours, and of the best variant; printed too."""
    found = []
    print(f"\n{'shape':9}{'M':>6}{'bnb us':>9}{'bf16 us':>9}{'ours us':>9}{'% copy':>8}{'x bnb':>7}   best variant")
    for shape, m in dict.fromkeys((row["shape"], row["m"]) for row in rows):
        timed = [r for r in rows if (r["shape"], r["m"]) == (shape, m) and "median_s" in r]
        us = {r["contender"]: round(1e6 * r["median_s"], 1) for r in timed}
        share = {r["contender"]: round(100 * r["fraction_of_copy"], 1) for r in timed}
        known = ("bitsandbytes", "bf16", "ours")
        best = min((name for name in us if name not in known), key=us.__getitem__, default="")
        row = {"shape": shape, "m": m, **{name: us.get(name) for name in known}, "ours_of_copy": share.get("ours")}
        row |= {"best": best, "best_us": us.get(best), "best_of_copy": share.get(best)}
        times = round(us["bitsandbytes"] / us["ours"], 2) if {"bitsandbytes", "ours"} <= us.keys() else None
        cells = [us.get("bitsandbytes"), us.get("bf16"), us.get("ours"), share.get("ours"), times]
        text = "".join(f"{'-' if cell is None else cell:>{w}}" for cell, w in zip(cells, (9, 9, 9, 8, 7), strict=True))
        print(f"{shape:9}{m:6}{text}   {best or '-'} {us.get(best, '')}")
        found.append(row)
    return found


def prebuild(options: argparse.Namespace) -> float:
    """Compile all variants that may be asked for, in parallel; seconds it took."""
    start, arch, wanted = time.perf_counter(), driver.device_of(0).arch, set()
    for name in options.shapes:
        for m in options.rows:
            device, row_groups = driver.device_of(0), sum(SHAPES[name][0]) // 32
            wanted |= set(fitting_variants(m, row_groups, TUNED if options.tune else TRIED).values())
            if m <= 64:
                wanted.add(variants.default_variant(min(m, variants.rows_at_once(device)), 2, 1, row_groups, device))
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda variant: build.cubin("nf4_linear", arch, variant.defines), wanted))
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="four shapes, two minutes")
    parser.add_argument("--tune", action="store_true", help="many variants at M = 1, 8, 16")
    parser.add_argument("--shapes", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--rows", help="batches, for instance 1,8")
    parser.add_argument("--out", type=Path, help="write every row to this JSON file")
    parser.add_argument("--replays", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=0, help="begin no contest after so long")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("linear.py: torch sees no CUDA device; nothing is measured")
    options.shapes = options.shapes.split(",") if options.shapes else QUICK_SHAPES if options.quick else tuple(SHAPES)
    options.rows = (
        [int(m) for m in options.rows.split(",")] if options.rows else (1, 8, 16) if options.tune else QUICK_ROWS
    )
    options.tried_rows = (1, 8, 16) if options.quick else options.rows
    options.seconds = options.seconds or (150 if options.quick else 1e9)
    start = time.perf_counter()
    torch.manual_seed(0)
    properties = torch.cuda.get_device_properties(0)
    ceiling, compiled = copy_rate(), prebuild(options)
    installed = {d.name: d.version for d in metadata.distributions()}
    result: dict[str, Any] = {
        "benchmark": "linear", "device": properties.name, "multiprocessors": properties.multi_processor_count,
        "copy_bytes_per_s": ceiling, "compile_s": compiled, "calls": CALLS,
        "versions": {n: installed.get(n) for n in ("torch", "triton", "bitsandbytes", "cuda-bindings")},
    }  # fmt: skip
    print(
        f"{properties.name}: copy {ceiling / 1e12:.2f} TB/s; kernels compiled in {compiled:.1f} s; a weight is read once"
    )
    print(f"{'shape':9}{'M':>6}  {'contender':34}{'us':>9}{'min-max':>16}{'% copy':>8}{'err e-3':>9}")
    rows: list[dict[str, Any]] = []
    for contest, weights, x in contests(options, properties.L2_cache_size):
        if time.perf_counter() - start > options.seconds:
            print(f"{contest.shape} M={contest.m}: not measured (time is up)")
            continue
        rows += measure(contest, weights, x, ceiling, options.replays or 15)
    result["seconds"] = round(time.perf_counter() - start, 1)
    if options.out:
        options.out.write_text(json.dumps(result | {"rows": rows}, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result | {"summary_us": summary(rows)}))


if __name__ == "__main__":
    main()
