"""Ours or bitsandbytes', by times: the rule, and the file that keeps them. The clock is a fake one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from runtime.stored_weights import drawn

from halfbyte.errors import UsageError
from halfbyte.runtime.linear import table
from halfbyte.runtime.linear.module import Nf4Linear
from halfbyte.runtime.loading import timing
from halfbyte.runtime.loading.choice import ROWS, Measured, Shape, Times, decide, read_times, write_times

#: microseconds of (kernel, expand, bitsandbytes) at each of ROWS: a GPU where ours is faster everywhere
FAST = {
    1: (40, None, 90),
    8: (40, None, 200),
    16: (42, None, 200),
    32: (50, 130, 200),
    64: (100, 130, 210),
    256: (None, 220, 230),
}
SHAPE = Shape((64, 32), 128, 64)


def times(changes: dict[int, tuple[float | None, float | None, float | None]] | None = None) -> Times:
    rows = FAST | (changes or {})
    names = ("kernel", "expand", "bitsandbytes")
    return {m: {n: t * 1e-6 for n, t in zip(names, row, strict=True) if t is not None} for m, row in rows.items()}


def test_the_fastest_path_is_taken_at_every_batch():
    assert decide(times()).paths == "64:kernel expand"
    assert decide(times({64: (140, 130, 210)})).paths == "32:kernel expand"
    assert decide(times({32: (140, 130, 210), 64: (140, 130, 210)})).paths == "16:kernel expand"


def test_batches_of_1_to_16_have_one_path_whatever_the_times_are():
    both = times()
    for m, kernel, triton in ((1, 10, 40), (8, 80, 40), (16, 80, 40)):
        both[m] |= {"kernel": kernel * 1e-6, "triton": triton * 1e-6}
    verdict = decide(both)
    assert verdict.paths is not None
    assert {table.path_for(verdict.paths, m) for m in range(1, 17)} == {"triton"}  # 170 against 120


@pytest.mark.parametrize("m", ROWS)
def test_one_batch_where_bitsandbytes_is_faster_gives_it_the_shape(m):
    row = tuple(None if t is None else t * (1 if i < 2 else 0.1) for i, t in enumerate(FAST[m]))
    verdict = decide(times({m: row}))
    assert verdict.paths is None
    assert f"faster at {m} rows" in verdict.reason
    assert decide(times({m: row}), against_theirs=False).paths == "64:kernel expand"


def test_a_difference_within_noise_is_none():
    assert decide(times({256: (None, 230, 225)})).paths is not None
    assert decide(times({256: (None, 240, 225)})).paths is None


def test_what_could_not_be_timed_is_not_chosen():
    assert decide(times({8: (None, None, 100)})).paths is None
    assert decide(times({256: (None, None, 100)})).paths is None
    silent = {m: {p: t for p, t in row.items() if p != "bitsandbytes"} for m, row in times().items()}
    assert decide(silent).reason == "bitsandbytes could not be timed"


class Clock:
    """Counts how often it is asked."""

    def __init__(self, found: Times | None = None) -> None:
        self.asked, self.found = 0, found or times()

    def __call__(self, theirs: Any, ours: Nf4Linear) -> Times:
        self.asked += 1
        return self.found


def judged(file: Path, clock: Clock) -> Any:
    """As replacement does: what is known, else judged."""
    measured = Measured(file, clock)
    return measured.known(SHAPE) or measured.judge(SHAPE, [], Nf4Linear(drawn(SHAPE.rows, 128)))


def test_a_shape_is_timed_once_and_then_read_from_disk(tmp_path):
    clock = Clock()
    assert judged(tmp_path / "a" / "times.json", clock) == judged(tmp_path / "a" / "times.json", clock)
    assert clock.asked == 1


@pytest.mark.parametrize("damage", ["cut", "changed", "format", "negative", "not json", "rows", "list", "folder"])
def test_a_file_that_is_not_whole_is_measured_again(tmp_path, damage):
    file, clock = tmp_path / "times.json", Clock()
    judged(file, clock)
    text = file.read_text()
    body = json.loads(text)
    if damage == "cut":
        file.write_text(text[:-20])
    elif damage == "changed":
        file.write_text(text.replace("kernel", "triton", 1))
    elif damage == "not json":
        file.write_bytes(b"\xff{")
    elif damage == "folder":
        file.unlink()
        file.mkdir()
    else:
        good = times()
        good |= {1: {"kernel": -1.0}} if damage == "negative" else {}
        if damage == "rows":
            del good[8]
        write_raw(file, {str(SHAPE): good} if damage != "list" else [1, 2], 2 if damage == "format" else body["format"])
    judged(file, clock)
    assert clock.asked == 2


def write_raw(file: Path, content: Any, number: int) -> None:
    """A file with a right digest and wrong content."""
    from halfbyte.runtime.loading import choice

    plain = json.loads(json.dumps(content))
    file.write_text(json.dumps({"format": number, "sha256": choice._digest(plain), "times": plain}))


def test_two_writers_keep_each_others_times(tmp_path):
    file = tmp_path / "times.json"
    write_times(file, {"a": times()})
    write_times(file, {"b": times({1: (1, None, 2)})})
    assert read_times(file) == {"a": times(), "b": times({1: (1, None, 2)})}


def test_what_failed_is_not_kept(tmp_path):
    clock = Clock(times({8: (None, None, 100)}))
    assert judged(tmp_path / "times.json", clock).paths is None
    assert not (tmp_path / "times.json").exists()


def test_a_wrong_or_failing_path_is_not_timed():
    truth = torch.ones(4)

    def fails(i: int) -> torch.Tensor:
        raise UsageError("no")

    jobs = {
        "bitsandbytes": lambda i: truth, "kernel": lambda i: truth * 1.001, "triton": fails,
        "expand": lambda i: torch.full((4,), torch.nan),
    }  # fmt: skip
    assert timing.time_jobs(jobs, lambda job: 1.0) == {"bitsandbytes": 1.0, "kernel": 1.0}


def test_the_calls_that_are_timed_multiply_by_the_same_weight_ours_and_theirs_in_every_copy():
    from bitsandbytes.nn import Linear4bit

    theirs = [Linear4bit(128, rows, False, torch.bfloat16, True, "nf4").to("cpu").eval() for rows in (64, 32)]
    ours = Nf4Linear.of_linear4bit(*theirs)
    asked = []
    for m, jobs in timing.jobs_of(theirs, ours, 3, kernel=True):
        assert list(jobs) == ["bitsandbytes", *timing.paths_at(m, True)]
        assert all(torch.equal(job(0), job(1)) and torch.equal(job(1), job(5)) for job in jobs.values())
        timed = timing.time_jobs(jobs, lambda job: asked.append(job(0).shape) or 1.0)
        assert list(timed) == list(jobs)  # none differs from bitsandbytes' result
    assert {tuple(shape) for shape in asked} == {(m, 96) for m in ROWS}


def test_paths_that_a_table_may_name_are_timed_at_every_batch():
    assert [timing.paths_at(m, True) for m in ROWS] == [("kernel",)] * 3 + [("kernel", "expand")] * 2 + [("expand",)]
    assert [timing.paths_at(m, False) for m in ROWS] == [("triton",)] * 3 + [("expand",)] * 3


def test_times_of_another_gpu_version_or_source_are_not_these():
    assert timing.key_of(["a", "bc"]) != timing.key_of(["ab", "c"])
    assert len(timing.source_digest()) == 64
