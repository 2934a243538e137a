"""`halfbyte quantize`: validate everything, then stream every tensor through the codec into shards.

    open source -> plan -> lay out shards -> check place and room -> journal -> tensors -> companions -> config -> records

Tensors are rounded or copied in slices by a pool of workers (`tensor_work`); those that another method than rtn fits are written
first, one by one (`fitting`).

Nothing is written before the plan, the skip list and the disk have been found good. After that the job may be killed at
any byte: run again, it continues, and the result is byte-identical (see `journal`).
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from halfbyte.device import check_device
from halfbyte.errors import OutputError
from halfbyte.format.checkpoint import open_source
from halfbyte.format.nf4_layout import component_sizes
from halfbyte.format.shards import Shard, ShardFile, hash_file, outputs_of, parse_size, plan_shards
from halfbyte.format.tensors import Source, TensorInfo
from halfbyte.layers.fitting.method import method_of
from halfbyte.memory import peak_gpu_bytes, peak_rss_bytes
from halfbyte.progress import note, track
from halfbyte.quantizer import carry, target
from halfbyte.quantizer.fitted import Place
from halfbyte.quantizer.fitting import Fitting
from halfbyte.quantizer.journal import Journal
from halfbyte.quantizer.tensor_work import Stopped, TensorWork
from halfbyte.recipe.budget.spending import costs_method, unlike
from halfbyte.recipe.decisions import PLAN_OPTIONS, Decision, Plan, plan_options
from halfbyte.recipe.probe import QUICK_SAMPLE, QUICK_TENSORS, probe
from halfbyte.records import digest, write_record
from halfbyte.texts.calibration import read_calibration


def quantize(
    source: str | Path,
    out: str | Path,
    *,
    device: str = "cpu",
    max_shard_size: str = "5GB",
    allow_disagreement: bool = False,
    overwrite: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Write the NF4 checkpoint of `source` into the folder `out`; returns the quantize record.

    source              folder, .gguf file or hub id
    device              `cpu` or `cuda[:N]`: where the codec runs; the bytes of rtn are the same
    max_shard_size      e.g. `5GB`, `500MB`, `4GiB`
    allow_disagreement  write a skip list that loaders read differently
    overwrite           replace a checkpoint or an unfinished job of halfbyte in `out`
    options             any field of `PlanOptions` (preset, blocksize, budget, sensitivity) and of `Method`

    Memory: (CPU cores + 1) x about 100 MiB, and 1/16 byte a weight of the tensors in hand; not a function of the model. Of another
    method than rtn: one decoder layer and one Hessian (`layerwise`), never the model, but for the answers that the source writes.
    raises SourceError, PlanError, OutputError, UsageError; KeyboardInterrupt leaves a job that continues when run again
    """
    from halfbyte.recipe.survey import plan_of

    method = method_of({name: value for name, value in options.items() if name not in PLAN_OPTIONS})
    decided = plan_options({name: value for name, value in options.items() if name in PLAN_OPTIONS})
    limit, out = parse_size(max_shard_size), Path(out)
    check_device(device)
    texts = read_calibration(method.calibration) if method.calibration is not None else None
    opened = open_source(source)
    try:
        target.check_place(opened, out)
        plan = plan_of(opened, allow_disagreement=allow_disagreement, **vars(decided))
        if (apart := unlike(plan.budget, method.method)) is not None:
            note(apart)
        fitting = Fitting(method, texts, device) if method.method != "rtn" else None
        return Job(opened, out, plan, limit, device, fitting).run(overwrite=overwrite)
    finally:
        opened.close()


