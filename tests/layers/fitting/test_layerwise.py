"""Layer by layer over calibration rows: what is measured, in which order, and that every tensor is fitted once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from layers.drawn_weights import DrawnWeights, config_of
from layers.small_rows import random_rows

from halfbyte.codec.fitting import Moments
from halfbyte.layers.fitting.layerwise import Inputs, fit_layers
from halfbyte.layers.model import WholeModel
from halfbyte.layers.streaming import StreamedModel

pytestmark = pytest.mark.usefixtures("one_thread")
ROWS = random_rows(3, 128)
LLAMA_ORDER = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Halving:
    """A Store whose fit keeps every weight but for the sign of its last column; what was asked is noted."""

    def __init__(self, weights: DrawnWeights, done: frozenset[str] = frozenset()) -> None:
        self.weights, self.done = weights, set(done)
        self.fitted: dict[str, Inputs | None] = {}
        self.loaded: list[str] = []

    def is_done(self, name: str) -> bool:
        return name in self.done

    def load(self, name: str) -> torch.Tensor:
        self.loaded.append(name)
        return self.changed(name)

    def fit(self, name: str, inputs: Inputs | None) -> torch.Tensor:
        self.fitted[name] = inputs
        self.done.add(name)
        return self.changed(name)

    def changed(self, name: str) -> torch.Tensor:
        weight = self.weights.load(name).clone()
        weight[:, -1] *= -1
        return weight


def linears(weights: DrawnWeights) -> set[str]:
    return {n for n in weights.names() if "_proj." in n and ".layers." in n and "vision" not in n}


def walk(family: str, *, sequential: bool = True, done: frozenset[str] = frozenset(), full: bool = True) -> Halving:
    weights = DrawnWeights(config_of(family))
    store = Halving(weights, done)
    model = StreamedModel(weights)
    fit_layers(
        model, ROWS, linears(weights), store, lambda columns: Moments(columns, full), batch=2, sequential=sequential
    )
    return store


def inputs_in_a_whole_model(family: str, changed: set[str], name: str) -> torch.Tensor:
    """[tokens, columns] that stock's module is handed, in a whole model some of whose weights are changed."""
    weights = DrawnWeights(config_of(family))
    weights.changes = {other: Halving(weights).changed(other) for other in changed}
    model = WholeModel(weights)
    seen: list[torch.Tensor] = []
    module = model.model.get_submodule(name.removesuffix(".weight"))
    module.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    found = []
    for batch, _ in zip(ROWS.batches(2), model.hidden_states(ROWS.batches(2)), strict=True):
        rows, positions = batch.scored
        found.append(seen.pop()[torch.from_numpy(rows), torch.from_numpy(positions)])
    return torch.cat(found)


@pytest.fixture(scope="module")
def llama() -> Iterator[Halving]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield walk("llama")
    torch.set_num_threads(threads)


def test_every_linear_is_fitted_once_in_the_order_of_its_calls(llama: Halving) -> None:
    layers = [f"model.layers.{n}." for n in range(3)]
    order = [name.split(".")[-2] for name in llama.fitted]
    assert order == LLAMA_ORDER * 3
    assert [name[: len(layers[0])] for name in llama.fitted] == [layer for layer in layers for _ in LLAMA_ORDER]
    assert not llama.loaded


def test_linears_that_read_the_same_tensor_share_its_moments(llama: Halving) -> None:
    def of(name: str) -> Inputs | None:
        return llama.fitted[f"model.layers.1.{name}.weight"]

    assert of("self_attn.q_proj") is of("self_attn.k_proj") is of("self_attn.v_proj")
    assert of("mlp.gate_proj") is of("mlp.up_proj")
    assert of("mlp.up_proj") is not of("self_attn.q_proj") is not of("self_attn.o_proj")
    assert {found.tokens for found in llama.fitted.values() if found} == {ROWS.n}


@pytest.mark.parametrize("name", ["self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"])
def test_inputs_are_those_of_a_model_whose_earlier_linears_are_quantized(name: str, llama: Halving) -> None:
    whole = f"model.layers.1.{name}.weight"
    before = list(llama.fitted)[: list(llama.fitted).index(whole)]
    if name == "mlp.up_proj":
        before.remove("model.layers.1.mlp.gate_proj.weight")
    x = inputs_in_a_whole_model("llama", set(before), whole).double()
    found = llama.fitted[whole]
    assert found is not None
    assert found.hessian is not None
    torch.testing.assert_close(found.hessian.double(), x.T @ x / len(x), rtol=1e-4, atol=1e-6)


def test_at_once_the_layers_own_linears_are_still_the_sources() -> None:
    store = walk("llama", sequential=False, full=False)
    whole = "model.layers.1.mlp.down_proj.weight"
    before = {name for name in store.fitted if ".layers.0." in name}
    x = inputs_in_a_whole_model("llama", before, whole).double()
    found = store.fitted[whole]
    assert found is not None
    assert found.hessian is None
    assert found.mean_squares is not None
    torch.testing.assert_close(found.mean_squares.double(), x.square().mean(dim=0), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kept", [7, 10, 20])
def test_a_resumed_walk_measures_the_same_bits_behind_what_is_written(kept: int, llama: Halving) -> None:
    done = frozenset(list(llama.fitted)[:kept])
    again = walk("llama", done=done)
    assert set(again.fitted) == set(llama.fitted) - done
    assert set(again.loaded) == done
    for name, found in again.fitted.items():
        first = llama.fitted[name]
        assert first is not None
        assert found is not None
        assert first.hessian is not None
        assert found.hessian is not None
        assert torch.equal(first.hessian, found.hessian)


def test_nothing_is_read_when_nothing_is_left(llama: Halving) -> None:
    store = walk("llama", done=frozenset(llama.fitted))
    assert not store.fitted
    assert not store.loaded
    assert not store.weights.read.keys() & set(llama.fitted)


@pytest.mark.parametrize("family", ["gemma4", "gemma4_e", "gemma3_text"])
def test_families_with_shared_keys_and_per_layer_inputs_are_walked_too(family: str) -> None:
    store = walk(family)
    assert set(store.fitted) == linears(store.weights)
    unread = {name for name, found in store.fitted.items() if found is None}
    assert all(any(part in name for part in ("k_proj", "v_proj")) for name in unread)
    assert len(unread) < len(store.fitted) / 4


def test_an_input_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    from halfbyte.errors import NonFiniteWeight

    weights: Any = DrawnWeights(config_of("llama"))
    weights.changes = {"model.layers.0.input_layernorm.weight": torch.full((64,), torch.inf)}
    with pytest.raises(NonFiniteWeight, match="NaN or infinite"):
        fit_layers(StreamedModel(weights), ROWS, linears(weights), Halving(weights), Moments, batch=2, sequential=True)
