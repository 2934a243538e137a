"""Norms of q, k and v, the rotary embedding, and the write into the cache, in one launch.

A head v of width d is rotated in pairs (i, i + d/2) by the angle position * frequency_i:

    v1' = v1 cos - v2 sin        v2' = v2 cos + v1 sin

Cosines and sines come ready, [tokens, d/2], made once a step and rounded to the model's dtype as transformers does; a
frequency of 0 (Gemma 4's full layers turn only a quarter of the pairs) is a rotation by nothing.

Key and value of token t of row b go to slot (position[b] + t) mod slots: a full cache has a slot for every position, a sliding
layer's goes round (halfbyte.runtime.decode.cache). Where keys are values (Gemma 4's full layers), v *is* k before its norm.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

from dataclasses import dataclass

import torch

from halfbyte.runtime.decode.kernels.norm import Norm, normed, weights_of
from halfbyte.runtime.decode.kernels.where import by_kernel, launch_options, power_of_two, take_turn

try:
    import triton
    import triton.language as tl
except ImportError:  # Windows, CPU-only builds of torch
    triton = None  # type: ignore[assignment]


@dataclass(frozen=True)
class HeadNorms:
    """The norms over a head's width; None is no norm."""

    q: Norm | None = None
    k: Norm | None = None
    v: Norm | None = None


@dataclass(frozen=True)
class Target:
    """Where keys and values go: keys, values [rows, kv_heads, slots, d]; position int [rows], that of each row's first token."""

    keys: torch.Tensor
    values: torch.Tensor
    position: torch.Tensor


def rotate(
    q: torch.Tensor,
    kv: tuple[torch.Tensor, torch.Tensor] | None,
    norms: HeadNorms,
    angles: tuple[torch.Tensor, torch.Tensor],
    target: Target,
) -> torch.Tensor:
    """Queries ready for attention, [tokens, heads, d]; keys and values are in the cache afterwards.

    q        [tokens, heads * d]; tokens = rows * new tokens, row by row
    kv       keys and values [tokens, kv_heads * d], or None for a layer that reads another's cache
    angles   cosines and sines [tokens, d/2]
    """
    step = rotate_kernel if by_kernel(q) else rotate_reference
    return step(q, kv, norms, angles, target)


