"""The training loop: AdamW, linear warm-up and cosine decay, gradient clipping, checkpoints that resume bit for bit.

    lr(s) = peak * (s + 1) / warmup                                        for s < warmup
    lr(s) = peak * (floor + (1 - floor) * (1 + cos(pi * progress)) / 2)    afterwards, progress from 0 to 1

The batches of step s are a function of s alone, and nothing else is drawn at random. So a checkpoint is the weights, the
optimizer's two moments and the step; continued on the same machine it gives the weights of an uninterrupted run. It is
written as safetensors (no pickle) into a new folder that is renamed when complete, and only then is the old one removed.

Weights and moments are float32. On a GPU the forward pass runs under bfloat16 autocast, or in TF32 without it: a model so
small that launching kernels is what takes the time is better off without autocast's casts, and with its step recorded.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from halfbyte.errors import OutputError, SourceError
from halfbyte.progress import note, track
from halfbyte.records import write_text_atomic
from halfbyte.trainer.losses import Batch
from halfbyte.trainer.step import GraphedStep, Step

#: from a step on: for each step the micro-batches whose losses are averaged by their weight
Batches = Callable[[int], Iterator[list[tuple[float, Batch]]]]
_PREFIX = "checkpoint-"


@dataclass(frozen=True)
class Settings:
    """How to train.

    learning_rate  the peak
    floor          last learning rate over the peak
    save_every     steps between checkpoints, 0 for none
    autocast       bfloat16 forward passes on a GPU; False: TF32
    graphed        on a GPU, record the step as a CUDA graph (see `step` for what that asks of the model)
    """

    steps: int
    learning_rate: float
    warmup: int = 100
    floor: float = 0.02
    weight_decay: float = 0.0
    clip: float = 1.0
    beta2: float = 0.98
    save_every: int = 0
    autocast: bool = True
    graphed: bool = False


def learning_rate(settings: Settings, step: int) -> float:
    """The learning rate of `step`, counted from 0."""
    if step < settings.warmup:
        return settings.learning_rate * (step + 1) / settings.warmup
    progress = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    wave = (1 + math.cos(math.pi * min(1.0, progress))) / 2
    return settings.learning_rate * (settings.floor + (1 - settings.floor) * wave)


def train(
    model: nn.Module,
    batches: Batches,
    loss_of: Callable[[Batch], torch.Tensor],
    settings: Settings,
    folder: Path,
    before_step: Callable[[], None] = lambda: None,
) -> list[dict[str, float]]:
    """Train every parameter of `model` that asks for a gradient, in place; returns the loss curve.

    folder   checkpoints and `loss.jsonl` live here; a run that finds a checkpoint continues from it
    returns  one {"step", "loss", "learning_rate", "seconds"} per step since the very start
    raises   OutputError if `folder` belongs to a run with other settings or parameters, SourceError if the loss is not finite
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = _optimizer(parameters, settings)
    folder.mkdir(parents=True, exist_ok=True)
    done, curve = _resume(folder, parameters, optimizer, settings)
    device = next(iter(parameters.values())).device
    half = device.type == "cuda" and settings.autocast
    take = (GraphedStep if settings.graphed and device.type == "cuda" else Step)(
        parameters,
        optimizer,
        loss_of,
        settings.clip,
        partial(torch.autocast, "cuda", torch.bfloat16) if half else nullcontext,
        before_step,
    )
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if device.type == "cuda" else "highest")
    model.train()
    losses: list[torch.Tensor] = []
    started = time.perf_counter() - (curve[-1]["seconds"] if curve else 0)
    with track("training", settings.steps - done, "steps") as advance:
        for step, micro in zip(range(done, settings.steps), batches(done), strict=False):
            _set_rate(optimizer, learning_rate(settings, step))
            losses.append(take(micro))
            advance(1)
            saves = bool(settings.save_every) and (step + 1) % settings.save_every == 0
            if saves or len(losses) == 50 or step + 1 == settings.steps:
                curve += _read_losses(losses, step, settings, time.perf_counter() - started)
                losses = []
            if saves and step + 1 < settings.steps:
                _save(folder, step + 1, parameters, optimizer, settings, curve)
    write_text_atomic(folder / "loss.jsonl", "".join(json.dumps(row) + "\n" for row in curve))
    model.eval()
    torch.set_float32_matmul_precision(precision)
    return curve


