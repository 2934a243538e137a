"""docs/format.md sections 1 and 2: each test breaks one rule of a good checkpoint and expects the check to say so."""

# ruff: noqa: N802  (the number of a rule is spelled as in the document)
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from verifier import surgery

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


def failed(checks: dict[str, dict[str, Any]]) -> set[str]:
    return {key for key, check in checks.items() if check["status"] == "failed"}


def test_good_checkpoint_fails_nothing(good: Path, source: Any, plan: Any, examine: Any) -> None:
    checks = examine(good, source=source, plan=plan)
    assert failed(checks) == set()
    assert {key for key, check in checks.items() if check["status"] == "skipped"} == {
        "digests", "load", "modules", "values", "answers",
    }  # fmt: skip


def test_single_file_checkpoint_fails_nothing(good: Path, source: Any, examine: Any) -> None:
    first, second = surgery.all_parts(good)
    surgery.write_checkpoint(good, [first | second])
    assert failed(examine(good, source=source)) == set()


def test_F1_a_missing_shard_is_named(good: Path, examine: Any) -> None:
    (good / SECOND).unlink()
    checks = examine(good)
    assert checks["F1"]["status"] == "failed"
    assert SECOND in checks["F1"]["detail"]


def test_F1_a_weight_file_outside_the_index_is_named(good: Path, examine: Any) -> None:
    surgery.write_shard(good / "old.safetensors", {}, b"")
    assert "old.safetensors" in examine(good)["F1"]["detail"]


def test_F1_shards_must_count_to_their_number(good: Path, examine: Any) -> None:
    (good / SECOND).rename(good / "model-00003-of-00003.safetensors")
    surgery.edit_json(
        good / INDEX,
        lambda body: body["weight_map"].update(
            {n: "model-00003-of-00003.safetensors" for n, s in body["weight_map"].items() if s == SECOND}
        ),
    )
    assert "model-00003-of-00003" in examine(good)["F1"]["detail"]


def test_F2_an_index_with_another_shard_for_a_tensor_fails(good: Path, examine: Any) -> None:
    name = next(iter(surgery.read_shard(good / FIRST)[0]))
    surgery.edit_json(good / INDEX, lambda body: body["weight_map"].update({name: SECOND}))
    assert name in examine(good)["F2"]["detail"]


def test_F2_total_size_must_be_the_sum_of_the_tensors(good: Path, examine: Any) -> None:
    surgery.edit_json(good / INDEX, lambda body: body["metadata"].update(total_size=1))
    assert "total_size is 1" in examine(good)["F2"]["detail"]


def test_F3_a_shard_name_that_climbs_out_is_refused_and_nothing_is_loaded(good: Path, examine: Any) -> None:
    (good / FIRST).rename(good.parent / "elsewhere.safetensors")
    surgery.edit_json(
        good / INDEX,
        lambda body: body["weight_map"].update(
            {n: "../elsewhere.safetensors" for n, s in body["weight_map"].items() if s == FIRST}
        ),
    )
    checks = examine(good)
    assert "../elsewhere" in checks["F3"]["detail"]
    assert checks["load"] == {**checks["load"], "status": "skipped", "detail": "the files cannot be read safely"}


@pytest.mark.parametrize("name", ["../weight", "a/b", "..", ""])
def test_F3_a_tensor_name_like_a_path_is_refused(good: Path, examine: Any, name: str) -> None:
    surgery.edit_header(good / FIRST, lambda header: header.update({name: header.pop(next(iter(header)))}))
    assert examine(good)["F3"]["status"] == "failed"


def test_F4_a_header_longer_than_its_file_is_refused(good: Path, examine: Any) -> None:
    raw = (good / FIRST).read_bytes()
    (good / FIRST).write_bytes((1 << 40).to_bytes(8, "little") + raw[8:])
    assert "header claims" in examine(good)["F4-F6"]["detail"]


