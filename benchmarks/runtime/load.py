"""How long does a 31B in NF4 take from its files to the GPU, by stock transformers and by ours, and how long would the bytes alone take?

    python benchmarks/runtime/load.py --folder /tmp/load                          17.8 GiB on disk; 6 to 9 minutes on an H200
    python benchmarks/runtime/load.py --folder /tmp/load --layers 12 --repeats 2  a fifth of it, with a projection
    python benchmarks/runtime/load.py --folder /tmp/load --shape tiny --device cpu --repeats 1      proves that it runs; its figures mean nothing

The checkpoint is written first (benchmarks/runtime/nf4_checkpoint.py: random bytes in the real shapes). Every row is a process of its own, so that peaks are its own:

    stock               from_pretrained, device_map = the device
    ours, cold          `halfbyte.load` with an empty HALFBYTE_CACHE: kernels are compiled, paths are timed
    ours, warm          the same with what the first left there
    ceiling             the same files through pinned buffers to the GPU, by threads that do nothing else; besides the rates of its parts

A row's clock runs from the call to the end of all GPU work: Python's imports and the CUDA context are before it (`start_s`). Ours in three parts:
read = the time in transformers' from_pretrained, choice = what model.halfbyte says was spent on timing, re-layout = the rest. Files are in the page cache
(each was just written, and is read once before anything is timed), unless --cold, which asks the kernel to drop them before each row.

Peak RSS is the kernel's VmHWM, in which pages of a mapped file count; peak of RssAnon is beside it, sampled every 10 ms: what must really fit. The last
line is one JSON object.

The catch: on a CPU transformers maps the files and reads nothing until a weight is asked for, so there times are those of making modules.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

WAYS = ("ceiling", "stock", "ours, cold", "ours, warm")
CHUNK = 1 << 26
THREADS = 8
GIB = 2**30


class Watch:
    """Peak of RssAnon in this process, sampled."""

    def __init__(self) -> None:
        self.peak, self.ended = 0, threading.Event()
        self.thread = threading.Thread(target=self.run, daemon=True)

    def run(self) -> None:
        """Until told to end."""
        while not self.ended.wait(0.01):
            self.look()

    def look(self) -> None:
        """Once."""
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                self.peak = max(self.peak, int(line.split()[1]) * 1024)

    def __enter__(self) -> Watch:
        self.look()
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.thread.join()
        self.look()


def wait(device: str) -> None:
    """For the GPU."""
    if device != "cpu":
        import torch

        torch.cuda.synchronize()


def auto_class(folder: Path) -> Any:
    """transformers' class for the checkpoint."""
    import transformers

    from halfbyte.format.checkpoint import read_config
    from halfbyte.recipe.skeleton import auto_class_of

    return getattr(transformers, auto_class_of(read_config(folder)))


def import_all(folder: Path) -> None:
    """What a load would import on its way."""
    import bitsandbytes  # noqa: F401
    import transformers

    import halfbyte

    auto_class(folder)
    for name in json.loads((folder / "config.json").read_text()).get("architectures", []):
        getattr(transformers, name)
    assert callable(halfbyte.load)  # imported when it is asked for


def by_stock(folder: Path, device: str) -> dict[str, Any]:
    """As a model card says it."""
    kind = auto_class(folder)
    begin = time.perf_counter()
    model, found = kind.from_pretrained(folder, dtype="auto", device_map={"": device}, output_loading_info=True)
    wait(device)
    seconds = time.perf_counter() - begin
    wrong = {
        name: sorted(found[name])[:3]
        for name in ("missing_keys", "unexpected_keys", "mismatched_keys")
        if found.get(name)
    }
    if wrong:
        raise SystemExit(f"the checkpoint is not what transformers wants: {wrong}")
    del model
    return {"seconds": seconds}


def by_ours(folder: Path, device: str, fast: Any = "auto") -> dict[str, Any]:
    """halfbyte.load, with a clock around what it lets transformers do."""
    import halfbyte

    kind, reading = auto_class(folder), 0.0
    original = kind.from_pretrained

    def clocked(*given: Any, **named: Any) -> Any:
        nonlocal reading
        begin = time.perf_counter()
        model = original(*given, **named)
        wait(device)
        reading += time.perf_counter() - begin
        return model

    kind.from_pretrained = clocked
    begin = time.perf_counter()
    model = halfbyte.load(folder, device=device, fast=fast)
    wait(device)
    seconds = time.perf_counter() - begin
    report = model.halfbyte
    return {
        "seconds": seconds, "read_s": reading or None, "choice_s": report.measuring_s,
        "relayout_s": seconds - reading - report.measuring_s if reading else None, "linears": report.summary(),
    }  # fmt: skip


