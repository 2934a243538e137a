"""The published Gemma 4 configs: counts, bytes, skip lists. The figures were counted independently of this code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from recipe.small_models import counts, nf4_modules, plan_of

from halfbyte.errors import LoaderDisagreement
from halfbyte.recipe.decisions import Plan
from halfbyte.recipe.linter import lint
from halfbyte.recipe.sizes import GIB
from halfbyte.recipe.skeleton import build_skeleton

NAMES = ("31B-it", "26B-A4B-it", "12B", "E2B-it", "E4B-it")
OURS_31B = ["lm_head", "embed_tokens", "vision_tower", "embed_vision", "model.vision_tower", "model.embed_vision"]


@pytest.fixture(scope="module")
def configs(shared_data: Path) -> dict[str, dict[str, Any]]:
    return {n: json.loads((shared_data / f"gemma4/gemma-4-{n}/config.json").read_text()) for n in NAMES}


@pytest.fixture(scope="module")
def plans(configs: dict[str, dict[str, Any]]) -> dict[str, Plan]:
    return {name: plan_of(config) for name, config in configs.items()}


def test_31b_has_602_linears_of_which_410_become_nf4(plans: dict[str, Plan]) -> None:
    modules = plans["31B-it"].summary["modules"]
    assert (modules["linear"], modules["nf4"]) == (602, 410)
    assert modules["by_area"] == {
        "decoder": {"linear": 410, "nf4": 410},
        "vision": {"linear": 190, "nf4": 0},
        "projector": {"linear": 1, "nf4": 0},
        "head": {"linear": 1, "nf4": 0},
    }


def test_31b_shrinks_from_58_25_to_17_77_gib(plans: dict[str, Plan]) -> None:
    sizes = plans["31B-it"].summary["bytes"]
    assert round(sizes["source"] / GIB, 2) == 58.25
    assert (round(sizes["file"] / GIB, 2), round(sizes["gpu"] / GIB, 2)) == (17.77, 17.77)
    assert (
        sizes["source"] == 2 * 31273086512 + 2 * 60 + 2 * 2 * 1152
    )  # parameters, layer_scalar, std_bias and std_scale
    assert sizes["file"] == sizes["nf4"] + sizes["keep"]


def test_31b_skip_list_is_six_entries_and_every_loader_makes_410_modules_of_it(plans: dict[str, Plan]) -> None:
    plan = plans["31B-it"]
    assert plan.skip_modules == OURS_31B
    assert set(counts(plan).values()) == {410}
    assert all(row["agrees"] for row in plan.loaders.values())


@pytest.mark.parametrize(
    ("listed", "expected"),
    [
        (["lm_head", "vision_tower", "multi_modal_projector", "embed_tokens"], (411, 601, 601, 411)),
        (OURS_31B, (410, 410, 410, 410)),
        ([], (602, 602, 602, 601)),
    ],
)
def test_31b_lists_in_the_wild_are_read_differently(
    configs: dict[str, dict[str, Any]], listed: list[str], expected: tuple[int, ...]
) -> None:
    matrix = lint(listed, build_skeleton(configs["31B-it"]))
    assert tuple(row["modules"] for row in matrix.values()) == expected


def test_31b_with_unsloths_bare_list_is_refused_with_matrix_and_a_better_list(
    configs: dict[str, dict[str, Any]],
) -> None:
    shown = plan_of(configs["31B-it"], preset="unsloth", allow_disagreement=True)
    assert tuple(counts(shown).values()) == (410, 601, 601, 410)
    with pytest.raises(LoaderDisagreement) as caught:
        plan_of(configs["31B-it"], preset="unsloth")
    message = str(caught.value)
    assert "601 modules" in message
    assert "410 modules" in message
    assert ", ".join(OURS_31B) in message


def test_every_layer_scalar_is_in_the_plan_as_a_kept_buffer(plans: dict[str, Plan]) -> None:
    scalars = [d for d in plans["31B-it"].decisions if d.name.endswith("layer_scalar")]
    assert len(scalars) == 60
    assert {(d.kind, d.action, d.shape, d.area) for d in scalars} == {("buffer", "keep", (1,), "decoder")}


def test_tied_head_is_noted_and_stored_once(plans: dict[str, Plan]) -> None:
    plan = plans["31B-it"]
    assert not [d for d in plan.decisions if d.name == "lm_head.weight"]
    assert any("lm_head.weight = model.language_model.embed_tokens.weight" in note for note in plan.notes)


def test_26b_names_its_fused_experts_with_count_and_size(plans: dict[str, Plan]) -> None:
    plan = plans["26B-A4B-it"]
    experts = [d for d in plan.decisions if d.kind == "fused_experts"]
    assert len(experts) == 60
    assert {d.action for d in experts} == {"keep"}
    assert plan.notes[0].startswith("FUSED EXPERTS")
    assert "60 tensors, 42.54 GiB" in plan.notes[0]


def test_26b_keeps_every_router(plans: dict[str, Plan]) -> None:
    routers = [d for d in plans["26B-A4B-it"].decisions if d.name.endswith("router.proj.weight")]
    assert len(routers) == 30
    assert {d.action for d in routers} == {"keep"}


@pytest.mark.parametrize(("name", "nf4"), [("E2B-it", 275 - 70), ("E4B-it", 258)])
def test_e_models_keep_every_per_layer_module(plans: dict[str, Plan], name: str, nf4: int) -> None:
    plan = plans[name]
    assert plan.summary["modules"]["nf4"] == nf4
    assert not [module for module in nf4_modules(plan) if "per_layer" in module]
    assert {"per_layer_input_gate", "per_layer_projection", "audio_tower", "model.audio_tower"} <= set(
        plan.skip_modules
    )


def test_12b_protects_the_patch_embedder_under_the_name_that_vllm_gives_it(plans: dict[str, Plan]) -> None:
    plan = plans["12B"]
    assert plan.model["model_type"] == "gemma4_unified"
    assert set(counts(plan).values()) == {328}
    assert "vision_embedder.patch_dense" in plan.skip_modules


@pytest.mark.parametrize("name", NAMES)
def test_every_loader_agrees_with_the_default_plan(plans: dict[str, Plan], name: str) -> None:
    assert all(row["agrees"] for row in plans[name].loaders.values())
    assert plans[name].model["auto_class"] == "AutoModelForImageTextToText"


def test_a_plan_survives_its_record(plans: dict[str, Plan]) -> None:
    plan = plans["E2B-it"]
    again = Plan.from_dict(json.loads(json.dumps(plan.to_dict())))
    assert again == plan
    assert again.digest == plan.digest


def test_31b_cache_grows_80_mib_per_1024_tokens_beside_800_mib_of_windows(plans: dict[str, Plan]) -> None:
    cache = plans["31B-it"].summary["kv_cache"]
    # 10 full layers of 4 x 512, 50 sliding ones of 16 x 256; keys and values; bf16
    assert cache["bytes_per_1k_tokens_growing"] == 10 * 4 * 512 * 2 * 2 * 1024
    assert cache["sliding_window_bytes_full"] == 50 * 16 * 256 * 2 * 2 * 1024
    assert cache["at"]["8192"] == 8 * cache["bytes_per_1k_tokens_growing"] + cache["sliding_window_bytes_full"]


def test_e2b_layers_that_share_keys_store_none(plans: dict[str, Plan]) -> None:
    cache = plans["E2B-it"].summary["kv_cache"]
    # 15 of 35 layers have their own: 12 sliding of 256, 3 full of 512, one kv head
    assert cache["bytes_per_1k_tokens_growing"] == 3 * 512 * 2 * 2 * 1024
    assert cache["sliding_window_bytes_full"] == 12 * 256 * 2 * 2 * 512


def test_31b_fits_24_gb_with_a_context_that_fills_it_and_not_16(configs: dict[str, dict[str, Any]]) -> None:
    fit = plan_of(configs["31B-it"], card_gb=24).summary["fit"]
    growing = 10 * 4 * 512 * 2 * 2
    used = fit["weights_bytes"] + fit["max_context_tokens"] * growing + 50 * 16 * 256 * 2 * 2 * 1024
    assert fit["fits"]
    assert 0 <= fit["usable_bytes"] - used < growing
    assert plan_of(configs["31B-it"], card_gb=16).summary["fit"]["fits"] is False
