"""The shape of the code base, held by tests: arrows between rooms, sizes, names, and what a command may import.

Import cost is architecture: `import torch` takes seconds, bitsandbytes more, and a help page needs neither. Every probe
of `sys.modules` runs in a fresh interpreter, because this one has imported everything already.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cards.paper_checkpoint import write_checkpoint

from halfbyte.cli import main as command_line
from halfbyte.demo.tiny_gemma4 import gemma4_config

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "halfbyte"
FILES = sorted(PACKAGE.rglob("*.py"))
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
MAX_LINES, MAX_FUNCTION_LINES, MAX_PARAMETERS, MAX_FILES = 400, 60, 7, 12
DRAWERS = {"utils", "util", "common", "helpers", "helper", "base", "manager", "misc"}
HEAVY = {"torch", "transformers", "bitsandbytes", "numba", "matplotlib"}
#: runs the command line in a fresh interpreter and prints which top-level packages that took
PROBE = """
import json, sys
sys.argv = ["halfbyte", *sys.argv[1:]]
from halfbyte.cli.main import main
try:
    main()
except SystemExit as left:
    assert left.code in (0, None, 2), left.code
print()
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def functions() -> Iterator[tuple[Path, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, FUNCTIONS):
                yield path, node


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    """What a caller has to know: without self and cls, and without a GPU kernel's compile-time constants."""
    given = function.args
    named = [*given.posonlyargs, *given.args, *given.kwonlyargs, *filter(None, (given.vararg, given.kwarg))]
    constant = [a for a in named if a.annotation is not None and ast.unparse(a.annotation).endswith("constexpr")]
    return [a.arg for a in named if a not in constant and a.arg not in ("self", "cls")]


def imported_by(code: str, *arguments: str) -> set[str]:
    """Top-level packages that a fresh interpreter holds after `code`, whose last line prints them as JSON."""
    ended = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120, check=False
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    return set(json.loads(ended.stdout.splitlines()[-1]))


def test_imports_between_rooms_go_one_way() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", "from importlinter.cli import lint_imports_command as run; run()", "--no-cache"],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-1000:]
    assert "3 kept, 0 broken" in ended.stdout, "a contract is gone from pyproject.toml"


def test_the_walk_below_sees_the_whole_package() -> None:
    assert {"codec", "format", "recipe", "quantizer", "verifier", "cards", "runtime", "cli"} <= {
        path.parent.name for path in FILES
    }


def test_files_are_at_most_400_lines() -> None:
    lines = {name_of(path): len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert {name: count for name, count in lines.items() if count > MAX_LINES} == {}


def test_functions_are_at_most_60_lines() -> None:
    lengths = {f"{name_of(p)}:{f.name}": f.end_lineno - f.lineno + 1 for p, f in functions() if f.end_lineno}
    assert {name: count for name, count in lengths.items() if count > MAX_FUNCTION_LINES} == {}


def test_functions_take_at_most_seven_parameters() -> None:
    """A command of the CLI may take more: its parameters are the options, each of them named on the command line.

    So may a Triton kernel: it is launched with addresses, strides and sizes, and cannot be given a record of them.
    """

    def is_kernel(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
        return any(ast.unparse(decorator) == "triton.jit" for decorator in function.decorator_list)

    counts = {
        f"{name_of(path)}:{function.name}": len(parameters(function))
        for path, function in functions()
        if not (path.parent.name == "cli" and function.name == "command") and not is_kernel(function)
    }
    assert {name: count for name, count in counts.items() if count > MAX_PARAMETERS} == {}


def test_a_room_has_at_most_twelve_files() -> None:
    """The CLI is one file a verb; there are as many as there are verbs."""
    rooms = {folder: len(list(folder.glob("*.py"))) for folder in {path.parent for path in FILES}}
    verbs = {Path(module.__file__ or "").name for module in command_line.MODULES} | {"main.py", "__init__.py"}
    assert {path.name for path in (PACKAGE / "cli").glob("*.py")} == verbs
    del rooms[PACKAGE / "cli"]
    assert {name_of(folder): count for folder, count in rooms.items() if count > MAX_FILES} == {}


def test_no_room_or_file_is_a_drawer() -> None:
    names = {part for path in FILES for part in path.relative_to(PACKAGE).with_suffix("").parts}
    assert names & DRAWERS == set()


def test_every_module_says_what_it_is_for() -> None:
    silent = [name_of(p) for p in FILES if not ast.get_docstring(ast.parse(p.read_text(encoding="utf-8")))]
    assert silent == []


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["quantize", "--help"], ["card", "absent-folder"]])
def test_light_commands_import_nothing_heavy(arguments: list[str]) -> None:
    loaded = imported_by(PROBE, *arguments)
    assert "halfbyte" in loaded
    assert loaded & HEAVY == set()


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = 'import halfbyte, json, sys; dir(halfbyte); print(json.dumps([m.partition(".")[0] for m in sys.modules]))'
    assert imported_by(code) & HEAVY == set()


def test_writing_a_card_imports_nothing_heavy(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "tiny-nf4")
    assert imported_by(PROBE, "card", str(folder)) & HEAVY == set()
    assert (folder / "README.md").is_file(), "the command left before it wrote anything"


def test_plan_imports_neither_bitsandbytes_nor_numba(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(gemma4_config(2048, 6, False)))
    loaded = imported_by(PROBE, "plan", str(config))
    assert "transformers" in loaded
    assert loaded & {"bitsandbytes", "numba", "matplotlib"} == set()