def read_shard_bytes(path: Path, work: Callable[[int, int, int], None], buffers: list[Any], threads: int) -> None:
    """Read a file by pieces of CHUNK: buffer number i holds piece [begin, begin + size) when work(i, begin, size) is called."""
    size, free = path.stat().st_size, list(range(threads))
    file = os.open(path, os.O_RDONLY)

    def piece(begin: int) -> None:
        number = free.pop()
        length = min(CHUNK, size - begin)
        view, done = memoryview(buffers[number])[:length], 0
        while done < length:
            done += os.preadv(file, [view[done:]], begin + done)
        work(number, begin, length)
        free.append(number)

    try:
        with ThreadPoolExecutor(threads) as pool:
            for future in [pool.submit(piece, begin) for begin in range(0, size, CHUNK)]:
                future.result()
    finally:
        os.close(file)


def by_ceiling(folder: Path, device: str) -> dict[str, Any]:
    """Rates of reading by one thread and by several, of the pinned copy, and all of it at once."""
    import torch

    on_gpu = device != "cpu"
    shards = sorted(folder.glob("*.safetensors"))
    total = sum(shard.stat().st_size for shard in shards)
    pinned = [torch.zeros(min(CHUNK, total), dtype=torch.uint8, pin_memory=on_gpu) for _ in range(THREADS)]
    buffers = [tensor.numpy() for tensor in pinned]

    def read(threads: int, work: Callable[[int, int, int], None] = lambda *_: None) -> float:
        wait(device)
        begin = time.perf_counter()
        for shard in shards:
            read_shard_bytes(shard, work, buffers, threads)
        wait(device)
        return time.perf_counter() - begin

    first = read(THREADS)  # brings the files into the page cache, unless they are there
    found = {"first_read_s": first, "read_1_bytes_per_s": total / read(1), "read_bytes_per_s": total / read(THREADS)}
    if not on_gpu:
        return found | {"seconds": total / found["read_bytes_per_s"], "copy_bytes_per_s": None}
    there = torch.empty(total, dtype=torch.uint8, device=device)
    streams = [torch.cuda.Stream() for _ in range(THREADS)]

    def to_gpu(number: int, begin: int, size: int) -> None:
        # every shard begins at 0: it is the copying that costs, not the place
        with torch.cuda.stream(streams[number]):
            there[begin : begin + size].copy_(pinned[number][:size], non_blocking=True)
        streams[number].synchronize()

    times = []
    for _ in range(10):
        wait(device)
        begin = time.perf_counter()
        there[: len(pinned[0])].copy_(pinned[0], non_blocking=True)
        wait(device)
        times.append(time.perf_counter() - begin)
    found["copy_bytes_per_s"] = len(pinned[0]) / statistics.median(times)
    read(THREADS, to_gpu)
    return found | {"seconds": read(THREADS, to_gpu)}


def child(options: argparse.Namespace) -> dict[str, Any]:
    """One row, in a process that does nothing else."""
    begin = time.perf_counter()
    import torch
    import transformers

    from halfbyte.memory import peak_gpu_bytes, peak_rss_bytes

    transformers.logging.disable_progress_bar()
    import_all(options.folder / "checkpoint")
    if options.device != "cpu":
        torch.zeros(1, device=options.device)
    started = time.perf_counter() - begin
    way = by_ceiling if options.child == "ceiling" else by_stock if options.child == "stock" else by_ours
    more = {"fast": options.fast} if way is by_ours else {}
    with Watch() as watch:
        found = way(options.folder / "checkpoint", options.device, **more)
    reserved = torch.cuda.max_memory_reserved() if options.device != "cpu" else None
    return found | {
        "start_s": started, "peak_rss_bytes": peak_rss_bytes(), "peak_anonymous_bytes": watch.peak,
        "peak_gpu_bytes": peak_gpu_bytes(options.device), "peak_gpu_reserved_bytes": reserved,
        "device": torch.cuda.get_device_name() if options.device != "cpu" else "CPU",
    }  # fmt: skip


def measure(way: str, options: argparse.Namespace, left: float) -> dict[str, Any]:
    """Run one row in its process; {"error"} if it fails or takes longer than `left` seconds."""
    cache = options.folder / "cache"
    if way == "ours, cold":
        shutil.rmtree(cache, ignore_errors=True)
    if options.cold:
        drop(options.folder / "checkpoint")
    command = [sys.executable, __file__, "--folder", str(options.folder), "--device", options.device, "--child", way]
    command += ["--all-ours"] if options.fast is True else []
    places = {"HALFBYTE_CACHE": str(cache), "TRITON_CACHE_DIR": str(cache / "triton"), "HF_HUB_OFFLINE": "1"}
    try:
        ended = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | places, timeout=left)  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"error": f"not finished after {left:.0f} s (--seconds)"}
    if ended.returncode:
        return {"error": (ended.stderr.strip().splitlines() or [f"exit {ended.returncode}"])[-1][:300]}
    return dict(json.loads(ended.stdout.strip().splitlines()[-1]))


def drop(folder: Path) -> None:
    """Ask the kernel to forget the files' pages."""
    for shard in folder.glob("*.safetensors"):
        file = os.open(shard, os.O_RDONLY)
        os.fsync(file)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


