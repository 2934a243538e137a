"""make_plan on checkpoints as they come: renamed, unknown, missing, doubled, mis-shaped, older layouts."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
from recipe.small_models import gpt2, llama, llava, mixtral, nf4_modules, plan_of, qwen2_vl, skeleton_of

from halfbyte.errors import PlanError, ShapeMismatch, UsageError
from halfbyte.format.tensors import TensorInfo
from halfbyte.recipe.plan import make_plan
from halfbyte.recipe.skeleton import Skeleton, tensors_of


def tensors(config: dict[str, object]) -> list[TensorInfo]:
    return tensors_of(skeleton_of(config)[0])


def info(name: str, shape: tuple[int, ...], dtype: str = "BF16") -> TensorInfo:
    return TensorInfo(name=name, dtype=dtype, shape=shape, file="model.safetensors", start=0)


def test_headers_and_a_bare_config_give_the_same_plan() -> None:
    config = llava()
    assert make_plan(config, tensors(config)).digest == make_plan(config, None).digest


def test_the_callers_config_is_not_changed(tiny_gemma4: Path) -> None:
    config = json.loads((tiny_gemma4 / "config.json").read_text())  # Gemma 4's class writes into what it is given
    before = copy.deepcopy(config)
    plan_of(config)
    assert config == before


def test_every_tensor_has_one_decision_in_the_sources_order() -> None:
    given = list(reversed(tensors(llava())))
    plan = make_plan(llava(), given)
    assert [d.name for d in plan.decisions] == [t.name for t in given]
    assert all(d.reason for d in plan.decisions)


def test_areas_of_a_llava() -> None:
    areas = {d.name: d.area for d in plan_of(llava()).decisions}
    assert areas["model.vision_tower.embeddings.position_embedding.weight"] == "vision"
    assert areas["model.multi_modal_projector.linear_1.weight"] == "projector"
    assert areas["model.language_model.embed_tokens.weight"] == "embeddings"
    assert areas["model.language_model.layers.0.mlp.up_proj.weight"] == "decoder"
    assert areas["lm_head.weight"] == "head"


def test_qwen_vls_merger_belongs_to_its_tower() -> None:
    merger = [d for d in plan_of(qwen2_vl()).decisions if ".merger." in d.name]
    assert {d.area for d in merger} == {"vision"}


def test_a_tower_is_known_by_its_config_even_where_its_name_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("halfbyte.recipe.areas._NAMES", {})
    towers = [d for d in plan_of(qwen2_vl()).decisions if ".visual." in d.name]
    assert {d.area for d in towers} == {"vision"}


def test_names_of_an_older_llava_are_planned_as_the_modules_they_load_into() -> None:
    def older(name: str) -> str:
        return name.replace("model.language_model.", "language_model.model.").replace(
            "lm_head", "language_model.lm_head"
        )

    given = [replace(t, name=older(t.name).replace("model.vision_tower.", "vision_tower.")) for t in tensors(llava())]
    plan = make_plan(llava(), given)
    assert nf4_modules(plan) == nf4_modules(plan_of(llava()))
    assert plan.decisions[0].name != tensors(llava())[0].name


def test_only_plain_linear_weights_become_nf4() -> None:
    plan = plan_of(llama(attention_bias=True))
    assert {(d.kind, len(d.shape)) for d in plan.decisions if d.action == "nf4"} == {("linear", 2)}
    biases = [d for d in plan.decisions if d.name.endswith(".bias")]
    assert {(d.action, d.reason) for d in biases} == {("keep", "bias")}


def test_gpt2s_transposed_conv1d_is_kept_and_the_emptiness_noted() -> None:
    plan = plan_of(gpt2())
    kept = [d for d in plan.decisions if d.kind == "conv1d"]
    assert len(kept) == 8
    assert {d.action for d in plan.decisions} == {"keep"}
    assert plan.notes[0].startswith("NOTHING BECOMES NF4")


def test_a_tensor_the_model_does_not_know_is_carried_and_noted() -> None:
    plan = make_plan(llama(), [*tensors(llama()), info("model.layers.99.rotary.table", (8,), "F32")])
    last = plan.decisions[-1]
    assert (last.action, last.kind, last.area, last.module) == ("keep", "unknown", "other", None)
    assert any("model.layers.99.rotary.table" in note for note in plan.notes)
    without = plan_of(llama()).summary["bytes"]
    assert plan.summary["bytes"]["gpu"] == without["gpu"]
    assert plan.summary["bytes"]["file"] == without["file"] + 32


def test_a_missing_decoder_linear_is_an_error_that_names_it() -> None:
    given = [t for t in tensors(llama()) if t.name != "model.layers.7.mlp.down_proj.weight"]
    with pytest.raises(PlanError, match=r"no tensor for model\.layers\.7\.mlp\.down_proj\.weight"):
        make_plan(llama(), given)


def test_a_missing_norm_is_a_note_that_names_it() -> None:
    plan = make_plan(llama(), [t for t in tensors(llama()) if t.name != "model.norm.weight"])
    assert any("the source lacks 1 tensor: model.norm.weight" in note for note in plan.notes)


def test_a_tied_head_is_not_missing_whichever_of_the_two_is_stored() -> None:
    config = llama(tie_word_embeddings=True)
    stored = [replace(t, name="lm_head.weight") if "embed_tokens" in t.name else t for t in tensors(config)]
    for given in (tensors(config), stored):
        assert not any("lacks" in note for note in make_plan(config, given).notes)


def test_two_names_for_one_parameter_are_refused() -> None:
    given = [*tensors(llama()), info("layers.0.mlp.up_proj.weight", (128, 64))]
    with pytest.raises(PlanError, match=r"both load into 'model\.layers\.0\.mlp\.up_proj\.weight'"):
        make_plan(llama(), given)


def test_a_shape_that_is_not_the_models_is_refused() -> None:
    given = [replace(t, shape=(64, 128)) if t.name.endswith("3.mlp.up_proj.weight") else t for t in tensors(llama())]
    with pytest.raises(ShapeMismatch, match=r"layers\.3\.mlp\.up_proj\.weight"):
        make_plan(llama(), given)


def test_a_decoder_weight_that_is_quantized_already_is_refused() -> None:
    given = [replace(t, dtype="F8_E4M3") if t.name.endswith("3.mlp.up_proj.weight") else t for t in tensors(llama())]
    with pytest.raises(PlanError, match="has dtype F8_E4M3"):
        make_plan(llama(), given)


def test_a_decoder_weight_that_loading_would_split_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def splitting(skeleton: Skeleton, names: Iterable[str]) -> dict[str, tuple[str | None, bool]]:
        return {name: (name, name.endswith("5.self_attn.q_proj.weight")) for name in names}

    monkeypatch.setattr("halfbyte.recipe.plan.model_names", splitting)
    with pytest.raises(PlanError, match=r"layers\.5\.self_attn\.q_proj\.weight is merged or split"):
        plan_of(llama())


def test_experts_stored_singly_are_kept_as_what_they_load_into() -> None:
    rest = [t for t in tensors(mixtral()) if ".experts." not in t.name]
    single = [
        info(f"model.layers.0.block_sparse_moe.experts.{i}.{w}.weight", (64, 128) if w == "w2" else (128, 64))
        for i in range(2)
        for w in ("w1", "w2", "w3")
    ]
    plan = make_plan(mixtral(), [*rest, *single])
    assert [(d.kind, d.action) for d in plan.decisions[-6:]] == [("fused_experts", "keep")] * 6
    assert "6 tensors" in plan.notes[0]
    assert not any("lacks" in note for note in plan.notes)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "my_model", "auto_map": {"AutoModel": "x.Y"}}, "brings its own code"),
        ({"hidden_size": 64}, "knows no model type None"),
        ({"model_type": "vit"}, "no language model of type 'vit'"),
        (llama(num_attention_heads=0), "config does not fit|cannot build"),
    ],
)
def test_a_model_that_cannot_be_built_is_a_plan_error_with_advice(config: dict[str, object], said: str) -> None:
    with pytest.raises(PlanError, match=said) as caught:
        plan_of(config)
    assert caught.value.todo


def test_a_blocksize_bitsandbytes_has_not_is_refused() -> None:
    with pytest.raises(UsageError, match="blocksize 48"):
        plan_of(llama(), blocksize=48)


def test_planning_imports_no_bitsandbytes() -> None:
    code = (
        "import sys; from halfbyte.recipe.plan import make_plan;"
        "assert 'torch' not in sys.modules;"
        f"make_plan({llama(num_hidden_layers=1)!r}, None); print('bitsandbytes' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