@dataclass
class Job:
    """One run: the source, what was decided, and where it goes."""

    source: Source
    out: Path
    plan: Plan
    max_shard_bytes: int
    device: str
    fitting: Fitting | None = None
    shards: list[Shard] = field(init=False)
    started: float = field(default_factory=time.perf_counter)
    resumed: int = 0

    def __post_init__(self) -> None:
        groups = [
            outputs_of(d.name, d.dtype, d.shape, d.action, self.plan.blocksize_of(d)) for d in self.plan.decisions
        ]
        self.shards = plan_shards(groups, self.max_shard_bytes)

    @property
    def detail(self) -> dict[str, Any]:
        """What makes two jobs the same: equal detail, equal bytes."""
        files = sorted({info.file for info in self.source.tensors})
        root = self.source.path if self.source.path.is_dir() else self.source.path.parent
        stats = {name: (root / name).stat() for name in files}
        return {
            "source": {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()},
            "config": digest(self.source.config),
            "plan": self.plan.digest,
            "layout": digest([[s.file, s.header_bytes, [[t.name, t.offset] for t in s.tensors]] for s in self.shards]),
            **({"method": self.fitting.detail} if self.fitting else {}),
        }

    def run(self, *, overwrite: bool) -> dict[str, Any]:
        detail = self.detail
        identity = digest(detail)
        target.check_ours(self.out)
        finished = target.finished_job(self.out)
        if finished is not None:
            if finished["job"] == identity and not overwrite:
                note("already done: the same source, plan and layout are in place")
                return finished
            if not overwrite:
                raise OutputError(
                    "holds another finished checkpoint", where=str(self.out), todo="--overwrite, or another folder"
                )
        target.check_room(self.out, sum(t.nbytes for s in self.shards for t in (*s.tensors, *s.quant_states)))
        if finished is not None:
            target.remove_finished(self.out, finished)
        journal = target.open_journal(self.out, identity, detail, overwrite=overwrite)
        done = False
        try:
            self._stream(journal)
            record = self._finish(journal, identity)
            done = True
            return record
        finally:
            journal.close(finished=done)

    def _stream(self, journal: Journal) -> None:
        """Write every shard that the journal does not prove finished."""
        opened = [self._resume(shard, journal) for shard in self.shards]
        try:
            if self.fitting is not None:
                self.fitting.run(self.source, self.plan, self._places(opened, journal), journal)
                fitted = {d.name for d in self.plan.decisions if d.action == "nf4"}
                opened = [(file, [name for name in todo if name not in fitted]) for file, todo in opened]
            self._round_and_copy(opened, journal)
        finally:
            for file, _ in opened:
                if file is not None:
                    file.close()

    def _places(self, opened: Sequence[tuple[ShardFile | None, list[str]]], journal: Journal) -> dict[str, Place]:
        """Where each source tensor's results lie or will lie."""
        return {
            name: Place(shard, self.out / shard.file if file is None else file.part, file, name in todo)
            for shard, (file, todo) in zip(self.shards, opened, strict=True)
            for name in shard.owners
        }

    def _round_and_copy(self, opened: Sequence[tuple[ShardFile | None, list[str]]], journal: Journal) -> None:
        """What is still to be written, by a pool of workers; each shard gets its final name behind its last tensor."""
        infos = {info.name: info for info in self.source.tensors}
        total = sum(info.nbytes for info in infos.values())
        cores = len(os.sched_getaffinity(0))
        with track("quantize", total, "B") as advance, ThreadPoolExecutor(cores + 1, "halfbyte") as pool:
            work = TensorWork(self.source, self.plan.blocksize, self.device, threading.Event(), advance)
            decisions = {d.name: d for d in self.plan.decisions}
            futures: list[Future[Any]] = []
            try:
                for shard, (file, todo) in zip(self.shards, opened, strict=True):
                    for name in (n for n in shard.owners if n not in todo):
                        advance(infos[name].nbytes)
                    if file is None:
                        continue
                    tasks = [pool.submit(_run_and_journal, work, infos[n], decisions[n], file, journal) for n in todo]
                    futures += [*tasks, pool.submit(_close_shard, file, tasks, journal)]
                _wait_all(futures)
            finally:
                work.stop.set()
                for future in futures:
                    future.cancel()
                pool.shutdown(wait=True)

    def _resume(self, shard: Shard, journal: Journal) -> tuple[ShardFile | None, list[str]]:
        """The shard's file (None if it is finished) and the source tensors still to be written into it."""
        final, entry = self.out / shard.file, journal.shards.get(shard.file)
        if entry is not None and final.is_file() and hash_file(final) == entry["sha256"]:
            self.resumed += len(shard.owners)
            return None, []
        part = journal.work / f"{shard.file}.part"
        if final.is_file() and not part.exists():
            final.replace(part)
        fresh = not part.exists()
        file = ShardFile(shard, journal.work, self.out)
        todo = []
        for name in shard.owners:
            known = journal.tensors.get(name)
            if fresh or known is None or file.digest_of(written_order(shard, name)) != known["output_sha256"]:
                todo.append(name)
        self.resumed += len(shard.owners) - len(todo)
        return file, todo

    def _finish(self, journal: Journal, identity: str) -> dict[str, Any]:
        """Companions, index, config and records; returns the quantize record."""
        states = {t.owner: journal.tensors[t.owner]["quant_state"] for s in self.shards for t in s.quant_states}
        fixed = sum(t.nbytes for s in self.shards for t in s.tensors)
        total = fixed + sum(len(state.encode()) for state in states.values())
        companions = carry.carry_companions(self.source, self.out)
        extra = carry.write_index_and_config(self.source, self.out, self.shards, total, self.plan.skip_modules)
        write_record(self.out, "plan", self.plan.to_dict())
        files = {s.file: {k: journal.shards[s.file][k] for k in ("sha256", "bytes")} for s in self.shards}
        body = {
            "job": identity,
            "plan_digest": self.plan.digest,
            "weights_digest": digest({name: entry["sha256"] for name, entry in files.items()}),
            "options": {
                "preset": self.plan.preset["name"],
                "max_shard_bytes": self.max_shard_bytes,
                "blocksize": self.plan.blocksize,
                "blocksizes": self.plan.blocksizes,
                "budget": (self.plan.budget or {}).get("asked"),
                "budget_costs": costs_method(self.plan.budget) if self.plan.budget else None,
            },
            "source": {
                "label": self.source.label,
                "kind": self.source.kind,
                "lineage": self.source.lineage(),
                "left_behind": self.source.left_behind(),
            },
            "files": files,
            "companions": {**companions, **extra},
            "tensors": {
                d.name: {
                    "sha256": journal.tensors[d.name]["source_sha256"],
                    "action": d.action,
                    **fit_of(journal, d.name),
                }
                for d in self.plan.decisions
            },
            "sizes": self._sizes(total),
            **({"method": self.fitting.record(journal)} if self.fitting else {}),
            "lattice": probe(self.source, self.plan, sample=QUICK_SAMPLE, at_most=QUICK_TENSORS),
            "run": self._run_figures(),
        }
        path = write_record(self.out, "quantize", body)
        result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return result

    def _run_figures(self) -> dict[str, Any]:
        """What this run took, on what."""
        return {
            "device": self.device,
            "cores": len(os.sched_getaffinity(0)),
            "seconds": round(time.perf_counter() - self.started, 3),
            "resumed_tensors": self.resumed,
            "peak_rss_bytes": peak_rss_bytes(),
            "peak_gpu_bytes": peak_gpu_bytes(self.device),
        }

    def _sizes(self, total: int) -> dict[str, Any]:
        """Bytes of tensor data before and after; weights counted once."""
        weights = sum(info.numel for info in self.source.tensors)
        source = sum(info.nbytes for info in self.source.tensors)
        return {
            "source_bytes": source,
            "output_bytes": total,
            "parameters": weights,
            "bits_per_weight": round(8 * total / weights, 4) if weights else None,
        }


