"""`halfbyte qat`: teach a model to live on a coarse grid, by imitating itself.

    teacher   the source, as it is
    student   a copy whose decoder linears are seen through the grid (`grids`)
    loss      KL(P_teacher || P_student) on the answers of the data, full vocabulary (`losses`)
    result    the source with the student's weights: plain bf16 that lies exactly on the grid

No labels are learned: the data only says where the two are compared. That is the recipe of Gemma's QAT checkpoints (Gemma 3
technical report, arXiv:2503.19786, section 2.3), and it is what keeps a chat model's manners when its data is somebody
else's text. Which linears: those that the plan would turn into NF4. They are trained, and the decoder's norms with them;
embeddings, head and vision tower stay the source's own bytes.

Memory: 4 bytes a weight for the teacher, and 4 + 12 bytes a trained weight for the student. This trains small models; the
31B needs many GPUs, and somebody else has done it.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from halfbyte.device import check_device
from halfbyte.errors import OutputError, PlanError, UsageError
from halfbyte.format.checkpoint import open_source
from halfbyte.format.shards import hash_file
from halfbyte.format.tensors import Source
from halfbyte.memory import peak_gpu_bytes, peak_rss_bytes
from halfbyte.records import digest, write_record, write_text_atomic

WORK = ".halfbyte-qat"


@dataclass(frozen=True)
class Training:
    """The options of a QAT run, by the names of the command line.

    steps          optimizer steps
    batch          rows a step
    length         tokens a row at most
    learning_rate  peak of the cosine
    seed           order of the rows
    save_every     steps between checkpoints (0: none)
    """

    steps: int = 500
    batch: int = 16
    length: int = 512
    learning_rate: float = 3e-5
    seed: int = 0
    save_every: int = 100


TRAINING_OPTIONS = tuple(Training.__dataclass_fields__)


def qat(
    source: str | Path,
    out: str | Path,
    *,
    data: str | Path,
    grid: str = "q4_0",
    preset: str | Path = "decoder-only",
    device: str = "auto",
    **training: Any,
) -> dict[str, Any]:
    """Train `source` onto `grid` and write the result into the folder `out`; returns the qat record.

    source    bf16 checkpoint folder, .gguf file or hub id
    data      .jsonl or .txt (see `halfbyte.trainer.rows`)
    grid      `q4_0` or `nf4`
    preset    which linears: those this preset turns into NF4
    device    `auto` (a GPU if there is one), `cpu`, `cuda[:N]`
    training  any field of `Training`

    A run that was stopped continues from its last checkpoint when it is started again.
    raises UsageError, SourceError, PlanError, OutputError
    """
    from halfbyte.trainer.grids import check_grid

    unknown = training.keys() - set(TRAINING_OPTIONS)
    if unknown:
        raise UsageError(f"unknown option {min(unknown)!r}", todo=f"known: {', '.join(TRAINING_OPTIONS)}")
    check_grid(grid)
    options, out = Training(**training), Path(out)
    _check_options(options)
    if (out / "config.json").exists():
        raise OutputError("already holds a checkpoint", where=str(out), todo="name an empty folder")
    opened = open_source(source)
    try:
        return _Run(opened, out, grid, options, _device(device)).run(data, preset)
    finally:
        opened.close()


def _check_options(options: Training) -> None:
    for name in ("steps", "batch", "length"):
        if getattr(options, name) < 1:
            raise UsageError(
                f"{getattr(options, name)} is not at least 1", where=f"--{name}", todo="give a larger number"
            )
    if not 0 < options.learning_rate < 1:
        raise UsageError(f"{options.learning_rate} is no learning rate", where="--learning-rate", todo="try 3e-5")


def _device(device: str) -> str:
    import torch

    chosen = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    check_device(chosen)
    return chosen


@dataclass(frozen=True)
class _Run:
    source: Source
    out: Path
    grid: str
    options: Training
    device: str

    def run(self, data: str | Path, preset: str | Path) -> dict[str, Any]:
        from transformers import AutoTokenizer

        from halfbyte.recipe.survey import plan_of
        from halfbyte.trainer.loop import Settings
        from halfbyte.trainer.plain_checkpoint import write_plain
        from halfbyte.trainer.rows import batches_of, read_rows

        started = time.perf_counter()
        plan = plan_of(self.source, preset=preset, allow_disagreement=True)
        modules = [d.module for d in plan.decisions if d.action == "nf4" and d.module]
        data_sha256 = (
            hash_file(Path(data)) if Path(data).is_file() else None
        )  # read_rows says what is wrong with the others
        work = self.out / WORK
        _same_job(work, {"source": self.source.label, "grid": self.grid, "data": data_sha256, "linears": modules})
        folder = work / "source"
        if not (folder / "config.json").exists():
            write_plain(self.source, folder, {})
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        rows = read_rows(data, tokenizer, self.options.length)
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        batches = batches_of(rows, self.options.batch, self.options.seed, pad, self.device)
        steps = self.options.steps
        settings = Settings(
            steps, self.options.learning_rate, warmup=max(1, steps // 20), save_every=self.options.save_every
        )
        curve, weights = train_onto_grid(folder, self.grid, modules, batches, settings, self.device)
        write_plain(self.source, self.out, self._source_names(weights))
        shutil.rmtree(work)
        body = {
            "source": self.source.label,
            "grid": self.grid,
            "modules": len(modules),
            "training": asdict(self.options),
            "data": {"file": Path(data).name, "sha256": data_sha256, "rows": len(rows)},
            "loss": _summary(curve),
            "run": {
                "seconds": round(time.perf_counter() - started, 1),
                "device": self.device,
                "peak_rss_bytes": peak_rss_bytes(),
                "peak_gpu_bytes": peak_gpu_bytes(self.device),
            },
        }
        write_record(self.out, "qat", body)
        return body

    def _source_names(self, weights: dict[str, Any]) -> dict[str, Any]:
        """The weights under the source's tensor names (transformers renames some on loading)."""
        from halfbyte.recipe.skeleton import build_skeleton, model_names

        names = model_names(build_skeleton(self.source.config), [info.name for info in self.source.tensors])
        found = {name: weights[key] for name, (key, converted) in names.items() if key in weights and not converted}
        if len(found) < len(weights):
            raise PlanError(
                f"transformers changes {len(weights) - len(found)} of the trained tensors while loading (it merges or splits them)",
                where=self.source.label,
                todo="this architecture cannot be trained onto a grid yet",
            )
        return found


