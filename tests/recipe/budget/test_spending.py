"""A budget: what is decided together, what the decisions say, that every loader reads the result alike, and what is refused."""

from __future__ import annotations

import json
import re
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from recipe.budget.paper_costs import change, groups, write_costs
from recipe.small_models import counts, llama, llava, nf4_modules, plan_of, qwen2_vl

from halfbyte.demo.tiny_gemma4 import gemma4_config
from halfbyte.errors import SourceError, UsageError
from halfbyte.recipe import survey
from halfbyte.recipe.decisions import Plan, PlanOptions
from halfbyte.recipe.survey import plan

MODELS = {"llama": llama(), "llava": llava(), "qwen2_vl": qwen2_vl(), "gemma4": gemma4_config(1024, 6, False)}


@pytest.fixture
def small(tmp_path: Path) -> tuple[Path, Path, Plan]:
    """config.json of a small Llama of 2 layers, its costs, its plan without a budget."""
    return placed(llama(num_hidden_layers=2), tmp_path)


def placed(config: dict[str, Any], folder: Path, seed: int = 0) -> tuple[Path, Path, Plan]:
    (folder / "config.json").write_text(json.dumps(config))
    free = plan_of(config)
    return folder / "config.json", write_costs(folder / "costs", config, free, seed), free


def bounds(config: Path, costs: Path) -> tuple[int, int]:
    """Smallest and largest budget, as the refusals of one byte and of far too much state them."""
    with pytest.raises(UsageError, match="are too few") as small:
        plan(config, budget="1B", sensitivity=costs)
    with pytest.raises(UsageError, match="quantize nothing") as large:
        plan(config, budget="900GB", sensitivity=costs)
    smallest, largest = (int(e.value.what.rpartition(" ")[2].strip("()").replace(",", "")) for e in (small, large))
    return smallest, largest


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("share", [0.02, 0.3, 0.8])
def test_every_loader_reads_a_budgets_plan_alike(model: str, share: float, tmp_path: Path) -> None:
    config, costs, free = placed(MODELS[model], tmp_path)
    smallest, largest = bounds(config, costs)
    limit = smallest + int(share * (largest - smallest))
    made = plan(config, budget=f"{limit}B", sensitivity=costs, allow_disagreement=False)
    assert set(counts(made).values()) == {len(nf4_modules(made))}
    assert made.summary["bytes"]["file"] <= limit
    assert made.budget is not None
    assert made.summary["bytes"]["file"] <= made.budget["at_most"] <= limit
    if share > 0.1:
        assert len(nf4_modules(made)) < len(nf4_modules(free)), "nothing was kept: nothing was tested"


def test_what_vllm_fuses_is_decided_as_one(tmp_path: Path) -> None:
    config, costs, free = placed(MODELS["gemma4"], tmp_path)
    named = {g.name: g.modules for g in groups(MODELS["gemma4"], free)}
    root = "model.language_model.layers.0"
    assert named[f"{root}.self_attn.qkv_proj"] == tuple(f"{root}.self_attn.{part}_proj" for part in "qkv")
    assert named[f"{root}.mlp.gate_up_proj"] == tuple(f"{root}.mlp.{part}_proj" for part in ("gate", "up"))
    assert named[f"{root}.mlp.down_proj"] == (f"{root}.mlp.down_proj",)
    smallest, largest = bounds(config, costs)
    made = plan(config, budget=f"{smallest + int(0.33 * (largest - smallest))}B", sensitivity=costs)
    fates = {d.module: (d.action, d.blocksize) for d in made.decisions}
    assert all(len({fates[module] for module in modules}) == 1 for modules in named.values())
    assert len({fates[modules[0]] for modules in named.values()}) == 3, "not all three choices were made"


def test_no_other_choice_within_the_budget_costs_less(small: tuple[Path, Path, Plan]) -> None:
    config, costs, _ = small
    smallest, largest = bounds(config, costs)
    for share in (0.05, 0.4):
        made = plan(config, budget=f"{smallest + int(share * (largest - smallest))}B", sensitivity=costs)
        spent = made.budget
        assert spent is not None
        rest = spent["smallest"] - sum(g["bytes"]["nf4-64"] for g in spent["groups"])
        every = product(
            *[[(g["bytes"][c], g["nats"][c]) for c in ("nf4-64", "nf4-32", "keep")] for g in spent["groups"]]
        )
        best = min(sum(n for _, n in chosen) for chosen in every if rest + sum(b for b, _ in chosen) <= spent["bytes"])
        assert spent["nats"] == pytest.approx(best, rel=1e-9)


@pytest.mark.parametrize(("share", "made_of"), [(0.006, {"nf4-64", "nf4-32"}), (0.33, {"nf4-32", "keep"})])
def test_decisions_carry_their_block_and_a_reason_with_nats_and_bytes(
    share: float, made_of: set[str], small: tuple[Path, Path, Plan]
) -> None:
    config, costs, _ = small
    smallest, largest = bounds(config, costs)
    made = plan(config, budget=f"{smallest + int(share * (largest - smallest))}B", sensitivity=costs)
    spent = made.budget
    assert spent is not None
    chosen = {module: g["choice"] for g in spent["groups"] for module in g["modules"]}
    assert set(chosen.values()) == made_of
    fate = {"nf4-64": ("nf4", 64), "nf4-32": ("nf4", 32), "keep": ("keep", 64)}
    said = {"nf4-64": "budget NF4-64: costs", "nf4-32": "budget NF4-32: saves", "keep": "budget stays BF16: saves"}
    for d in made.decisions:
        assert d.reason.startswith("budget") == (d.module in chosen)
        if d.module in chosen:
            assert (d.action, made.blocksize_of(d)) == fate[chosen[d.module]]
            assert re.match(said[chosen[d.module]] + r" [\d.e-]+ nats.* for [\d.]+ [kM]B", d.reason), d.reason
    assert "(q_proj, k_proj, v_proj as one)" in next(d.reason for d in made.decisions if "q_proj" in d.name)
    assert Plan.from_dict(json.loads(json.dumps(made.to_dict()))) == made


