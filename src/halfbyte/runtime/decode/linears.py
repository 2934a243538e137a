"""The four products of a layer as callables, whatever the model's linears are: plain, bitsandbytes', ours, fused or apart.

    qkv(h)             -> (q, (k, v)), or (q, None) where a layer has no keys of its own
    o(a)
    mlp(h, activation) = down(act(gate) * up), where (gate, up) is one product if fused

A fused module is looked for first: `qkv_proj` or `qk_proj` of the attention, `gate_up_proj` of the MLP, a module with `splits` (the rows of its
parts in order, as `Nf4Linear` has). Parts of a fused product are ranges of its columns, never copied. Where keys are values
there is no v, and k is given twice.

A plain `nn.Linear` is computed by `kernels.dense` while there are few rows, because cuBLAS changes its order of sums with their number.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from halfbyte.runtime.decode.kernels.dense import dense
from halfbyte.runtime.decode.kernels.gate import gated

Product = Callable[[torch.Tensor], torch.Tensor]
KeysValues = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Linears:
    """The products of one layer; inputs and results [tokens, width]."""

    qkv: Callable[[torch.Tensor], tuple[torch.Tensor, KeysValues | None]]
    o: Product
    mlp: Callable[[torch.Tensor, str], torch.Tensor]
    count: int


def linears_of(attention: Any, mlp: Any, own_keys: bool) -> Linears:
    """The products of a decoder layer's two modules; own_keys: whether the layer computes keys and values."""
    qkv, many = _qkv(attention, own_keys)
    through_mlp, more = _mlp(mlp)
    return Linears(qkv, product(attention.o_proj), through_mlp, many + more + 1)


def product(module: Any) -> Product:
    """x [rows, in] -> [rows, out] by a module, or by `dense` if it is a plain linear without hooks."""
    plain = type(module) is torch.nn.Linear and "forward" not in module.__dict__
    if plain and not module._forward_hooks and not module._forward_pre_hooks:
        return lambda x: dense(x, module.weight, module.bias)
    call: Product = module
    return call


def _fused(owner: Any, *names: str) -> Any | None:
    found = (getattr(owner, name, None) for name in names)
    return next((module for module in found if module is not None and hasattr(module, "splits")), None)


def _qkv(
    attention: Any, own_keys: bool
) -> tuple[Callable[[torch.Tensor], tuple[torch.Tensor, KeysValues | None]], int]:
    fused = _fused(attention, "qkv_proj", "qk_proj")
    if fused is not None and own_keys:
        multiply, splits = product(fused), tuple(fused.splits)

        def together(h: torch.Tensor) -> tuple[torch.Tensor, KeysValues | None]:
            parts = multiply(h).split(splits, dim=-1)
            return parts[0], (parts[1], parts[-1])

        return together, 1
    q = product(attention.q_proj)
    if not own_keys:
        return (lambda h: (q(h), None)), 1
    k = product(attention.k_proj)
    if getattr(attention, "v_proj", None) is None:

        def keys_are_values(h: torch.Tensor) -> tuple[torch.Tensor, KeysValues | None]:
            keys = k(h)
            return q(h), (keys, keys)

        return keys_are_values, 2
    v = product(attention.v_proj)
    return (lambda h: (q(h), (k(h), v(h)))), 3


def _mlp(mlp: Any) -> tuple[Callable[[torch.Tensor, str], torch.Tensor], int]:
    """The MLP, and how many products it is. Where `down` can, it computes act(gate) * up where it reads it."""
    fused, down = _fused(mlp, "gate_up_proj"), product(mlp.down_proj)
    if fused is not None:
        multiply, splits = product(fused), tuple(fused.splits)
        at_once = getattr(mlp.down_proj, "gated", None)

        def together(h: torch.Tensor, activation: str) -> torch.Tensor:
            both = multiply(h)
            y: torch.Tensor | None = at_once(both, activation) if at_once is not None else None
            if y is None:
                gate, up = both.split(splits, dim=-1)
                y = down(gated(gate, up, activation))
            return y

        return together, 2
    gate, up = product(mlp.gate_proj), product(mlp.up_proj)
    return (lambda h, activation: down(gated(gate(h), up(h), activation))), 3
