"""Last words: read by rule, forced without an answerer, compared like every task, and with the first candidate too."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from cards.small_schema import violations

import halfbyte
from halfbyte.cards.report import report
from halfbyte.errors import SourceError
from halfbyte.evaluator.tasks import asking
from halfbyte.evaluator.tasks.lastword import read_lastword
from halfbyte.evaluator.tasks.opening import open_tasks

SCHEMA = Path(halfbyte.__file__).parent / "evaluator" / "job" / "evaluate.schema.json"
LAST_WORDS = Path(__file__).parents[3] / "benchmarks" / "evaluation" / "last_words.py"

pytestmark = pytest.mark.usefixtures("one_thread_for_all")


def written(folder: Path, *rows: dict[str, Any]) -> Path:
    path = folder / "words.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_the_last_word_is_what_stands_behind_the_last_white_space(tmp_path: Path) -> None:
    plain = {"text": "He put it into  the\nbox \n"}
    named = {"text": "He put it into the box", "target": "the box", "id": 7, "kind": "two", "source": "A paragraph."}
    task = read_lastword(written(tmp_path, plain, named))
    assert [(i.id, i.kind, i.prompt, i.key, i.source) for i in task.items] == [
        ("1", "last word", "He put it into  the", "\nbox", None),
        ("7", "two", "He put it into", " the box", "A paragraph."),
    ]
    assert [task.grade(task.items[1], said) for said in (" the box", "the box", " the", "")] == [
        True,
        False,
        False,
        False,
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [({"text": " "}, "not a text"), ({"text": "box"}, "nothing stands before"), ({"text": "the box.", "target": "box"}, "does not end with"),
     ({"text": "x " * 20_000}, "a text of 39,999 characters"), ({"text": "a b", "target": 3}, "not a text"), ({"prompt": "a b"}, "text is"),
     ({"text": "a b", "id": "1"}, "used before")],
)  # fmt: skip
def test_refusals_name_the_line(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(SourceError, match=message) as caught:
        read_lastword(written(tmp_path, {"text": "A good line"}, row))
    assert "line 2" in str(caught.value)


def test_another_target_is_another_question_and_another_source_is_not(tmp_path: Path) -> None:
    def digest(text: str = "into the box", **more: str) -> str:
        return read_lastword(written(tmp_path, {"text": text, **more})).digest

    assert len({digest(), digest(target="the box"), digest("into the bag")}) == 3
    assert digest() == digest(source="Some paragraph.", kind="other")


def test_the_longest_answer_is_no_matter_of_a_task_that_generates_none(tmp_path: Path) -> None:
    path = written(tmp_path, {"text": "into the box"})
    (task,) = open_tasks([f"lastword={path}"], max_new_tokens=64)
    assert (task.max_new_tokens, task.forced) == (0, True)


def test_last_words_are_forced_kept_and_compared_with_the_first_candidate_too(
    tiny_gemma4: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asking, "Answerer", None)  # whoever builds a model that generates now fails
    specs = [f"{tiny_gemma4}@nf4", str(tiny_gemma4)]
    path, out = written(tmp_path, *({"text": f"The owl saw {n} mice in the barn"} for n in range(6))), tmp_path / "out"

    def run() -> dict[str, Any]:
        return halfbyte.evaluate(
            tiny_gemma4, specs, protocol="none", task=f"lastword={path}", out=out, device="cpu", layers=False, resamples=200
        )  # fmt: skip

    first = run()
    schema = json.loads(SCHEMA.read_text())
    assert list(violations(first, schema, schema)) == []
    (block,) = first["tasks"]
    assert (block["metric"], block["template"], block["n"]) == ("lastword[raw,forced]", None, 6)
    assert (block["max_new_tokens"], block["reference"]["cut_off"]) == (0, 0)
    nf4, same = block["candidates"]
    assert same["same_text"] == 6
    (against,) = block["comparisons"]
    assert (against["candidate"], against["against"]) == (specs[1], specs[0])
    assert against["same_text"] == nf4["same_text"], "the second candidate is the reference itself"
    again = run()["tasks"][0]
    assert [c["answers"]["cached"] for c in (again["reference"], *again["candidates"])] == [True] * 3
    assert "No answers, one forward pass an item, bare prompts" in report(out).read_text(encoding="utf-8")


RAW = (
    " \n = Owls = \n \n Owls hunt at night . The barn owl of this park , which was seen by many people in the year 1990 , lives in the old barn "
    "behind the mill . The barn owl eats mice and other small animals that come to the mill for the grain which the farmer leaves there for "
    "his many hens , and it is , in the words of the farmer , the best friend of the mill and of the barn . It left . Where it went to nobody "
    "knows .\n"
)


def test_the_recipe_for_wikitext_is_what_its_docstring_says() -> None:
    spec = importlib.util.spec_from_file_location("last_words", LAST_WORDS)
    assert spec is not None
    assert spec.loader is not None
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    (item,) = recipe.items_of(RAW)
    assert (item["id"], item["kind"], item["target"]) == ("1.1.3", "said before", "barn")
    assert item["text"].startswith("The barn owl eats mice"), "the fewest whole sentences that give 40 words"
    assert item["text"].endswith("the mill and of the barn"), "no full stop"
    assert item["source"].startswith("Owls hunt at night. ")
