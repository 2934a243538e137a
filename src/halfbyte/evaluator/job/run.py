"""All of it in order: open, choose protocols, make rows, score, compute figures, write.

Everything that can be refused is refused before the first weight is read: options, names, data files, models, tokenizers.
What is scored is kept as soon as it is there (halfbyte.evaluator.job.vectors), so a run that was stopped continues.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from halfbyte.device import check_device
from halfbyte.errors import OutputError
from halfbyte.evaluator.diagnosis.untouched import untouched_areas
from halfbyte.evaluator.job.bases import Base, open_bases
from halfbyte.evaluator.job.effects import effects_of, pairs_of
from halfbyte.evaluator.job.figures import figures_of, frame_of, residual_of, worst_tokens
from halfbyte.evaluator.job.layers import weight_errors
from halfbyte.evaluator.job.material import Material, check_pictures, gather_material, rows_of
from halfbyte.evaluator.job.scoring import METRICS_VERSION, Machine, Scored, device_name, score_base
from halfbyte.evaluator.job.settings import Settings, check_pack_options, choose_protocols, command_of, settings_of
from halfbyte.evaluator.job.sizes import parameters_of, size_of
from halfbyte.evaluator.job.writing import NAME, write_card_records
from halfbyte.evaluator.packed import (
    PackedReference,
    arithmetic_of,
    check_protocol,
    check_writing,
    lent_tokenizer,
    write_reference_pack,
)
from halfbyte.evaluator.seen import method_facts, refuse_seen
from halfbyte.evaluator.tasks.asking import Place
from halfbyte.evaluator.tasks.measuring import measure_tasks, refuse_blind
from halfbyte.evaluator.tasks.opening import open_tasks
from halfbyte.evaluator.tasks.task import Task
from halfbyte.memory import peak_gpu_bytes, peak_rss_bytes
from halfbyte.records import read_record, write_record
from halfbyte.texts import protocols

#: changes when a reader of the record would have to
RECORD_VERSION = 2


def evaluate(
    reference: str | Path,
    candidates: Sequence[str | Path] = (),
    *,
    base: Sequence[str] = (),
    data: Sequence[str | Path] = (),
    out: str | Path = Path("halfbyte-evaluation"),
    device: str = "auto",
    **options: Any,
) -> dict[str, Any]:
    """Score candidates against the full precision they were made from; returns the evaluate record, as written to `out`.

    reference   a bf16 checkpoint folder, .gguf file or hub id; or a reference pack (halfbyte.evaluator.packed)
    candidates  the same, a folder in NF4, or `SRC@nf4`, `SRC@q4_0`, `SRC@uniform`; with a declared base's `NAME:` in front if
                it belongs to that one; none are needed if the reference is only to be written as a pack
    base        "NAME=REF": a further reference (halfbyte.evaluator.job.bases)
    data        .jsonl files of prompts or chats, other files as texts; without: a few built-in ones
    out         folder of the record, the vectors, the reference's answers, and all models' answers to tasks
    device      `auto` (a GPU if there is one), `cpu`, `cuda[:N]`
    options     any field of `Settings`, by the names of the command line

    A second run with the same inputs reads the vectors of the first. A candidate folder that `halfbyte quantize` wrote gets
    a record of its own for its card.
    raises UsageError, SourceError, PlanError, ShapeMismatch, OutputError (`out` is a checkpoint)
    """
    settings, started = settings_of(options), time.perf_counter()
    _check_out(Path(out))
    device = _device(device)
    specs = [candidates] if isinstance(candidates, str | Path) else candidates
    files = [data] if isinstance(data, str | Path) else data
    tasks = _tasks(settings)
    material = gather_material(files, settings.limit)
    with ExitStack() as stack:
        pairs = [base] if isinstance(base, str) else base
        bases = open_bases(
            str(reference), [str(spec) for spec in specs], pairs, stack, alone=settings.write_reference is not None
        )
        if all(isinstance(each.reference, PackedReference) for each in bases):
            check_pack_options(settings, files)
        refuse_blind(bases, tasks)
        refuse_seen(bases, material, tasks)
        job = _Job(bases, Work(material, tasks), settings, device, Path(out))
        body = job.body()
        named = {"base": pairs, "data": [str(path) for path in files], "device": [device], "out": [str(out)]}
        body["command"] = command_of([str(reference), *(str(spec) for spec in specs)], named, settings)
        body["run"] = {
            "seconds": round(time.perf_counter() - started, 3),
            "device": device,
            "device_name": device_name(device),
            "dtype": job.machine.dtype,
            "peak_rss_bytes": peak_rss_bytes(),
            "peak_gpu_bytes": peak_gpu_bytes(device),
        }
        write_record(Path(out), NAME, body)
        write_card_records(body, bases)
    return read_record(Path(out), NAME) or body


def _check_out(out: Path) -> None:
    if (out / "config.json").exists():
        raise OutputError(
            "holds a checkpoint, whose own record would be overwritten", where=str(out), todo="name another folder"
        )


def _tasks(settings: Settings) -> list[Task]:
    limit, longest = settings.task_limit, settings.task_max_new_tokens
    return open_tasks(settings.task, allow_code=settings.allow_code, limit=limit, max_new_tokens=longest)


def _device(device: str) -> str:
    import torch

    chosen = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    check_device(chosen)
    return chosen


def _tokenizer(each: Base) -> Any | None:
    """The reference's tokenizer; a pack has none, and a candidate's stands in if there is one of the same vocabulary."""
    if isinstance(each.reference, PackedReference):
        return lent_tokenizer(each.reference, [entry.weights for entry in each.candidates])
    return protocols.load_tokenizer(each.reference)


@dataclass(frozen=True)
class Work:
    """What models are measured on: material of the protocols, and tasks."""

    material: Material
    tasks: Sequence[Task]


class _Job:
    """What the parts of the record are made of."""

    def __init__(self, bases: list[Base], work: Work, settings: Settings, device: str, out: Path) -> None:
        self.bases, self.material, self.tasks, self.settings, self.out = bases, work.material, work.tasks, settings, out
        packs = [each.reference for each in bases if isinstance(each.reference, PackedReference)]
        dtype, batch = settings.dtype, settings.batch
        if packs:
            dtype, batch = arithmetic_of(packs, dtype, None if batch == Settings.batch else batch)
        if dtype == "auto":
            dtype = "float32" if device == "cpu" else "bfloat16"
        self.machine = Machine(device, dtype, batch, out / "vectors")
        self.tokenizers = {each.name: _tokenizer(each) for each in bases}
        self.names = {
            each.name: check_protocol(each.reference, settings.protocol) if isinstance(each.reference, PackedReference)
            else choose_protocols(
                settings.protocol, instruct=self._instruct(each), has_text=work.material.given_text,
                has_pictures=bool(work.material.pictures),
            )
            for each in bases
        }  # fmt: skip
        for each in bases:
            if not isinstance(each.reference, PackedReference):
                check_pictures(each.reference, self.names[each.name], work.material)
        if settings.write_reference is not None:
            check_writing(Path(settings.write_reference), packs, [n for names in self.names.values() for n in names])

    def _instruct(self, each: Base) -> bool:
        if isinstance(each.reference, PackedReference):
            return each.reference.instruct
        return protocols.is_instruct(self.tokenizers[each.name])

    def body(self) -> dict[str, Any]:
        scored = [self._score(each, name) for each in self.bases for name in self.names[each.name]]
        blocks = [self._block(each) for each in scored]
        place = Place(self.out / "answers", self.machine.device, self.machine.dtype, self.machine.batch)
        asked = measure_tasks(self.bases, self.tasks, place, self.settings, pairs_of, self.tokenizers)
        return {
            "record_version": RECORD_VERSION,
            "metrics_version": METRICS_VERSION,
            "settings": {**asdict(self.settings), "dtype": self.machine.dtype, "batch": self.machine.batch},
            "bases": [self._base(each) for each in self.bases],
            "protocols": blocks,
            "effects": self._effects(scored),
            **asked,
            "self_tests": self._self_tests(scored),
        }

    def _score(self, each: Base, name: str) -> Scored:
        settings, place = self.settings, (self.out / "traces", self.machine.device, self.machine.dtype)
        if isinstance(each.reference, PackedReference):
            return score_base(
                each, each.reference.kept.rows, self.machine, floor=settings.floor, layers=settings.layers
            )
        rows = rows_of(name, each.reference, self.material, settings, place)
        keep = None
        if settings.write_reference is not None:
            path, data = Path(settings.write_reference), self.material.files_of(name)
            keep = partial(write_reference_pack, path, data, head=settings.pack_head)
        return score_base(each, rows, self.machine, floor=settings.floor, layers=settings.layers, keep=keep)

    def _base(self, each: Base) -> dict[str, Any]:
        parameters = parameters_of(each.reference)
        packed = each.reference if isinstance(each.reference, PackedReference) else None
        return {
            "name": each.name,
            "reference": each.reference.label,
            "digest": each.reference.digest,
            "kind": each.kind,
            "instruct": self._instruct(each),
            "pack": packed.file if packed else None,
            "size": size_of(each.reference, parameters),
            "candidates": [
                {
                    "id": entry.id, "label": entry.weights.label, "digest": entry.weights.digest, "kind": entry.kind,
                    "size": size_of(entry.weights, parameters), "method": method_facts(entry),
                    "weights": weight_errors(each.reference, entry.weights, self.out / "vectors")
                    if self.settings.layers and packed is None else None,
                    "areas": untouched_areas(each.reference, entry.weights, self.out / "vectors") if packed is None else None,
                }
                for entry in each.candidates
            ],
        }  # fmt: skip

    def _block(self, scored: Scored) -> dict[str, Any]:
        """One protocol of one base."""
        found, rows, own = figures_of(scored, self.settings), scored.rows, scored.reference
        frame = frame_of(scored, self.settings)
        tokenizer, reference = self.tokenizers[scored.base.name], scored.base.reference
        packed = reference if isinstance(reference, PackedReference) else None
        return {
            "protocol": rows.protocol,
            "version": rows.version,
            "base": scored.base.name,
            "out_of_frame": bool(rows.facts.get("out_of_frame", False)),
            "data": packed.data if packed else list(self.material.files_of(rows.protocol)),
            "rows": {"digest": rows.digest, "rows": len(rows.tokens), "n": len(own.arrays["nll"]), "documents": len(own.arrays["documents"]), "facts": rows.facts},
            "vectors": {"file": f"vectors/{own.path.name}", "cached": own.cached, "seconds": own.about["seconds"]},
            "measured_on": {key: own.about[key] for key in ("device_name", "streamed", "versions")},
            "self_kld": own.about["self_kld"],
            "floor": found["floor"],
            "reference": found["reference"],
            "comparisons": found["comparisons"],
            "candidates": [
                {
                    "candidate": key,
                    "vectors": {"file": f"vectors/{stored.path.name}", "cached": stored.cached, "seconds": stored.about["seconds"]},
                    **found["candidates"][key],
                    "frame": frame.get(key),
                    "residual": residual_of(stored, own) if self.settings.layers else None,
                    "worst": worst_tokens(scored, key, tokenizer),
                }
                for key, stored in scored.candidates.items()
            ],
        }  # fmt: skip

    def _effects(self, scored: Sequence[Scored]) -> list[dict[str, Any]]:
        """Of the first base and each other, protocol by protocol."""
        found = []
        for left in (each for each in scored if each.base is self.bases[0]):
            for right in scored:
                if right.base is not left.base and right.rows.protocol == left.rows.protocol and left.candidates:
                    found += effects_of(left, right, self.settings.resamples, self.settings.margin)
        return found

    def _self_tests(self, scored: Sequence[Scored]) -> list[dict[str, Any]]:
        """What must hold whatever the models are: a model has no divergence from itself."""
        return [
            {
                "test": "self-KLD is exactly 0", "protocol": each.rows.protocol, "base": each.base.name,
                "value": each.reference.about["self_kld"], "passed": each.reference.about["self_kld"] == 0.0,
            }
            for each in scored
        ]  # fmt: skip
