"""The loop: schedule, resuming bit for bit, refusals."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from halfbyte.errors import OutputError, SourceError
from halfbyte.trainer.loop import Settings, learning_rate, train

SETTINGS = Settings(steps=10, learning_rate=0.05, warmup=2, weight_decay=0.1, save_every=4)


class Stopped(Exception):
    pass


def line(stop_at: int | None = None) -> Any:
    """Batches of points on y = 2 x0 - x1, a function of the step alone."""

    def batches(start: int) -> Iterator[list[tuple[float, dict[str, torch.Tensor]]]]:
        step = start
        while True:
            if step == stop_at:
                raise Stopped
            x = torch.randn(8, 2, generator=torch.Generator().manual_seed(step))
            yield [(0.5, {"x": x[:4]}), (0.5, {"x": x[4:]})]
            step += 1

    return batches


def fit(folder: Path, batches: Any, settings: Settings = SETTINGS, scale: float = 1.0) -> tuple[torch.Tensor, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))

    def loss_of(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        x = batch["x"]
        return ((model(x)[:, 0] - (2 * x[:, 0] - x[:, 1])) ** 2).mean() * scale

    curve = train(model, batches, loss_of, settings, folder)
    return nn.utils.parameters_to_vector(model.parameters()).detach(), curve


def test_warm_up_rises_to_the_peak_and_the_cosine_ends_at_the_floor() -> None:
    settings = Settings(steps=100, learning_rate=1.0, warmup=10, floor=0.1)
    assert [round(learning_rate(settings, s), 2) for s in (0, 4, 9, 10)] == [0.1, 0.5, 1.0, 1.0]
    assert learning_rate(settings, 55) == pytest.approx(0.55)
    assert learning_rate(settings, 100) == pytest.approx(0.1)


def test_loss_falls_and_the_curve_has_every_step(tmp_path: Path) -> None:
    _, curve = fit(tmp_path, line(), replace(SETTINGS, steps=150, save_every=0))
    assert [row["step"] for row in curve] == list(range(150))
    assert curve[-1]["loss"] < 0.2 * curve[0]["loss"]


def test_a_stopped_run_continues_to_the_same_bits(tmp_path: Path) -> None:
    whole, curve = fit(tmp_path / "whole", line())
    with pytest.raises(Stopped):
        fit(tmp_path / "cut", line(stop_at=7))
    assert [path.name for path in (tmp_path / "cut").iterdir()] == ["checkpoint-4"]
    (tmp_path / "cut" / ".checkpoint-8.part").mkdir()  # what a kill while saving leaves
    again, curve_again = fit(tmp_path / "cut", line())
    assert torch.equal(whole, again)
    assert [row["loss"] for row in curve] == [row["loss"] for row in curve_again]


def test_a_checkpoint_of_other_settings_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        fit(tmp_path, line(stop_at=5))
    with pytest.raises(OutputError, match="another run"):
        fit(tmp_path, line(), replace(SETTINGS, learning_rate=0.04))


def test_a_loss_that_is_not_finite_is_an_error_that_names_the_steps(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"no longer finite \(steps 0 to 3\)"):
        fit(tmp_path, line(), scale=float("inf"))
