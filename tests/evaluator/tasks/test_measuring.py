"""Tasks in an evaluation: flips that were planted are found, answers are kept and never stale, two bases make a 2 x 2."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from cards.small_schema import violations
from format.tiny_gguf import write_llama_gguf
from PIL import Image

import halfbyte
from halfbyte.errors import UsageError
from halfbyte.evaluator.answers import Answer
from halfbyte.evaluator.tasks import asking
from halfbyte.evaluator.tasks.asking import Asked
from halfbyte.evaluator.tasks.results import Graded, effects_on

SCHEMA = Path(halfbyte.__file__).parent / "evaluator" / "job" / "evaluate.schema.json"
FAST: dict[str, Any] = {
    "protocol": "none", "task_max_new_tokens": 4, "resamples": 200, "device": "cpu", "layers": False, "batch": 4,
}  # fmt: skip


pytestmark = pytest.mark.usefixtures("one_thread_for_all")


def write_questions(folder: Path, answers: dict[str, str], n: int = 12) -> Path:
    """Every other question with a picture; those without an entry in `answers` cannot be answered."""
    folder.mkdir(exist_ok=True)
    rows = []
    for i in range(n):
        row = {"id": f"q{i}", "kind": "picture" if i % 2 else "text", "prompt": f"<b>Question {i}</b>?"}
        if i % 2:
            Image.new("RGB", (32, 32), (30 * i, 0, 0)).save(folder / f"{i}.png")
            row["image"] = f"{i}.png"
        rows.append({**row, "answer": answers.get(f"q{i}", "no such answer")})
    path = folder / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def kept(out: Path, found: dict[str, Any]) -> dict[str, str]:
    """Answers of a model by question, from the file that the record names."""
    return {id: text for id, text, _ in json.loads((out / found["answers"]["file"]).read_text())["answers"]}


def cached(record: dict[str, Any]) -> list[bool]:
    return [c["answers"]["cached"] for block in record["tasks"] for c in (block["reference"], *block["candidates"])]


@pytest.fixture(scope="module")
def other_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from halfbyte.demo.tiny_gemma4 import write_tiny_gemma4

    return write_tiny_gemma4(tmp_path_factory.mktemp("other") / "other", seed=1)


@pytest.fixture(scope="module")
def planted(
    tiny_gemma4: Path, other_base: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """Right is what the reference says (q0 to q9) and what `other` says (q10): it loses 10, gains 1."""
    folder = tmp_path_factory.mktemp("tasks")
    out, specs = folder / "out", [str(tiny_gemma4), str(other_base), f"qat:{other_base}"]

    def run(path: Path) -> dict[str, Any]:
        base = f"qat={other_base}"
        return halfbyte.evaluate(tiny_gemma4, specs, base=base, task=f"questions={path}", out=out, **FAST)

    block = run(write_questions(folder / "q", {}))["tasks"][0]
    own, others = kept(out, block["reference"]), kept(out, block["candidates"][1])
    right = {f"q{i}": own[f"q{i}"] for i in range(10)} | {"q10": others["q10"]}
    return folder, run(write_questions(folder / "q", right))


def test_planted_flips_are_counted_both_ways(planted: tuple[Path, dict[str, Any]]) -> None:
    block, second = planted[1]["tasks"]
    same, other = block["candidates"]
    assert (block["n"], block["metric"], block["reference"]["right"]) == (12, "questions[chat,greedy]", 10)
    assert (same["same_text"], same["flips"]["p"], same["right"]) == (12, 1.0, 10)
    flips = other["flips"]
    assert (flips["only_reference"], flips["only_candidate"], other["right"]) == (10, 1, 1)
    assert flips["p"] == pytest.approx(2 * 12 / 2**11)
    assert flips["difference"] == pytest.approx(-9 / 12)
    assert other["verdict"] == "loss"
    assert flips["high"] < 0
    assert same["verdict"] == "undecided", "12 items cannot bound anything to 2 points"
    assert [(k["kind"], k["n"], k["flips"]["only_reference"]) for k in other["kinds"]] == [
        ("text", 6, 5),
        ("picture", 6, 5),
    ]
    assert (second["base"], second["reference"]["right"]) == ("qat", 1)


def test_five_flips_are_shown_lost_ones_first(planted: tuple[Path, dict[str, Any]]) -> None:
    same, other = planted[1]["tasks"][0]["candidates"]
    assert same["examples"] == []
    assert [(e["id"], e["lost"], e["image"]) for e in other["examples"]] == [
        ("q0", True, False), ("q1", True, True), ("q2", True, False), ("q3", True, True), ("q4", True, False)
    ]  # fmt: skip
    assert other["examples"][0]["reference"] != other["examples"][0]["candidate"]


def test_two_bases_make_a_2_x_2_of_accuracy(planted: tuple[Path, dict[str, Any]]) -> None:
    effects = {e["effect"]: e for e in planted[1]["task_effects"]}
    assert {name: e["value"] for name, e in effects.items()} == {
        "D(vanilla)": 0.0,
        "D(QAT)": 0.0,
        "T": -9 / 12,
        "I": 0.0,
    }
    assert effects["T"]["high"] < 0
    assert effects["T"]["verdict"] == "loss"
    assert effects["I"]["method"] == "tango, both D at 97.5 %"
    assert effects["I"]["low"] < effects["D(vanilla)"]["low"] < 0, "no flips is not certainty"


def graded(*right: int, n: int = 40) -> Graded:
    items = [Answer(str(i), "k", "", i in right, ()) for i in range(n)]
    return Graded(items, items, Asked([], Path("x"), False, 0.0, {}))


def test_the_interaction_is_the_difference_of_the_ds_with_the_bootstrap_s_interval() -> None:
    vanilla = {"": graded(*range(30)), "c": graded(*range(10, 30))}
    qat = {"": graded(*range(28)), "c": graded(*range(2, 29))}
    found = {e["effect"]: e for e in effects_on([vanilla, qat], ("c", "c"), 500, 0.02)}
    assert found["D(vanilla)"]["value"] == -10 / 40
    assert found["D(QAT)"]["value"] == pytest.approx(-1 / 40)
    assert found["I"]["value"] == pytest.approx(9 / 40)
    assert found["I"]["method"] == "bootstrap-t"
    assert 0 < found["I"]["low"] < 9 / 40 < found["I"]["high"]
    assert found["I"]["verdict"] == "win", "higher is better"


def test_the_record_is_valid_and_its_command_makes_it_again(planted: tuple[Path, dict[str, Any]]) -> None:
    folder, record = planted
    schema = json.loads(SCHEMA.read_text())
    assert list(violations(record, schema, schema)) == []
    assert record["record_version"] == 2
    assert record["protocols"] == []
    command = record["command"]
    assert command[command.index("--task") + 1] == f"questions={folder / 'q' / 'questions.jsonl'}"
    assert command[command.index("--protocol") + 1] == "none"


# ---- nothing is asked twice, and nothing is stale


def test_answers_are_asked_once_and_grades_are_made_anew(planted: tuple[Path, dict[str, Any]]) -> None:
    """The second run of `planted` had other right answers: no model was asked again, and the grades were others."""
    assert cached(planted[1]) == [True] * 5


def test_a_stopped_run_goes_on_and_damaged_or_other_answers_are_asked_again(
    tiny_gemma4: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, out = write_questions(tmp_path / "q", {}, n=3), tmp_path / "out"
    whole, asked = asking.answer_questions, []

    def run(**options: Any) -> dict[str, Any]:
        given = {**FAST, **options}
        return halfbyte.evaluate(tiny_gemma4, [f"{tiny_gemma4}@nf4"], task=f"questions={path}", out=out, **given)

    def stopped(*arguments: Any, **options: Any) -> Any:
        asked.append(1)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return whole(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(asking, "answer_questions", stopped)
        with pytest.raises(KeyboardInterrupt):
            run()
    assert not (out / "halfbyte").exists(), "no record of half a run"
    first = run()
    assert cached(first) == [True, False]
    with monkeypatch.context() as patch:
        patch.setattr(asking, "Answerer", None)  # whoever builds a model now fails
        assert cached(run()) == [True, True]
    file = out / first["tasks"][0]["candidates"][0]["answers"]["file"]
    body = json.loads(file.read_text())
    body["answers"][0][1] = "no such answer"  # as if somebody had mended the score by hand
    file.write_text(json.dumps(body))
    again = run()
    assert cached(again) == [True, False]
    assert again["tasks"][0]["candidates"][0]["right"] == 0
    Image.new("RGB", (32, 32), "green").save(tmp_path / "q" / "1.png")
    assert cached(run()) == [False, False], "another picture"
    assert cached(run(task_max_new_tokens=3)) == [False, False]
    assert cached(run(batch=2, task_max_new_tokens=3)) == [False, False]


def test_a_changed_template_is_another_question(tiny_gemma4: Path, tmp_path: Path) -> None:
    path, source = write_questions(tmp_path / "q", {}, n=1), Path(shutil.copytree(tiny_gemma4, tmp_path / "source"))

    def run() -> dict[str, Any]:
        return halfbyte.evaluate(source, ["uniform"], task=f"questions={path}", out=tmp_path / "out", **FAST)

    first = run()
    (template,) = source.glob("chat_template.jinja")
    template.write_text(template.read_text() + "\n")
    second = run()
    assert cached(second) == [False, False]
    assert second["tasks"][0]["template"] != first["tasks"][0]["template"]


# ---- which models, and refusals


def test_a_gguf_answers_and_so_does_what_is_rounded_from_it(tmp_path: Path) -> None:
    gguf = tmp_path / "llama.gguf"
    write_llama_gguf(gguf, tensor_type="BF16")
    path = tmp_path / "gsm8k.jsonl"
    path.write_text('{"question": "1 + 1?", "answer": "#### 2"}\n' * 3)
    body = halfbyte.evaluate(gguf, [f"{gguf}@nf4", "uniform"], task=f"gsm8k={path}", out=tmp_path / "out", **FAST)
    (block,) = body["tasks"]
    assert (block["n"], block["metric"]) == (3, "gsm8k[chat,greedy]")
    own, nothing = (kept(tmp_path / "out", each) for each in (block["reference"], block["candidates"][1]))
    assert own != nothing
    assert block["candidates"][1]["same_text"] == 0


def test_a_model_without_eyes_is_not_shown_pictures(tmp_path: Path) -> None:
    gguf = tmp_path / "llama.gguf"
    write_llama_gguf(gguf, tensor_type="BF16")
    with pytest.raises(UsageError, match="has images, and"):
        halfbyte.evaluate(
            gguf, ["uniform"], task=f"questions={write_questions(tmp_path / 'q', {})}", out=tmp_path / "o", **FAST
        )
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [({"task": ()}, "nothing to measure"), ({"protocol": ["none", "ppl[raw]"]}, "none and another"), ({"task_limit": 0}, "too small"),
     ({"task_margin": -0.1}, "no margin"), ({"task_margin": float("nan")}, "no margin"), ({"task_max_new_tokens": 0}, "too small"),
     ({"task": "mbpp=x.json"}, "runs the code")],
)  # fmt: skip
def test_refusals(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        halfbyte.evaluate("absent", ["uniform"], out=tmp_path / "out", **{**FAST, "task": "questions=x", **options})


def test_a_checkpoint_s_card_gets_its_accuracy(tiny_gemma4: Path, tiny_nf4: Path, tmp_path: Path) -> None:
    nf4 = Path(shutil.copytree(tiny_nf4, tmp_path / "nf4"))
    path = write_questions(tmp_path / "q", {}, n=3)
    halfbyte.evaluate(tiny_gemma4, [str(nf4)], task=f"questions={path}", out=tmp_path / "out", **FAST)
    text = halfbyte.card(nf4).read_text(encoding="utf-8")
    assert "| `questions[chat,greedy] accuracy` | 0 | 0 to 0.561497 | 3 |" in text
    assert "questions[chat,greedy] accuracy" in text.partition("\n---\n")[0], "and in model-index"
