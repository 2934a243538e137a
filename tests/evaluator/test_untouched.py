"""Areas outside the decoder: one changed weight in a tower is found and said aloud; names and dtypes may differ, values may not."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from layers.drawn_weights import DrawnWeights, config_of

from halfbyte.cards.report.words import untouched
from halfbyte.evaluator.diagnosis import untouched as module
from halfbyte.evaluator.diagnosis.untouched import untouched_areas
from halfbyte.layers.weights import open_weights

TOWER = "model.vision_tower.encoder.layers.1.self_attn.q_proj.linear.weight"


def by_area(found: dict[str, Any]) -> dict[str, tuple[int, int, bool]]:
    return {row["area"]: (row["identical"], row["tensors"], row["same"]) for row in found["areas"]}


def change_one_weight(folder: Path, name: str, value: float) -> None:
    """In place: the first element of one tensor."""
    from safetensors.torch import load_file, save_file

    for path in sorted(folder.glob("*.safetensors")):
        tensors = load_file(path)
        if name in tensors:
            tensors[name].view(-1)[0] = value
            save_file(tensors, path, metadata={"format": "pt"})
            return
    raise AssertionError(f"no tensor {name}")


def test_nf4_of_the_decoder_leaves_everything_else_identical(tiny_gemma4: Path, tiny_nf4: Path, tmp_path: Path) -> None:
    found = untouched_areas(open_weights(tiny_gemma4), open_weights(tiny_nf4), tmp_path)
    assert by_area(found) == {"vision": (30, 30, True), "projector": (1, 1, True), "embeddings": (1, 1, True)}
    assert found["head_tied"]
    said = untouched(found)
    assert (
        "vision tower, projector and embeddings (with the head, which is tied to them): 32 of 32 tensors identical"
        in said
    )
    assert "NOT" not in said
    assert not found["cached"]
    assert untouched_areas(open_weights(tiny_gemma4), open_weights(tiny_nf4), tmp_path) == {**found, "cached": True}


def test_one_changed_weight_of_the_tower_is_said_aloud(tiny_gemma4: Path, tmp_path: Path) -> None:
    changed = Path(shutil.copytree(tiny_gemma4, tmp_path / "changed"))
    change_one_weight(changed, TOWER, 3.0)
    found = untouched_areas(open_weights(tiny_gemma4), open_weights(changed), tmp_path)
    assert by_area(found) == {"vision": (29, 30, False), "projector": (1, 1, True), "embeddings": (1, 1, True)}
    (vision,) = [row for row in found["areas"] if not row["same"]]
    assert vision["first"] == TOWER
    said = untouched(found)
    assert f"VISION TOWER NOT THE REFERENCE'S: only 29 of 30 tensors identical, first {TOWER}" in said
    assert "projector and embeddings" in said


class Drawn(DrawnWeights):
    """Some tensors gone."""

    gone: tuple[str, ...] = ()

    def names(self) -> list[str]:
        return [name for name in super().names() if not name.startswith(self.gone)]


def test_a_missing_tower_nan_and_another_shape_are_not_identical(tmp_path: Path) -> None:
    mine, theirs = DrawnWeights(config_of("gemma4")), Drawn(config_of("gemma4"), "theirs")
    theirs.gone = ("model.vision_tower",)
    embedding, projector = "model.language_model.embed_tokens.weight", "model.embed_vision.embedding_projection.weight"
    theirs.changes = {embedding: mine.load(embedding)[:-1], projector: mine.load(projector) * float("nan")}
    theirs._shapes = {**theirs._shapes, embedding: torch.Size([1023, 128])}
    found = untouched_areas(mine, theirs, tmp_path)
    assert by_area(found) == {"vision": (0, 30, False), "projector": (0, 1, False), "embeddings": (0, 1, False)}
    assert found["areas"][0]["missing"] == 30
    assert "30 not in both" in untouched(found)


def test_equal_means_equal_values_in_any_dtype_and_in_slices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SLICE", 1000)
    mine, wide = DrawnWeights(config_of("llama")), DrawnWeights(config_of("llama"), "wide")
    wide.changes = {name: mine.load(name).float() for name in mine.names()}
    found = untouched_areas(mine, wide, tmp_path)
    assert by_area(found) == {"embeddings": (1, 1, True), "head": (1, 1, True)}
    assert not found["head_tied"]
    wide.changes["lm_head.weight"][-1, -1] += 1
    wide.label = "wider"
    assert by_area(untouched_areas(mine, wide, tmp_path))["head"] == (0, 1, False)
