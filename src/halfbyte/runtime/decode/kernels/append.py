"""What is kept of a step's choices, appended to each row's text: the step's last launch.

With fed tokens f_0 (known) and f_1.. (drafts), and the model's choice c_t behind each:

    right       1 + the number of leading drafts with f_t = c_(t-1): c_0 is right in any case, c_t if every draft up to f_t was
    until stop  the place of the first stop token among c, plus 1
    kept        the least of right, until stop, and what is left to the limit; 0 for a row that has ended

In torch this is some twenty launches of a microsecond and a half each, behind every step; as a kernel it is one.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

from typing import Protocol

import torch

from halfbyte.runtime.decode.kernels.where import by_kernel, launch_options, power_of_two, take_turn

try:
    import triton
    import triton.language as tl
except ImportError:  # Windows, CPU-only builds of torch
    triton = None  # type: ignore[assignment]


class Texts(Protocol):
    """The buffers of halfbyte.runtime.decode.state.State."""

    @property
    def history(self) -> torch.Tensor: ...

    @property
    def length(self) -> torch.Tensor: ...

    @property
    def limit(self) -> torch.Tensor: ...

    @property
    def done(self) -> torch.Tensor: ...

    @property
    def steps(self) -> torch.Tensor: ...

    @property
    def stops(self) -> torch.Tensor: ...


def append(texts: Texts, fed: torch.Tensor, chosen: torch.Tensor) -> None:
    """Change history, length, done and steps in place; fed, chosen int64 [rows, T]."""
    (append_kernel if by_kernel(fed) else append_reference)(texts, fed, chosen)


def append_reference(texts: Texts, fed: torch.Tensor, chosen: torch.Tensor) -> None:
    """The same in plain torch."""
    steps = fed.shape[1]
    at = torch.arange(steps, device=fed.device)
    right = (fed[:, 1:] == chosen[:, :-1]).long().cumprod(-1).sum(-1) + 1
    stop = (chosen[..., None] == texts.stops).any(-1)
    until_stop = torch.where(stop, at + 1, steps).amin(-1)
    kept = torch.minimum(torch.minimum(right, until_stop), texts.limit - texts.length)
    kept = kept.masked_fill(texts.done, 0)
    place = texts.length[:, None] + at
    texts.history.scatter_(1, place, torch.where(at < kept[:, None], chosen, texts.history.gather(1, place)))
    texts.steps.add_((~texts.done).long())
    texts.length.add_(kept)
    texts.done.logical_or_((stop & (at < kept[:, None])).any(-1) | (texts.length >= texts.limit))


def append_kernel(texts: Texts, fed: torch.Tensor, chosen: torch.Tensor) -> None:
    """The same by the kernel; fed and chosen contiguous."""
    rows, steps = fed.shape
    _append[(rows,)](
        fed, chosen, texts.history, texts.length, texts.limit, texts.done, texts.steps, texts.stops,
        texts.history.shape[1], steps=steps, wide=power_of_two(steps), stops_n=len(texts.stops), num_warps=1,
        **launch_options(fed),
    )  # fmt: skip


if triton is not None:

    @triton.jit
    def _append(
        fed, chosen, history, length, limit, done, counted, stops, width,
        steps: tl.constexpr, wide: tl.constexpr, stops_n: tl.constexpr, early: tl.constexpr,
    ):  # fmt: skip
        take_turn(early)
        row = tl.program_id(0)
        at = tl.arange(0, wide)
        there = at < steps
        choice = tl.load(chosen + row * steps + at, mask=there, other=-2)
        draft = tl.load(fed + row * steps + at, mask=there & (at > 0), other=-3)
        before = tl.load(chosen + row * steps + at - 1, mask=there & (at > 0), other=-3)
        right = tl.min(tl.where(draft != before, at, steps), axis=0)
        ends = tl.load(stops + tl.arange(0, stops_n))
        stop = tl.max((choice[:, None] == ends[None, :]).to(tl.int32), axis=1) > 0
        until_stop = tl.min(tl.where(stop, at + 1, steps), axis=0)
        known = tl.load(length + row)
        last = tl.load(limit + row)
        ended = tl.load(done + row).to(tl.int32) != 0
        kept = tl.minimum(tl.minimum(right, until_stop).to(tl.int64), last - known)
        kept = tl.where(ended, 0, kept)
        tl.store(history + row.to(tl.int64) * width + known + at, choice, mask=at < kept)
        tl.store(counted + row, tl.load(counted + row) + tl.where(ended, 0, 1))
        tl.store(length + row, known + kept)
        stopped = tl.max((stop & (at < kept)).to(tl.int32), axis=0) > 0
        tl.store(done + row, ended | stopped | (known + kept >= last))