def test_finer_blocks_that_were_measured_to_be_no_better_are_not_bought(small: tuple[Path, Path, Plan]) -> None:
    config, costs, _ = small
    record = json.loads((costs / "halfbyte" / "sensitivity.json").read_text())
    worse = record["groups"][0]
    worse["costs"]["nf4-32"]["kld"] = 1.1 * worse["costs"]["nf4-64"]["kld"]
    smallest, largest = bounds(config, costs)
    limit = smallest + int(0.015 * (largest - smallest))
    made = plan(config, budget=f"{limit}B", sensitivity=change(costs, groups=record["groups"]))
    told = {d.module: d.reason for d in made.decisions}
    assert all("NF4-32 was measured to save nothing for" in told[module] for module in worse["modules"])


def test_the_digest_tells_block_sizes_apart_and_is_the_old_one_without(small: tuple[Path, Path, Plan]) -> None:
    config, costs, free = small
    smallest, largest = bounds(config, costs)
    made = plan(config, budget=f"{smallest + (largest - smallest) // 3}B", sensitivity=costs)
    assert made.digest != free.digest
    one = next(i for i, d in enumerate(free.decisions) if d.action == "nf4")
    body = free.to_dict()
    body["decisions"][one]["blocksize"] = 64
    assert Plan.from_dict(body).digest == free.digest, "64 said aloud is still 64"
    body["decisions"][one]["blocksize"] = 32
    assert Plan.from_dict(body).digest != free.digest


def test_bits_a_weight_are_a_budget_too(small: tuple[Path, Path, Plan]) -> None:
    config, costs, _ = small
    made = plan(config, budget="9bpw", sensitivity=costs)
    assert made.summary["bits_per_weight"] <= 9
    assert made.budget is not None
    assert made.budget["asked"] == "9bpw"


def test_a_module_that_was_not_measured_stays_as_the_preset_has_it(small: tuple[Path, Path, Plan]) -> None:
    config, costs, _ = small
    record = json.loads((costs / "halfbyte" / "sensitivity.json").read_text())
    left_out, *others = record["groups"]
    made = plan(config, budget="9bpw", sensitivity=change(costs, groups=others))
    assert made.budget is not None
    assert made.budget["unmeasured"] == left_out["modules"]
    told = {d.module: (d.action, d.reason) for d in made.decisions}
    assert {told[module] for module in left_out["modules"]} == {("nf4", "linear of the decoder")}


def test_what_cannot_be_spent_is_refused(small: tuple[Path, Path, Plan], tmp_path: Path) -> None:
    config, costs, _ = small
    smallest, largest = bounds(config, costs)
    plan(config, budget=f"{smallest}B", sensitivity=costs)
    plan(config, budget=f"{largest - 1}B", sensitivity=costs)
    with pytest.raises(UsageError, match="too few"):
        plan(config, budget=f"{smallest - 1}B", sensitivity=costs)
    with pytest.raises(UsageError, match="quantize nothing"):
        plan(config, budget=f"{largest}B", sensitivity=costs)
    with pytest.raises(UsageError, match="none are given"):
        plan(config, budget="9bpw")
    with pytest.raises(UsageError, match="nothing is decided by it"):
        plan(config, sensitivity=costs)
    with pytest.raises(UsageError, match="is not a size"):
        plan(config, budget="plenty", sensitivity=costs)
    with pytest.raises(UsageError, match="chooses block sizes itself"):
        plan(config, budget="9bpw", sensitivity=costs, blocksize=32)
    with pytest.raises(UsageError, match="writes its own skip list"):
        plan(config, budget="9bpw", sensitivity=costs, preset="unsloth")
    (tmp_path / "other").mkdir()
    other, _, _ = placed(llama(num_hidden_layers=3), tmp_path / "other")
    with pytest.raises(UsageError, match="other tensors"):
        plan(other, budget="9bpw", sensitivity=costs)


@pytest.mark.parametrize("lie", [-1e-3, float("nan"), float("inf"), "0.1", True, None])
def test_a_record_with_a_lie_in_it_is_refused(small: tuple[Path, Path, Plan], lie: object) -> None:
    config, costs, _ = small
    record = json.loads((costs / "halfbyte" / "sensitivity.json").read_text())
    record["groups"][0]["costs"]["nf4-32"]["kld"] = lie
    with pytest.raises(SourceError, match="no number of nats"):
        plan(config, budget="9bpw", sensitivity=change(costs, groups=record["groups"]))


def test_a_file_that_is_no_record_is_refused(small: tuple[Path, Path, Plan], tmp_path: Path) -> None:
    config, costs, _ = small
    with pytest.raises(SourceError, match="no sensitivity record"):
        plan(config, budget="9bpw", sensitivity=tmp_path / "absent")
    with pytest.raises(SourceError, match="is not a sensitivity record"):
        plan(config, budget="9bpw", sensitivity=change(costs, record="evaluate"))


def test_options_have_one_list_of_names() -> None:
    assert survey.plan_options({}) == PlanOptions()
    with pytest.raises(UsageError, match="unknown option 'blocksise'"):
        survey.plan_options({"blocksise": 32})
