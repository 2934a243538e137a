"""`halfbyte quantize`: what it says, and what a second run in the same folder does."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from cli.conftest import Refused, Run

from halfbyte.quantizer.job import Job
from halfbyte.quantizer.journal import WORK_FOLDER, Journal


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def weights(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(folder).items() if name.endswith(".safetensors")}


def test_it_says_what_it_wrote_and_what_comes_next(run: Run, tiny_gemma4: Path, tmp_path: Path, finished: Path) -> None:
    out = tmp_path / "out"
    outcome = run("quantize", tiny_gemma4, out)
    assert outcome.code == 0
    assert "41 of " in outcome.out
    assert f"next: halfbyte verify {out} --source {tiny_gemma4}" in outcome.out
    assert "quantize" in outcome.err, "progress goes to stderr"
    assert weights(out) == weights(finished)
    assert not (out / WORK_FOLDER).exists()


def test_a_fitted_checkpoint_says_how_and_what_it_was_worth(run: Run, tiny_gemma4: Path, tmp_path: Path) -> None:
    (tmp_path / "own.txt").write_text("The mill by the river had eleven windows. " * 20)
    outcome = run("quantize", tiny_gemma4, tmp_path / "out", "--method", "gptq", "--calibration", tmp_path / "own.txt",
                  "--calibration-tokens", 300, "--fit", "candidates=2", "--fit", "sweeps=0", "--no-sequential")  # fmt: skip
    assert outcome.code == 0
    assert "method gptq: error compensation (GPTQ), calibrated on own.txt (sha256 " in outcome.out
    assert "against round to nearest (geometric mean of 41 tensors" in outcome.out
    assert "fit (gptq)" in outcome.err, "progress goes to stderr"


def test_json_is_the_record_on_disk(run: Run, tiny_gemma4: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    record = json.loads(run("quantize", tiny_gemma4, out, "--json").out)
    assert record == json.loads((out / "halfbyte" / "quantize.json").read_text())


def test_again_is_already_done_and_touches_nothing(run: Run, tiny_gemma4: Path, checkpoint: Path) -> None:
    before = contents(checkpoint)
    outcome = run("quantize", tiny_gemma4, checkpoint)
    assert outcome.code == 0
    assert "already done" in outcome.err
    assert contents(checkpoint) == before


def test_another_job_in_a_finished_folder_is_refused(refused: Refused, tiny_gemma4: Path, checkpoint: Path) -> None:
    before = contents(checkpoint)
    message = refused("quantize", tiny_gemma4, checkpoint, "--max-shard-size", "1MB")
    assert "holds another finished checkpoint" in message
    assert "--overwrite" in message
    assert contents(checkpoint) == before


def test_another_job_in_an_unfinished_folder_is_refused(refused: Refused, tiny_gemma4: Path, tmp_path: Path) -> None:
    journal = Journal(tmp_path / "out")
    journal.append({"job": "sha256:other", "detail": {"plan": "sha256:other"}})
    journal.close()
    message = refused("quantize", tiny_gemma4, tmp_path / "out")
    assert "unfinished job that is not this one: " in message
    assert "plan was 'sha256:other'" in message


def test_overwriting_an_unfinished_job_leaves_none_of_its_index_and_config(
    run: Run, tiny_gemma4: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between config.json and the end, a job of several shards leaves both."""
    out = tmp_path / "out"
    assert run("quantize", tiny_gemma4, out, "--max-shard-size", "1MB").code == 0
    journal = Journal(out)
    journal.append({"job": "sha256:other", "detail": {"plan": "sha256:other"}})
    for name in weights(out):
        journal.append({"shard": name, "sha256": "", "bytes": 0})
    journal.close()
    during: list[set[str]] = []
    stream = Job._stream
    monkeypatch.setattr(Job, "_stream", lambda *given: (during.append(set(os.listdir(out))), stream(*given)))
    assert run("quantize", tiny_gemma4, out, "--overwrite").code == 0
    assert "config.json" not in during[0], "until the last shard is there, no loader may take the folder for a model"
    assert not (out / "model.safetensors.index.json").exists()
    assert list(weights(out)) == ["model.safetensors"]


def test_a_folder_that_another_process_writes_is_refused(refused: Refused, tiny_gemma4: Path, tmp_path: Path) -> None:
    journal = Journal(tmp_path / "out")
    try:
        assert "another halfbyte process" in refused("quantize", tiny_gemma4, tmp_path / "out", "--overwrite")
    finally:
        journal.close()


def test_overwrite_replaces_ours_and_keeps_what_is_not(run: Run, tiny_gemma4: Path, checkpoint: Path) -> None:
    (checkpoint / "notes.txt").write_text("mine")
    outcome = run("quantize", tiny_gemma4, checkpoint, "--max-shard-size", "1MB", "--overwrite")
    assert outcome.code == 0
    assert not (checkpoint / "model.safetensors").exists(), "a shard of the old layout is left behind"
    assert len(weights(checkpoint)) > 1
    assert (checkpoint / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("options", [[], ["--overwrite"]])
def test_a_folder_with_foreign_files_is_never_touched(
    refused: Refused, tiny_gemma4: Path, tmp_path: Path, options: list[str]
) -> None:
    out = tmp_path / "photos"
    (out / "halfbyte").mkdir(parents=True)
    (out / "halfbyte" / "photo.raw").write_bytes(b"mine")
    (out / "model.safetensors").write_bytes(b"mine too")
    before = contents(out)
    assert "not a halfbyte checkpoint" in refused("quantize", tiny_gemma4, out, *options)
    assert contents(out) == before


def test_max_shard_size_bounds_every_shard(run: Run, tiny_gemma4: Path, tmp_path: Path, finished: Path) -> None:
    assert run("quantize", tiny_gemma4, tmp_path / "out", "--max-shard-size", "1MB").code == 0
    sizes = [len(data) for data in weights(tmp_path / "out").values()]
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert max(sizes) <= 10**6
    assert len(set(index["weight_map"].values())) == len(sizes) >= len(weights(finished)["model.safetensors"]) // 10**6


def test_a_disk_too_small_is_refused_before_anything_is_written(
    refused: Refused, tiny_gemma4: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1 << 20))
    assert "0.00 GiB are free" in refused("quantize", tiny_gemma4, tmp_path / "out")
    assert not (tmp_path / "out").exists()
