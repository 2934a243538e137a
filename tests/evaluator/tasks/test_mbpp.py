"""Code of answers: right if its tests run to the end, and able to do nothing else. Never without leave."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from halfbyte.errors import SourceError, UsageError
from halfbyte.evaluator.tasks import sandbox
from halfbyte.evaluator.tasks.mbpp import code_of, read_mbpp
from halfbyte.evaluator.tasks.sandbox import guarantees, run_program

needs = {
    name: pytest.mark.skipif(name not in guarantees(), reason=f"no namespace here for: {name}")
    for name in sandbox.NAMESPACES
}


def passes(program: str, seconds: float = 10) -> bool:
    return run_program(program, seconds=seconds).passed


def test_without_leave_no_code_runs(shared_data: Path) -> None:
    with pytest.raises(UsageError, match="runs the code") as caught:
        read_mbpp(shared_data / "mbpp" / "sanitized-mbpp.json", allow_code=False)
    assert "--allow-code" in str(caught.value)


def test_the_file_s_own_solutions_pass_and_others_do_not(shared_data: Path) -> None:
    path = shared_data / "mbpp" / "sanitized-mbpp.json"
    task = read_mbpp(path, allow_code=True)
    rows = json.loads(path.read_text(encoding="utf-8"))
    assert len(task.items) == len(rows) == 427
    for item, row in list(zip(task.items, rows, strict=True))[::40]:
        assert all(test in item.prompt for test in row["test_list"])
        assert row["code"] not in item.prompt
        assert task.grade(item, f"Here it is:\n```python\n{row['code']}\n```\nIt works."), item.id
        assert task.grade(item, row["code"]), item.id
        assert not task.grade(item, f"```python\n{row['code']}\n```\nor\n```\npass\n```"), "the last block counts"
        assert not task.grade(item, "I do not know."), item.id


@pytest.mark.parametrize(
    ("answer", "code"),
    [("x = 1", "x = 1"), ("```python\nx = 1\n```", "x = 1"), ("```\na\n```\n\n```py\nb\nc\n```", "b\nc"), ("```python\ncut off", "cut off"),
     ("```python\n  x\n  ```", "  x")],
)  # fmt: skip
def test_code_is_the_last_fenced_block_or_everything(answer: str, code: str) -> None:
    assert code_of(answer) == code


def test_a_program_passes_only_at_its_last_line() -> None:
    assert passes("assert 1 + 1 == 2")
    for program in (
        "assert 1 + 1 == 3",
        "import sys; sys.exit(0)",
        "import os; os._exit(0)",
        "raise SystemExit",
        "x = (",
        "\0",
        "\udc80",
    ):
        assert not passes(program), program


def test_time_and_memory_end() -> None:
    outcome = run_program("while True: pass", seconds=0.5)
    assert (outcome.passed, outcome.timed_out) == (False, True)
    assert not passes("x = bytearray(2 << 30)")
    assert passes("x = bytearray(2 << 20)")
    assert not passes("open('x', 'wb').write(bytes(17 << 20))")
    assert not passes("x = '" + "a" * sandbox.MAX_PROGRAM + "'"), "a program may be too long"


def test_output_is_thrown_away_and_there_is_no_input() -> None:
    assert passes("import sys\nprint('x' * 10**7)\nassert sys.stdin.read() == ''")


def test_it_sees_neither_environment_nor_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_TOKEN", "secret")
    assert passes("import os\nassert 'A_TOKEN' not in os.environ and 'PATH' not in os.environ")
    assert not passes("import numpy")


def test_its_folder_is_gone_afterwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert passes("import os\nopen('note', 'w').write('x')\nassert sorted(os.listdir('.')) == ['answer.py', 'note']")
    assert list(tmp_path.iterdir()) == []


@needs["network"]
def test_no_address_can_be_reached() -> None:
    assert passes(
        "import socket\n"
        "for target in ('127.0.0.1', '192.0.2.1'):\n"
        "    try:\n        socket.create_connection((target, 80), 1)\n"
        "    except OSError as error:\n        assert error.errno == 101, error\n"
        "    else:\n        raise RuntimeError"
    )


@needs["files"]
def test_nothing_outside_its_folder_can_be_written(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.write_text("mine")
    assert passes(
        "import os\n"
        f"for act in (lambda: open({str(mine)!r}, 'a'), lambda: os.unlink({str(mine)!r}), lambda: os.mkdir({str(tmp_path / 'x')!r})):\n"
        "    try:\n        act()\n"
        "    except OSError as error:\n        assert error.errno == 30, error\n"
        "    else:\n        raise RuntimeError"
    )
    assert mine.read_text() == "mine"


@needs["processes"]
def test_daemons_die_with_it() -> None:
    reading, writing = os.pipe()  # the far end stays open as long as anybody lives who has inherited it
    try:
        with pytest.MonkeyPatch.context() as patch:
            whole = sandbox.subprocess.Popen
            patch.setattr(
                sandbox.subprocess, "Popen", lambda *a, **k: whole(*a, **{**k, "pass_fds": (*k["pass_fds"], writing)})
            )
            assert passes("import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(60)")
        os.close(writing)
        writing = -1
        os.set_blocking(reading, False)
        deadline = 200
        while deadline:
            try:
                assert os.read(reading, 1) == b""
                break
            except BlockingIOError:
                deadline -= 1
                sandbox_wait()
        assert deadline, "somebody still holds the pipe"
    finally:
        os.close(reading)
        if writing >= 0:
            os.close(writing)


def sandbox_wait() -> None:
    import time

    time.sleep(0.02)


def test_what_is_not_granted_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "guarantees", lambda: ())
    assert sandbox.facts()["network"] == "NOT cut off"
    assert sandbox.facts()["files"] == "NOT protected from writing"
    assert run_program("assert True").passed, "limits alone still run it"


@pytest.mark.parametrize(
    ("rows", "message"),
    [("{}", "not a JSON list"), ("[1]", "entry 1"), ('[{"task_id": 1, "prompt": "p", "test_list": []}]', "no tests"), ("[]", "nothing in it"),
     ('[{"task_id": 1, "prompt": "p", "test_list": [1]}]', "not a list of texts"), ('[{"task_id": 1, "test_list": ["assert 1"]}]', "prompt is missing")],
)  # fmt: skip
def test_damaged_files_are_refused(tmp_path: Path, rows: str, message: str) -> None:
    path = tmp_path / "mbpp.json"
    path.write_text(rows)
    with pytest.raises(SourceError, match=message):
        read_mbpp(path, allow_code=True)
