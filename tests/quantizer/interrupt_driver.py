"""Run by test_interruption.py in a process of its own: fork a job, kill it at its n-th write, look, run it again.

usage: interrupt_driver.py SOURCE FOLDER KILLS SEED; prints one JSON object. Forking needs a parent whose torch
has started no threads (OpenMP's threads do not survive a fork), hence the separate process.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import sys
from pathlib import Path

import torch

import halfbyte.quantizer.job as job
from halfbyte import codec
from halfbyte.recipe.survey import plan


def countdown_to_kill(calls: int, signum: int) -> None:
    """Deliver `signum` to this process at its `calls`-th write, rename, truncation or flush."""
    left = calls

    def wrap(function):  # type: ignore[no-untyped-def]
        def counted(*arguments, **named):  # type: ignore[no-untyped-def]
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signum)
            return function(*arguments, **named)

        return counted

    for name in ("pwrite", "replace", "ftruncate", "fsync", "write"):
        setattr(os, name, wrap(getattr(os, name)))


def run(source: Path, out: Path, calls: int = 0, signum: int = signal.SIGKILL) -> int:
    """Quantize in a forked child; returns its wait status."""
    pid = os.fork()
    if pid == 0:
        try:
            # A shell starts background jobs with SIGINT ignored, and Python keeps that: the test must not depend on it.
            signal.signal(signal.SIGINT, signal.default_int_handler)
            if calls:
                countdown_to_kill(calls, signum)
            job.quantize(source, out, max_shard_size="400KB")
            os._exit(0)
        except KeyboardInterrupt:
            os._exit(130)
        except BaseException as error:
            print(error, file=sys.stderr)
            os._exit(1)
    return os.waitpid(pid, 0)[1]


def contents(out: Path) -> dict[str, str]:
    """sha256 of every file at the top of `out` (records carry times, so they are left out)."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(out.iterdir()) if p.is_file()}


def main() -> None:
    source, folder, kills, seed = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    signum = signal.Signals(int(sys.argv[5])) if len(sys.argv) > 5 else signal.SIGKILL
    # Warm what every child would warm again: imports, and the codec's kernels (64 elements: no OpenMP thread is started).
    plan(source)
    codec.quantize_blocks(torch.ones(64, dtype=torch.bfloat16), 64, threads=1)
    assert run(source, folder / "whole") == 0
    whole = contents(folder / "whole")
    results = []
    for index, calls in enumerate(random.Random(seed).sample(range(1, 300), kills)):
        out = folder / f"killed-{index}"
        status = run(source, out, calls, signum)
        between = contents(out) if out.exists() else {}
        first_final = {name: digest for name, digest in between.items() if not name.startswith(".")}
        again = run(source, out)
        results.append(
            {
                "calls": calls,
                "signal": os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0,
                "exit": os.WEXITSTATUS(status) if os.WIFEXITED(status) else None,
                "half_files": sorted(n for n, d in first_final.items() if whole.get(n) != d),
                "loadable_early": "config.json" in between and status != 0,
                "again": again,
                "identical": contents(out) == whole,
                "resumed": json.loads((out / "halfbyte/quantize.json").read_text())["run"]["resumed_tensors"],
                "work_folder_left": (out / ".halfbyte-work").exists(),
            }
        )
    print(json.dumps({"files": len(whole), "results": results}))


if __name__ == "__main__":
    main()
