"""Stock transformers in a child process: what it loads, what it loses, and what happens when it dies."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from verifier import surgery

from halfbyte.errors import UsageError
from halfbyte.verifier import sentences, stock_probe, verify
from halfbyte.verifier.stock import check_stock, judge, run_probe

Report = Callable[[Path], dict[str, Any]]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def report_of(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Report:
    """The child's program run in this process, which has imported transformers already: what it writes about a folder.

    The first test and the last ones run it as a child; what it finds in a broken checkpoint does not depend on that.
    """

    def report(folder: Path) -> dict[str, Any]:
        place = tmp_path / "report.json"
        monkeypatch.setattr(sys, "argv", ["stock_probe", str(folder), "cpu", str(place)])
        with warnings.catch_warnings():
            warnings.simplefilter("default")  # to the child a warning is no error
            stock_probe.main()
        body: dict[str, Any] = json.loads(place.read_text())
        return body

    return report


def by_id(checks: list[Any]) -> dict[str, Any]:
    return {check.id: check for check in checks}


def packed(folder: Path) -> set[str]:
    from halfbyte.verifier.layout import nf4_names

    return nf4_names(name for parts in surgery.all_parts(folder) for name in parts)


def test_good_checkpoint_loads_and_answers_text_and_image(good: Path, tiny_gemma4: Path, plan: Any) -> None:
    record = verify(good, source=str(tiny_gemma4), plan=plan)
    assert sentences(record) == []
    checks = {check["id"]: check for check in record["checks"]}
    assert checks["modules"]["detail"] == "41 Linear4bit with a quant state: decoder 41"
    assert checks["values"]["detail"] == "75 parameters and buffers equal the file"
    answers = record["stock"]["answers"]
    assert [answer["image"] for answer in answers] == [False, False, True]
    assert all(answer["answer"] and answer["finite"] and answer["tokens"] == 64 for answer in answers)
    assert len(record["tensors"]) == 41
    assert all(20 < row["sqnr_db"] < 21.5 for row in record["tensors"])
    assert {path.name for path in (good / "halfbyte").iterdir()} == {"verify.json", "generate.json"}


def test_lost_layer_scalar_is_seen_by_the_loader(good: Path, report_of: Report) -> None:
    name = "model.language_model.layers.3.layer_scalar"
    surgery.drop(good, name)
    assert by_id(judge(report_of(good), packed(good), None))["load"].where == name


def test_quantized_vision_tower_is_more_linear4bit_than_planned(
    everything_quantized: Path, plan: Any, report_of: Report
) -> None:
    check = by_id(judge(report_of(everything_quantized), packed(everything_quantized), plan))["modules"]
    assert check.status == "failed"
    assert "became Linear4bit, the plan keeps it" in check.detail


def test_lost_quant_state_is_a_layer_without_one(good: Path, report_of: Report) -> None:
    surgery.drop(good, "model.language_model.layers.1.mlp.up_proj.weight.quant_state.bitsandbytes__nf4")
    report = report_of(good)
    checks = judge(report, packed(good), None)
    assert "failed" in {check.status for check in checks}, report


def test_nan_in_a_norm_gives_logits_that_are_not_finite(good: Path, report_of: Report) -> None:
    name = "model.language_model.norm.weight"
    surgery.replace(good, name, lambda t: (t[0], t[1], b"\xc0\x7f" + t[2][2:]))
    checks = judge(report_of(good), packed(good), None)
    assert "logits are not finite" in by_id(checks)["answers"].detail


def test_broken_tokenizer_fails_the_answers_and_not_the_load(good: Path, report_of: Report) -> None:
    (good / "tokenizer.json").write_text("no")
    checks = by_id(judge(report_of(good), packed(good), None))
    assert checks["load"].status == "passed"
    assert checks["answers"].status == "failed"


SOUND: dict[str, Any] = {
    "auto_class": "AutoModelForCausalLM", "architecture": "A", "device": "cpu", "load_seconds": 1.0,
    "missing_keys": [], "unexpected_keys": [], "mismatched_keys": [],
    "linear4bit": ["a"], "without_quant_state": [],
    "values_compared": 3, "values_different": [], "values_unmatched": [],
    "answers": [{"prompt": "p", "answer": "red", "finite": True, "tokens": 1, "tokens_per_second": 1.0}],
    "answers_error": None,
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "failing"),
    [
        ({}, set()),
        ({"missing_keys": ["x"]}, {"load"}),
        ({"unexpected_keys": ["x"]}, {"load"}),
        ({"mismatched_keys": ["x"]}, {"load"}),
        ({"linear4bit": ["a", "b"]}, {"modules"}),
        ({"without_quant_state": ["b"]}, {"modules"}),
        ({"values_different": ["layer_scalar"]}, {"values"}),
        ({"answers": [{**SOUND["answers"][0], "answer": ""}]}, {"answers"}),
        ({"answers": [{**SOUND["answers"][0], "finite": False}]}, {"answers"}),
        ({"answers": [], "answers_error": "no template"}, {"answers"}),
    ],
    ids=str,
)
def test_each_fault_of_a_report_fails_its_own_check(change: dict[str, Any], failing: set[str]) -> None:
    checks = judge({**SOUND, **change}, {"a.weight"}, None)
    assert {check.id for check in checks if check.status == "failed"} == failing


@pytest.mark.parametrize(
    ("script", "words"),
    [("kill -SEGV $$", "was killed by signal 11"), ("echo no memory >&2; exit 3", "code 3: no memory")],
)
def test_a_child_that_dies_is_a_failed_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, words: str
) -> None:
    fake = tmp_path / "python"
    fake.write_text(f"#!/bin/sh\n{script}\n")
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake))
    checks, _ = check_stock(tmp_path, set(), None, "cpu")
    assert words in by_id(checks)["load"].detail
    assert {check.status for check in checks} == {"failed", "skipped"}


def test_a_child_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\nexec sleep 60\n")
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake))
    monkeypatch.setattr("halfbyte.verifier.stock.TIMEOUT_SECONDS", 0.2)
    assert "no result after" in run_probe(tmp_path, "cpu")["error"]


def test_verify_of_no_folder_is_a_usage_error(tmp_path: Path) -> None:
    from halfbyte.errors import UsageError

    with pytest.raises(UsageError, match="is not a folder"):
        verify(tmp_path / "absent")


@pytest.mark.gpu
def test_good_checkpoint_answers_on_a_gpu(good: Path, plan: Any) -> None:
    checks, report = check_stock(good, packed(good), plan, "cuda")
    assert {check.status for check in checks} == {"passed"}, report
    assert report["device"] == "cuda"


@pytest.mark.parametrize("device", ["tpu", "cuda:x"])
def test_unknown_device_is_refused_before_any_check(good: Path, device: str) -> None:
    with pytest.raises(UsageError, match="unknown device"):
        verify(good, device=device)
