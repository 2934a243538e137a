"""Costs of weights as a method makes them: the scorer finds the same, a killed walk goes on where it was, the plan says which."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import halfbyte
from halfbyte import codec
from halfbyte.cli.text.quantized import render
from halfbyte.codec.fitting import Fit, fit_weight
from halfbyte.errors import SourceError, UsageError
from halfbyte.evaluator.scoring.scorer import score
from halfbyte.evaluator.sensitivity import fits, job
from halfbyte.layers.weights import PlainWeights, open_weights
from halfbyte.recipe.budget.sensitivity import read_sensitivity

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL: dict[str, Any] = {"limit": 2, "device": "cpu", "protocol": "kld[assistant,given]"}
QUICK: dict[str, Any] = {"method": "gptq", "fit": ["sweeps=0", "candidates=2"]}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Chats to measure on, others to calibrate on."""
    folder = tmp_path_factory.mktemp("data")
    chats = {
        "measured": [("Name a colour.", "Red is one."), ("And two?", "Blue, green")],
        "seen": [("Say a number.", "Seven, or eight."), ("What is a leaf?", "A part of a plant.")],
    }
    for name, lines in chats.items():
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps({"prompt": p, "response": r}) for p, r in lines))
    return {name: folder / f"{name}.jsonl" for name in chats}


@pytest.fixture(scope="module")
def record(tiny_gemma4: Path, files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Costs of gptq, calibrated on the other chats."""
    out = tmp_path_factory.mktemp("gptq")
    found = halfbyte.sensitivity(tiny_gemma4, out, data=files["measured"], calibration=files["seen"], **SMALL, **QUICK)
    return {**found, "folder": str(out)}


class Scaled:
    """A source with some weights fitted by `scale`. Implements Weights."""

    def __init__(self, plain: PlainWeights, names: set[str], blocksize: int) -> None:
        self.plain, self.names_, self.fit = plain, names, Fit(method="scale", blocksize=blocksize)
        self.label, self.config, self.digest = "scaled", plain.config, "scaled"

    def __getattr__(self, name: str) -> Any:
        return getattr(self.plain, name)

    def load(self, name: str, device: str = "cpu") -> torch.Tensor:
        weight = self.plain.load(name, device)
        return codec.dequantize(fit_weight(weight, self.fit).nf4).view(weight.shape) if name in self.names_ else weight


def test_costs_are_what_the_scorer_finds_for_a_model_with_that_group_fitted(
    tiny_gemma4: Path, files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[Any] = []
    rows_of = job.rows_of
    monkeypatch.setattr(job, "rows_of", lambda *given: kept.append(rows_of(*given)) or kept[0])
    record = halfbyte.sensitivity(tiny_gemma4, tmp_path, data=files["measured"], method="scale", **SMALL)
    plain = open_weights(tiny_gemma4)
    assert isinstance(plain, PlainWeights)
    group = record["groups"][3]
    changed = [Scaled(plain, {f"{module}.weight" for module in group["modules"]}, size) for size in (64, 32)]
    found = score(plain, changed, kept[0], device="cpu", streaming=False, floor=False)
    for candidate, choice in zip(found.candidates, ("nf4-64", "nf4-32"), strict=True):
        assert group["costs"][choice]["kld"] == pytest.approx(float(candidate.kld.mean()), rel=1e-9)
    assert record["weights"]["method"] == "scale"
    assert record["weights"]["calibration"] is None
    plain.close()


def test_a_killed_walk_goes_on_with_the_fits_that_are_there_and_ends_in_the_same_record(
    record: dict[str, Any], tiny_gemma4: Path, files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    fit = fits.Fits.fit

    def dying(store: fits.Fits, name: str, inputs: Any) -> torch.Tensor:
        if len(made) == 9:
            raise KeyboardInterrupt
        made.append(name)
        return fit(store, name, inputs)

    def run() -> dict[str, Any]:
        return halfbyte.sensitivity(
            tiny_gemma4, tmp_path, data=files["measured"], calibration=files["seen"], **SMALL, **QUICK
        )

    monkeypatch.setattr(fits.Fits, "fit", dying)
    with pytest.raises(KeyboardInterrupt):
        run()
    assert len(list(tmp_path.glob("fits/*/*.safetensors"))) == 2 * 9
    first, made[:] = set(made), [""] * 10  # never nine again
    again = run()
    assert not first & set(made)
    assert (again["groups"], again["joint"]) == (record["groups"], record["joint"])
    assert not list(tmp_path.glob("fits/*/*")), "deleted once the record is there"


def test_a_plan_and_a_checkpoint_say_by_which_costs_a_budget_was_spent(
    record: dict[str, Any], tiny_gemma4: Path, tmp_path: Path
) -> None:
    folder = Path(record["folder"])
    about = read_sensitivity(folder).about["weights"]
    assert about["method"] == "gptq"
    assert about["calibration"]["name"] == "seen.jsonl"
    assert about["calibration"]["tokens"] == record["weights"]["calibration"]["tokens"] > 0
    budget = {"budget": "9.4bpw", "sensitivity": folder}
    plan = halfbyte.plan(tiny_gemma4, allow_disagreement=False, **budget)
    assert plan.budget is not None
    assert plan.budget["sensitivity"]["weights"] == about
    rounded = halfbyte.quantize(tiny_gemma4, tmp_path / "rtn", **budget)
    assert rounded["options"]["budget_costs"] == "gptq"
    assert "spent by costs of gptq: another method" in render(rounded, "source", tmp_path)
    same = {**rounded, "method": {"name": "gptq", "gain": {}}}
    assert "spent by costs" not in render(same, "source", tmp_path)


def test_text_that_the_fit_has_seen_measures_nothing(tiny_gemma4: Path, files: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"2 of its documents are in the calibration measured.jsonl"):
        halfbyte.sensitivity(
            tiny_gemma4, tmp_path, data=files["measured"], calibration=files["measured"], **SMALL, **QUICK
        )


def test_a_record_with_lies_about_its_method_is_refused(record: dict[str, Any], tmp_path: Path) -> None:
    body = json.loads((Path(record["folder"]) / "halfbyte" / "sensitivity.json").read_text())
    for wrong in ({"method": "magic", "calibration": None}, {"method": "gptq", "calibration": {"name": "x"}}, "gptq"):
        path = tmp_path / "sensitivity.json"
        path.write_text(json.dumps({**body, "weights": wrong}))
        with pytest.raises(SourceError, match="a field is missing or wrong"):
            read_sensitivity(path)
    path.write_text(json.dumps({key: value for key, value in body.items() if key != "weights"}))
    assert read_sensitivity(path).about["weights"] == {"method": "rtn", "calibration": None}
