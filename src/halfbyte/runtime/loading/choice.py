"""Ours or bitsandbytes', and ours by which path: decided from times on this GPU, which are kept on disk.

A model has few shapes (Gemma 4 31B: six), and each is timed once with its own weights, at a few batches (`ROWS`). From the times:

    1 to 16 rows    one path for all of them, so that a row has the same bits in any batch: the least sum
    more rows       the fastest at the next batch that was timed
    any row slower than bitsandbytes by more than NOISE     the shape stays bitsandbytes'

Kept are the times, not the decision: a better rule needs no new measurement. The file's name is a hash of all they depend on:
GPU, versions, our sources. What is read back is checked like anything from outside, and measured again if it is not whole.

The catch: between two timed batches the table is a guess; and times of one weight do not know what the rest of a model leaves in the
L2 cache (timing.py has several copies of each for that).
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from halfbyte.records import write_text_atomic
from halfbyte.runtime.linear.module import Nf4Linear
from halfbyte.runtime.linear.table import DEFAULT, INVARIANT_ROWS, PATHS
from halfbyte.runtime.loading.report import OURS, THEIRS

#: batches that are timed
ROWS = (1, 8, 16, 32, 64, 256)
#: what two timings of the same thing may differ by
NOISE = 1.05
FORMAT = 1

#: rows of x -> path -> seconds of one call
Times = dict[int, dict[str, float]]


class Shape(NamedTuple):
    """Rows of each part, columns, block size: linears with the same three are timed once."""

    rows: tuple[int, ...]
    columns: int
    blocksize: int

    def __str__(self) -> str:
        return f"{'+'.join(map(str, self.rows))}x{self.columns}/{self.blocksize}"


class Verdict(NamedTuple):
    """`paths`: the table (halfbyte.runtime.linear.table) if it is ours, None if it is theirs; and why."""

    paths: str | None
    reason: str

    @property
    def path(self) -> str:
        """Whose code runs: `report.OURS` or `report.THEIRS`."""
        return OURS if self.paths is not None else THEIRS


def decide(times: Times, against_theirs: bool = True) -> Verdict:
    """The rule above. against_theirs False: ours whatever bitsandbytes' times are."""
    chosen = _chosen(times)
    if chosen is None:
        return Verdict(None, "no path of ours could be timed")
    slower = [
        (m, chosen[m], theirs)
        for m in chosen
        if (theirs := times[m].get(THEIRS)) is not None and times[m][chosen[m]] > NOISE * theirs
    ]
    if slower and against_theirs:
        m, path, theirs = max(slower, key=lambda row: times[row[0]][row[1]] / row[2])
        return Verdict(None, f"faster at {m} rows: {1e6 * theirs:.1f} us, ours {1e6 * times[m][path]:.1f} us")
    steps: list[tuple[int, str]] = []
    for m in sorted(m for m in chosen if m >= INVARIANT_ROWS):
        if steps and steps[-1][1] == chosen[m]:
            steps.pop()
        steps.append((m, chosen[m]))
    words = [f"{m}:{path}" for m, path in steps[:-1]] + [steps[-1][1]]
    timed = THEIRS in times[min(times)]
    return Verdict(" ".join(words), "fastest where timed" if timed else "bitsandbytes could not be timed")


def _chosen(times: Times) -> dict[int, str] | None:
    """The path for each timed batch, None if some batch has none."""
    few = [m for m in times if m <= INVARIANT_ROWS]
    common = [path for path in PATHS if path != "expand" and all(path in times[m] for m in few)]
    if not common or INVARIANT_ROWS not in few:
        return None
    narrow = min(common, key=lambda path: sum(times[m][path] for m in few))
    chosen = dict.fromkeys(few, narrow)
    for m in sorted(set(times) - set(few)):
        timed = [path for path in PATHS if path in times[m]]
        if not timed:
            return None
        chosen[m] = min(timed, key=times[m].__getitem__)
    return chosen


class Always:
    """Ours wherever it can be, without a measurement."""

    seconds = 0.0

    def __init__(self, reason: str) -> None:
        self.verdict = Verdict(DEFAULT, reason)

    def known(self, shape: Shape) -> Verdict | None:
        """Always the same."""
        return self.verdict

    def judge(self, shape: Shape, theirs: Sequence[Any], ours: Nf4Linear) -> Verdict:
        """Always the same."""
        return self.verdict


class Measured:
    """Verdicts by time.

    file            where times are kept (`timing.times_file`)
    timer           seconds of each path: (bitsandbytes' linears, ours) -> Times
    against_theirs  False: times choose among our own paths only
    """

    def __init__(
        self, file: Path, timer: Callable[[Sequence[Any], Nf4Linear], Times], against_theirs: bool = True
    ) -> None:
        self.file, self.timer, self.against_theirs = file, timer, against_theirs
        self.times = read_times(file)
        self.seconds = 0.0

    def known(self, shape: Shape) -> Verdict | None:
        """The verdict from times on disk or of this session."""
        times = self.times.get(str(shape))
        return None if times is None else decide(times, self.against_theirs)

    def judge(self, shape: Shape, theirs: Sequence[Any], ours: Nf4Linear) -> Verdict:
        """Time, keep, decide. What could not be timed is not kept."""
        start = time.perf_counter()
        times = self.timer(theirs, ours)
        self.seconds += time.perf_counter() - start
        verdict = decide(times, self.against_theirs)
        self.times[str(shape)] = times
        if _chosen(times) is not None:
            write_times(self.file, self.times)
        return verdict


def read_times(file: Path) -> dict[str, Times]:
    """Shape -> times; nothing if the file is absent, cut short, changed, or holds anything but positive times."""
    try:
        body = json.loads(file.read_bytes())
        if body["format"] != FORMAT or body["sha256"] != _digest(body["times"]):
            return {}
        found = {
            str(shape): {int(m): {path: float(seconds) for path, seconds in row.items()} for m, row in rows.items()}
            for shape, rows in body["times"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}
    values = [seconds for rows in found.values() for row in rows.values() for seconds in row.values()]
    fine = all(0 < seconds < math.inf for seconds in values)
    return found if fine and all(set(rows) == set(ROWS) for rows in found.values()) else {}


def write_times(file: Path, times: dict[str, Times]) -> None:
    """Write all or nothing, together with what others wrote meanwhile; a folder that cannot be written is no error."""
    complete = {shape: rows for shape, rows in times.items() if set(rows) == set(ROWS)}
    plain = {shape: {str(m): row for m, row in rows.items()} for shape, rows in (read_times(file) | complete).items()}
    try:
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        body = {"format": FORMAT, "sha256": _digest(plain), "times": plain}
        write_text_atomic(file, json.dumps(body, indent=1) + "\n")
    except OSError:
        return


def _digest(times: Any) -> str:
    return hashlib.sha256(json.dumps(times, sort_keys=True).encode()).hexdigest()
