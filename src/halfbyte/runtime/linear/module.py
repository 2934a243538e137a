"""Nf4Linear: a linear layer, or several that share their input, with its weight in our layout.

    layer = Nf4Linear.of_linear4bit(model.layers[0].mlp.down_proj)      from a live bitsandbytes layer
    layer = Nf4Linear.of_tensors([q, k, v])                             from the six tensors of each, as a checkpoint has them
    q, k, v = layer(x).split(layer.splits, dim=-1)
    layer.to_bitsandbytes()                                             the tensors that came in, bit for bit

The same on a CPU, through the codec: slow, and right.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from halfbyte.errors import UsageError
from halfbyte.runtime.kernels.tensors import NAMES
from halfbyte.runtime.linear import op
from halfbyte.runtime.linear.table import DEFAULT
from halfbyte.runtime.linear.tensors import read_stored, stored_of_linear
from halfbyte.runtime.linear.weight import Nf4Weight, weight_from


def nf4_linear(x: torch.Tensor, weight: Nf4Weight, paths: str = DEFAULT) -> torch.Tensor:
    """y = x W^T: x [..., columns] -> [..., rows] in x's dtype; `op` picks the path, on a GPU by `paths`. raises ShapeMismatch"""
    y: torch.Tensor = op.nf4_linear(x, weight.tiles, weight.codes, weight.nested, weight.groups, weight.maps, paths)
    return y


class Nf4Linear(torch.nn.Module):
    """x [..., in_features] -> [..., out_features].

    paths   which path for how many rows of x, on a GPU (halfbyte.runtime.linear.table)

    Its tensors are in no state_dict: a layout is not a format. `to_bitsandbytes` gives what is saved.
    """

    tiles: torch.Tensor
    codes: torch.Tensor
    nested: torch.Tensor
    groups: torch.Tensor
    maps: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, weight: Nf4Weight, bias: torch.Tensor | None = None) -> None:
        super().__init__()
        for name in NAMES:
            self.register_buffer(name, getattr(weight, name), persistent=False)
        self.register_buffer("bias", bias, persistent=False)
        self.paths = DEFAULT
        self.in_features, self.out_features = weight.columns, weight.rows
        self.blocksize, self.row_tiles, self.parts = weight.blocksize, weight.row_tiles, weight.parts

    @classmethod
    def of_tensors(cls, tensors: Sequence[Mapping[str, torch.Tensor]], bias: torch.Tensor | None = None) -> Nf4Linear:
        """From the six tensors of each part (names as in tensors.NAMES), stacked by rows. Errors as of what it calls."""
        stored = [read_stored(dict(part), f"part {index}") for index, part in enumerate(tensors)]
        return cls(weight_from(stored), bias)

    @classmethod
    def of_linear4bit(cls, *linears: Any) -> Nf4Linear:
        """From live `Linear4bit` layers that read the same input. raises UsageError if only some have a bias"""
        biases = [linear.bias for linear in linears if linear.bias is not None]
        if biases and len(biases) != len(linears):
            raise UsageError("some layers have a bias, others not", where="Nf4Linear", todo="stack alike layers only")
        weight = weight_from([stored_of_linear(linear) for linear in linears])
        return cls(weight, torch.cat([bias.detach() for bias in biases]) if biases else None)

    @property
    def splits(self) -> tuple[int, ...]:
        """Rows of the parts."""
        return tuple(part.rows for part in self.parts)

    @property
    def weight(self) -> Nf4Weight:
        """The weight, as it is now (on this device)."""
        return Nf4Weight(
            self.tiles, self.codes, self.nested, self.groups, self.maps,
            self.out_features, self.in_features, self.blocksize, self.row_tiles, self.parts,
        )  # fmt: skip

    def to_bitsandbytes(self) -> list[dict[str, torch.Tensor]]:
        """The six tensors of each part, the bytes it was made from."""
        return [part.to_dict() for part in self.weight.to_stored()]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """y = x W^T + bias, in x's dtype."""
        y = nf4_linear(x, self.weight, self.paths)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Moves like any module, but `model.to(torch.bfloat16)` does not touch the scales: they are part of the format."""
        exact = {name: getattr(self, name) for name in ("nested", "maps")}
        moved = super()._apply(fn, recurse)
        for name, tensor in exact.items():
            if getattr(self, name).dtype != tensor.dtype:
                setattr(self, name, tensor.to(getattr(self, name).device))
        return moved

    def extra_repr(self) -> str:
        """For print(model)."""
        return f"{self.in_features}, {self.out_features}, blocksize={self.blocksize}, parts={len(self.parts)}"
