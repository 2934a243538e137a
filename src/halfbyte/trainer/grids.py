"""Train on the grid: the forward pass sees rounded weights, the backward pass pretends that rounding is not there.

The straight-through estimator (Bengio, Leonard and Courville 2013, arXiv:1308.3432): with Q the rounding to a grid,

    forward   y = Q(w) x              what the deployed model will compute
    backward  dL/dw := dL/dQ(w)       Q is flat almost everywhere, so its true gradient would be zero

The full-precision w moves until Q(w) jumps. Q is the very function that later writes the file, scales included, and its
result is rounded to bfloat16, the type it will be stored in. So training sees exactly the weights that are saved.

    q4_0   llama.cpp's symmetric int4, blocks of 32, d = (largest by magnitude) / -8, d also a bf16 number
    nf4    bitsandbytes NF4, blocks of 64, double-quantized: quantized and expanded again by `halfbyte.codec`

All weights are rounded at once when a step begins (`refresh`), not one by one where they are used: a small model spends its
time launching kernels, and a step with a text and a picture batch would round everything twice.

Catch: the scale is a function of w too (the largest element of its block), and is not differentiated: the gradient of
the largest element is passed through like every other.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from halfbyte import codec
from halfbyte.codec.q4_0 import round_to_q4_0
from halfbyte.errors import UsageError

GRIDS = ("q4_0", "nf4")


def round_to_grid(weight: torch.Tensor, grid: str) -> torch.Tensor:
    """`weight` on the grid, as float32 values that bfloat16 holds exactly; same shape, no gradient.

    raises UsageError for a grid that is not one of GRIDS, ShapeMismatch if q4_0's blocks of 32 do not divide the rows
    """
    check_grid(grid)
    with torch.no_grad():
        if grid == "q4_0":
            rounded = round_to_q4_0(weight.detach().float(), "bf16")
        else:
            flat = weight.detach().to(torch.bfloat16).reshape(-1).contiguous()
            rounded = codec.dequantize(codec.quantize(flat)).reshape(weight.shape)
        return rounded.to(torch.bfloat16).float()


def check_grid(grid: str) -> None:
    """Raises UsageError for a name that is not one of GRIDS."""
    if grid not in GRIDS:
        raise UsageError(f"unknown grid {grid!r}", where="--grid", todo=f"one of {', '.join(GRIDS)}")


class _StraightThrough(torch.autograd.Function):
    """The rounded weight forward, its gradient to the full one backward."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
        return rounded

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        return gradient, None


class GridLinear(nn.Linear):
    """A linear module that computes with `rounded`, its weight on `grid` as of the last `refresh`, and trains `weight`."""

    rounded: torch.Tensor

    def __init__(self, linear: nn.Linear, grid: str) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.grid = grid
        self.register_buffer("rounded", linear.weight.detach(), persistent=False)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        weight: torch.Tensor = _StraightThrough.apply(self.weight, self.rounded)  # type: ignore[no-untyped-call]
        return F.linear(input, weight, self.bias)


def put_on_grid(model: nn.Module, modules: Iterable[str], grid: str) -> None:
    """Make the named linear modules GridLinear (in place), keeping their parameters; call `refresh` before each step."""
    check_grid(grid)
    for name in modules:
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear), name
        model.set_submodule(name, GridLinear(linear, grid))
    refresh(model)


def refresh(model: nn.Module) -> None:
    """Round every GridLinear's weight as it is now."""
    linears = [module for module in model.modules() if isinstance(module, GridLinear)]
    together = [module for module in linears if module.grid == "q4_0"]  # blocks of 32 along rows: tensors may be joined
    if together:
        flat = torch.cat([module.weight.detach().reshape(-1, 32) for module in together])
        parts = round_to_grid(flat, "q4_0").split([module.weight.numel() // 32 for module in together])
        for module, part in zip(together, parts, strict=True):
            module.rounded = part.view_as(module.weight)
    for module in linears:
        if module.grid != "q4_0":  # the second level of NF4 takes the mean of one tensor's scales
            module.rounded = round_to_grid(module.weight, module.grid)


def take_off_grid(model: nn.Module) -> None:
    """Make every GridLinear a plain linear again whose weight is the rounded one (in place)."""
    refresh(model)
    for name, module in [(n, m) for n, m in model.named_modules() if isinstance(m, GridLinear)]:
        linear = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
        linear.weight, linear.bias = nn.Parameter(module.rounded), module.bias
        model.set_submodule(name, linear)
