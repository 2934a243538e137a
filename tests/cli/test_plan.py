"""`halfbyte plan`: what it prints, as text and as JSON."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path

import pytest
from cli.conftest import Refused, Run

from halfbyte.demo.tiny_gemma4 import gemma4_config


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(gemma4_config(2048, 6, False)))
    return path


def test_json_has_modules_bytes_and_areas(run: Run, config: Path) -> None:
    outcome = run("plan", config, "--json")
    plan = json.loads(outcome.out)
    assert outcome.code == 0
    assert plan["modules"]["nf4"] == plan["areas"]["decoder"]["nf4_modules"] == 6 * 7 - 1
    assert plan["bytes"]["gpu"] < plan["bytes"]["source"] == sum(a["source_bytes"] for a in plan["areas"].values())
    assert plan["digest"].startswith("sha256:")
    assert "decisions" not in plan


def test_tensors_lists_every_tensor_with_its_reason(run: Run, config: Path) -> None:
    decisions = json.loads(run("plan", config, "--json", "--tensors").out)["decisions"]
    text = run("plan", config, "--tensors").out
    assert len(decisions) > 100
    assert all(d["reason"] and f"{d['action']:4}  {d['name']}  " in text for d in decisions)


def test_text_shows_what_each_loader_makes_of_the_list(run: Run, config: Path) -> None:
    text = run("plan", config).out
    assert "41 of 58 linear modules become Linear4bit" in text
    for loader in ("transformers 4.x", "transformers 5.0-5.10", "vLLM bitsandbytes plug-in"):
        (row,) = [line for line in text.splitlines() if line.startswith(loader)]
        assert "41 decoder" in row
    assert "every loader agrees" in text


def test_the_31b_is_410_modules_and_58_25_to_17_77_gib(run: Run, shared_data: Path) -> None:
    outcome = run("plan", shared_data / "gemma4/gemma-4-31B-it/config.json", "--json")
    plan = json.loads(outcome.out)
    assert (plan["modules"]["nf4"], plan["modules"]["by_area"]["vision"]["nf4"]) == (410, 0)
    assert [round(plan["bytes"][key] / 2**30, 2) for key in ("source", "gpu")] == [58.25, 17.77]


def test_unsloth_preset_on_the_31b_prints_601_and_410_and_that_they_disagree(run: Run, shared_data: Path) -> None:
    outcome = run("plan", shared_data / "gemma4/gemma-4-31B-it/config.json", "--preset", "unsloth")
    rows = {line[:25].strip(): line[25:].split() for line in outcome.out.splitlines()}
    assert outcome.code == 0
    assert rows["transformers 4.x"][0] == rows["vLLM bitsandbytes plug-in"][0] == "410"
    assert rows["transformers 5.0-5.10"][0] == "601"
    assert "loaders disagree (601 / 410)" in outcome.out
    mark = f"differs from transformers {version('transformers')}"
    marked = {loader for loader, cells in rows.items() if " ".join(cells).endswith(mark)}
    assert marked == {"transformers 4.x", "vLLM bitsandbytes plug-in"}, "the plan is what the installed one makes"
    assert "this plan" not in outcome.out, "the plan is not the measure of a list that is written as given"


def test_disagreement_can_be_made_an_error(refused: Refused, config: Path) -> None:
    message = refused("plan", config, "--preset", "unsloth", "--no-allow-disagreement")
    assert "vision" in message


def test_a_card_too_small_is_said_to_be(run: Run, config: Path, shared_data: Path) -> None:
    large = shared_data / "gemma4/gemma-4-31B-it/config.json"
    assert "does not fit a 16 GB card" in run("plan", large, "--card-gb", 16).out
    assert "fits a 24 GB card" in run("plan", config).out


def test_an_unknown_preset_is_refused(refused: Refused, config: Path) -> None:
    assert "no such preset: decoder" in refused("plan", config, "--preset", "decoder")


def test_a_config_that_is_not_json_is_refused(refused: Refused, config: Path) -> None:
    config.write_text("{")
    assert str(config) in refused("plan", config)


def test_a_model_type_that_transformers_does_not_know_is_refused(refused: Refused, config: Path) -> None:
    config.write_text(json.dumps({"model_type": "gemma5"}))
    assert "'gemma5'" in refused("plan", config)


def test_probe_reads_weights_and_says_that_random_ones_are_on_no_grid(run: Run, tiny_gemma4: Path) -> None:
    text = run("plan", tiny_gemma4, "--probe").out
    found = json.loads(run("plan", tiny_gemma4, "--probe", "--json").out)["lattice"]
    assert "lattice     the source is not on an int4 or NF4 grid" in text
    assert found["summary"]["verdicts"]["no"] == found["summary"]["quantized"] == len(found["tensors"])
    assert f"looked at   {found['sampled_weights']:,} weights" in text


def test_without_probe_nothing_is_said_of_a_lattice(run: Run, tiny_gemma4: Path) -> None:
    assert "lattice" not in run("plan", tiny_gemma4).out
    assert json.loads(run("plan", tiny_gemma4, "--json").out)["lattice"] is None


def test_probe_of_a_bare_config_is_refused(refused: Refused, config: Path) -> None:
    assert "a config.json has no weights to probe" in refused("plan", config, "--probe")
