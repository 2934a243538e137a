"""Tasks on the page, in Markdown and on the terminal: the record's figures, flips in full, strangers' text as text."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from halfbyte.cards.report import section
from halfbyte.cards.report.page import render
from halfbyte.cards.report.tasks import meaning
from halfbyte.cli.text.evaluation import render as on_terminal
from halfbyte.evaluator.answers import Answer
from halfbyte.evaluator.tasks.asking import Asked, Said
from halfbyte.evaluator.tasks.results import Graded, block_of
from halfbyte.evaluator.tasks.task import Item, Task

HOSTILE = "<script>alert(1)</script> | [x](http://evil.example) \u202e $a_b$"


def graded(task: Task, text: str, right: set[int]) -> Graded:
    said = [Said(item.id, f"{text} {item.id}", 9) for item in task.items]
    items = [Answer(s.id, i.kind, s.text, int(s.id) in right, ()) for i, s in zip(task.items, said, strict=True)]
    return Graded(items, items, Asked(said, Path("answers.json"), False, 1.5, {}))


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    """200 items in two kinds, hostile in every text; the candidate loses 20 and gains 2. Only tasks were asked."""
    items = [Item(str(n), f"<i>{n % 2}", f"{HOSTILE} {n}") for n in range(200)]
    file = {"name": "<u>q.jsonl", "sha256": "0" * 64, "bytes": 7}
    task = Task(
        "questions",
        1,
        items,
        9,
        "the same",
        [file],
        lambda item, text: True,
        facts={"sandbox": {"network": "NOT cut off"}},
    )
    models = {
        "": graded(task, "A" + HOSTILE, set(range(100))),
        "x@nf4": graded(task, "B" + HOSTILE, set(range(20, 102))),
    }
    block = {**block_of(task, "reference", models, 0.02), "metric": "questions[chat,greedy]", "template": "sha256:1"}
    size = {"file_bytes": None, "bits_per_weight": None, "counted": True, "parameters": None}
    base = {"name": "reference", "reference": "x", "kind": "bf16", "instruct": True, "digest": "sha256:2", "size": size}
    effect = {
        "effect": "T",
        "task": "questions",
        "precision": "NF4",
        "value": -0.125,
        "low": -0.25,
        "high": None,
        "verdict": "undecided",
    }
    return {
        "created": "today", "versions": {"halfbyte": "0"}, "settings": {"margin": 0.01, "task_margin": 0.02, "resamples": 1},
        "bases": [{**base, "candidates": [{**base, "id": "x@nf4", "label": "x@nf4", "weights": None}]}],
        "protocols": [], "effects": [], "self_tests": [], "tasks": [block], "task_effects": [effect], "metrics_version": 1,
        "command": ["halfbyte", "evaluate"],
        "run": {"seconds": 1.0, "device_name": "cpu", "dtype": "float32", "peak_rss_bytes": 1, "peak_gpu_bytes": None},
    }  # fmt: skip


@pytest.fixture(scope="module")
def page(record: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> str:
    return render(record, tmp_path_factory.mktemp("none"))


def text_of(page: str) -> str:
    from cards.test_report import Seen

    return " ".join(" ".join(Seen(page).texts).split())


def test_page_markdown_and_terminal_say_the_same(page: str, record: dict[str, Any]) -> None:
    found = record["tasks"][0]["candidates"][0]
    assert (found["flips"]["only_reference"], found["flips"]["only_candidate"], found["verdict"]) == (20, 2, "loss")
    p, low, high = found["flips"]["p"], 100 * found["flips"]["low"], 100 * found["flips"]["high"]
    difference = f"-9.0 points [{low:+.1f}, {high:+.1f}]"
    for text in (text_of(page), section(record).replace("\\", ""), on_terminal(record)):
        assert difference in text
        assert "50.0 % [43.1, 56.9]" in text, "the reference"
        assert f"{p:.4g}" in text
        assert re.search(r"\b20\b\W+2\b", text), "lost and gained"
    assert "20 lost and 2 gained" in text_of(page)
    assert "more than 2 points" in text_of(page)
    assert "-0.125 [-0.25, ∞]" in text_of(page)
    assert "NOT cut off" in text_of(page)
    assert "margin 2 points" in on_terminal(record)
    assert "self-KLD" not in on_terminal(record), "nothing was scored, so nothing passed"


def test_flips_are_shown_in_full_and_stay_text(page: str, record: dict[str, Any]) -> None:
    from cards.test_report import Seen

    seen = Seen(page)
    assert not {"script", "i", "u"} & set(seen.tags)
    assert "\u202e" not in page
    examples = record["tasks"][0]["candidates"][0]["examples"]
    assert [e["id"] for e in examples] == ["0", "1", "2", "3", "4"]
    text = text_of(page)
    assert text.count("[x](http://evil.example)") == 3 * 5, "prompt and both answers of five flips"
    assert "Flips of x@nf4, the first 5" in text
    markdown = section(record)
    assert "<script" not in markdown
    assert "<u>" not in markdown


def test_kinds_have_their_own_counts(page: str) -> None:
    text = text_of(page)
    assert "<i>0 100 50.0 %" in text
    assert "<i>1 100 50.0 %" in text


def test_without_tasks_it_says_so(record: dict[str, Any], tmp_path: Path) -> None:
    text = text_of(render({**record, "tasks": [], "task_effects": []}, tmp_path))
    assert "5 Tasks not measured" in text
    older = {key: value for key, value in record.items() if key not in ("tasks", "task_effects")}
    assert "5 Tasks not measured" in text_of(render(older, tmp_path)), "a record of version 1"


@pytest.mark.parametrize(
    ("verdict", "high", "words"),
    [("tie", 0.01, "tie: whatever the difference is, it is within 2 points"), ("loss", -0.03, "it costs more than 2 points"),
     ("loss", -0.01, "it costs something, perhaps more than 2 points"), ("win", 0.1, "more right answers"), ("undecided", 0.1, "too few items")],
)  # fmt: skip
def test_a_verdict_claims_no_more_than_its_interval(verdict: str, high: float, words: str) -> None:
    assert words in meaning({"verdict": verdict, "margin": 0.02, "flips": {"high": high}})


def test_lost_answers_are_shown_before_gained_ones() -> None:
    items = [Item(str(n), "k", "p") for n in range(6)]
    task = Task("questions", 1, items, 9, "the same", [], lambda item, text: True)
    block = block_of(task, "reference", {"": graded(task, "a", {5, 3}), "c": graded(task, "b", {0, 3})}, 0.02)
    assert [(e["id"], e["lost"]) for e in block["candidates"][0]["examples"]] == [("5", True), ("0", False)]


def test_later_candidates_are_set_against_the_first_wherever_tasks_are_printed(
    record: dict[str, Any], tmp_path: Path
) -> None:
    items = [Item(str(n), "k", "p") for n in range(100)]
    task = Task("lastword", 1, items, 0, "the same", [], lambda item, text: True, forced=True)
    right = {"": range(60), "x@nf4": range(20, 60), "gptq": range(15, 60)}
    block = block_of(task, "reference", {key: graded(task, key, set(of)) for key, of in right.items()}, 0.02)
    one = {**record, "tasks": [{**block, "metric": "lastword[raw,forced]", "template": None}], "task_effects": []}
    line = "gptq against x@nf4: difference +5.0 points"
    for text in (text_of(render(one, tmp_path)), section(one).replace("\\", ""), on_terminal(one)):
        assert line in text
        assert "0 lost and 5 gained" in text
        assert "o answers, one forward pass an item" in text
        assert "at most 0 tokens" not in text
