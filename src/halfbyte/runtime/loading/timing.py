"""How long does each path take, for one weight, on this GPU?

A call of 20 microseconds cannot be timed by itself: Python takes longer to ask for it. So CALLS calls are captured in a CUDA graph and
the graph is replayed between two events; the median over REPLAYS. A weight smaller than the L2 cache would be read from it the second
time, which no decoder sees: so each call of the graph takes the next of several copies, of bitsandbytes' weight as of ours.

Before it is timed, a path must give what bitsandbytes gives, within WRONG: a kernel that is wrong on some GPU is not chosen there.

The catch: a second or so for each shape on the first load (kernels are compiled, graphs captured); it is kept on disk. The Triton path
is compiled for every batch, which takes longer, so it is timed only where the CUDA C++ kernels cannot run.
"""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from halfbyte.errors import HalfbyteError
from halfbyte.runtime.kernels.build import cache_folder
from halfbyte.runtime.linear import op
from halfbyte.runtime.linear.module import Nf4Linear, nf4_linear
from halfbyte.runtime.linear.table import INVARIANT_ROWS
from halfbyte.runtime.linear.weight import Nf4Weight
from halfbyte.runtime.loading.choice import ROWS, Times
from halfbyte.runtime.loading.report import THEIRS

CALLS, REPLAYS = 8, 5
MOST_COPIES = 6
#: rows beyond which the kernel is not tried: each 64 (32 on a smaller GPU) read the weight again
MOST_KERNEL_ROWS = 64
#: relative difference from bitsandbytes' result (both have about 2e-3 of rounding)
WRONG = 2e-2

#: a call with copy number i
Job = Callable[[int], torch.Tensor]


def times_file(index: int) -> Path:
    """Where the times of GPU `index` lie: a name that is the hash of what they depend on."""
    properties = torch.cuda.get_device_properties(index)
    packages = ("torch", "triton", "bitsandbytes", "cuda-bindings")
    facts = [properties.name, str(properties.multi_processor_count), str(torch.version.cuda), source_digest()]
    return cache_folder().parent / "choices" / f"{key_of([*facts, *map(version_of, packages)])}.json"


def key_of(facts: Sequence[str]) -> str:
    """32 hexadecimal digits."""
    return hashlib.sha256("\0".join(facts).encode()).hexdigest()[:32]


def version_of(package: str) -> str:
    """Its version, or a word for its absence."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "absent"


def source_digest() -> str:
    """Hash of the sources whose speed is measured: kernels, linear, and this file."""
    rooms = Path(__file__).resolve().parents[1]
    files = [file for room in ("kernels", "linear") for file in (rooms / room).iterdir()]
    files = [file for file in files if file.suffix in (".py", ".cu", ".cuh")] + [Path(__file__).resolve()]
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(f"{file.name}\0".encode() + file.read_bytes())
    return digest.hexdigest()


def paths_at(rows: int, kernel: bool) -> tuple[str, ...]:
    """Our paths that are timed at so many rows. kernel: whether the CUDA C++ kernels run here"""
    if rows <= INVARIANT_ROWS:
        return ("kernel",) if kernel else ("triton",)
    return ("kernel", "expand") if kernel and rows <= MOST_KERNEL_ROWS else ("expand",)


def time_paths(theirs: Sequence[Any], ours: Nf4Linear) -> Times:
    """Seconds of one call by each path and each of ROWS; a path that fails or is wrong is left out."""
    device = ours.tiles.device
    kernel = op.why_no_kernel(device) is None
    found: Times = {}
    if kernel:
        compile_ahead(ours)
    with torch.cuda.device(device), torch.inference_mode():
        cache_bytes = torch.cuda.get_device_properties(device).L2_cache_size
        count = min(MOST_COPIES, max(2, 1 + -(-2 * cache_bytes // ours.tiles.numel())))
        for m, jobs in jobs_of(theirs, ours, count, kernel):
            found[m] = time_jobs(jobs, seconds_a_call)
    del jobs
    torch.cuda.empty_cache()
    return found


def jobs_of(theirs: Sequence[Any], ours: Nf4Linear, count: int, kernel: bool) -> Iterator[tuple[int, dict[str, Job]]]:
    """For each of ROWS the calls to time, bitsandbytes' first: with `count` copies of either weight, and x at random."""
    mine, stock = ours.weight.copies(count), _their_copies(theirs, count)
    for m in ROWS:
        x = torch.randn(m, ours.in_features, device=ours.tiles.device, dtype=torch.bfloat16)
        yield m, {THEIRS: _their_job(x, stock)} | {path: _our_job(x, mine, path) for path in paths_at(m, kernel)}


