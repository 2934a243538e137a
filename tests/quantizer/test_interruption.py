"""Killed at any point and run again, the job ends in the same bytes; nothing half-written ever has a final name."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

DRIVER = Path(__file__).with_name("interrupt_driver.py")


def drive(source: Path, folder: Path, kills: int, seed: int, signum: int) -> list[dict[str, Any]]:
    command = [sys.executable, str(DRIVER), str(source), str(folder), str(kills), str(seed), str(int(signum))]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    results: list[dict[str, Any]] = json.loads(ended.stdout.splitlines()[-1])["results"]
    return results


def test_killed_at_ten_random_points_it_continues_to_identical_bytes(tiny_gemma4: Path, tmp_path: Path) -> None:
    results = drive(tiny_gemma4, tmp_path, 10, 0, signal.SIGKILL)
    killed = [r for r in results if r["signal"] == signal.SIGKILL]
    assert len(killed) >= 7, "most of the random points must lie inside the job"
    assert [r for r in results if not r["identical"] or r["again"] != 0 or r["work_folder_left"]] == []
    assert [r["half_files"] for r in killed] == [[]] * len(killed)
    assert not any(r["loadable_early"] for r in killed if r["calls"] < 200)
    assert any(r["resumed"] > 0 for r in killed), "no run continued: everything was done again"


def test_interrupted_by_control_c_it_stops_cleanly_and_continues(tiny_gemma4: Path, tmp_path: Path) -> None:
    results = drive(tiny_gemma4, tmp_path, 4, 2, signal.SIGINT)
    stopped = [r for r in results if r["exit"] == 130]
    assert stopped
    assert all(r["identical"] and not r["half_files"] for r in results)
