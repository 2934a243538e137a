"""How fast is the codec, against bitsandbytes and against the machine? And where do bitsandbytes' CUDA bits differ?

    python benchmarks/codec.py                          CPU, 115,605,504 bf16 weights: the largest linear of Gemma 4 31B
    python benchmarks/codec.py --numel 4194304          the same, in seconds
    python benchmarks/codec.py --device cuda            Triton kernels against bitsandbytes' CUDA kernels
    python benchmarks/codec.py --ties --device cuda     count the bits in which bitsandbytes' CUDA kernel differs from ours

Each contender runs in the same process on the same weights and cores, taking turns; the table shows the median and the range
over repeats. Bytes are those that must move: 2 in and 0.5 + 4/64 out per weight (the other way round to dequantize). The ceiling is
a copy of the weights by torch with the same number of threads: bytes read + written per second. Results of all contenders are
compared before any is timed. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from importlib import metadata
from typing import Any

import torch

from halfbyte import codec

ROWS, COLUMNS = 21504, 5376
BLOCKSIZE = 64
BYTES_A_WEIGHT = 2 + 0.5 + 4 / BLOCKSIZE


def seconds(job: Callable[[], Any], device: str) -> float:
    """Wall time of one call, GPU work included."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    job()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(jobs: dict[str, Callable[[], Any]], repeats: int, device: str) -> dict[str, list[float]]:
    """Each job once to warm up, then `repeats` rounds in which every job has its turn."""
    for job in jobs.values():
        job()
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(repeats):
        for name, job in jobs.items():
            times[name].append(seconds(job, device))
    return times


