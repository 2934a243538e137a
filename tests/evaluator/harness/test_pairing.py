"""Samples of two models are paired by document, filter and hashes; flips and verdicts need no lm-eval to be right."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from halfbyte.cli.text.harness import render
from halfbyte.errors import ShapeMismatch, SourceError, UsageError
from halfbyte.evaluator.harness import job, lm_eval
from halfbyte.evaluator.harness.pairing import pair_samples, read_samples

#: two samples as lm-eval 0.4.13 wrote them of SmolLM2-135M (a local task), without `arguments`; hashes shortened
GOLDEN = """\
{"doc_id": 0, "doc": {"question": "What is the capital of France?", "choices": ["Cairo", "Madrid", "Moscow", "Paris"], "label": 3}, \
"target": 3, "resps": [[[-8.72, false]], [[-8.87, false]], [[-13.55, false]], [[-4.08, false]]], "filtered_resps": [[-8.72, false], \
[-8.87, false], [-13.55, false], [-4.08, false]], "filter": "none", "metrics": ["acc"], "doc_hash": "8419", "prompt_hash": "8eb8", \
"target_hash": "4e07", "acc": 1.0}
{"doc_id": 1, "doc": {"question": "What is the capital of Germany?"}, "target": 2, "resps": [], "filtered_resps": [], "filter": "none", \
"metrics": ["acc"], "doc_hash": "10dc", "prompt_hash": "5ab5", "target_hash": "d473", "acc": 0.0}
"""


def sample(doc: int, *, filter: str = "none", answer: str = "a", **metrics: Any) -> dict[str, Any]:
    hashes = {"doc_hash": f"d{doc}", "prompt_hash": f"p{doc}", "target_hash": f"t{doc}"}
    return {"doc_id": doc, "filter": filter, "filtered_resps": [answer], "metrics": list(metrics), **hashes, **metrics}


def accuracies(*right: int, n: int = 20) -> list[dict[str, Any]]:
    return [sample(doc, answer=str(doc in right), acc=float(doc in right)) for doc in range(n)]


def test_a_golden_file_is_read_and_ties_with_itself(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text(GOLDEN)
    samples = read_samples(tmp_path / "t.jsonl")
    (found,) = pair_samples(samples, samples, 1.0)["metrics"]
    assert (found["metric"], found["filter"], found["n"], found["same_answer"]) == ("acc", "none", 2, 2)
    assert (found["reference"]["right"], found["flips"]["p"], found["verdict"]) == (1, 1.0, "tie")


def test_flips_are_counted_both_ways_whatever_the_order() -> None:
    found = pair_samples(accuracies(0, 1, 2, 3, 4), list(reversed(accuracies(2, 3, 4, 6, 7, 8, 9))), 0.02)["metrics"][0]
    flips = found["flips"]
    assert (flips["only_reference"], flips["only_candidate"]) == (2, 4)
    assert flips["p"] == pytest.approx(0.6875)
    assert flips["low"] < 0 < flips["difference"] < flips["high"]
    assert (found["verdict"], found["same_answer"], found["candidate"]["value"]) == ("undecided", 14, 0.35)
    assert pair_samples(accuracies(*range(15)), accuracies(), 0.02)["metrics"][0]["verdict"] == "loss"


def test_filters_are_apart_and_a_document_may_have_one_sample_in_each() -> None:
    mine = [sample(doc, filter=name, exact_match=1.0) for doc in range(3) for name in ("strict", "flexible")]
    others = [{**each, "exact_match": float(each["filter"] == "flexible")} for each in mine]
    found = {m["filter"]: m["flips"]["only_reference"] for m in pair_samples(mine, others, 0.02)["metrics"]}
    assert found == {"strict": 3, "flexible": 0}


def test_numbers_that_are_not_right_or_wrong_have_a_difference_and_no_verdict() -> None:
    mine = [sample(doc, f1=0.5 + doc / 100, ppl=[-1.0, 3], acc=True) for doc in range(20)]
    others = [{**each, "f1": each["f1"] - 0.1 - 0.01 * (n % 3)} for n, each in enumerate(mine)]
    found = pair_samples(mine, others, 0.02, resamples=200)
    f1, acc = found["metrics"]
    assert (f1["flips"], f1["verdict"]) == (None, None)
    assert f1["difference"]["value"] == pytest.approx(-0.1095)
    assert f1["difference"]["low"] < -0.1095 < f1["difference"]["high"] < 0
    assert acc["reference"]["right"] == 20
    assert found["left_out"] == [{"metric": "ppl", "filter": "none", "n": 20}]
    nan = [{**each, "f1": float("nan")} for each in mine]
    assert [m["metric"] for m in pair_samples(mine, nan, 0.02)["left_out"]] == ["f1", "ppl"]


@pytest.mark.parametrize("name", ["doc_hash", "prompt_hash", "target_hash"])
def test_another_document_prompt_or_target_is_no_pair(name: str) -> None:
    others = accuracies()
    others[7] = {**others[7], name: "other"}
    with pytest.raises(ShapeMismatch, match=f"{name} of document 7 differs"):
        pair_samples(accuracies(), others, 0.02)


def test_samples_without_a_partner_are_refused() -> None:
    with pytest.raises(ShapeMismatch, match=r"document 19 .* one model only"):
        pair_samples(accuracies(n=20), accuracies(n=19), 0.02)
    with pytest.raises(ShapeMismatch, match="answered twice"):
        pair_samples(accuracies() + accuracies(n=1), accuracies(), 0.02)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"doc_id": "0"}, "doc_id"), ({"doc_hash": None}, "doc_hash is missing"), ({"metrics": "acc"}, "metrics"), ({"filter": 3}, "filter is 3")],
)  # fmt: skip
def test_damaged_samples_are_refused_by_line(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(GOLDEN.splitlines()[0] + "\n" + json.dumps({**json.loads(GOLDEN.splitlines()[1]), **change}) + "\n")
    with pytest.raises(SourceError, match=message) as caught:
        read_samples(path)
    assert "line 2" in str(caught.value)


def test_without_the_extra_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="not installed") as caught:
        lm_eval("x", "y", tasks="arc_easy")
    assert "pip install 'halfbyte[lm-eval]'" in str(caught.value)


@pytest.fixture
def faked(monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval, as if it had run: the reference is right in 0 to 9, the candidate in 8 and 9."""

    def run(answerer: Any, weights: Any, tasks: list[str], settings: Any, folder: Path) -> dict[str, Any]:
        right = range(8 if folder.name == "candidate" else 0, 10)
        folder.mkdir(parents=True)
        path = folder / "t.jsonl"
        path.write_text("".join(json.dumps({**each, "ppl": [1]}) + "\n" for each in accuracies(*right)))
        return {"t": {"samples": path, "version": 1.0, "n_shot": 0, "chat": True}}

    monkeypatch.setattr(job, "need_lm_eval", lambda: "0.0")
    monkeypatch.setattr(job, "run_tasks", run)
    monkeypatch.setattr(job, "Answerer", lambda *a, **k: SimpleNamespace())


@pytest.mark.usefixtures("faked")
def test_the_record_is_made_of_the_files_and_printed(tiny_gemma4: Path, tmp_path: Path) -> None:
    record = lm_eval(tiny_gemma4, f"{tiny_gemma4}@nf4", tasks="t", out=tmp_path, device="cpu")
    (found,) = record["tasks"][0]["metrics"]
    assert (found["flips"]["only_reference"], found["verdict"], found["n"]) == (8, "loss", 20)
    assert record["reference"]["digest"] != record["candidate"]["digest"]
    text = render(record)
    assert "50.0 % [29.9, 70.1]" in text
    assert "-40.0 points" in text
    assert "loss" in text


@pytest.mark.usefixtures("faked")
@pytest.mark.parametrize(
    ("options", "message"),
    [({"tasks": " , "}, "no task"), ({"limit": 0}, "too small"), ({"margin": 2.0}, "no margin"), ({"dtype": "f16"}, "unknown dtype"),
     ({"include": "absent-folder"}, "no such folder"), ({"shots": 1}, "unknown option")],
)  # fmt: skip
def test_refusals(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        lm_eval("x", "y", out=tmp_path, device="cpu", **{"tasks": "t", **options})
