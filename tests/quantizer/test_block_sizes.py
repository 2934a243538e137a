"""Blocks of 32, and blocks of both sizes beside bf16 in one checkpoint: written, proven, and loaded by everyone."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from recipe.budget.paper_costs import write_costs

import halfbyte
from halfbyte.format.checkpoint import SafetensorsSource
from halfbyte.layers.weights import open_weights
from halfbyte.recipe.decisions import Plan
from halfbyte.runtime.linear.tensors import NAMES, read_stored
from halfbyte.verifier.job import examine

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def fine(tiny_gemma4: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything in blocks of 32."""
    out = tmp_path_factory.mktemp("fine") / "nf4"
    halfbyte.quantize(tiny_gemma4, out, blocksize=32)
    return out


@pytest.fixture(scope="module")
def mixed(tiny_gemma4: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some modules in blocks of 64, some of 32, some in bf16, as a budget on drawn costs has it."""
    place = tmp_path_factory.mktemp("mixed")
    free = halfbyte.plan(tiny_gemma4)
    config = json.loads((tiny_gemma4 / "config.json").read_text())
    costs = write_costs(place / "costs", config, free)
    halfbyte.quantize(tiny_gemma4, place / "nf4", budget="9.4bpw", sensitivity=costs)
    return place / "nf4"


def plan_in(folder: Path) -> Plan:
    return Plan.from_dict(json.loads((folder / "halfbyte" / "plan.json").read_text()))


def fates(plan: Plan) -> dict[str, int | None]:
    """Module -> its block size, None if the budget keeps it."""
    return {
        d.module: plan.blocksize_of(d) if d.action == "nf4" else None
        for d in plan.decisions
        if d.module and (d.action == "nf4" or d.reason.startswith("budget"))
    }


def failed(folder: Path, **options: Any) -> list[tuple[str, str]]:
    checks = examine(folder, generate=False, **options)["checks"]
    return [(check["id"], check["detail"]) for check in checks if check["status"] == "failed"]


def loaded(folder: Path) -> Any:
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.bfloat16, device_map={"": "cpu"})


@pytest.mark.parametrize("which", ["fine", "mixed"])
def test_stock_transformers_and_bitsandbytes_load_every_block_size(which: str, request: pytest.FixtureRequest) -> None:
    """Block size and values of each module as planned, and logits that are those of our own expansion."""
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    folder: Path = request.getfixturevalue(which)
    planned, model, weights = fates(plan_in(folder)), loaded(folder), open_weights(folder)
    names = {d.module: d.name for d in plan_in(folder).decisions}
    found = {}
    for path, module in model.named_modules():
        if path not in planned:
            continue
        if not isinstance(module, Linear4bit):
            found[path] = None
            value = module.weight
        else:
            state = module.weight.quant_state
            found[path] = state.blocksize
            value = dequantize_4bit(module.weight.data, state)
        assert torch.equal(value, weights.load(names[path])), path
    assert found == planned
    expected = {"fine": {32}, "mixed": {64, 32, None}}[which]
    assert set(found.values()) == expected
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([[5, 17, 400, 28]])).logits
    assert bool(logits.isfinite().all())
    weights.close()


@pytest.mark.parametrize("which", ["fine", "mixed"])
def test_it_is_verified_against_plan_and_source(which: str, request: pytest.FixtureRequest, tiny_gemma4: Path) -> None:
    folder: Path = request.getfixturevalue(which)
    source = SafetensorsSource(tiny_gemma4)
    assert failed(folder, source=source) == []
    source.close()


def test_another_block_size_than_the_plans_is_found(fine: Path) -> None:
    free = plan_in(fine)
    coarse = Plan.from_dict({**free.to_dict(), "blocksize": 64})
    found = dict(failed(fine, plan=coarse))
    assert "has blocks of 32, the plan says 64" in found["F19"]


def test_our_kernels_reader_takes_every_weight_and_fused_parts_have_one_size(mixed: Path) -> None:
    source, plan = SafetensorsSource(mixed), plan_in(mixed)
    infos = {info.name: info for info in source.tensors}
    sizes = {}
    for d in (d for d in plan.decisions if d.action == "nf4"):
        parts = {
            part: source.read(info, 0, info.numel)
            for part in NAMES
            for info in [infos[d.name if part == "weight" else f"{d.name}.{part}"]]
        }
        sizes[d.module] = read_stored(parts, d.name).blocksize
    source.close()
    assert sizes == {d.module: plan.blocksize_of(d) for d in plan.decisions if d.action == "nf4"}
    assert plan.budget is not None
    for group in plan.budget["groups"]:
        assert len({sizes.get(module) for module in group["modules"]}) == 1


def test_the_files_bytes_are_within_the_budget_and_near_what_was_foreseen(mixed: Path) -> None:
    record, plan = json.loads((mixed / "halfbyte" / "quantize.json").read_text()), plan_in(mixed)
    assert plan.budget is not None
    assert record["sizes"]["output_bytes"] <= plan.budget["at_most"] <= plan.budget["bytes"]
    nf4 = sum(d.action == "nf4" for d in plan.decisions)
    assert plan.budget["at_most"] - record["sizes"]["output_bytes"] <= 12 * nf4
    assert record["options"]["budget"] == "9.4bpw"


def test_a_candidate_rounded_on_the_way_is_what_quantize_writes(tiny_gemma4: Path, fine: Path) -> None:
    rounded, written = open_weights(f"{tiny_gemma4}@nf4-32"), open_weights(fine)
    different = [name for name in written.names() if not torch.equal(rounded.load(name), written.load(name))]
    assert different == []
    assert rounded.digest != open_weights(f"{tiny_gemma4}@nf4").digest
    rounded.close()
    written.close()


def test_the_card_says_which_bitsandbytes_and_how_the_budget_was_spent(mixed: Path, fine: Path) -> None:
    tally = Counter(fates(plan_in(mixed)).values())
    text = halfbyte.card(mixed).read_text()
    assert "`bitsandbytes` 0.49.2 or newer (blocks of 32)" in text
    assert "largest magnitude in 64 or 32 weights" in text
    assert "Budget `9.4bpw`" in text
    assert f"{tally[64]} NF4-64, {tally[32]} NF4-32, {tally[None]} stays BF16" in text
    assert "--budget 9.4bpw --sensitivity" in text
    assert f"{tally[32]} NF4: budget NF4-32" in text, "a reason of its own for every tensor is no table"
    plain = halfbyte.card(fine).read_text()
    assert "--blocksize 32" in plain
    assert "`bitsandbytes` 0.49.2 or newer" in plain
    assert "Budget" not in plain
