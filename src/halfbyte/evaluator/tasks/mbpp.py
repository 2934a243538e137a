"""MBPP: short Python functions, right if their tests pass (Austin et al. 2021, google-research/mbpp, `sanitized-mbpp.json`).

The prompt is the paper's sentence with the tests in it, as is usual: without them nobody could know the function's name. The code is
the last fenced block of the answer, or the whole answer if it has none. It passes if code, imports and all asserts of the file run to the end.

An answer is a stranger's program. It runs only in `sandbox`, and only with `--allow-code`; without, the task is refused before
any model is asked.
"""

from __future__ import annotations

import re
from pathlib import Path

from halfbyte.errors import UsageError
from halfbyte.evaluator.tasks.lines import Entry, about, read_list, unique
from halfbyte.evaluator.tasks.sandbox import facts, run_program
from halfbyte.evaluator.tasks.task import Item, Task

VERSION, MAX_NEW_TOKENS = 1, 512
RULE = "the last fenced block (or the whole answer) passes all asserts of the file, in the sandbox"
ASKED = (
    "You are an expert Python programmer, and here is your task: {task} Your code should pass these tests:\n\n{tests}\n\n"
    "Answer with the code in one fenced block."
)
#: an opening fence may name a language; a block that was cut off by the end of the answer counts too
FENCED = re.compile(r"```[^\n`]*\n(.*?)(?:\n[ \t]*```|\Z)", re.DOTALL)


def read_mbpp(path: Path, *, allow_code: bool) -> Task:
    """The task of a `sanitized-mbpp.json`; raises UsageError without `allow_code`, SourceError naming the entry."""
    if not allow_code:
        raise UsageError(
            "mbpp runs the code that a model wrote",
            where="--task mbpp",
            todo="add --allow-code if that may be, in a sandbox",
        )
    entries = read_list(path)
    items = [_item(entry) for entry in entries]
    unique(zip((item.id for item in items), entries, strict=True))
    return Task("mbpp", VERSION, items, MAX_NEW_TOKENS, RULE, [about(path)], grade, facts={"sandbox": facts()})


def grade(item: Item, answer: str) -> bool:
    """Whether the answer's code runs through all of the item's tests."""
    imports, tests = item.key
    return run_program("\n".join([code_of(answer), *imports, *tests])).passed


def code_of(answer: str) -> str:
    """The last fenced block, or the whole answer."""
    blocks = FENCED.findall(answer)
    return str(blocks[-1]) if blocks else answer


def _item(entry: Entry) -> Item:
    tests = entry.texts("test_list")
    if not tests:
        raise entry.wrong("it has no tests")
    imports = entry.texts("test_imports") if "test_imports" in entry.body else []
    prompt = ASKED.format(task=entry.text("prompt").strip(), tests="\n".join(tests))
    return Item(entry.name("task_id"), "function", prompt, key=(tuple(imports), tuple(tests)))