def _same_job(work: Path, job: dict[str, Any]) -> None:
    """Note what this run trains on; raises OutputError if the unfinished run in `work` trained on something else."""
    noted, digest_now = work / "job.json", digest(job)
    if noted.exists() and json.loads(noted.read_text(encoding="utf-8")) != digest_now:
        raise OutputError(
            "holds an unfinished run with another source, grid, preset or data",
            where=str(work.parent),
            todo="repeat its command to finish it, or name another folder",
        )
    write_text_atomic(noted, json.dumps(digest_now))


def _summary(curve: list[dict[str, float]]) -> dict[str, Any]:
    """First and last tenth of the curve as means, and at most a hundred points between."""
    tenth = max(1, len(curve) // 10)
    losses = [row["loss"] for row in curve]
    stride = max(1, len(curve) // 100)
    return {
        "first": sum(losses[:tenth]) / tenth,
        "last": sum(losses[-tenth:]) / tenth,
        "curve": [[row["step"], row["loss"]] for row in curve[::stride]],
    }


def train_onto_grid(
    folder: Path,
    grid: str,
    modules: Sequence[str],
    batches: Any,
    settings: Any,
    device: str,
    view: Callable[[Any], Any] = lambda model: model,
) -> tuple[list[dict[str, float]], dict[str, Any]]:
    """QAT of the checkpoint in `folder` by distillation from itself; checkpoints go beside it, into `folder/..`.

    modules  module paths whose weight is trained on the grid; the decoder's norms are trained with them
    batches  `halfbyte.trainer.loop.Batches`
    view     makes of a model what the loss runs (another forward pass over the same weights)
    returns  the loss curve, and parameter name -> trained float32 tensor (grid weights as bf16 will hold them)
    """
    import torch

    from halfbyte.trainer.grids import put_on_grid, refresh, take_off_grid
    from halfbyte.trainer.loop import train
    from halfbyte.trainer.losses import distillation

    teacher, student = load_model(folder, device), load_model(folder, device)
    trained = _trained_names(student, modules)
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(name in trained)
    teacher.requires_grad_(False).eval()
    put_on_grid(student, modules, grid)
    pupil, master = view(student), view(teacher)
    curve = train(
        student,
        batches,
        lambda batch: distillation(pupil, master, batch),
        settings,
        folder.parent,
        before_step=lambda: refresh(student),
    )
    take_off_grid(student)
    weights = {name: p.detach().to("cpu", torch.float32) for name, p in student.named_parameters() if name in trained}
    return curve, weights


def _trained_names(model: Any, modules: Sequence[str]) -> set[str]:
    """The linears' weights, and every norm's weight below the decoder that holds them."""
    decoders = {name.rpartition(".layers.")[0] + "." for name in modules}
    norms = {n for n, p in model.named_parameters() if p.ndim == 1 and "norm" in n and n.startswith(tuple(decoders))}
    return {f"{name}.weight" for name in modules} | norms


def load_model(folder: Path, device: str) -> Any:
    """The transformers model of a plain checkpoint folder in float32 on `device`."""
    import torch
    import transformers

    from halfbyte.format.checkpoint import read_config
    from halfbyte.recipe.skeleton import auto_class_of

    auto_class = getattr(transformers, auto_class_of(read_config(folder)))
    model = auto_class.from_pretrained(folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False)
    return model.to(device)
