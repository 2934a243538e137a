"""The four products of a layer as callables, whatever the model's linears are: plain, bitsandbytes', ours, fused or apart.

    qkv(h)      -> (q, (k, v)), or (q, None) where a layer has no keys of its own
    o(a), down(m)
    gate_up(h)  -> (gate, up)

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

Product = Callable[[torch.Tensor], torch.Tensor]
KeysValues = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Linears:
    """The products of one layer; inputs and results [tokens, width]."""

    qkv: Callable[[torch.Tensor], tuple[torch.Tensor, KeysValues | None]]
    o: Product
    gate_up: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
    down: Product
    count: int


def linears_of(attention: Any, mlp: Any, own_keys: bool) -> Linears:
    """The products of a decoder layer's two modules; own_keys: whether the layer computes keys and values."""
    qkv, many = _qkv(attention, own_keys)
    gate_up, more = _gate_up(mlp)
    return Linears(qkv, product(attention.o_proj), gate_up, product(mlp.down_proj), many + more + 2)


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


def _gate_up(mlp: Any) -> tuple[Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]], int]:
    fused = _fused(mlp, "gate_up_proj")
    if fused is not None:
        multiply, splits = product(fused), tuple(fused.splits)

        def together(h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            gate, up = multiply(h).split(splits, dim=-1)
            return gate, up

        return together, 1
    gate, up = product(mlp.gate_proj), product(mlp.up_proj)
    return (lambda h: (gate(h), up(h))), 2
