"""The README is true: its generated parts are current, and every command and program in it runs, in order."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^\$ (.+)$", README, re.MULTILINE)
#: run elsewhere: installing uv and the tests are what runs this very file (.ci/run does both)
ELSEWHERE = ("pip install uv", "uv run pytest")


def test_generated_parts_are_current() -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "cogapp", "--check", "README.md"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, "run `uv run cog -r README.md`\n" + ended.stdout


def test_the_first_command_stands_by_line_15() -> None:
    lines = README.splitlines()
    assert next(i for i, line in enumerate(lines, 1) if line.startswith("$ ")) <= 15


def test_ci_runs_what_the_readme_says() -> None:
    ci = (ROOT / ".ci" / "run").read_text()
    assert all(command.split(" ", 1)[1] in ci for command in ELSEWHERE)


@pytest.mark.docs
@pytest.mark.real
@pytest.mark.timeout(600)
def test_every_command_and_program_of_the_readme_runs(tmp_path: Path) -> None:
    ours = [c for c in COMMANDS if c not in ELSEWHERE]
    assert len(ours) >= 7
    assert all(command.startswith("uv run halfbyte ") for command in ours)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    for command in ours:
        arguments = [sys.executable, "-m", "halfbyte.cli.main", *shlex.split(command)[3:]]
        ended = subprocess.run(arguments, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert ended.returncode == 0, f"{command}\n{ended.stdout[-2000:]}\n{ended.stderr[-3000:]}"
    assert (tmp_path / "halfbyte-demo").is_dir()
    (program,) = re.findall(r"```python\n(.+?)```", README, re.DOTALL)
    ended = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr[-3000:]


@pytest.mark.docs
def test_the_card_s_program_runs_exactly_as_printed(tiny_gemma4: Path, tmp_path: Path) -> None:
    import halfbyte

    out = tmp_path / "nf4"
    halfbyte.quantize(tiny_gemma4, out)
    halfbyte.verify(out, source=tiny_gemma4)
    card = halfbyte.card(out).read_text(encoding="utf-8")
    program = next(p for p in re.findall(r"```python\n(.+?)```", card, re.DOTALL) if "from_pretrained" in p)
    (tmp_path / "here").mkdir()
    ended = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, program + ended.stderr[-3000:]
    assert ended.stdout.strip()
