"""Protocols, token id by token id: the frame, the one <bos>, which predictions count; and the reference's own answers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from halfbyte.errors import SourceError, UsageError
from halfbyte.layers.rows import Rows
from halfbyte.layers.weights import open_weights
from halfbyte.texts import protocols, reading, traces

BOS, TURN, END = 2, 105, 106  # the tiny Gemma 4 has Gemma 4's ids
QUESTION = ({"role": "user", "content": "What is in this image?"},)
ANSWER = "A small house with a green door."


@pytest.fixture(scope="module")
def tokenizer(tiny_gemma4: Path) -> Any:
    return protocols.load_tokenizer(open_weights(tiny_gemma4))


@pytest.fixture
def base_tokenizer(tiny_gemma4: Path) -> Any:
    """The same tokenizer without a chat template: a base model's."""
    loaded = protocols.load_tokenizer(open_weights(tiny_gemma4))
    loaded.chat_template = None
    return loaded


def document(text: str) -> reading.Document:
    return reading.Document("d", text, len(text.split()), len(text.encode()))


def counted(rows: Rows, row: int) -> list[int]:
    """The tokens whose predictions count, in one row."""
    return [int(token) for token in rows.tokens[row][1:][rows.scored[row][:-1]]]


def test_given_answers_count_the_answer_and_the_end_of_the_turn(tokenizer: Any) -> None:
    rows = protocols.given_answers(tokenizer, [reading.Chat("1", QUESTION, ANSWER)])
    prompt = protocols.prompt_ids(tokenizer, QUESTION)
    assert counted(rows, 0) == [*tokenizer.encode(ANSWER, add_special_tokens=False), END]
    assert list(rows.tokens[0][: len(prompt)]) == prompt
    assert (rows.tokens[0] == BOS).sum() == 1
    assert not rows.scored[0][: len(prompt) - 1].any(), "nothing of the prompt counts"


def test_row_of_a_given_answer_is_what_the_template_writes(tokenizer: Any) -> None:
    """The whole conversation, rendered and encoded at once: the other way to the same ids."""
    rows = protocols.given_answers(tokenizer, [reading.Chat("1", QUESTION, ANSWER)])
    whole = tokenizer.apply_chat_template(
        [*QUESTION, {"role": "assistant", "content": ANSWER}], tokenize=True, return_dict=True
    )["input_ids"]
    framed = tokenizer.decode(rows.tokens[0]).replace("<|channel>thought\n<channel|>", "")  # only before new answers
    assert tokenizer.decode(whole).startswith(framed)


def test_assistant_frame_never_ends_its_turn(tokenizer: Any) -> None:
    text = "A whale, a seal and an octopus live in the sea. " * 6
    rows = protocols.assistant_frame(tokenizer, [document(text)], window=32)
    ids = tokenizer.encode(text, add_special_tokens=False)
    prompt = protocols.prompt_ids(tokenizer, ({"role": "user", "content": protocols.FRAME_REQUEST},))
    assert [token for row in range(len(rows.tokens)) for token in counted(rows, row)] == ids
    for row in rows.tokens:
        assert list(row[: len(prompt)]) == prompt
        assert list(row).count(TURN) == prompt.count(TURN)
        assert list(row).count(BOS) == 1
    assert rows.facts["words"] == len(text.split())


def test_raw_windows_have_exactly_one_bos(tokenizer: Any, base_tokenizer: Any) -> None:
    text = "Quantization stores a number with fewer bits. " * 8
    rows = protocols.raw_text(base_tokenizer, [document(text)], window=16)
    assert len(rows.tokens) > 2
    assert all(list(row).count(BOS) == 1 and row[0] == BOS for row in rows.tokens)
    assert [t for row in range(len(rows.tokens)) for t in counted(rows, row)] == tokenizer.encode(
        text, add_special_tokens=False
    )
    assert rows.facts["out_of_frame"] is False
    assert protocols.raw_text(tokenizer, [document(text)]).facts["out_of_frame"] is True


def test_without_bos_the_first_token_of_a_window_does_not_count(base_tokenizer: Any) -> None:
    rows = protocols.raw_text(base_tokenizer, [document("one two three four five")], bos=False)
    assert BOS not in rows.tokens[0]
    assert counted(rows, 0) == list(rows.tokens[0][1:])


def test_real_gemma4_tokenizer_gets_its_one_bos(shared_data: Path) -> None:
    """Gemma's tokenizer adds no <bos> by itself, its template does: both ways one."""
    from transformers import AutoTokenizer

    real = AutoTokenizer.from_pretrained(shared_data / "gemma4" / "tokenizer", local_files_only=True)
    template = shared_data / "gemma4" / "chat_template.gemma-4-31B-it.jinja"
    real.chat_template = template.read_text(encoding="utf-8")
    rows = protocols.raw_text(real, [document("Three animals live in the sea.")])
    assert list(rows.tokens[0]).count(BOS) == 1
    framed = protocols.given_answers(real, [reading.Chat("1", QUESTION, ANSWER)])
    assert list(framed.tokens[0]).count(BOS) == 1
    assert counted(framed, 0)[-1] == END