def rotate_reference(
    q: torch.Tensor,
    kv: tuple[torch.Tensor, torch.Tensor] | None,
    norms: HeadNorms,
    angles: tuple[torch.Tensor, torch.Tensor],
    target: Target,
) -> torch.Tensor:
    """The same in plain torch."""
    rows, _, slots, d = target.keys.shape
    tokens = q.shape[0]
    queries = _turned(_by_head(q, d, norms.q), *angles)
    if kv is not None:
        keys = _turned(_by_head(kv[0], d, norms.k), *angles)
        values = _by_head(kv[1], d, norms.v)
        row = torch.arange(rows, device=q.device)[:, None]
        slot = (target.position[:, None] + torch.arange(tokens // rows, device=q.device)) % slots
        target.keys[row, :, slot] = keys.view(rows, tokens // rows, -1, d).to(target.keys.dtype)
        target.values[row, :, slot] = values.view(rows, tokens // rows, -1, d).to(target.values.dtype)
    return queries


def _by_head(x: torch.Tensor, d: int, norm: Norm | None) -> torch.Tensor:
    heads = x.reshape(x.shape[0], -1, d)
    return heads if norm is None else normed(heads, norm)


def _turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def rotate_kernel(
    q: torch.Tensor,
    kv: tuple[torch.Tensor, torch.Tensor] | None,
    norms: HeadNorms,
    angles: tuple[torch.Tensor, torch.Tensor],
    target: Target,
) -> torch.Tensor:
    """The same by the kernel; rows of q, k, v may be strided (parts of one product), columns not."""
    rows, kv_heads, slots, d = target.keys.shape
    tokens, heads = q.shape[0], q.shape[1] // d
    k, v = kv if kv is not None else (q, q)
    out = torch.empty(tokens, heads, d, dtype=q.dtype, device=q.device)
    first = [norm for norm in (norms.q, norms.k, norms.v) if norm is not None]
    eps, late = (first[0].eps, first[0].late) if first else (0.0, False)
    assert all(norm.eps == eps and norm.late == late for norm in first), "one eps for all heads"
    weights = [out if n is None or n.weight is None else n.weight for n in (norms.q, norms.k, norms.v)]
    # 0 no norm, 1 without a scale, 2 with one
    kinds = [0 if n is None else 1 if n.weight is None else 2 for n in (norms.q, norms.k, norms.v)]
    half = power_of_two(d // 2)
    _rotate[(tokens, heads + (kv_heads if kv is not None else 0))](
        q, k, v, *weights, *angles, target.keys, target.values, target.position, out,
        q.stride(0), k.stride(0), v.stride(0), eps, slots, tokens // rows,
        heads=heads, kv_heads=kv_heads, d=d, half=half, late=late,
        q_kind=kinds[0], k_kind=kinds[1], v_kind=kinds[2], num_warps=1 if half <= 64 else 2,
        **launch_options(q),
    )  # fmt: skip
    return out


if triton is not None:

    @triton.jit
    def _halves(x, at, mask, d):
        """Both halves of a head, as float32."""
        first = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
        return first, tl.load(x + d // 2 + at, mask=mask, other=0.0).to(tl.float32)

    @triton.jit
    def _weights(norm, at, mask, d, kind: tl.constexpr):
        """Both halves of a norm's weights, if it has any; read before the kernel takes its turn."""
        return weights_of(norm, at, mask, kind == 2), weights_of(norm + d // 2, at, mask, kind == 2)

    @triton.jit
    def _normed(first, second, w1, w2, d, eps, kind: tl.constexpr, late: tl.constexpr, dtype: tl.constexpr):
        """Both halves of a head, normed and rounded."""
        if kind > 0:
            scale = tl.rsqrt((tl.sum(first * first, axis=0) + tl.sum(second * second, axis=0)) / d + eps)
            first, second = first * scale, second * scale
            if kind == 2:
                if late:
                    first, second = first.to(dtype).to(tl.float32), second.to(dtype).to(tl.float32)
                first, second = first * w1, second * w2
            first, second = first.to(dtype).to(tl.float32), second.to(dtype).to(tl.float32)
        return first, second

    @triton.jit
    def _turn(a, b, cos, sin, dtype: tl.constexpr):
        """The pair turned by its angle, each product rounded."""
        left = ((a * cos).to(dtype).to(tl.float32) - (b * sin).to(dtype).to(tl.float32)).to(dtype)
        return left, ((b * cos).to(dtype).to(tl.float32) + (a * sin).to(dtype).to(tl.float32)).to(dtype)

    @triton.jit
    def _rotate(
        q, k, v, q_weight, k_weight, v_weight, cosines, sines, keys, values, position, out,
        q_stride, k_stride, v_stride, eps, slots, steps,
        heads: tl.constexpr, kv_heads: tl.constexpr, d: tl.constexpr, half: tl.constexpr, late: tl.constexpr,
        q_kind: tl.constexpr, k_kind: tl.constexpr, v_kind: tl.constexpr, early: tl.constexpr,
    ):  # fmt: skip
        token = tl.program_id(0).to(tl.int64)
        head = tl.program_id(1)
        dtype: tl.constexpr = q.dtype.element_ty
        at = tl.arange(0, half)
        mask = at < d // 2
        angle = token * (d // 2) + at
        if head < heads:
            w1, w2 = _weights(q_weight, at, mask, d, q_kind)
            take_turn(early)
            cos = tl.load(cosines + angle, mask=mask, other=0.0).to(tl.float32)
            sin = tl.load(sines + angle, mask=mask, other=0.0).to(tl.float32)
            a, b = _halves(q + token * q_stride + head * d, at, mask, d)
            a, b = _normed(a, b, w1, w2, d, eps, q_kind, late, dtype)
            left, right = _turn(a, b, cos, sin, dtype)
            to = out + (token * heads + head) * d + at
            tl.store(to, left, mask=mask)
            tl.store(to + d // 2, right, mask=mask)
        else:
            w1, w2 = _weights(k_weight, at, mask, d, k_kind)
            u1, u2 = _weights(v_weight, at, mask, d, v_kind)
            take_turn(early)
            number = head - heads
            row = token // steps
            cos = tl.load(cosines + angle, mask=mask, other=0.0).to(tl.float32)
            sin = tl.load(sines + angle, mask=mask, other=0.0).to(tl.float32)
            a, b = _halves(k + token * k_stride + number * d, at, mask, d)
            e, f = _halves(v + token * v_stride + number * d, at, mask, d)  # all reads before the first write
            slot = (tl.load(position + row).to(tl.int64) + token % steps) % slots
            place = ((row * kv_heads + number) * slots + slot) * d + at
            a, b = _normed(a, b, w1, w2, d, eps, k_kind, late, dtype)
            left, right = _turn(a, b, cos, sin, dtype)
            e, f = _normed(e, f, u1, u2, d, eps, v_kind, late, dtype)
            stored: tl.constexpr = keys.dtype.element_ty
            tl.store(keys + place, left.to(stored), mask=mask)
            tl.store(keys + place + d // 2, right.to(stored), mask=mask)
            tl.store(values + place, e.to(stored), mask=mask)
            tl.store(values + place + d // 2, f.to(stored), mask=mask)