def contenders(weight: torch.Tensor) -> dict[str, Callable[[], Any]]:
    """Name -> job. Level 1 alone, since on CUDA level 2 is ours on the CPU and theirs on the GPU."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    matrix = weight.view(-1, COLUMNS) if weight.numel() % COLUMNS == 0 else weight.view(-1, BLOCKSIZE)
    packed, absmax = codec.quantize_blocks(weight, BLOCKSIZE)
    theirs, state = quantize_4bit(matrix, blocksize=BLOCKSIZE, compress_statistics=False, quant_type="nf4")
    differ = int((packed != theirs.view(-1)).sum()), int((absmax != state.absmax).sum())
    if weight.device.type == "cpu" and differ != (0, 0):
        raise SystemExit(f"results differ in {differ} codes and scales: nothing to time")
    copy = torch.empty_like(weight)
    return {
        "copy": lambda: copy.copy_(weight),
        "bitsandbytes quantize": lambda: quantize_4bit(matrix, blocksize=BLOCKSIZE, quant_type="nf4"),
        "halfbyte quantize": lambda: codec.quantize_blocks(weight, BLOCKSIZE),
        "bitsandbytes dequantize": lambda: dequantize_4bit(theirs, state),
        "halfbyte dequantize": lambda: codec.dequantize_blocks(packed, absmax, weight.numel(), BLOCKSIZE),
    }


def report(times: dict[str, list[float]], n: int) -> dict[str, dict[str, float]]:
    """Print one line per contender; returns the same as numbers."""
    ceiling = 2 * 2 * n / statistics.median(times["copy"])
    rows = {}
    print(f"{'':26}{'median ms':>11}{'min-max ms':>19}{'G weights/s':>13}{'GB/s':>8}{'% of copy':>11}")
    for name, values in times.items():
        middle = statistics.median(values)
        rate = (4.0 if name == "copy" else BYTES_A_WEIGHT) * n / middle
        rows[name] = {
            "median_s": middle,
            "min_s": min(values),
            "max_s": max(values),
            "weights_per_s": n / middle,
            "bytes_per_s": rate,
            "fraction_of_copy": rate / ceiling,
        }
        span = f"{1e3 * min(values):.1f}-{1e3 * max(values):.1f}"
        print(
            f"{name:26}{1e3 * middle:11.1f}{span:>19}{n / middle / 1e9:13.3f}{rate / 1e9:8.1f}{100 * rate / ceiling:11.1f}"
        )
    return rows


def differences(weight: torch.Tensor) -> dict[str, Any]:
    """Bits in which bitsandbytes on this device differs from ours: codes, scales, 8-bit scales, offset."""
    from bitsandbytes.functional import quantize_4bit

    theirs, state = quantize_4bit(weight, blocksize=BLOCKSIZE, compress_statistics=True, quant_type="nf4")
    _, plain = quantize_4bit(weight, blocksize=BLOCKSIZE, compress_statistics=False, quant_type="nf4")
    packed, absmax = codec.quantize_blocks(weight, BLOCKSIZE)
    nested = codec.nest_absmax(absmax)
    apart = packed ^ theirs.view(-1)
    return {
        "weights": weight.numel(),
        "codes_differ": int(((apart >> 4) != 0).sum() + ((apart & 15) != 0).sum()),
        "scales": absmax.numel(),
        "scales_differ": int((absmax != plain.absmax).sum()),
        "scale_codes_differ": int((nested.absmax != state.absmax.cpu()).sum()),
        "nested_absmax_differ": int((nested.nested_absmax != state.state2.absmax.cpu()).sum()),
        "offset_ours": nested.nested_offset.hex(),
        "offset_theirs": state.offset.item().hex(),
    }


def ties(n: int, device: str) -> dict[str, Any]:
    """Differences on Gaussian bf16 weights, and on float32 weights that lie exactly on midpoints of their block."""
    torch.manual_seed(0)
    n -= n % BLOCKSIZE
    scale = torch.exp2(torch.randint(-12, 3, (n // BLOCKSIZE, 1)).float()) * torch.rand(n // BLOCKSIZE, 1)
    level = torch.cat([codec.nf4_midpoints(), torch.ones(1)])[torch.randint(0, 16, (n // BLOCKSIZE, BLOCKSIZE))]
    level[:, 0] = 1.0  # each block holds its scale
    samples = {
        "gaussian bf16": torch.randn(n).mul_(0.02).to(torch.bfloat16),
        "midpoints f32": (level * scale).view(-1),
        "midpoints f32, scale 1": level.view(-1).contiguous(),
    }
    return {name: differences(weight.to(device)) for name, weight in samples.items()}


def circumstances(device: str) -> dict[str, Any]:
    installed = {distribution.name for distribution in metadata.distributions()}
    found = {name: metadata.version(name) for name in ("torch", "triton", "numba", "bitsandbytes") if name in installed}
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    capability = torch.backends.cpu.get_cpu_capability()
    return {"device": name, "cpu": capability, "threads": torch.get_num_threads(), "versions": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--numel", type=int, help=f"weights (default {ROWS * COLUMNS}, with --ties 26214400)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--ties", action="store_true", help="count differing bits instead of seconds")
    options = parser.parse_args()
    result: dict[str, Any] = {"benchmark": "codec", **circumstances(options.device)}
    if options.ties:
        result["differences"] = ties(options.numel or 26_214_400, options.device)
        for name, row in result["differences"].items():
            print(name, row)
    else:
        n = (options.numel or ROWS * COLUMNS) // BLOCKSIZE * BLOCKSIZE
        torch.manual_seed(0)
        weight = torch.empty(n, dtype=torch.bfloat16).normal_(std=0.02).to(options.device)
        times = measure(contenders(weight), options.repeats, options.device)
        result |= {"numel": n, "repeats": options.repeats, "rows": report(times, n)}
        for verb in ("quantize", "dequantize"):
            ratio = statistics.median(times[f"bitsandbytes {verb}"]) / statistics.median(times[f"halfbyte {verb}"])
            result[f"{verb}_times_faster"] = ratio
            print(f"{verb}: {ratio:.1f} times as fast as bitsandbytes")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
