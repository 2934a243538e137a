"""Small layers with correlated inputs, as calibration would see them."""

from __future__ import annotations

import torch

from halfbyte.codec import Moments


def layer(rows: int, columns: int, seed: int = 0, tokens: int = 512) -> tuple[torch.Tensor, torch.Tensor]:
    """A bf16 weight [rows, columns] and the Hessian of inputs that are correlated and of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.randn(rows, columns, generator=generator) * 0.02).bfloat16()
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5 + torch.eye(columns)
    sizes = torch.exp(torch.randn(columns, generator=generator))
    moments = Moments(columns)
    moments.add((torch.randn(tokens, columns, generator=generator) @ mixing) * sizes)
    hessian = moments.hessian
    assert hessian is not None
    return weight, hessian
