"""A record that contradicts the weights, or another record, never reaches a card."""

from __future__ import annotations

from pathlib import Path

import pytest
from cards.paper_checkpoint import edit

from halfbyte.cards.evidence import gather
from halfbyte.errors import CheckFailed, SourceError, UnsafeName
from halfbyte.records import write_record


def test_missing_records_are_none_and_no_error(checkpoint: Path) -> None:
    for name in ("plan", "verify"):
        (checkpoint / "halfbyte" / f"{name}.json").unlink()
    evidence = gather(checkpoint)
    assert (evidence.plan, evidence.verify, evidence.generate, evidence.evaluations) == (None, None, None, {})


def test_no_quantize_record_is_an_error_that_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no quantize record") as caught:
        gather(tmp_path)
    assert "halfbyte quantize" in str(caught.value)


@pytest.mark.parametrize("name", ["verify", "generate", "evaluate-wikitext"])
def test_record_of_other_weights_names_both_digests(checkpoint: Path, name: str) -> None:
    write_record(checkpoint, name, {"weights_digest": "sha256:old", "checks": [], "passed": True, "results": []})
    with pytest.raises(SourceError) as caught:
        gather(checkpoint)
    message = str(caught.value)
    assert "sha256:old" in message
    assert gather_digest(checkpoint) in message
    assert f"halfbyte {name.partition('-')[0]}" in message


def gather_digest(folder: Path) -> str:
    import json

    return str(json.loads((folder / "halfbyte" / "quantize.json").read_text())["weights_digest"])


def test_failed_verification_of_changed_weights_is_not_called_an_old_record(checkpoint: Path) -> None:
    edit(checkpoint, "verify", lambda body: body.update(passed=False, weights_digest="sha256:flipped"))
    with pytest.raises(CheckFailed, match="verification failed and found weights sha256:flipped"):
        gather(checkpoint)


@pytest.mark.parametrize("change", [b"", b"one byte more"])
def test_weights_of_another_size_are_an_error(checkpoint: Path, change: bytes) -> None:
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] if not change else path.read_bytes() + change)
    with pytest.raises(SourceError, match="the quantize record says"):
        gather(checkpoint)


def test_lost_shard_is_an_error(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(SourceError, match="is missing"):
        gather(checkpoint)


def test_hash_edited_by_hand_is_an_error(checkpoint: Path) -> None:
    edit(checkpoint, "quantize", lambda body: body["files"]["model.safetensors"].update(sha256="00" * 32))
    with pytest.raises(SourceError, match="its own files give"):
        gather(checkpoint)


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/etc/passwd", "a\\b.safetensors", ".x.safetensors", "model.bin"]
)
def test_shard_name_that_is_more_than_a_file_name_is_refused(checkpoint: Path, name: str) -> None:
    from halfbyte.records import digest

    def rename(body: dict[str, object]) -> None:
        body.update(files={name: {"sha256": "ab", "bytes": 1}}, weights_digest=digest({name: "ab"}))

    edit(checkpoint, "quantize", rename)
    with pytest.raises(UnsafeName):
        gather(checkpoint)


def test_plan_of_another_job_is_an_error(checkpoint: Path) -> None:
    edit(checkpoint, "plan", lambda body: body["decisions"][0].update(action="keep"))
    with pytest.raises(SourceError, match="the plan says keep, the quantize record nf4"):
        gather(checkpoint)


@pytest.mark.parametrize(("name", "key"), [("quantize", "sizes"), ("plan", "decisions"), ("verify", "checks")])
def test_record_without_what_it_cannot_do_without_is_named(checkpoint: Path, name: str, key: str) -> None:
    edit(checkpoint, name, lambda body: body.pop(key))
    with pytest.raises(SourceError, match=f"the {name} record lacks {key}"):
        gather(checkpoint)