def compile_ahead(ours: Nf4Linear) -> None:
    """Compile what will be timed, several at once: one after another it would take longer than all the timing."""
    from halfbyte.runtime.kernels import build, driver, variants

    weight = ours.weight.tensors
    device, row_groups = driver.device_of(ours.tiles.device.index or 0), weight.groups.shape[0]
    wanted = {
        variants.default_variant(
            min(m, variants.rows_at_once(device)), weight.row_tiles, weight.subs, row_groups, device
        )
        for m in ROWS
        if m <= MOST_KERNEL_ROWS
    }
    with ThreadPoolExecutor(4) as pool:
        for work in [pool.submit(build.cubin, "nf4_linear", device.arch, variant.defines) for variant in wanted]:
            work.exception()  # a variant that does not compile fails again where it is timed, and is left out there


def time_jobs(jobs: dict[str, Job], clock: Callable[[Job], float]) -> dict[str, float]:
    """Path -> seconds. Left out: what fails, and what differs from bitsandbytes' result."""
    times: dict[str, float] = {}
    truth: torch.Tensor | None = None
    for path, job in jobs.items():
        try:
            y = job(0).float()
            if path == THEIRS:
                truth = y
            elif truth is not None and not float((y - truth).norm() / truth.norm()) < WRONG:
                continue
            times[path] = clock(job)
        except (RuntimeError, HalfbyteError, ImportError):
            continue
    return times


def seconds_a_call(job: Job) -> float:
    """Median over replays of a graph of CALLS calls."""
    return float(statistics.median(replay_seconds(job, CALLS, REPLAYS)))


def replay_seconds(job: Callable[[int], object], calls: int, replays: int) -> list[float]:
    """Seconds of a call in each replay of a graph of `calls` calls, job(0) to job(calls - 1)."""
    for i in range(3):
        job(i)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(calls):
            job(i)
    graph.replay()
    found = []
    for _ in range(replays):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end) / 1e3 / calls)
    return found


def _their_copies(linears: Sequence[Any], count: int) -> list[list[tuple[torch.Tensor, Any]]]:
    """Per copy, per linear: packed and QuantState."""
    from bitsandbytes.functional import QuantState

    copies = [[(linear.weight.data, linear.weight.quant_state) for linear in linears]]
    for _ in range(count - 1):
        copy = []
        for packed, state in copies[0]:
            tensors = {name: tensor.clone() for name, tensor in state.as_dict(packed=True).items()}
            copy.append((packed.clone(), QuantState.from_dict(tensors, device=packed.device)))
        copies.append(copy)
    return copies


def _our_job(x: torch.Tensor, copies: list[Nf4Weight], path: str) -> Job:
    return lambda i: nf4_linear(x, copies[i % len(copies)], path)


def _their_job(x: torch.Tensor, copies: list[list[tuple[torch.Tensor, Any]]]) -> Job:
    """bitsandbytes' calls, one a linear. The pieces are joined for the check only: a graph's last call may be free of it."""
    from bitsandbytes import matmul_4bit

    def job(i: int) -> torch.Tensor:
        pieces = [matmul_4bit(x, packed, state) for packed, state in copies[i % len(copies)]]
        capturing = x.is_cuda and torch.cuda.is_current_stream_capturing()
        return pieces[0] if capturing or len(pieces) == 1 else torch.cat(pieces, dim=-1)

    return job
