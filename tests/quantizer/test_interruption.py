"""Stopped at any point and run again, the job ends in the same bytes; nothing half-written ever has a final name."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

DRIVER = Path(__file__).with_name("interrupt_driver.py")
Results = list[dict[str, Any]]


@pytest.fixture(scope="module")
def stopped(tiny_gemma4: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Results]:
    """What the driver saw: how the job was stopped -> one entry a job."""
    command = [sys.executable, str(DRIVER), str(tiny_gemma4), str(tmp_path_factory.mktemp("stopped"))]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    results: dict[str, Results] = json.loads(ended.stdout.splitlines()[-1])
    return results


def test_killed_at_ten_random_points_it_continues_to_identical_bytes(stopped: dict[str, Results]) -> None:
    results = stopped["killed"]
    killed = [r for r in results if r["signal"] == signal.SIGKILL]
    assert len(killed) >= 7, "most of the random points must lie inside the job"
    assert [r for r in results if not r["identical"] or r["again"] != 0] == []
    assert [r["half_files"] for r in killed] == [[]] * len(killed)
    assert not any(r["loadable_early"] for r in killed if r["calls"] < 200)
    assert any(r["resumed"] > 0 for r in killed), "no run continued: everything was done again"


def test_interrupted_by_control_c_it_stops_cleanly_and_continues(stopped: dict[str, Results]) -> None:
    results = stopped["interrupted"]
    assert [r for r in results if r["exit"] == 130]
    assert all(r["identical"] and not r["half_files"] for r in results)


def test_killed_before_a_rename_it_leaves_a_temporary_file_that_the_next_run_removes(
    stopped: dict[str, Results],
) -> None:
    """A companion, config.json and a record: all are written by records.write_bytes_atomic."""
    results = stopped["renaming"]
    assert [(r["signal"], len(r["temporary_files"])) for r in results] == [(signal.SIGKILL, 1)] * 3
    assert [r for r in results if not r["identical"] or r["again"] != 0 or r["half_files"]] == []
