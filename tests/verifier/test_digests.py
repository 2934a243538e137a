"""Without the source: the quantize record's digests still catch what was changed afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from verifier import surgery

from halfbyte.records import digest, write_record

W = "model.language_model.layers.1.mlp.up_proj.weight"
NORM = "model.language_model.layers.2.input_layernorm.weight"


@pytest.fixture
def recorded(good: Path, tiny_gemma4: Path, plan: Any) -> Path:
    """The good checkpoint with the records that `quantize` leaves."""
    files = {p.name: {"sha256": surgery.sha256(p), "bytes": p.stat().st_size} for p in good.glob("*.safetensors")}
    import hashlib

    actions = {d.name: d.action for d in plan.decisions}
    tensors = {
        name: {"sha256": hashlib.sha256(raw).hexdigest(), "action": actions[name]}
        for parts in surgery.all_parts(tiny_gemma4)
        for name, (_, _, raw) in parts.items()
    }
    companions = {n: surgery.sha256(good / n) for n in ("config.json", "tokenizer.json", "chat_template.jinja")}
    weights = digest({name: entry["sha256"] for name, entry in sorted(files.items())})
    write_record(good, "plan", plan.to_dict())
    write_record(
        good, "quantize", {"files": files, "tensors": tensors, "companions": companions, "weights_digest": weights}
    )
    return good


def test_untouched_checkpoint_passes_and_has_the_recorded_weights_digest(recorded: Path) -> None:
    from halfbyte.records import read_record
    from halfbyte.verifier.job import examine

    body = examine(recorded, generate=False)
    assert [c for c in body["checks"] if c["status"] == "failed"] == []
    record = read_record(recorded, "quantize")
    assert record is not None
    assert body["weights_digest"] == record["weights_digest"]


def test_a_flipped_code_is_caught_by_the_file_digest(recorded: Path, examine: Any) -> None:
    path = next(p for p in sorted(recorded.glob("*.safetensors")) if W in surgery.read_shard(p)[0])
    header, _ = surgery.read_shard(path)
    raw = bytearray(path.read_bytes())
    at = (
        len(raw)
        - sum(e["data_offsets"][1] - e["data_offsets"][0] for e in header.values())
        + header[W]["data_offsets"][0]
    )
    raw[at] ^= 1
    path.write_bytes(bytes(raw))
    checks = examine(recorded)
    assert {key for key, check in checks.items() if check["status"] == "failed"} == {"digests"}
    assert checks["digests"]["where"] == path.name


def test_a_kept_tensor_is_held_against_the_digest_of_its_source(recorded: Path, examine: Any) -> None:
    surgery.flip(recorded, NORM)
    check = examine(recorded)["F18"]
    assert check["status"] == "failed"
    assert check["where"] == NORM


def test_a_changed_companion_is_caught_by_its_digest(recorded: Path, examine: Any) -> None:
    (recorded / "tokenizer.json").write_text("{}")
    assert examine(recorded)["F26"]["where"] == "tokenizer.json"


def test_with_a_record_scales_must_be_equal_to_the_byte(good: Path, recorded: Path, source: Any, examine: Any) -> None:
    surgery.replace(recorded, f"{W}.absmax", lambda t: (t[0], t[1], bytes([t[2][0] ^ 1]) + t[2][1:]))
    key = "F11 F12 F22"
    assert "1 of 512 scale codes differ" in examine(recorded, source=source)[key]["detail"]
    (recorded / "halfbyte" / "quantize.json").unlink()
    foreign = examine(recorded, source=source)[key]
    assert foreign["status"] == "passed", "one scale in 512, one step: what another device may write"
    assert "1 scales differ by a step" in foreign["detail"]


def test_without_a_record_a_scale_two_steps_off_is_still_a_fault(good: Path, source: Any, examine: Any) -> None:
    surgery.replace(good, f"{W}.absmax", lambda t: (t[0], t[1], bytes([(t[2][0] + 2) % 256]) + t[2][1:]))
    check = examine(good, source=source)["F11 F12 F22"]
    assert check["where"] == f"{W}.absmax"
    assert "by up to 2 steps" in check["detail"]


def test_sentences_tell_exactly_the_failed_checks(recorded: Path) -> None:
    from halfbyte.verifier import sentences
    from halfbyte.verifier.job import examine

    (recorded / "tokenizer.json").write_text("{}")
    body = examine(recorded, generate=False)
    assert body["passed"] is False
    (sentence,) = sentences(body)
    assert sentence.startswith("F26 ")
    assert sentence.endswith("tokenizer.json: changed since it was written")