def test_F4_a_repeated_key_is_refused(good: Path, examine: Any) -> None:
    header, data = surgery.read_shard(good / FIRST)
    text = json.dumps(header)
    name = next(iter(header))
    twice = (text[:-1] + ", " + json.dumps({name: header[name]})[1:]).encode()
    (good / FIRST).write_bytes(len(twice).to_bytes(8, "little") + twice + data)
    assert "twice" in examine(good)["F4-F6"]["detail"]


def test_F5_offsets_must_span_what_dtype_and_shape_need(good: Path, examine: Any) -> None:
    name = next(n for n in surgery.read_shard(good / SECOND)[0] if n.endswith("embed_tokens.weight"))
    surgery.edit_header(good / SECOND, lambda header: header[name].update(dtype="F32"))
    assert name in examine(good)["F4-F6"]["detail"]


def test_F6_overlapping_tensors_are_refused(good: Path, examine: Any) -> None:
    header, _ = surgery.read_shard(good / FIRST)
    shapes = [(n, tuple(e["shape"]), e["dtype"]) for n, e in header.items()]
    one = shapes[0]
    other = next(s for s in shapes[1:] if s[1:] == one[1:])
    surgery.edit_header(good / FIRST, lambda h: h[other[0]].update(data_offsets=h[one[0]]["data_offsets"]))
    assert "overlap" in examine(good)["F4-F6"]["detail"]


def test_F6_a_truncated_shard_is_refused(good: Path, examine: Any) -> None:
    raw = (good / SECOND).read_bytes()
    (good / SECOND).write_bytes(raw[:-100])
    checks = examine(good)
    assert "cut short" in checks["F4-F6"]["detail"]
    assert checks["F9"]["status"] == "skipped"


def test_F6_bytes_after_the_last_tensor_are_refused(good: Path, examine: Any) -> None:
    with (good / FIRST).open("ab") as file:
        file.write(b"hidden")
    assert "longer than its header" in examine(good)["F4-F6"]["detail"]


def test_F7_data_must_begin_at_a_multiple_of_eight(good: Path, examine: Any) -> None:
    raw = (good / FIRST).read_bytes()
    size = int.from_bytes(raw[:8], "little")
    (good / FIRST).write_bytes((size + 4).to_bytes(8, "little") + raw[8 : 8 + size] + b"    " + raw[8 + size :])
    assert "not a multiple of 8" in examine(good)["F7"]["detail"]


def test_F7_a_tensor_must_begin_at_a_multiple_of_its_element_size(good: Path, examine: Any) -> None:
    parts = surgery.all_parts(good)[0]
    wide = next(n for n, t in parts.items() if t[0] == "F32")
    odd = next(n for n, t in parts.items() if t[0] == "U8" and len(t[2]) % 2)
    header, data = {}, b""
    for name in [odd, wide, *(n for n in parts if n not in (odd, wide))]:
        dtype, shape, raw = parts[name]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    surgery.write_shard(good / FIRST, header, data)
    assert wide in examine(good)["F7"]["detail"]


def test_F8_a_private_weight_file_beside_a_public_config_fails(good: Path, examine: Any) -> None:
    (good / "config.json").chmod(0o644)
    (good / FIRST).chmod(0o600)
    checks = examine(good)
    assert FIRST in checks["F8"]["detail"]
    assert checks["F9"]["status"] == "passed"


def test_F26_a_changed_template_and_a_lost_tokenizer_are_named(good: Path, source: Any, examine: Any) -> None:
    (good / "chat_template.jinja").write_text("changed")
    (good / "tokenizer.json").unlink()
    detail = examine(good, source=source)["F26"]["detail"]
    assert "chat_template.jinja: differs" in detail
    assert "tokenizer.json: is in the source and not here" in detail


def test_folder_without_weights_is_a_failed_check_not_a_traceback(tmp_path: Path, examine: Any) -> None:
    checks = examine(tmp_path)
    assert "no safetensors weights" in checks["F1"]["detail"]
    assert "passed" not in {checks[key]["status"] for key in ("F9", "F18", "F19", "load")}
