"""Which path multiplies how many rows of x: a short line of text, so that a traced graph carries it as a constant.

    "16:kernel 64:kernel expand"        up to 16 rows the kernel, up to 64 the kernel, beyond that expand and cuBLAS

    kernel   CUDA C++ (halfbyte.runtime.kernels), up to 64 rows of x a launch
    triton   the portable kernel, 16 rows at most; more rows are expanded
    expand   the weight in bf16 in one reused buffer, then cuBLAS

The op looks its rows up when it runs, which is Python: a CUDA graph records the path that was taken, and one rows-to-path table
belongs to a weight for good. The first step must reach 16 rows: a row of x has the same bits in any batch of 1 to 16, and two
paths add in two orders. Where a table comes from: halfbyte.runtime.loading.choice.
"""

from __future__ import annotations

import math
from functools import cache

from halfbyte.errors import UsageError

PATHS = ("kernel", "triton", "expand")
#: batches of which every row has the bits it would have alone
INVARIANT_ROWS = 16
#: what is taken where nothing was measured
DEFAULT = "64:kernel expand"


@cache
def steps(table: str) -> tuple[tuple[float, str], ...]:
    """(most rows, path), ascending, the last without a limit. raises UsageError if the line says anything else"""
    found: list[tuple[float, str]] = []
    for number, word in enumerate(words := table.split()):
        limit, colon, path = word.rpartition(":")
        last = number == len(words) - 1
        if path not in PATHS or bool(colon) == last or (colon and not (limit.isascii() and limit.isdigit())):
            raise _wrong(table)
        found.append((math.inf if last else int(limit), path))
    limits = [limit for limit, _ in found]
    if not found or limits != sorted(set(limits)) or limits[0] < INVARIANT_ROWS:
        raise _wrong(table)
    return tuple(found)


@cache
def path_for(table: str, rows: int) -> str:
    """The path for `rows` rows of x. raises UsageError if the table cannot be read"""
    return next(path for limit, path in steps(table) if rows <= limit)


def _wrong(table: str) -> UsageError:
    return UsageError(
        f"{table!r} is no table of paths",
        where="nf4_linear",
        todo=f"write like {DEFAULT!r}: ascending limits from {INVARIANT_ROWS} up, the last path without one",
    )
