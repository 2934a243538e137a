"""Variants carried side by side are, to the bit, models whose tensors are rounded; whatever layers say to each other."""

from __future__ import annotations

import pytest
import torch
from layers.drawn_weights import DrawnWeights, config_of
from layers.small_rows import random_rows

from halfbyte.evaluator.sensitivity.carrying import CarryingModel, Variant
from halfbyte.layers.streaming import StreamedModel
from halfbyte.layers.weights import round_to_nf4
from halfbyte.recipe.budget.groups import groups_of
from halfbyte.recipe.plan import make_plan
from halfbyte.recipe.skeleton import build_skeleton

pytestmark = pytest.mark.usefixtures("one_thread")
BATCHES = random_rows(3, 128, lengths=(9, 23, 5)).batches(2)


def variants_of(config: dict[str, object]) -> list[Variant]:
    """Every group alone in one of the two choices, and all at once in NF4-64 (each layer changed)."""
    found = []
    for at, group in enumerate(groups_of(make_plan(config, None).decisions, build_skeleton(config))):
        keys = frozenset(f"{module}.weight" for module in group.modules)
        layer = next((int(part) for part in group.name.split(".") if part.isdigit()), None)
        if layer is not None:
            found.append(Variant(group.name, "", keys, 64 if at % 2 else 32, layer))
    return [*found, Variant("all", "", frozenset().union(*(v.keys for v in found)), 64)]


def rounded(config: dict[str, object], variant: Variant) -> list[torch.Tensor]:
    weights = DrawnWeights(config)
    weights.changes = {key: round_to_nf4(weights.load(key), variant.blocksize) for key in variant.keys}
    model = StreamedModel(weights)
    states = list(model.hidden_states(BATCHES))
    model.close()
    return states


@pytest.mark.parametrize("family", ["gemma4_e", "gemma4", "llama"])
def test_each_variant_is_the_model_with_its_tensors_rounded(family: str) -> None:
    config = config_of(family)
    variants = variants_of(config)
    model = CarryingModel(DrawnWeights(config))
    own = model.carry(BATCHES, variants)
    plain = list(StreamedModel(DrawnWeights(config)).hidden_states(BATCHES))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(own, plain, strict=True))
    assert len(variants) > 10
    for variant in variants[:: max(1, len(variants) // 6)] + variants[-1:]:
        expected = rounded(config, variant)
        assert all(torch.equal(a, b) for a, b in zip(variant.states, expected, strict=True)), variant.name
        assert not all(torch.equal(a, b) for a, b in zip(variant.states, own, strict=True)), (
            f"{variant.name}: no change"
        )
        assert variant.drift is not None
        assert 0 < variant.drift < 1


def test_a_variant_that_changes_nothing_is_the_model_and_weights_are_read_once() -> None:
    weights = DrawnWeights(config_of("llama"))
    model, nothing = CarryingModel(weights), Variant("nothing", "", frozenset(), 64)
    variants = [nothing, *variants_of(config_of("llama"))]
    own = model.carry(BATCHES, variants)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(own, nothing.states, strict=True))
    assert nothing.drift is None
    layers = {name: count for name, count in weights.read.items() if ".layers." in name}
    assert set(layers.values()) == {1}


def test_what_variants_wear_is_taken_off_again() -> None:
    config = config_of("llama")
    model = CarryingModel(DrawnWeights(config))
    once = model.carry(BATCHES, variants_of(config))
    again = model.carry(BATCHES, [])
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
