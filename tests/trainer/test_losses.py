"""Losses against transformers' own and against sums written out by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from halfbyte.demo import write_tiny_gemma4
from halfbyte.trainer.losses import IGNORE, cross_entropy, distillation
from halfbyte.trainer.qat import load_model
from halfbyte.trainer.rows import Row, collate


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, student: Path) -> tuple[Any, Any]:
    other = write_tiny_gemma4(tmp_path_factory.mktemp("losses") / "other", layers=2, seed=4)
    return load_model(student, "cpu").eval(), load_model(other, "cpu").eval()


@pytest.fixture(scope="module")
def batch() -> Any:
    rows = [Row(tuple(range(400 + n, 412 + n)), tuple(i > 4 + n for i in range(12))) for n in range(3)]
    return collate([*rows, Row((2, 500, 501), (False, True, True))], pad=0)


def probabilities(model: Any, batch: Any) -> torch.Tensor:
    """float64 [n, vocab] at the scored positions, through the model's whole forward pass, padding masked."""
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=(batch["input_ids"] != 0).long()).logits
    return torch.softmax(logits.flatten(0, 1)[batch["scored"]].double(), dim=-1)


def test_cross_entropy_is_minus_the_mean_log_probability_of_the_targets(models: Any, batch: Any) -> None:
    labels = probabilities(models[0], batch).gather(1, batch["targets"][:, None])
    assert cross_entropy(models[0], batch).item() == pytest.approx(-labels.log().mean().item(), abs=1e-5)


def test_distillation_is_the_divergence_from_the_teacher(models: Any, batch: Any) -> None:
    teacher, student = probabilities(models[0], batch), probabilities(models[1], batch)
    expected = (teacher * (teacher.log() - student.log())).sum(-1).mean().item()
    assert expected > 0.1
    assert distillation(models[1], models[0], batch).item() == pytest.approx(expected, rel=1e-4)
    assert distillation(models[0], models[0], batch).item() == 0


def test_filling_a_batch_up_changes_no_loss(models: Any, batch: Any) -> None:
    filled = dict(batch)
    filled["scored"] = torch.cat([batch["scored"], torch.zeros(9, dtype=torch.int64)])
    filled["targets"] = torch.cat([batch["targets"], torch.full((9,), IGNORE)])
    assert cross_entropy(models[1], filled).item() == pytest.approx(cross_entropy(models[1], batch).item(), rel=1e-6)
    plain = distillation(models[1], models[0], batch).item()
    assert distillation(models[1], models[0], filled).item() == pytest.approx(plain, rel=1e-6)
