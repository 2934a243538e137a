"""The derived list: what it says, and that all four loaders read it alike."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recipe.small_models import (
    counts,
    gpt2,
    llama,
    llava,
    mixtral,
    nf4_modules,
    plan_of,
    qwen2_moe,
    qwen2_vl,
    skeleton_of,
)

from halfbyte.recipe.linter import lint
from halfbyte.recipe.skip_list import derive_skip_modules

BLOCKS = ["self_attn", "mlp"]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (llama(), ["lm_head", "embed_tokens"]),
        (mixtral(), ["lm_head", "embed_tokens"]),
        (qwen2_moe(), ["lm_head", "embed_tokens", "shared_expert_gate"]),
        (qwen2_vl(), ["lm_head", "embed_tokens", "visual", "model.visual"]),
        (
            llava(),
            [
                *["lm_head", "embed_tokens", "vision_tower", "multi_modal_projector"],
                *["model.vision_tower", "model.multi_modal_projector"],
            ],
        ),
        (gpt2(), ["lm_head", "embed_tokens", "transformer"]),
    ],
    ids=lambda value: value.get("model_type") if isinstance(value, dict) else "",
)
def test_the_list_and_the_agreement_of_every_loader(config: dict[str, object], expected: list[str]) -> None:
    plan = plan_of(config)
    assert plan.skip_modules == expected
    assert set(counts(plan).values()) == {len(nf4_modules(plan))}


@settings(max_examples=40, deadline=None)
@given(kept=st.sets(st.tuples(st.integers(0, 11), st.sampled_from(BLOCKS)), max_size=23))
@pytest.mark.parametrize("config", [llama(), llava()], ids=["llama", "llava"])
def test_any_choice_of_whole_blocks_has_a_list_that_all_loaders_read_alike(
    config: dict[str, object], kept: set[tuple[int, str]]
) -> None:
    skeleton, areas = SKELETONS.setdefault(str(config), skeleton_of(config))
    away = tuple(f".layers.{layer}.{block}." for layer, block in kept)
    nf4 = [
        name
        for name in skeleton.convertible
        if areas.area_of(name) == "decoder" and not any(block in name for block in away)
    ]
    listed = derive_skip_modules(nf4, skeleton, areas)
    assert all(row["agrees"] for row in lint(listed, skeleton, wanted=nf4, areas=areas).values())


SKELETONS: dict[str, tuple] = {}  # type: ignore[type-arg]


def test_a_whole_layer_is_never_named_by_its_number_alone() -> None:
    skeleton, areas = skeleton_of(llama())
    nf4 = [n for n in skeleton.convertible if areas.area_of(n) == "decoder" and ".layers.1." not in n]
    listed = derive_skip_modules(nf4, skeleton, areas)
    assert listed[2:] == ["model.layers.1.self_attn", "model.layers.1.mlp"]


def test_keeping_one_part_of_a_fused_projection_is_a_disagreement_with_vllm() -> None:
    skeleton, areas = skeleton_of(llama())
    nf4 = [n for n in skeleton.convertible if areas.area_of(n) == "decoder" and not n.endswith("layers.3.mlp.up_proj")]
    matrix = lint(derive_skip_modules(nf4, skeleton, areas), skeleton, wanted=nf4, areas=areas)
    assert [row["agrees"] for row in matrix.values()] == [True, True, True, False]
    assert matrix["vllm"]["extra"] == ["model.layers.3.mlp.up_proj"]


def test_a_projection_kept_in_every_layer_is_listed_once_with_its_fused_name() -> None:
    skeleton, areas = skeleton_of(llama())
    nf4 = [
        n for n in skeleton.convertible if areas.area_of(n) == "decoder" and not n.endswith(("gate_proj", "up_proj"))
    ]
    listed = derive_skip_modules(nf4, skeleton, areas)
    assert listed == ["lm_head", "embed_tokens", "gate_proj", "gate_up_proj", "up_proj"]
    assert all(row["agrees"] for row in lint(listed, skeleton, wanted=nf4, areas=areas).values())


def test_a_bare_name_that_would_hit_an_nf4_module_gives_way_to_full_paths() -> None:
    skeleton, areas = skeleton_of(llava())
    kept = [n for n in skeleton.convertible if n.startswith("model.vision_tower.") and ".mlp." in n]
    nf4 = [n for n in skeleton.convertible if n not in kept and areas.area_of(n) != "head"]
    listed = derive_skip_modules(nf4, skeleton, areas)
    assert kept
    assert "mlp" not in listed
    assert "model.vision_tower.encoder.layers.1.mlp" in listed
    assert all(row["agrees"] for row in lint(listed, skeleton, wanted=nf4, areas=areas).values())
