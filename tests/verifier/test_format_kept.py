"""docs/format.md sections 5 and 6: kept tensors, the inventory, config.json and the skip list."""

# ruff: noqa: N802  (the number of a rule is spelled as in the document)
from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from verifier import surgery

NORM = "model.language_model.layers.2.input_layernorm.weight"
SCALAR = "model.language_model.layers.3.layer_scalar"
EMBEDDING = "model.language_model.embed_tokens.weight"
TOWER = "model.vision_tower.encoder.layers.0.mlp.up_proj.linear.weight"


def test_F18_one_flipped_bit_in_a_kept_tensor_is_located(good: Path, source: Any, examine: Any) -> None:
    surgery.flip(good, EMBEDDING, at=2001, mask=0x01)
    assert examine(good, source=source)["F18"]["detail"] == f"{EMBEDDING}: differs from the source at element 1000"


def test_F18_a_kept_tensor_of_another_dtype_is_named(good: Path, source: Any, examine: Any) -> None:
    import torch

    def to_float(tensor: tuple[str, list[int], bytes]) -> tuple[str, list[int], bytes]:
        return "F32", tensor[1], torch.frombuffer(bytearray(tensor[2]), dtype=torch.bfloat16).float().numpy().tobytes()

    surgery.replace(good, NORM, to_float)
    checks = examine(good, source=source)
    assert checks["F18"]["where"] == checks["F19"]["where"] == NORM


@pytest.mark.parametrize("known", ["source", "plan", "neither"])
def test_F19_a_lost_layer_scalar_is_missed_by_name(
    good: Path, source: Any, plan: Any, examine: Any, known: str
) -> None:
    surgery.drop(good, SCALAR)
    options = {"source": {"source": source}, "plan": {"plan": plan}, "neither": {}}[known]
    assert examine(good, **options)["F19"]["where"] == SCALAR


def test_F19_a_tensor_that_the_source_does_not_have_is_named(good: Path, source: Any, examine: Any) -> None:
    surgery.rewrite(
        good, lambda parts: parts.update({"extra.weight": ("BF16", [1], b"\0\0")}) if NORM in parts else None
    )
    assert examine(good, source=source)["F19"]["where"] == "extra.weight"
    assert examine(good)["F19"]["where"] == "extra.weight"


def test_F19_a_quantized_vision_tower_contradicts_the_plan(everything_quantized: Path, plan: Any, examine: Any) -> None:
    checks = examine(everything_quantized, plan=plan)
    assert "is quantized, the plan says keep" in checks["F19"]["detail"]
    assert "vision: 15 quantized weights, the plan has 0" in checks["areas"]["detail"]


def test_F20_a_second_copy_of_a_tied_weight_is_refused(good: Path, source: Any, examine: Any) -> None:
    copy = next(parts[EMBEDDING] for parts in surgery.all_parts(good) if EMBEDDING in parts)
    surgery.rewrite(good, lambda parts: parts.update({"lm_head.weight": copy}) if EMBEDDING in parts else None)
    assert examine(good, source=source)["F20"]["status"] == "failed"


@pytest.mark.parametrize(("bits", "word"), [(0x7FC0, "NaN"), (0xFF80, "minus infinity")])
def test_F21_nan_and_infinity_in_a_kept_tensor_are_located(good: Path, examine: Any, bits: int, word: str) -> None:
    raw = bits.to_bytes(2, "little")
    surgery.replace(good, NORM, lambda t: (t[0], t[1], t[2][:8] + raw + t[2][10:]))
    assert examine(good)["F21"]["detail"] == f"{NORM}: element 4 is NaN or infinite", word


def test_F21_an_infinite_clip_bound_of_one_element_is_allowed(good: Path, examine: Any) -> None:
    surgery.replace(good, SCALAR, lambda t: (t[0], t[1], (0x7F80).to_bytes(2, "little")))
    assert examine(good)["F21"]["status"] == "passed"


def test_F23_a_config_that_transformers_rewrote_is_refused(
    good: Path, stock_checkpoint: Path, source: Any, examine: Any
) -> None:
    (good / "config.json").write_bytes((stock_checkpoint / "config.json").read_bytes())
    assert "text_config" in examine(good, source=source)["F23"]["detail"]


def test_F23_another_order_of_keys_is_refused(good: Path, source: Any, examine: Any) -> None:
    body = json.loads((good / "config.json").read_text())
    (good / "config.json").write_text(json.dumps(dict(sorted(body.items(), reverse=True))))
    assert "order" in examine(good, source=source)["F23"]["detail"]


def test_F23_a_folder_without_config_is_a_failed_check(good: Path, examine: Any) -> None:
    (good / "config.json").unlink()
    checks = examine(good)
    assert checks["F23"]["status"] == "failed"
    assert checks["F18"]["detail"] == "config.json cannot be read"


@pytest.mark.parametrize(
    "change",
    [{"bnb_4bit_use_double_quant": False}, {"bnb_4bit_compute_dtype": "float16"}, {"surprise": 1}],
    ids=lambda change: next(iter(change)),
)
def test_F24_another_quantization_config_is_refused(good: Path, examine: Any, change: dict[str, Any]) -> None:
    surgery.edit_json(good / "config.json", lambda body: body["quantization_config"].update(change))
    assert next(iter(change)) in examine(good)["F24"]["detail"]


def test_F24_the_document_shows_what_transformers_writes(stock_checkpoint: Path) -> None:
    document = (Path(__file__).parents[2] / "docs" / "format.md").read_text()
    shown = json.loads(document.split("**F24**")[1].split("```json")[1].split("```")[0])
    theirs = json.loads((stock_checkpoint / "config.json").read_text())["quantization_config"]
    assert list(shown.items()) == list({**theirs, "llm_int8_skip_modules": ["..."]}.items())


def test_F25_a_list_that_loaders_read_differently_is_refused(good: Path, examine: Any) -> None:
    bare = ["lm_head", "embed_tokens", "vision_tower", "embed_vision"]
    surgery.edit_json(good / "config.json", lambda body: body["quantization_config"].update(llm_int8_skip_modules=bare))
    detail = examine(good)["F25"]["detail"]
    assert "would make 4-bit what is not stored so: model.vision_tower" in detail
    assert "transformers 5" in detail


def test_F25_a_list_that_skips_a_quantized_layer_is_refused(good: Path, examine: Any) -> None:
    surgery.edit_json(
        good / "config.json", lambda body: body["quantization_config"]["llm_int8_skip_modules"].append("up_proj")
    )
    assert "leave in 16 bits what is stored as 4-bit" in examine(good)["F25"]["detail"]


def test_F25_an_entry_that_is_no_regular_expression_is_refused(good: Path, examine: Any) -> None:
    surgery.edit_json(
        good / "config.json", lambda body: body["quantization_config"].update(llm_int8_skip_modules=["("])
    )
    assert examine(good)["F25"]["status"] == "failed"


def test_a_plan_that_wants_a_tower_quantized_contradicts_a_kept_one(good: Path, plan: Any, examine: Any) -> None:
    decisions = [replace(d, action="nf4") if d.name == TOWER else d for d in plan.decisions]
    assert examine(good, plan=replace(plan, decisions=decisions))["F19"]["where"] == TOWER