def test_two_bos_are_refused(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", "{{ bos_token }}" + tokenizer.chat_template)
    with pytest.raises(SourceError, match="two <bos>"):
        protocols.prompt_ids(tokenizer, QUESTION)


def test_base_models_have_no_frame(base_tokenizer: Any) -> None:
    assert not protocols.is_instruct(base_tokenizer)
    with pytest.raises(UsageError, match="no chat template"):
        protocols.assistant_frame(base_tokenizer, [document("text")])


def test_wikitext_80_takes_long_paragraphs_in_order(base_tokenizer: Any) -> None:
    short, long = "a house . ", "the sea and the table , " * 60
    raw = " = One = \n " + "\n ".join([short, *[f"{number} {long}" for number in range(81)]]) + "\n"
    rows = protocols.wikitext_80(base_tokenizer, reading.wikitext_paragraphs(raw))
    assert sorted(set(rows.documents)) == sorted(f"paragraph {number}" for number in range(2, 82))
    assert all(row[0] == BOS for row in rows.tokens)
    with pytest.raises(UsageError, match="0 paragraphs"):
        protocols.wikitext_80(base_tokenizer, reading.wikitext_paragraphs(" = One = \n a b c\n"))


def test_the_first_windows_of_each_document_can_be_enough(tokenizer: Any) -> None:
    long = [
        document("A whale, a seal and an octopus live in the sea. " * 9),
        replace(document("one two " * 40), name="e"),
    ]
    for make in (protocols.raw_text, protocols.assistant_frame):
        whole, first = make(tokenizer, long, window=16), make(tokenizer, long, window=16, windows=1)
        starts = [whole.documents.index(name) for name in dict.fromkeys(whole.documents)]
        assert [row.tolist() for row in first.tokens] == [whole.tokens[at].tolist() for at in starts]
        assert (first.facts["windows"], whole.facts["windows"]) == (1, None)
        assert "words" not in first.facts, "words of whole documents would not be those scored"


def test_only_wikitext_has_paragraphs(tmp_path: Path) -> None:
    line = "a house . " * 200
    (tmp_path / "wiki").write_text(f" = One = \n {line}\n")
    (tmp_path / "other").write_text(f"{line}\n{line}\n")
    assert [len(reading.read_paragraphs(tmp_path / name)) for name in ("wiki", "other")] == [1, 0]


def test_wikitext_is_62_articles_detokenized_and_counted_before(shared_data: Path) -> None:
    articles = reading.read_documents(shared_data / "wikitext2" / "wiki.test.raw")
    assert len(articles) == 62
    assert sum(article.words for article in articles) == 241_211
    assert not any(" @-@ " in article.text or " , " in article.text for article in articles)


@pytest.mark.parametrize(
    ("raw", "plain"),
    [
        ("the 1990 @-@ 91 season , 1 @,@ 000 m", "the 1990-91 season, 1,000 m"),
        ('a " quoted ( inner ) word " . b', 'a "quoted (inner) word". b'),
        ("Boulter 's role ; = = Career = =", "Boulter's role; == Career =="),
        ("50 ° N north", "50°N north"),
        ("a N b", "a 1 b"),
    ],
)
def test_detokenizing_follows_the_rules(raw: str, plain: str) -> None:
    assert reading.detokenize(raw) == plain


def test_chats_are_read_in_both_spellings_and_bad_lines_are_named(tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    turns = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a"},
    ]
    lines = [{"prompt": "p", "response": "r", "key": 7}, {"messages": turns}, {"messages": turns[:2]}]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n", encoding="utf-8")
    first, second, third = reading.read_chats(path)
    assert (first.name, first.messages[0]["content"], first.response) == ("7", "p", "r")
    assert ([m["role"] for m in second.messages], second.response, third.response) == (["system", "user"], "a", None)
    assert len(reading.read_chats(path, limit=2)) == 2
    for bad in ("{", '{"prompt": 1}', '{"messages": [{"role": "robot", "content": "x"}]}', "[]"):
        path.write_text('{"prompt": "p"}\n' + bad + "\n", encoding="utf-8")
        with pytest.raises(SourceError, match="line 2"):
            reading.read_chats(path)


def test_reference_writes_its_own_greedy_answers_once(
    tiny_gemma4: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a left-padded batch and from a cache; the oracle goes one prompt and one token at a time, without a cache."""
    import torch

    from halfbyte.layers.model import WholeModel

    weights = open_weights(tiny_gemma4)
    tokenizer = protocols.load_tokenizer(weights)
    chats = [reading.Chat(str(k), ({"role": "user", "content": q},), None) for k, q in enumerate(("Who?", ANSWER))]
    answers, facts = traces.write_answers(weights, chats, tmp_path, max_new_tokens=5)
    model = WholeModel(weights)
    for chat, answer in zip(chats, answers, strict=True):
        ids = protocols.prompt_ids(tokenizer, chat.messages)
        for token in answer:
            with torch.inference_mode():
                best = model.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()
            assert token == best
            ids.append(token)
    rows = protocols.on_policy_answers(tokenizer, chats, answers, facts=facts)
    assert [counted(rows, row) for row in range(2)] == answers
    monkeypatch.setattr(traces, "WholeModel", None)  # a second model would fail
    assert traces.write_answers(weights, chats, tmp_path, max_new_tokens=5)[0] == answers
    with pytest.raises(TypeError):
        traces.write_answers(weights, chats, tmp_path, max_new_tokens=6)


def test_an_answer_ends_with_its_stop_token() -> None:
    assert traces.until_stop([5, 6, 106, 0, 0], {1, 106}) == [5, 6, 106]
    assert traces.until_stop([5, 6, 7], {1, 106}) == [5, 6, 7]


def test_a_prompt_longer_than_the_row_is_refused(tokenizer: Any) -> None:
    with pytest.raises(SourceError, match="fills 8 tokens"):
        protocols.given_answers(tokenizer, [reading.Chat("1", QUESTION, ANSWER)], length=8)
    cut = protocols.given_answers(tokenizer, [reading.Chat("1", QUESTION, ANSWER * 20)], length=64)
    assert len(cut.tokens[0]) == 64
    assert np.flatnonzero(cut.scored[0])[-1] == 62
