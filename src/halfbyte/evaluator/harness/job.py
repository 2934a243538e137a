"""`halfbyte lm-eval REFERENCE CANDIDATE --tasks a,b`: both models, the same documents, one record.

    OUT/samples/reference/TASK.jsonl, OUT/samples/candidate/TASK.jsonl    lm-eval's samples, without their prompts
    OUT/halfbyte/lm-eval.json                                            accuracies, flips, verdicts

The figures are made from the files, not from memory: who has the files can make them again. Nothing is kept between runs: lm-eval's
own documents may change under a name.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from halfbyte.device import check_device
from halfbyte.errors import OutputError, SourceError, UsageError
from halfbyte.evaluator.answering import Answerer
from halfbyte.evaluator.harness.pairing import pair_samples, read_samples
from halfbyte.evaluator.harness.running import need_lm_eval, run_tasks
from halfbyte.layers.model import DTYPES
from halfbyte.layers.weights import open_weights
from halfbyte.records import read_record, write_record

NAME = "lm-eval"


@dataclass(frozen=True)
class HarnessSettings:
    """By the names of the command line.

    limit        the first so many documents of each task; None: all
    include      folder of task YAML files of one's own (lm-eval runs the Python they name)
    num_fewshot  examples in the prompt; None: each task's own
    chat         through the chat template, if the model has one
    dtype        `float32`, `bfloat16`, or `auto`: float32 on the CPU, bfloat16 on a GPU
    batch        documents at a time
    margin       accuracy: a difference whose interval lies within it is a tie (halfbyte.evaluator.tasks.results says why 0.02)
    """

    limit: int | None = None
    include: str | None = None
    num_fewshot: int | None = None
    chat: bool = True
    dtype: str = "auto"
    batch: int = 8
    margin: float = 0.02


HARNESS_OPTIONS = tuple(HarnessSettings.__dataclass_fields__)


def lm_eval(
    reference: str | Path,
    candidate: str | Path,
    *,
    tasks: str = "",
    out: str | Path = Path("halfbyte-lm-eval"),
    device: str = "auto",
    **options: Any,
) -> dict[str, Any]:
    """Run lm-eval's `tasks` on both models and pair them; returns the record, as written to `out`.

    reference, candidate  as for `evaluate`; the candidate may be SRC@nf4 and the like
    tasks                 names, with commas between
    options               any field of HarnessSettings
    raises                UsageError (lm-eval is not installed; options), SourceError (a model, or lm-eval's own words), OutputError
    """
    version, started = need_lm_eval(), time.perf_counter()
    settings = _settings(options)
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not names:
        raise UsageError("no task", where="--tasks", todo="e.g. --tasks arc_easy,hellaswag")
    if (Path(out) / "config.json").exists():
        raise OutputError("holds a checkpoint", where=str(out), todo="name another folder")
    device = _device(device)
    dtype = settings.dtype if settings.dtype != "auto" else ("float32" if device == "cpu" else "bfloat16")
    with ExitStack() as stack:
        first = open_weights(reference)
        stack.callback(first.close)
        second = open_weights(candidate, like=first)
        stack.callback(second.close)
        answerer = Answerer(first, device=device, dtype=dtype)
        folder = Path(out) / "samples"
        before = run_tasks(answerer, first, names, settings, folder / "reference")
        after = run_tasks(answerer, second, names, settings, folder / "candidate")
        body = {
            "lm_eval": version,
            "reference": {"label": first.label, "digest": first.digest},
            "candidate": {"label": second.label, "digest": second.digest},
            "settings": {**asdict(settings), "dtype": dtype, "tasks": names},
            "tasks": [_task(name, before[name], after, settings.margin) for name in before],
            "run": {"seconds": round(time.perf_counter() - started, 3), "device": device, "dtype": dtype},
        }
    write_record(Path(out), NAME, body)
    return read_record(Path(out), NAME) or body


def _task(name: str, before: dict[str, Any], after: dict[str, Any], margin: float) -> dict[str, Any]:
    if name not in after:
        raise SourceError("was answered by one model only", where=f"task {name}", todo="report this")
    found = pair_samples(read_samples(before["samples"]), read_samples(after[name]["samples"]), margin)
    return {"task": name, "version": before["version"], "n_shot": before["n_shot"], "chat": before["chat"], **found}


def _settings(options: dict[str, Any]) -> HarnessSettings:
    if unknown := options.keys() - set(HARNESS_OPTIONS):
        raise UsageError(
            f"unknown option {min(unknown)!r}", where="lm-eval", todo=f"known: {', '.join(HARNESS_OPTIONS)}"
        )
    made = HarnessSettings(**options)
    for name, least in (("limit", 1), ("batch", 1), ("num_fewshot", 0)):
        value = getattr(made, name)
        if value is not None and value < least:
            raise UsageError(f"{value} is too small", where=f"--{name.replace('_', '-')}", todo=f"give {least} or more")
    if not 0 <= made.margin <= 1:
        raise UsageError(f"{made.margin} is no margin", where="--margin", todo="give a share, 0 to 1")
    if made.dtype not in ("auto", *DTYPES):
        raise UsageError(f"unknown dtype {made.dtype!r}", where="--dtype", todo=f"auto, {', '.join(DTYPES)}")
    if made.include is not None and not Path(made.include).is_dir():
        raise UsageError("no such folder", where=f"--include {made.include}", todo="name a folder of task YAML files")
    return made


def _device(device: str) -> str:
    import torch

    chosen = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    check_device(chosen)
    return chosen