def written_order(shard: Shard, owner: str) -> list[str]:
    """The fixed-size tensors of one source tensor in the order in which they were hashed, which is not that of the data."""
    there = {t.name for t in shard.tensors if t.owner == owner}
    return [name for name in component_sizes(owner, (1,)) if name in there]


def fit_of(journal: Journal, name: str) -> dict[str, Any]:
    """What a fit was worth, for the record; nothing of a tensor that was rounded or copied."""
    found = journal.tensors[name].get("fit")
    return {"fit": found} if found else {}


def _run_and_journal(work: TensorWork, info: TensorInfo, decision: Decision, file: ShardFile, journal: Journal) -> None:
    journal.append(work.run(info, decision, file))


def _close_shard(file: ShardFile, tasks: list[Future[None]], journal: Journal) -> None:
    """Wait for the shard's tensors, then give it its final name. Submitted after them, so it cannot starve them."""
    wait(tasks)
    if any(_failed(task) for task in tasks):
        return
    states = {t.name: journal.tensors[t.owner]["quant_state"].encode() for t in file.shard.quant_states}
    sha256 = file.finish(states)
    journal.append({"shard": file.shard.file, "sha256": sha256, "bytes": file.final.stat().st_size})


def _failed(task: Future[Any]) -> bool:
    return task.cancelled() or task.exception() is not None


def _wait_all(futures: list[Future[Any]]) -> None:
    """Wait for every future; the first failure (other than a worker told to stop) is raised."""
    waiting = set(futures)
    while waiting:
        ended, waiting = wait(waiting, timeout=0.5, return_when=FIRST_EXCEPTION)
        for future in ended:
            if not future.cancelled() and (error := future.exception()) is not None and not isinstance(error, Stopped):
                raise error
