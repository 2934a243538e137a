"""Presets: the schema, its errors, and what a user's own file does to a plan."""

from __future__ import annotations

from pathlib import Path

import pytest
from recipe.small_models import llama, llava, nf4_modules, plan_of

from halfbyte.errors import UsageError
from halfbyte.recipe.preset import BUILT_IN, load_preset, matches

UNSLOTH = [
    *["lm_head", "multi_modal_projector", "merger", "modality_projection", "router", "mlp.gate"],
    *["block_sparse_moe.gate", "mamba", "audio_tower", "vision_tower", "vision_embedder", "embed_vision"],
    *["embed_audio", "score", "classifier", "qa_outputs"],
]


def written(folder: Path, text: str) -> Path:
    path = folder / "mine.toml"
    path.write_text(text)
    return path


def test_unsloths_list_is_verbatim_and_in_order() -> None:
    assert list(load_preset("unsloth").skip_modules or ()) == UNSLOTH


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_built_in_entry_gives_a_reason(name: str) -> None:
    preset = load_preset(name)
    whys = [preset.why, *preset.areas.values(), *preset.modules.values(), *(preset.skip_modules or {}).values()]
    assert all(len(why) > 5 for why in whys)
    assert preset.name == name


@pytest.mark.parametrize(
    ("pattern", "module", "hit"),
    [
        ("router", "model.layers.0.router.proj", True),
        ("router", "model.layers.0.routers.proj", False),
        ("mlp.gate", "model.layers.0.mlp.gate", True),
        ("mlp.gate", "model.layers.0.mlp.gate_proj", False),
        ("layers.1", "model.layers.11.mlp", False),
        ("layers.*.self_attn", "model.layers.11.self_attn.q_proj", True),
        ("per_layer_*", "model.layers.0.per_layer_input_gate", True),
        ("a.b.c.d", "b.c", False),
    ],
)
def test_patterns_match_whole_components_in_a_row(pattern: str, module: str, hit: bool) -> None:
    assert matches(pattern, module) is hit


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name = ", "not TOML"),
        ('why = "x"\ncolour = "red"', "'colour'"),
        ('name = "x"', "'why'"),
        ('why = "x"\n[[keep]]\narea = "vision"', "'keep[0].why'"),
        ('why = "x"\n[[keep]]\narea = "visoin"\nwhy = "y"', "'keep[0].area'"),
        ('why = "x"\n[[keep]]\narea = "vision"\nmodule = "m"\nwhy = "y"', "'keep[0]'"),
        ('why = "x"\n[[keep]]\nmodul = "m"\nwhy = "y"', "'keep[0].modul'"),
        ('why = "x"\nkeep = ["mlp"]', "'keep'"),
        ('why = "x"\nextends = "unsloth"', "'extends'"),
        ('why = "x"\n[[skip_modules]]\nname = "a"\nwhy = "b"\n[[keep]]\nmodule = "m"\nwhy = "y"', "'keep'"),
        ('why = "x"\n[[skip_modules]]\nname = "a"', "'skip_modules[0].why'"),
    ],
)
def test_a_bad_file_is_refused_with_file_and_key(tmp_path: Path, text: str, said: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(UsageError) as caught:
        load_preset(path)
    assert said in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_preset_that_does_not_exist_is_refused() -> None:
    with pytest.raises(UsageError, match="no such preset: decoder_only"):
        load_preset("decoder_only")


def test_a_users_file_adds_to_decoder_only(tmp_path: Path) -> None:
    mine = written(tmp_path, 'why = "x"\n[[keep]]\nmodule = "layers.1.mlp"\nwhy = "layer 1 is fragile"\n')
    plan = plan_of(llava(), preset=mine)
    kept = [d for d in plan.decisions if d.reason == "layer 1 is fragile"]
    assert [d.module for d in kept] == [f"model.language_model.layers.1.mlp.{p}_proj" for p in ("gate", "up", "down")]
    assert not [name for name in nf4_modules(plan) if "vision_tower" in name]
    assert {"model.language_model.layers.1.mlp", "language_model.model.layers.1.mlp"} <= set(plan.skip_modules)


def test_extends_none_releases_the_tower_but_never_the_head(tmp_path: Path) -> None:
    mine = written(tmp_path, 'why = "x"\nextends = "none"\n')
    plan = plan_of(llava(), preset=mine)
    areas = {d.area for d in plan.decisions if d.action == "nf4"}
    assert areas == {"decoder", "vision", "projector"}


def test_a_pattern_that_matches_nothing_is_noted(tmp_path: Path) -> None:
    mine = written(tmp_path, 'why = "x"\n[[keep]]\nmodule = "layer.1.mlp"\nwhy = "a typo"\n')
    assert any("'layer.1.mlp' matches no module" in note for note in plan_of(llama(), preset=mine).notes)


def test_a_verbatim_list_is_written_as_given_and_decided_by_the_installed_rule(tmp_path: Path) -> None:
    entries = "\n".join(f'[[skip_modules]]\nname = "{n}"\nwhy = "because"' for n in ("lm_head", "o_proj"))
    plan = plan_of(llama(), preset=written(tmp_path, f'why = "x"\n{entries}'))
    assert plan.skip_modules == ["lm_head", "o_proj"]
    kept = [d for d in plan.decisions if d.name.endswith("o_proj.weight")]
    assert {(d.action, d.reason) for d in kept} == {("keep", "listed as 'o_proj': because")}
    assert len(nf4_modules(plan)) == 6 * 12
