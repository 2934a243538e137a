"""The calibration set: what it is made of, that it shares nothing with what figures are measured on, and its rows."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from halfbyte.errors import SourceError
from halfbyte.layers.weights import open_weights
from halfbyte.texts import calibration, protocols
from halfbyte.texts.calibration import Writing, calibration_rows, chat_hashes, read_calibration, text_hashes
from halfbyte.texts.reading import Chat, read_documents

END = 106  # the tiny Gemma 4 has Gemma 4's ids


@pytest.fixture(scope="module")
def known() -> set[str]:
    """The hashes of everything in the built-in set."""
    built_in = read_calibration("builtin")
    found = {h for chat in built_in.chats for h in chat_hashes(chat)}
    return found | {h for document in built_in.documents for h in text_hashes(document.text)}


@pytest.fixture
def writing(tmp_path: Path) -> Writing:
    return Writing(4, "cpu", "float32", 8, tmp_path)


def asked(prompt: str) -> set[str]:
    return chat_hashes(Chat("1", ({"role": "user", "content": prompt},), None))


def test_the_built_in_set_is_small_and_says_where_each_line_comes_from() -> None:
    room = resources.files("halfbyte.texts") / "built_in"
    lines = (room / "calibration.jsonl").read_text(encoding="utf-8").splitlines()
    stated = re.findall(r"^\| `([\w-]+) [^`]*` \|", (room / "SOURCES.md").read_text(encoding="utf-8"), re.M)
    assert {json.loads(line)["id"].split()[0] for line in lines} == set(stated) == {"own", "self-instruct", "wikipedia"}
    assert sum(len(line.encode()) + 1 for line in lines) <= 300_000
    assert len({json.loads(line)["id"] for line in lines}) == len(lines) > 200


def test_it_shares_no_document_with_what_evaluate_and_the_demo_measure_on(known: set[str]) -> None:
    from halfbyte.demo.school.held_out import SEED
    from halfbyte.demo.school.picture_questions import draw_picture_questions
    from halfbyte.demo.school.questions import draw_questions
    from halfbyte.evaluator.job.material import gather_material

    built_in = gather_material((), None)
    held_out = [item.prompt for item in draw_questions(SEED, 600, held_out=True)]
    held_out += [item.prompt for _, item in draw_picture_questions(SEED, 60, held_out=True)]
    measured = [chat_hashes(chat) for chat in built_in.chats] + [text_hashes(d.text) for d in built_in.documents]
    measured += [asked(prompt) for prompt in held_out]
    assert len(measured) > 700
    assert not set().union(*measured) & known


def test_it_shares_no_document_with_the_sets_that_results_are_published_on(known: set[str], shared_data: Path) -> None:
    prompts = [
        turn
        for name in ("question.jsonl", "vicuna_question.jsonl")
        for line in (shared_data / "mtbench" / name).read_text(encoding="utf-8").splitlines()
        for turn in json.loads(line)["turns"]
    ]
    for name, key in (("ifeval/input_data.jsonl", "prompt"), ("gsm8k/test.jsonl", "question")):
        prompts += [json.loads(line)[key] for line in (shared_data / name).read_text(encoding="utf-8").splitlines()]
    articles = read_documents(shared_data / "wikitext2" / "wiki.test.raw")
    assert len(prompts) > 1900
    assert len(articles) == 62
    measured = set().union(*map(asked, prompts), *(text_hashes(article.text) for article in articles))
    assert not measured & known


def test_a_document_is_recognised_by_its_paragraphs_in_any_spacing_and_case() -> None:
    paragraph = "A river never keeps the same shape for long; where the water runs fast it carries sand away."
    assert text_hashes(f"Title\n\n{paragraph}\nMore.") == text_hashes(paragraph.upper().replace(" ", "  "))
    assert text_hashes("Short.") == text_hashes(" short. ") != text_hashes("Other.")
    assert not asked("What is it?") & asked("What is this?")


def test_lines_of_all_kinds_are_read(tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    Image.new("RGB", (8, 6), "red").save(tmp_path / "a.png")
    lines = [
        {"prompt": "One?"}, {"prompt": "Two?", "response": "Two."}, {"text": "A text.", "id": "t"},
        {"messages": [{"role": "user", "content": "Three?"}]}, {"prompt": "What is it?", "image": "a.png"},
    ]  # fmt: skip
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n")
    found = read_calibration(path)
    assert [chat.response for chat in found.chats] == [None, "Two.", None]
    assert [(d.name, d.text) for d in found.documents] == [("t", "A text.")]
    assert (found.name, [one.prompt for one in found.pictures], found.drawn) == ("own.jsonl", ["What is it?"], 0)
    path.write_text('{"prompt": "One?"}\n{"question": 1}\n')
    with pytest.raises(SourceError, match="neither a prompt nor messages") as refused:
        read_calibration(path)
    assert "line 2" in str(refused.value)
    with pytest.raises(SourceError, match="cannot be read"):
        read_calibration(tmp_path / "absent.jsonl")


def test_instruct_rows_hold_prompt_and_the_sources_own_answer(
    tiny_gemma4: Path, writing: Writing, one_thread: None
) -> None:
    weights = open_weights(tiny_gemma4)
    texts = replace(read_calibration("builtin"), drawn=0)
    rows, facts = calibration_rows(texts, weights, tokens=600, seed=0, writing=writing)
    again, _ = calibration_rows(texts, weights, tokens=600, seed=0, writing=writing)
    tokenizer = protocols.load_tokenizer(weights)
    assert facts["answers"] == "written by the source"
    assert 200 < facts["tokens"] <= 600
    assert facts["chats"] > 1
    assert rows.digest == again.digest == facts["rows_digest"]
    for at in range(facts["chats"]):
        chat = next(c for c in texts.chats if c.name == rows.documents[at])
        prompt = protocols.prompt_ids(tokenizer, chat.messages)
        assert rows.tokens[at].tolist()[: len(prompt)] == prompt
        assert len(prompt) < len(rows.tokens[at]) <= len(prompt) + 4
    other, other_facts = calibration_rows(
        replace(texts, chats=()), weights, tokens=600, seed=1, writing=replace(writing, max_new_tokens=5)
    )
    assert other.digest != rows.digest
    assert other_facts["answers"] == "none"
    assert set(other_facts["hashes"]) != set(facts["hashes"])


def test_given_answers_end_their_turn_and_are_called_given(tiny_gemma4: Path, writing: Writing) -> None:
    weights = open_weights(tiny_gemma4)
    chat = Chat("1", ({"role": "user", "content": "What is it?"},), "A house.")
    texts = calibration.Calibration("own", "0", (chat,), ())
    rows, facts = calibration_rows(texts, weights, tokens=10, seed=0, writing=writing)
    assert facts["answers"] == "given"
    assert rows.tokens[0][-1] == END


def test_a_source_that_does_not_fit_writes_no_answers_and_the_record_says_so(
    tiny_gemma4: Path, writing: Writing, monkeypatch: pytest.MonkeyPatch
) -> None:
    from halfbyte.layers import streaming

    monkeypatch.setattr(streaming, "must_stream", lambda *place: True)
    monkeypatch.setattr(calibration, "write_answers", None)
    _, facts = calibration_rows(
        replace(read_calibration("builtin"), drawn=0), open_weights(tiny_gemma4), tokens=200, seed=0, writing=writing
    )
    assert facts["answers"] == "left out, the source does not fit"


def test_a_base_model_reads_texts_alone_behind_one_bos(
    tiny_gemma4: Path, writing: Writing, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = open_weights(tiny_gemma4)
    tokenizer: Any = protocols.load_tokenizer(weights)
    tokenizer.chat_template = None
    monkeypatch.setattr(protocols, "load_tokenizer", lambda weights: tokenizer)
    rows, facts = calibration_rows(read_calibration("builtin"), weights, tokens=1000, seed=0, writing=writing)
    assert (facts["chats"], facts["answers"], facts["instruct"]) == (0, "none", False)
    assert all(ids[0] == tokenizer.bos_token_id and ids[1] != ids[0] for ids in rows.tokens)
    chats = calibration.Calibration("own", "0", (Chat("1", ({"role": "user", "content": "Why?"},), None),), ())
    with pytest.raises(SourceError, match="nothing to calibrate on"):
        calibration_rows(chats, weights, tokens=1000, seed=0, writing=writing)
