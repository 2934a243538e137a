"""The README is true: its generated parts are current, and every command and program in it runs, in order."""

from __future__ import annotations

import re
import runpy
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


def in_child(*arguments: str, cwd: Path) -> str:
    """stdout of a fresh interpreter, which must end well."""
    ended = subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, f"{arguments}\n{ended.stdout[-2000:]}\n{ended.stderr[-3000:]}"
    return ended.stdout


@pytest.mark.docs
@pytest.mark.real
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("one_thread")
def test_every_command_and_program_of_the_readme_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the README's order. The first command is a process as for a person; the others run in this one, which has
    imported torch and transformers already, through the same entry point.
    """
    from halfbyte.cli.main import main

    ours = [c for c in COMMANDS if c not in ELSEWHERE]
    assert len(ours) >= 7
    assert all(command.startswith("uv run halfbyte ") for command in ours)
    first, *others = [shlex.split(command)[3:] for command in ours]
    assert in_child("-m", "halfbyte.cli.main", *first, cwd=tmp_path).strip()
    assert (tmp_path / "halfbyte-demo").is_dir()
    monkeypatch.chdir(tmp_path)
    for arguments in others:
        monkeypatch.setattr(sys, "argv", ["halfbyte", *arguments])
        with pytest.raises(SystemExit) as left:
            main()
        printed = capsys.readouterr()
        assert left.value.code in (0, None), f"{arguments}\n{printed.out[-2000:]}\n{printed.err[-3000:]}"
        assert printed.out.strip(), f"{arguments} printed nothing"
    (program,) = re.findall(r"```python\n(.+?)```", README, re.DOTALL)
    (tmp_path / "program.py").write_text(program)
    made = runpy.run_path("program.py")
    assert made["proof"]["passed"]
    assert made["answer"]["text"] == "Red, yellow and blue."
    assert made["card"].is_file()


@pytest.mark.docs
@pytest.mark.usefixtures("one_thread")
def test_the_card_s_program_runs_exactly_as_printed(tiny_gemma4: Path, tmp_path: Path) -> None:
    """The card of real records; without the sanity prompts, of which nothing goes into the program."""
    import halfbyte

    out = tmp_path / "nf4"
    halfbyte.quantize(tiny_gemma4, out)
    halfbyte.verify(out, source=tiny_gemma4, generate=False)
    card = halfbyte.card(out).read_text(encoding="utf-8")
    program = next(p for p in re.findall(r"```python\n(.+?)```", card, re.DOTALL) if "from_pretrained" in p)
    assert in_child("-c", program, cwd=tmp_path).strip()
