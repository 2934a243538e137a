"""Each loader's rule in small cases, and the installed one against what transformers and bitsandbytes really do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recipe.small_models import gpt2, llama, llava, skeleton_of

from halfbyte.errors import UsageError
from halfbyte.recipe.areas import Areas
from halfbyte.recipe.linter import (
    converted_by,
    early_5_rule,
    installed_rule,
    lint,
    transformers_4_rule,
    vllm_name,
    vllm_names,
    vllm_rule,
)
from halfbyte.recipe.skeleton import build_skeleton

TOWER = "model.vision_tower.layers.0.q_proj"


@pytest.mark.parametrize(
    ("entry", "name", "old", "early", "now", "vllm"),
    [
        # entry                module                           4.x    early  now    vLLM (same name given)
        ("vision_tower", TOWER, True, False, False, True),
        ("model.vision_tower", TOWER, True, True, True, True),
        ("vision_tower", "vision_tower.layers.0.q_proj", True, True, True, True),
        ("q_proj", TOWER, True, True, True, True),
        ("proj", TOWER, False, True, True, False),
        ("layers.1", "layers.11.q_proj", False, True, False, False),
        ("layers.1", "layers.1.q_proj", True, True, True, True),
        ("layers.1", "model.layers.1.q_proj", True, False, False, False),
        ("layers.*", "layers.11.q_proj", False, True, True, False),
        ("mlp.gate", "mlp.gate_proj", False, True, False, False),
        ("lm_head", "lm_head", True, True, True, True),
        ("head", "lm_head", False, True, True, False),
    ],
)
def test_one_entry_four_readings(entry: str, name: str, old: bool, early: bool, now: bool, vllm: bool) -> None:
    rules = (transformers_4_rule, early_5_rule, installed_rule, vllm_rule)
    assert tuple(bool(rule([entry])(name)) for rule in rules) == (old, early, now, vllm)


@pytest.mark.parametrize(
    ("path", "nested", "there"),
    [
        ("model.vision_tower.encoder.x", True, "vision_tower.encoder.x"),
        ("model.embed_audio.p", True, "embed_audio.p"),
        ("model.language_model.layers.0.self_attn.q_proj", True, "language_model.model.layers.0.self_attn.qkv_proj"),
        ("model.language_model.layers.0.mlp.up_proj", True, "language_model.model.layers.0.mlp.gate_up_proj"),
        ("lm_head", True, "language_model.lm_head"),
        ("lm_head", False, "lm_head"),
        ("model.layers.0.self_attn.o_proj", False, "model.layers.0.self_attn.o_proj"),
    ],
)
def test_vllm_has_its_own_names(path: str, nested: bool, there: str) -> None:
    assert vllm_name(path, nested) == there


def test_vllm_cannot_skip_one_part_of_a_fused_projection() -> None:
    skeleton, areas = skeleton_of(llama(num_hidden_layers=1))
    q = "model.layers.0.self_attn.q_proj"
    assert q in converted_by("vllm", [q, "q_proj"], skeleton, areas)
    whole = converted_by("vllm", ["qkv_proj"], skeleton, areas)
    assert not [name for name in whole if name.endswith(("q_proj", "k_proj", "v_proj"))]


def test_vllm_never_makes_the_head_4_bit() -> None:
    skeleton, areas = skeleton_of(llama(num_hidden_layers=1))
    assert "lm_head" not in converted_by("vllm", [], skeleton, areas)
    assert "lm_head" in converted_by("transformers_installed", [], skeleton, areas)


def test_disagreement_names_the_modules() -> None:
    skeleton, _ = skeleton_of(llava())
    wanted = [name for name in skeleton.convertible if ".language_model." in name]
    matrix = lint(["lm_head", "vision_tower", "multi_modal_projector"], skeleton, wanted=wanted)
    assert matrix["transformers_4"]["agrees"]
    assert not matrix["transformers_installed"]["agrees"]
    assert matrix["transformers_installed"]["extra"][0].startswith("model.vision_tower.")
    assert lint(["layers"], skeleton, wanted=wanted)["vllm"]["missing"] == wanted[:5]


@pytest.mark.parametrize("entry", ["mlp.(gate", "*", "[a", ""])
def test_an_entry_that_is_no_regular_expression_is_a_clear_error(entry: str) -> None:
    skeleton, _ = skeleton_of(llama(num_hidden_layers=1))
    with pytest.raises(UsageError, match="skip list entry"):
        lint(["lm_head", entry], skeleton)


def test_keep_in_fp32_modules_of_the_class_count_in_transformers_and_not_in_vllm(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from transformers import LlamaForCausalLM

    monkeypatch.setattr(LlamaForCausalLM, "_keep_in_fp32_modules", ["o_proj"])
    skeleton, areas = skeleton_of(llama(num_hidden_layers=1))
    found = {
        loader: converted_by(loader, ["lm_head"], skeleton, areas) for loader in ("transformers_installed", "vllm")
    }
    assert [any(name.endswith("o_proj") for name in names) for names in found.values()] == [False, True]


LISTS = [
    [],
    ["lm_head"],
    ["vision_tower", "embed_vision"],
    ["model.vision_tower", "embed_projection", "layers.1"],
    ["model.language_model.layers.1", "down_proj"],
    ["lm_head", "model.*layers.[02]", "o_proj|q_proj"],
]


def replaced_by_transformers(config: dict[str, Any], skip: list[str]) -> list[str]:
    """The oracle: what transformers' own code swaps for bitsandbytes' Linear4bit."""
    import bitsandbytes
    from transformers import BitsAndBytesConfig
    from transformers.integrations import replace_with_bnb_linear
    from transformers.quantizers.base import HfQuantizer

    model = build_skeleton(config).model
    avoid = HfQuantizer.get_modules_to_not_convert(model, list(skip), model._keep_in_fp32_modules)
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    replace_with_bnb_linear(model, modules_to_not_convert=avoid, quantization_config=quantization)
    return [name for name, module in model.named_modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]


@pytest.mark.parametrize("skip", LISTS)
def test_installed_rule_is_what_transformers_does_to_a_gemma_4(tiny_gemma4: Path, skip: list[str]) -> None:
    config = json.loads((tiny_gemma4 / "config.json").read_text())
    skeleton = build_skeleton(config)
    ours = converted_by("transformers_installed", skip, skeleton, Areas(skeleton))
    assert sorted(ours) == sorted(replaced_by_transformers(config, skip))
    assert ours


def test_installed_rule_is_what_transformers_does_to_gpt2s_conv1d() -> None:
    skeleton, areas = skeleton_of(gpt2())
    ours = converted_by("transformers_installed", ["lm_head"], skeleton, areas)
    assert sorted(ours) == sorted(replaced_by_transformers(gpt2(), ["lm_head"]))
    assert len(ours) == 8


WORDS = st.sampled_from(["model", "layers", "1", "11", "mlp", "gate", "gate_proj", "vision_tower", "lm_head"])
NAMES = st.lists(WORDS, min_size=1, max_size=4).map(".".join)


@settings(max_examples=200, deadline=None)
@given(entry=NAMES, name=NAMES)
def test_what_the_anchored_rule_skips_the_unanchored_one_skips_too(entry: str, name: str) -> None:
    assert not installed_rule([entry])(name) or early_5_rule([entry])(name)


@settings(max_examples=100, deadline=None)
@given(listed=st.lists(NAMES, max_size=3), extra=NAMES, name=NAMES)
def test_a_longer_list_never_converts_more(listed: list[str], extra: str, name: str) -> None:
    for rule in (transformers_4_rule, early_5_rule, installed_rule, vllm_rule):
        assert not rule(listed)(name) or rule([*listed, extra])(name)


def test_gemma_4_tower_is_named_otherwise_in_vllm(tiny_gemma4: Path) -> None:
    names = vllm_names(build_skeleton(json.loads((tiny_gemma4 / "config.json").read_text())))
    assert {there.split(".")[0] for there in names.values()} == {"vision_tower", "embed_vision", "language_model"}