def middle(rows: list[dict[str, Any]], key: str) -> float | None:
    """Median of a figure over the rows that have it."""
    found = [row[key] for row in rows if row.get(key) is not None]
    return statistics.median(found) if found else None


def show(way: str, rows: list[dict[str, Any]], total: int, scale: float) -> None:
    """One line of the table."""
    good = [row for row in rows if "error" not in row]
    if not good:
        print(f"{way:12} not measured: {rows[-1]['error'] if rows else 'no time left (--seconds)'}")
        return
    seconds = [row["seconds"] for row in good]
    half = statistics.median(seconds)

    def cell(key: str, unit: float = 1.0) -> str:
        value = middle(good, key)
        return f"{'-' if value is None else f'{value / unit:.2f}':>9}"

    span, whole = f"{min(seconds):.2f}-{max(seconds):.2f}", f"{half * scale:9.2f}" if scale != 1 else ""
    print(
        f"{way:12}{len(good):3}{half:9.2f}{span:>16}{total / 1e9 / half:8.2f}{cell('read_s')}{cell('relayout_s')}{cell('choice_s')}"
        f"{cell('peak_rss_bytes', GIB)}{cell('peak_anonymous_bytes', GIB)}{cell('peak_gpu_bytes', GIB)}{cell('peak_gpu_reserved_bytes', GIB)}{whole}"
    )


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Write, measure in turn, print."""
    from nf4_checkpoint import config_of, planned_bytes, write_checkpoint

    from halfbyte.records import versions

    begin = time.perf_counter()
    config = json.loads(options.config.read_text()) if options.config else config_of(options.shape, options.layers)
    total = write_checkpoint(options.folder / "checkpoint", config)
    writing = time.perf_counter() - begin
    scale = planned_bytes(config_of(options.shape)) / total if options.layers and not options.config else 1.0
    print(f"{total / 1e9:.2f} GB ({total / GIB:.2f} GiB) of tensors, there after {writing:.1f} s")
    rows: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    longest = dict.fromkeys(WAYS, 0.0)
    for _ in range(options.repeats):
        for way in WAYS:
            left = options.seconds - (time.perf_counter() - begin)
            if left < 1.2 * longest[way] + 5:
                continue
            start = time.perf_counter()
            rows[way].append(measure(way, options, left))
            longest[way] = max(longest[way], time.perf_counter() - start)
            taken = rows[way][-1].get("error") or f"{rows[way][-1]['seconds']:.2f} s"
            print(f"  {time.perf_counter() - begin:6.0f} s  {way}: {taken}", file=sys.stderr, flush=True)
    print(
        f"{'':12}{'n':>3}{'seconds':>9}{'min-max':>16}{'GB/s':>8}{'read':>9}{'relayout':>9}{'choice':>9}{'RSS GiB':>9}{'anon':>9}{'GPU GiB':>9}{'reserved':>9}"
        + ("    whole model, s" if scale != 1 else "")
    )
    for way in WAYS:
        show(way, rows[way], total, scale)
    limits = [row for row in rows["ceiling"] if "error" not in row]
    rates = {key: middle(limits, key) for key in ("read_1_bytes_per_s", "read_bytes_per_s", "copy_bytes_per_s")}
    print("GB/s: " + ", ".join(f"{key.removesuffix('_bytes_per_s')} {value / 1e9:.2f}" for key, value in rates.items() if value))  # fmt: skip
    for row in rows["ours, warm"][-1:]:
        print(row.get("linears", ""))
    if not options.keep:
        shutil.rmtree(options.folder)
    return {
        "benchmark": "load", "shape": str(options.config or options.shape), "layers": options.layers, "bytes": total, "written_s": writing,
        "device": next((row["device"] for found in rows.values() for row in found if "device" in row), None), "cold_files": options.cold,
        "projection_factor": scale, "cores": len(os.sched_getaffinity(0)), "threads": THREADS, "versions": versions(), "rows": rows,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="made, and removed at the end")
    parser.add_argument("--shape", choices=["31b", "tiny"], default="31b")
    parser.add_argument("--config", type=Path, help="config.json of any model instead of --shape")
    parser.add_argument("--layers", type=int, help="fewer decoder layers; times are projected by bytes")
    parser.add_argument("--device", default="cuda", help="cuda[:N] or cpu")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=560.0, help="start no row that may end later than this")
    parser.add_argument("--all-ours", dest="fast", action="store_const", const=True, default="auto",
                        help="our linears also where bitsandbytes is measured to be faster")  # fmt: skip
    parser.add_argument(
        "--cold", action="store_true", help="ask the kernel to drop the files from memory before each row"
    )
    parser.add_argument("--keep", action="store_true", help="leave the folder; the next run takes its checkpoint")
    parser.add_argument("--child", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    print(json.dumps(child(options) if options.child else run(options)))


if __name__ == "__main__":
    main()