def _set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def _read_losses(losses: list[torch.Tensor], last: int, settings: Settings, seconds: float) -> list[dict[str, float]]:
    """Rows of the curve; the device is waited for here, once in many steps, not at each."""
    values = torch.stack(losses).tolist()
    first = last - len(values) + 1
    if not all(math.isfinite(value) for value in values):
        raise SourceError(
            f"the loss is no longer finite (steps {first} to {last})",
            where="training",
            todo="lower --learning-rate, or look for damaged rows in the data",
        )
    return [
        {
            "step": first + i,
            "loss": value,
            "learning_rate": learning_rate(settings, first + i),
            "seconds": round(seconds, 2),
        }
        for i, value in enumerate(values)
    ]


def _optimizer(parameters: dict[str, nn.Parameter], settings: Settings) -> torch.optim.AdamW:
    """AdamW over one list of parameters in name order; only matrices decay."""
    decayed = [p for p in parameters.values() if p.ndim >= 2]
    others = [p for p in parameters.values() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}]
    device = next(iter(parameters.values())).device
    gpu = device.type == "cuda"
    rate = torch.zeros((), device=device) if gpu else 0.0  # a tensor, so that a recorded step sees it change
    return torch.optim.AdamW(
        [g for g in groups if g["params"]], lr=rate, betas=(0.9, settings.beta2), fused=gpu, capturable=gpu
    )


def _save(
    folder: Path,
    step: int,
    parameters: dict[str, nn.Parameter],
    optimizer: torch.optim.AdamW,
    settings: Settings,
    curve: list[dict[str, float]],
) -> None:
    """Write checkpoint-STEP beside the old one, rename it, remove the old one."""
    from safetensors.torch import save_file

    half_written = folder / f".{_PREFIX}{step}.part"
    shutil.rmtree(half_written, ignore_errors=True)
    half_written.mkdir()
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in parameters.items():
        state = optimizer.state[parameter]
        tensors[f"weight.{name}"] = parameter.detach()
        tensors[f"exp_avg.{name}"], tensors[f"exp_avg_sq.{name}"] = state["exp_avg"], state["exp_avg_sq"]
    save_file({name: t.contiguous().cpu() for name, t in tensors.items()}, half_written / "state.safetensors")
    write_text_atomic(
        half_written / "run.json", json.dumps({"step": step, "settings": asdict(settings), "curve": curve})
    )
    old = _checkpoints(folder)
    half_written.rename(folder / f"{_PREFIX}{step}")
    for path in old:
        shutil.rmtree(path)


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"{_PREFIX}*"), key=lambda path: int(path.name.removeprefix(_PREFIX)))


def _resume(
    folder: Path, parameters: dict[str, nn.Parameter], optimizer: torch.optim.AdamW, settings: Settings
) -> tuple[int, list[dict[str, float]]]:
    """Load the newest checkpoint, if there is one, into parameters and optimizer; (steps done, curve so far)."""
    from safetensors.torch import load_file

    found = _checkpoints(folder)
    if not found:
        return 0, []
    run = json.loads((found[-1] / "run.json").read_text(encoding="utf-8"))
    state = load_file(found[-1] / "state.safetensors")
    if run["settings"] != asdict(settings) or {n for n in state if n.startswith("weight.")} != {
        f"weight.{name}" for name in parameters
    }:
        raise OutputError(
            "holds a checkpoint of another run (other settings or other parameters)",
            where=str(found[-1]),
            todo="use the same options to continue, or another folder to start anew",
        )
    step = int(run["step"])
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(state[f"weight.{name}"])
            on = parameter.device
            optimizer.state[parameter] = {
                "step": torch.tensor(float(step), device=on if on.type == "cuda" else "cpu"),
                "exp_avg": state[f"exp_avg.{name}"].to(on),
                "exp_avg_sq": state[f"exp_avg_sq.{name}"].to(on),
            }
    note(f"continuing from step {step} of {settings.steps}")
    curve: list[dict[str, Any]] = run["curve"]
    return step, curve
