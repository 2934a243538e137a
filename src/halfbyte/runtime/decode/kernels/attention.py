"""Attention of a few new tokens over the cache, split over the keys ("flash-decoding"), for heads up to 512 wide.

One new token has one query a head, so there is no parallelism in the queries: the keys are cut into chunks of CHUNK slots, each chunk
gives its own softmax (largest score m, sum l of exp(s - m), weighted values o), and a second launch joins them:

    out = sum_c exp(m_c - M) o_c / sum_c exp(m_c - M) l_c,        M = max_c m_c,  chunks in order

The query heads that share a key head, times the new tokens, are the 16 rows of a tensor core tile (more rows: more programs). Chunk and tile
sizes are constants, and what is masked adds exact zeros, so a query gives the same bits for any batch and any number
of tokens beside it: verification of drafts equals plain decoding.

The position of slot j follows from the newest position p alone: p - ((p - j) mod slots), which is below 0 for a slot never written. So a
ring buffer needs no table, and slots left over from rejected drafts are masked as what they would be read as: too old, or newer
than the query.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

import torch

from halfbyte.runtime.decode.kernels.where import by_kernel, launch_options, power_of_two, take_turn

try:
    import triton
    import triton.language as tl
except ImportError:  # Windows, CPU-only builds of torch
    triton = None  # type: ignore[assignment]

#: slots a program reads
CHUNK = 128
ROWS = 16


def attend(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, position: torch.Tensor, scale: float, window: int
) -> torch.Tensor:
    """[tokens, heads * d] in q's dtype.

    q             [rows * new tokens, heads, d], row by row
    keys, values  [rows, kv_heads, slots, d], the new tokens' own already in them
    position      int [rows], of each row's first new token
    scale         multiplies the scores
    window        a query at p sees keys behind p - window; 0: all
    """
    step = attend_kernel if by_kernel(q) else attend_reference
    return step(q, keys, values, position, scale, window)


def visible(position: torch.Tensor, steps: int, slots: int, window: int) -> torch.Tensor:
    """bool [rows, steps, slots]: which slots each new token sees."""
    device = position.device
    newest = position[:, None] + steps - 1
    held = newest - torch.remainder(newest - torch.arange(slots, device=device), slots)
    query = (position[:, None] + torch.arange(steps, device=device))[:, :, None]
    held = held[:, None, :]
    seen = (held >= 0) & (held <= query)
    return seen & (held > query - window) if window else seen


def attend_reference(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, position: torch.Tensor, scale: float, window: int
) -> torch.Tensor:
    """The same in plain torch."""
    rows, kv_heads, slots, d = keys.shape
    steps, heads = q.shape[0] // rows, q.shape[1]
    groups = heads // kv_heads
    query = q.view(rows, steps, kv_heads, groups, d).permute(0, 2, 3, 1, 4).reshape(rows, kv_heads, groups * steps, d)
    scores = torch.matmul(query, keys.to(q.dtype).transpose(-1, -2)).float() * scale
    seen = visible(position, steps, slots, window)[:, None, None]
    scores = scores.view(rows, kv_heads, groups, steps, slots).masked_fill(~seen, -torch.inf)
    weights = scores.softmax(-1).to(q.dtype).view(rows, kv_heads, groups * steps, slots)
    out = torch.matmul(weights, values.to(q.dtype)).view(rows, kv_heads, groups, steps, d)
    return out.permute(0, 3, 1, 2, 4).reshape(rows * steps, heads * d)


def attend_kernel(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, position: torch.Tensor, scale: float, window: int
) -> torch.Tensor:
    """The same by the kernels; all contiguous."""
    rows, kv_heads, slots, d = keys.shape
    tokens, heads, _ = q.shape
    steps, groups = tokens // rows, heads // kv_heads
    chunks = triton.cdiv(slots, CHUNK)
    parts = torch.empty(tokens, heads, chunks, d, dtype=torch.float32, device=q.device)
    sums = torch.empty(tokens, heads, chunks, 2, dtype=torch.float32, device=q.device)
    wide = power_of_two(d)
    _attend[(chunks, triton.cdiv(steps * groups, ROWS), rows * kv_heads)](
        q, keys, values, position, parts, sums, scale * 1.4426950408889634, steps, slots, chunks,
        groups=groups, kv_heads=kv_heads, window=window, d=d, wide=wide, rows=ROWS, chunk=CHUNK, block=_keys_at_once(q, wide),
        num_warps=4 if wide <= 256 else 8, num_stages=2,
        **launch_options(q),
    )  # fmt: skip
    out = torch.empty(tokens, heads * d, dtype=q.dtype, device=q.device)
    _join[(tokens, heads)](
        parts,
        sums,
        position,
        out,
        steps,
        slots,
        chunks,
        heads=heads,
        chunk=CHUNK,
        d=d,
        wide=wide,
        many=8,
        num_warps=4,
        **launch_options(q),
    )
    return out


def _keys_at_once(q: torch.Tensor, wide: int) -> int:
    """Keys in a tile: two stages of keys and values must fit the shared memory."""
    return 16 if q.dtype == torch.float32 and wide > 128 else 64 if wide <= 128 else 32


if triton is not None:

    @triton.jit
    def _attend(
        q, keys, values, position, parts, sums, scale, steps, slots, chunks,
        groups: tl.constexpr, kv_heads: tl.constexpr, window: tl.constexpr, d: tl.constexpr, wide: tl.constexpr,
        rows: tl.constexpr, chunk: tl.constexpr, block: tl.constexpr, early: tl.constexpr,
    ):  # fmt: skip
        take_turn(early)
        which = tl.program_id(0)
        pair = tl.program_id(2)  # of a row of the batch and a key head
        row, head = pair // kv_heads, pair % kv_heads
        first = tl.load(position + row).to(tl.int32)
        newest = first + steps - 1
        live = tl.minimum(newest + 1, slots)
        start = which * chunk
        if start >= live:
            return
        tile = tl.program_id(1) * rows + tl.arange(0, rows)  # step * groups + head of the group
        step, member = tile // groups, tile % groups
        real = step < steps
        column = tl.arange(0, wide)
        inside = column < d
        query_at = ((row.to(tl.int64) * steps + step) * kv_heads + head) * groups + member
        query = tl.load(q + query_at[:, None] * d + column[None, :], mask=real[:, None] & inside[None, :], other=0.0)
        most = tl.full((rows,), float("-inf"), dtype=tl.float32)
        total = tl.zeros((rows,), dtype=tl.float32)
        out = tl.zeros((rows, wide), dtype=tl.float32)
        for offset in range(0, tl.minimum(chunk, live - start), block):
            slot = start + offset + tl.arange(0, block)
            there = slot < live
            held = newest - (newest - slot + slots) % slots
            at = (pair.to(tl.int64) * slots + slot)[:, None] * d + column[None, :]
            key = tl.load(keys + at, mask=there[:, None] & inside[None, :], other=0.0)
            score = tl.dot(query, tl.trans(key).to(query.dtype), input_precision="ieee") * scale
            seen = there[None, :] & (held[None, :] <= (first + step)[:, None])
            if window > 0:
                seen = seen & (held[None, :] > (first + step - window)[:, None])
            score = tl.where(seen, score, float("-inf"))
            higher = tl.maximum(most, tl.max(score, axis=1))
            base = tl.where(higher == float("-inf"), 0.0, higher)
            shrink = tl.exp2(most - base)
            weight = tl.exp2(score - base[:, None])
            total = total * shrink + tl.sum(weight, axis=1)
            value = tl.load(values + at, mask=there[:, None] & inside[None, :], other=0.0)
            out = out * shrink[:, None] + tl.dot(weight.to(query.dtype), value.to(query.dtype), input_precision="ieee")
            most = higher
        to = query_at * chunks + which
        tl.store(parts + to[:, None] * d + column[None, :], out, mask=real[:, None] & inside[None, :])
        tl.store(sums + to * 2, most, mask=real)
        tl.store(sums + to * 2 + 1, total, mask=real)

    @triton.jit
    def _join(
        parts, sums, position, out, steps, slots, chunks,
        heads: tl.constexpr, chunk: tl.constexpr, d: tl.constexpr, wide: tl.constexpr, many: tl.constexpr,
        early: tl.constexpr,
    ):  # fmt: skip
        take_turn(early)
        token, head = tl.program_id(0), tl.program_id(1)
        newest = tl.load(position + token // steps).to(tl.int32) + steps - 1
        live = (tl.minimum(newest + 1, slots) + chunk - 1) // chunk
        here = (token.to(tl.int64) * heads + head) * chunks
        column = tl.arange(0, wide)
        inside = column < d
        which = tl.arange(0, many)
        peaks = tl.full((many,), float("-inf"), dtype=tl.float32)
        for start in range(0, live, many):
            there = start + which < live
            peaks = tl.maximum(peaks, tl.load(sums + (here + start + which) * 2, mask=there, other=float("-inf")))
        most = tl.max(peaks, axis=0)
        total = tl.zeros((many,), dtype=tl.float32)
        gathered = tl.zeros((wide,), dtype=tl.float32)
        for start in range(0, live, many):
            there = start + which < live
            at = here + start + which
            weight = tl.exp2(tl.load(sums + at * 2, mask=there, other=float("-inf")) - most)
            total += weight * tl.load(sums + at * 2 + 1, mask=there, other=0.0)
            part = tl.load(parts + at[:, None] * d + column[None, :], mask=there[:, None] & inside[None, :], other=0.0)
            gathered += tl.sum(part * weight[:, None], axis=0)
        to = (token.to(tl.int64) * heads + head) * d + column
        tl.store(out + to, (gathered / tl.sum(total, axis=0)).to(out.dtype.element_ty), mask=inside)
