"""Training on a grid: what the forward pass sees, where the gradient goes, what is left at the end."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from halfbyte.codec.q4_0 import round_to_q4_0
from halfbyte.errors import UsageError
from halfbyte.trainer.grids import GRIDS, GridLinear, put_on_grid, refresh, round_to_grid, take_off_grid


def two_linears() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(64, 96, bias=False), nn.Tanh(), nn.Linear(96, 32))


@pytest.mark.parametrize("grid", GRIDS)
def test_grid_weights_are_bf16_numbers(grid: str) -> None:
    rounded = round_to_grid(torch.randn(32, 128), grid)
    assert torch.equal(rounded, rounded.bfloat16().float())


def test_what_q4_0_training_saves_survives_q4_0_unchanged() -> None:
    saved = round_to_grid(torch.randn(64, 128), "q4_0")
    assert torch.equal(round_to_q4_0(saved, "bf16").bfloat16().float(), saved)


def test_nf4_training_sees_what_the_quantizer_will_write() -> None:
    from halfbyte import codec

    weight = torch.randn(64, 128)
    flat = weight.to(torch.bfloat16).reshape(-1)
    expected = codec.dequantize(codec.quantize(flat)).to(torch.bfloat16).float().view(64, 128)
    assert torch.equal(round_to_grid(weight, "nf4"), expected)


@pytest.mark.parametrize("grid", GRIDS)
def test_forward_is_rounded_and_backward_is_straight_through(grid: str) -> None:
    model, x = two_linears(), torch.randn(5, 64)
    weight: Any = model[0].weight
    put_on_grid(model, ["0"], grid)
    plain = round_to_grid(weight, grid).requires_grad_()
    (torch.tanh(x @ plain.T) ** 2).sum().backward()
    (torch.tanh(model[0](x)) ** 2).sum().backward()
    assert torch.equal(model[0](x), x @ plain.T)
    assert not torch.equal(weight, plain)
    assert torch.allclose(weight.grad, plain.grad, rtol=0, atol=0)


@pytest.mark.parametrize("grid", GRIDS)
def test_refresh_follows_the_weights_tensor_by_tensor(grid: str) -> None:
    model = two_linears()
    put_on_grid(model, ["0", "2"], grid)
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.weight.mul_(1.37)
    refresh(model)
    for layer in (model[0], model[2]):
        assert torch.equal(layer.rounded, round_to_grid(layer.weight, grid))


def test_taken_off_the_grid_it_is_a_plain_model_with_rounded_weights() -> None:
    model, x = two_linears(), torch.randn(5, 64)
    put_on_grid(model, ["0", "2"], "q4_0")
    seen = model(x)
    take_off_grid(model)
    assert not any(isinstance(module, GridLinear) for module in model.modules())
    assert {type(module) for module in model} == {nn.Linear, nn.Tanh}
    assert torch.equal(model(x), seen)
    assert [name for name, _ in model.named_parameters()] == ["0.weight", "2.weight", "2.bias"]


def test_an_unknown_grid_is_refused() -> None:
    with pytest.raises(UsageError, match="int3"):
        put_on_grid(two_linears(), ["0"], "int3")
