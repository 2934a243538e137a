"""The command line as a person uses it: arguments in; exit code, stdout and stderr out.

`main()` runs in this process (a fresh interpreter for each of these tests would pay for torch again), and it is the real
entry point, so that how an error is printed is part of what is tested.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from halfbyte.cli.main import main


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str


Run = Callable[..., Outcome]
Refused = Callable[..., str]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run `halfbyte ARGUMENTS`. Any other exception than leaving is a traceback, and fails the test."""

    def command(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["halfbyte", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            main()
        printed = capsys.readouterr()
        code = left.value.code
        return Outcome(code if isinstance(code, int) else 0, printed.out, printed.err)

    return command


@pytest.fixture
def refused(run: Run) -> Refused:
    """Run a command that must be refused: exit code 2 and three parts on stderr. Returns the message."""

    def command(*arguments: object) -> str:
        outcome = run(*arguments)
        assert outcome.code == 2, outcome
        assert outcome.out == ""
        message = outcome.err[outcome.err.index("error: ") :]
        assert "\n  where: " in message
        assert "\n  next:  " in message
        return message

    return command


@pytest.fixture(scope="session")
def finished(tiny_gemma4: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Gemma 4 in NF4 (read it, never write into it)."""
    import halfbyte

    out = tmp_path_factory.mktemp("finished") / "tiny-nf4"
    halfbyte.quantize(tiny_gemma4, out)
    return out


@pytest.fixture
def checkpoint(finished: Path, tmp_path: Path) -> Path:
    """A private copy of the finished checkpoint."""
    return Path(shutil.copytree(finished, tmp_path / "tiny-nf4"))


@pytest.fixture
def source(tiny_gemma4: Path, tmp_path: Path) -> Path:
    """A private copy of the bf16 source."""
    return Path(shutil.copytree(tiny_gemma4, tmp_path / "source"))
