"""`halfbyte qat` end to end on a CPU: on the grid, everything else untouched, resumable bit for bit, loss lower."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import halfbyte
from halfbyte.codec.lattice import probe_lattice
from halfbyte.errors import OutputError, UsageError
from halfbyte.trainer import loop

OPTIONS: dict[str, Any] = {
    "steps": 10,
    "batch": 12,
    "length": 48,
    "learning_rate": 3e-3,
    "save_every": 4,
    "device": "cpu",
}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


@pytest.fixture(scope="module")
def trained(student: Path, chats: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("qat") / "out"
    return out, halfbyte.qat(student, out, data=chats, grid="q4_0", **OPTIONS)


def test_ten_steps_lower_the_loss(trained: tuple[Path, dict[str, Any]]) -> None:
    loss = trained[1]["loss"]
    assert len(loss["curve"]) == 10
    assert loss["last"] < 0.8 * loss["first"]


def test_decoder_linears_lie_exactly_on_the_grid_and_the_rest_is_untouched(
    student: Path, trained: tuple[Path, dict[str, Any]]
) -> None:
    before, after = tensors(student), tensors(trained[0])
    assert before.keys() == after.keys()
    plan = halfbyte.plan(student)
    for decision in plan.decisions:
        old, new = before[decision.name], after[decision.name]
        assert old.dtype == new.dtype
        if decision.action == "nf4":
            lattice = probe_lattice(new.flatten(), columns=new.shape[1])
            assert (lattice.verdict, lattice.grid, lattice.blocksize) == ("exactly", "int4", 32), lattice.sentence()
            assert not torch.equal(old, new)
        elif "language_model" not in decision.name or "norm" not in decision.name:
            assert torch.equal(old, new), decision.name


def test_companions_and_config_are_the_sources_own(student: Path, trained: tuple[Path, dict[str, Any]]) -> None:
    out = trained[0]
    assert json.loads((out / "config.json").read_text()) == json.loads((student / "config.json").read_text())
    for name in ("tokenizer.json", "chat_template.jinja", "LICENSE", "processor_config.json"):
        assert (out / name).read_bytes() == (student / name).read_bytes()
    assert sorted(p.name for p in out.iterdir() if p.name.startswith(".")) == []


def test_stock_transformers_loads_the_result(trained: tuple[Path, dict[str, Any]]) -> None:
    from transformers import AutoModelForImageTextToText

    _, info = AutoModelForImageTextToText.from_pretrained(trained[0], output_loading_info=True)
    assert not any(info.values()), info


def test_a_stopped_run_continues_to_the_same_bytes(
    student: Path, chats: Path, trained: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rate = loop.learning_rate

    def stop_at_six(settings: Any, step: int) -> float:
        if step == 6:
            raise KeyboardInterrupt
        return rate(settings, step)

    monkeypatch.setattr(loop, "learning_rate", stop_at_six)
    with pytest.raises(KeyboardInterrupt):
        halfbyte.qat(student, tmp_path / "out", data=chats, grid="q4_0", **OPTIONS)
    assert not (tmp_path / "out" / "config.json").exists()
    monkeypatch.undo()
    with pytest.raises(OutputError, match="another source, grid, preset or data"):
        halfbyte.qat(student, tmp_path / "out", data=chats, grid="nf4", **OPTIONS)
    halfbyte.qat(student, tmp_path / "out", data=chats, grid="q4_0", **OPTIONS)
    for file in sorted(trained[0].glob("*.safetensors")):
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()


def test_nf4_training_loses_nothing_more_when_it_is_quantized(student: Path, chats: Path, tmp_path: Path) -> None:
    """Down to the double quantization: the scales' mean moves, so a few scales may land one step aside."""
    halfbyte.qat(student, tmp_path / "out", data=chats, grid="nf4", **OPTIONS)
    plain = halfbyte.plan(student)
    trained = tensors(tmp_path / "out")
    from halfbyte.trainer.grids import round_to_grid

    for decision in plain.decisions:
        if decision.action == "nf4":
            weight = trained[decision.name].float()
            error = (round_to_grid(weight, "nf4") - weight).norm() / weight.norm()
            assert error < 0.01, (decision.name, float(error))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"grid": "int3"}, "unknown grid"),
        ({"speed": 3}, "unknown option 'speed'"),
        ({"steps": 0}, "not at least 1"),
        ({"learning_rate": 7.0}, "no learning rate"),
        ({"device": "tpu"}, "unknown device"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_written(
    change: dict[str, Any], match: str, student: Path, chats: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=match):
        halfbyte.qat(student, tmp_path / "out", **{"data": chats, "grid": "q4_0", **OPTIONS, **change})
    assert not (tmp_path / "out").exists()


def test_a_finished_folder_is_not_trained_over(
    student: Path, chats: Path, trained: tuple[Path, dict[str, Any]]
) -> None:
    with pytest.raises(OutputError, match="already holds a checkpoint"):
        halfbyte.qat(student, trained[0], data=chats, **OPTIONS)
