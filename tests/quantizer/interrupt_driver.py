"""Run by test_interruption.py in a process of its own: fork a job, stop it somewhere, look, run it again.

usage: interrupt_driver.py SOURCE FOLDER; prints one JSON object. Forking needs a parent whose torch has started no
threads (OpenMP's threads do not survive a fork), hence the separate process; one for all tests, since starting it
takes longer than a job.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

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


def kill_at_rename_to(name: str) -> None:
    """SIGKILL this process when a finished temporary file is to be renamed to `name`."""
    replace = os.replace

    def killing(source, target):  # type: ignore[no-untyped-def]
        if Path(target).name == name:
            os.kill(os.getpid(), signal.SIGKILL)
        return replace(source, target)

    os.replace = killing


def run(source: Path, out: Path, prepare: Callable[[], None] = lambda: None) -> int:
    """Quantize in a forked child, after `prepare`; returns its wait status."""
    pid = os.fork()
    if pid == 0:
        try:
            # A shell starts background jobs with SIGINT ignored, and Python keeps that: the test must not depend on it.
            signal.signal(signal.SIGINT, signal.default_int_handler)
            prepare()
            job.quantize(source, out, max_shard_size="400KB")
            os._exit(0)
        except KeyboardInterrupt:
            os._exit(130)
        except BaseException as error:
            print(error, file=sys.stderr)
            os._exit(1)
    return os.waitpid(pid, 0)[1]


def contents(out: Path) -> dict[str, str]:
    """Path and sha256 of every file in `out`; of a record only the path, since it carries times."""
    files = [p for p in sorted(out.rglob("*")) if p.is_file()]
    records = out / "halfbyte"
    return {
        str(p.relative_to(out)): "" if p.parent == records else hashlib.sha256(p.read_bytes()).hexdigest()
        for p in files
    }


def stop_and_continue(source: Path, out: Path, whole: dict[str, str], prepare: Callable[[], None]) -> dict[str, Any]:
    """Run a job that `prepare` stops, look at the folder, run it again."""
    status = run(source, out, prepare)
    between = contents(out) if out.exists() else {}
    hidden = {name for name in between if any(part.startswith(".") for part in Path(name).parts)}
    again = run(source, out)
    return {
        "signal": os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0,
        "exit": os.WEXITSTATUS(status) if os.WIFEXITED(status) else None,
        "half_files": sorted(n for n in between.keys() - hidden if whole.get(n) != between[n]),
        "temporary_files": sorted(n for n in hidden if not n.startswith(".halfbyte-work/")),
        "loadable_early": "config.json" in between and status != 0,
        "again": again,
        "identical": contents(out) == whole,
        "resumed": json.loads((out / "halfbyte/quantize.json").read_text())["run"]["resumed_tensors"],
    }


def main() -> None:
    source, folder = Path(sys.argv[1]), Path(sys.argv[2])
    # Warm what every child would warm again: imports, and the codec's kernels (64 elements: no OpenMP thread is started).
    plan(source)
    codec.quantize_blocks(torch.ones(64, dtype=torch.bfloat16), 64, threads=1)
    assert run(source, folder / "whole") == 0
    whole = contents(folder / "whole")
    results: dict[str, list[dict[str, Any]]] = {}
    for case, signum, stops, seed in (("killed", signal.SIGKILL, 10, 0), ("interrupted", signal.SIGINT, 4, 2)):
        results[case] = [
            {
                "calls": calls,
                **stop_and_continue(
                    source, folder / f"{case}-{calls}", whole, partial(countdown_to_kill, calls, signum)
                ),
            }
            for calls in random.Random(seed).sample(range(1, 300), stops)
        ]
    results["renaming"] = [
        stop_and_continue(source, folder / f"renaming-{name}", whole, partial(kill_at_rename_to, name))
        for name in ("tokenizer.json", "config.json", "quantize.json")
    ]
    print(json.dumps(results))


if __name__ == "__main__":
    main()
