"""The record of sensitivity: what the scorer finds too, in however many passes; what it refuses; and a budget spent by it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

import halfbyte
from halfbyte.errors import OutputError, SourceError, UsageError
from halfbyte.evaluator.scoring.scorer import score
from halfbyte.evaluator.sensitivity import job
from halfbyte.evaluator.sensitivity.carrying import CarryingModel
from halfbyte.evaluator.sensitivity.costs import cost_of, rank_correlation
from halfbyte.layers.weights import PlainWeights, open_weights, round_to_nf4
from halfbyte.recipe.budget.sensitivity import read_sensitivity

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL: dict[str, Any] = {"limit": 2, "window": 8, "device": "cpu", "protocol": "kld[assistant,given]"}


class Changed:
    """A source with some weights in NF4. Implements Weights."""

    def __init__(self, plain: PlainWeights, names: set[str], blocksize: int) -> None:
        self.plain, self.changed, self.blocksize = plain, names, blocksize
        self.label, self.config = f"changed {sorted(names)[0]}", plain.config
        self.digest = self.label

    def __getattr__(self, name: str) -> Any:
        return getattr(self.plain, name)

    def load(self, name: str, device: str = "cpu") -> torch.Tensor:
        weight = self.plain.load(name, device)
        return round_to_nf4(weight, self.blocksize) if name in self.changed else weight


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "chats.jsonl"
    lines = [{"prompt": "Name a colour.", "response": "Red is one."}, {"prompt": "And two?", "response": "Blue, green"}]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


@pytest.fixture(scope="module")
def record(tiny_gemma4: Path, chats: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("sensitivity")
    found = halfbyte.sensitivity(tiny_gemma4, out, data=[chats], **SMALL)
    return {**found, "folder": str(out)}


def test_costs_are_what_the_scorer_finds_for_a_model_with_that_group_rounded(
    record: dict[str, Any], tiny_gemma4: Path, chats: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[Any] = []
    rows_of = job.rows_of
    monkeypatch.setattr(job, "rows_of", lambda *given: kept.append(rows_of(*given)) or kept[0])
    monkeypatch.setattr(job._Work, "measure", lambda *_: {})
    halfbyte.sensitivity(tiny_gemma4, Path(record["folder"]) / "rows", data=[chats], **SMALL)
    plain = open_weights(tiny_gemma4)
    assert isinstance(plain, PlainWeights)
    assert kept[0].digest == record["rows"]["digest"]
    some = [record["groups"][at] for at in (0, 9, -1)]
    for group in some:
        names = {f"{module}.weight" for module in group["modules"]}
        changed = [Changed(plain, names, size) for size in (64, 32)]
        found = score(plain, changed, kept[0], device="cpu", streaming=False, floor=False)
        for candidate, choice in zip(found.candidates, ("nf4-64", "nf4-32"), strict=True):
            assert group["costs"][choice]["kld"] == pytest.approx(float(candidate.kld.mean()), rel=1e-9)
    plain.close()


def test_the_record_says_what_it_was_measured_on_and_how_far_costs_add_up(record: dict[str, Any], chats: Path) -> None:
    assert record["self_kld"] == 0.0
    assert record["rows"]["protocol"] == "kld[assistant,given]"
    assert (record["rows"]["documents"], record["passes"]) == (2, 1)
    assert record["data"][0]["name"] == chats.name
    for choice, joint in record["joint"].items():
        assert joint["sum"] == pytest.approx(sum(g["costs"][choice]["kld"] for g in record["groups"]))
        assert joint["kld"] > 0
    assert record["drift_rank_correlation"]["nf4-64"]["n"] == len(record["groups"]) == 24
    assert record["unmeasured"] == []
    for group in record["groups"]:
        apart = [group["costs"][c]["standard_error"] for c in ("nf4-64", "nf4-32")]
        assert 0 < group["saving_standard_error"] <= sum(apart) * (1 + 1e-9), "of a paired difference"


def test_several_passes_give_the_same_record(
    record: dict[str, Any], tiny_gemma4: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CarryingModel, "carried_at_once", lambda *_: 20)
    again = halfbyte.sensitivity(tiny_gemma4, tmp_path, data=chats, **SMALL)
    assert again["passes"] == 3
    assert (again["groups"], again["joint"], again["rows"]) == (record["groups"], record["joint"], record["rows"])


def test_a_budget_is_spent_by_it(record: dict[str, Any], tiny_gemma4: Path) -> None:
    folder = Path(record["folder"])
    for place in (folder, folder / "halfbyte" / "sensitivity.json"):
        plan = halfbyte.plan(tiny_gemma4, budget="9.4bpw", sensitivity=place, allow_disagreement=False)
        assert plan.budget is not None
        assert plan.budget["sensitivity"]["digest"] == read_sensitivity(folder).about["digest"]
        assert plan.budget["nats"] < plan.budget["uniform"]["nf4-64"]


def test_what_cannot_be_measured_is_refused(tiny_gemma4: Path, chats: Path, tmp_path: Path) -> None:
    def refused(error: type[Exception], match: str, source: Path = tiny_gemma4, **options: Any) -> None:
        with pytest.raises(error, match=match):
            halfbyte.sensitivity(source, tmp_path, **{"data": chats, "device": "cpu", **options})

    refused(UsageError, "no text to measure on", data=())
    refused(UsageError, "needs a text", protocol="ppl[raw]")
    refused(UsageError, "not read layer by layer", protocol="kld[assistant,on-policy,image]")
    refused(UsageError, "unknown option 'windw'", windw=3)
    refused(UsageError, "too small", limit=0)
    text = tmp_path / "page.txt"
    text.write_text("A page of words that no evaluation reads.")
    refused(UsageError, r"needs chats", data=text, protocol="kld[assistant,given]")
    halfbyte.quantize(tiny_gemma4, tmp_path / "nf4")
    refused(SourceError, "is not a source", source=tmp_path / "nf4")
    with pytest.raises(OutputError, match="holds a checkpoint"):
        halfbyte.sensitivity(tiny_gemma4, tmp_path / "nf4", data=chats)


@pytest.mark.parametrize(
    ("large", "answered", "chosen"),
    [(False, True, "on-policy"), (False, False, "on-policy"), (True, True, "given"), (True, False, "on-policy")],
)
def test_chats_are_answered_by_the_model_itself_where_it_fits(
    large: bool, answered: bool, chosen: str, tiny_gemma4: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "must_stream", lambda *_: large)
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"prompt": "Name a colour.", **({"response": "Red."} if answered else {})}))
    weights = open_weights(tiny_gemma4)
    assert isinstance(weights, PlainWeights)
    found = job._protocol(None, weights, job.gather_material([path], None), ("cpu", "float32"))
    assert found == f"kld[assistant,{chosen}]"
    weights.close()


def test_the_standard_error_is_of_documents_and_unknown_with_one() -> None:
    kld, document = np.array([1.0, 3.0, 2.0, 6.0]), np.array([0, 0, 1, 2])
    found = cost_of(kld, document)
    residuals = np.array([4 - 3 * 2, 2 - 3, 6 - 3])
    assert found["kld"] == 3
    assert found["standard_error"] == pytest.approx(np.sqrt(3 / 2 * (residuals**2).sum()) / 4)
    assert cost_of(kld, np.zeros(4, int))["standard_error"] is None


def test_the_rank_correlation_is_spearmans() -> None:
    rng = np.random.default_rng(0)
    one, other = rng.integers(0, 9, 30).astype(float), rng.standard_normal(30)
    assert rank_correlation(list(one), list(other)) == pytest.approx(spearmanr(one, other).statistic)
    assert rank_correlation([1, 1, 1], [1, 2, 3]) is None
    assert rank_correlation([1, 2], [1, 2]) is None
