"""Residual and norms between two sublayers in one launch.

With y what a sublayer gave and x the residual stream:

    x' = (x + post(y)) * scalar        post: Gemma's norm behind a sublayer, absent in Llama; scalar: Gemma 4's layer_scalar
    h  = following(x')                 the norm in front of the next sublayer

RMSNorm of a row v of width n: v / sqrt(mean(v^2) + eps) * weight, in float32. Gemma rounds once at the end; Llama rounds before the
weight is multiplied in (`late`), which shows in bf16.

The catch: one program a row, the whole row in its registers. A batch of one uses one multiprocessor, and what is measured is latency.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

from dataclasses import dataclass

import torch

from halfbyte.runtime.decode.kernels.where import by_kernel, launch_options, power_of_two, take_turn

try:
    import triton
    import triton.language as tl
except ImportError:  # Windows, CPU-only builds of torch
    triton = None  # type: ignore[assignment]


@dataclass(frozen=True)
class Norm:
    """An RMSNorm.

    weight  float32 [n], Gemma 3's 1 already added; None for a norm without a scale
    late    the normed value is rounded before the weight is multiplied in
    """

    weight: torch.Tensor | None
    eps: float
    late: bool = False


def normed(x: torch.Tensor, norm: Norm) -> torch.Tensor:
    """norm(x) over the last dimension, in x's dtype: the reference."""
    wide = x.float()
    unit = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + norm.eps)
    if norm.weight is not None:
        unit = (unit.to(x.dtype).float() if norm.late else unit) * norm.weight
    return unit.to(x.dtype)


def add_norm(
    x: torch.Tensor, y: torch.Tensor | None, post: Norm | None, scalar: float, following: Norm | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(x', h) as above; x, y [rows, n]. Without y, x' is x itself; without `following`, h is x'."""
    if not by_kernel(x):
        return add_norm_reference(x, y, post, scalar, following)
    return add_norm_kernel(x, y, post, scalar, following)


def add_norm_reference(
    x: torch.Tensor, y: torch.Tensor | None, post: Norm | None, scalar: float, following: Norm | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in plain torch."""
    if y is not None:
        x = x + (normed(y, post) if post is not None else y)
        if scalar != 1.0:
            x = x * scalar
    return x, (normed(x, following) if following is not None else x)


def add_norm_kernel(
    x: torch.Tensor, y: torch.Tensor | None, post: Norm | None, scalar: float, following: Norm | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same by the kernel; x and y contiguous."""
    rows, width = x.shape
    out = torch.empty_like(x) if y is not None else x
    h = torch.empty_like(x) if following is not None else out
    block = power_of_two(width)
    _add_norm[(rows,)](
        x, y if y is not None else x, _weight(post, x), _weight(following, x), out, h,
        width, float(scalar), post.eps if post else 0.0, following.eps if following else 0.0,
        has_y=y is not None, has_post=post is not None, post_scaled=post is not None and post.weight is not None,
        post_late=post is not None and post.late, scaled=scalar != 1.0, has_next=following is not None,
        next_scaled=following is not None and following.weight is not None,
        next_late=following is not None and following.late, block=block, num_warps=min(max(block // 512, 1), 16),
        **launch_options(x),
    )  # fmt: skip
    return out, h


def _weight(norm: Norm | None, otherwise: torch.Tensor) -> torch.Tensor:
    return otherwise if norm is None or norm.weight is None else norm.weight


if triton is not None:

    @triton.jit
    def weights_of(norm, at, mask, scaled: tl.constexpr):
        """A norm's weights, if it has any. Read before a kernel takes its turn: nobody writes them, and they come from far."""
        weight = tl.full(at.shape, 1.0, dtype=tl.float32)
        if scaled:
            weight = tl.load(norm + at, mask=mask, other=0.0).to(tl.float32)
        return weight

    @triton.jit
    def unit(v, weight, width, eps, scaled: tl.constexpr, late: tl.constexpr, dtype: tl.constexpr):
        """v / rms(v) * weight, rounded to dtype, as float32."""
        v = v * tl.rsqrt(tl.sum(v * v, axis=0) / width + eps)
        if scaled:
            if late:
                v = v.to(dtype).to(tl.float32)
            v = v * weight
        return v.to(dtype).to(tl.float32)

    @triton.jit
    def _add_norm(
        x, y, post, following, out, h, width, scalar, post_eps, next_eps,
        has_y: tl.constexpr, has_post: tl.constexpr, post_scaled: tl.constexpr, post_late: tl.constexpr, scaled: tl.constexpr,
        has_next: tl.constexpr, next_scaled: tl.constexpr, next_late: tl.constexpr, block: tl.constexpr, early: tl.constexpr,
    ):  # fmt: skip
        dtype: tl.constexpr = x.dtype.element_ty
        at = tl.arange(0, block)
        mask = at < width
        post_weight = weights_of(post, at, mask, post_scaled)
        next_weight = weights_of(following, at, mask, next_scaled)
        take_turn(early)
        here = tl.program_id(0).to(tl.int64) * width + at
        v = tl.load(x + here, mask=mask, other=0.0).to(tl.float32)
        if has_y:
            add = tl.load(y + here, mask=mask, other=0.0).to(tl.float32)
            if has_post:
                add = unit(add, post_weight, width, post_eps, post_scaled, post_late, dtype)
            v = (v + add).to(dtype).to(tl.float32)
            if scaled:
                v = (v * scalar).to(dtype).to(tl.float32)
            tl.store(out + here, v.to(dtype), mask=mask)
        if has_next:
            v = unit(v, next_weight, width, next_eps, next_scaled, next_late, dtype)
            tl.store(h + here, v.to(dtype), mask=mask)

else:
    weights_of = None
