"""Rows: what is scored, what is refused, and that a batch is a function of the step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from halfbyte.errors import SourceError, UsageError
from halfbyte.trainer.rows import batches_of, chat_row, collate, read_rows, text_rows


@pytest.fixture(scope="module")
def tokenizer(student: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(student)


def test_a_chat_is_scored_on_the_answer_and_the_end_of_its_turn(tokenizer: Any) -> None:
    messages = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}]
    row = chat_row(tokenizer, messages, 100)
    scored = [i for i, s in zip(row.ids, row.scored, strict=True) if s]
    assert tokenizer.decode(scored) == "Me.<turn|>\n"
    before = tokenizer.decode([i for i, s in zip(row.ids, row.scored, strict=True) if not s])
    assert before == "<bos><|turn>user\nWho?<turn|>\n<|turn>model\n<|channel>thought\n<channel|>"


def test_text_is_cut_into_windows_that_each_begin_with_bos(tokenizer: Any) -> None:
    rows = text_rows(tokenizer, "The story of a green house. " * 20, 16)
    assert {len(row.ids) for row in rows[:-1]} == {16}
    assert all(
        row.ids[0] == tokenizer.bos_token_id and row.scored == (False, *[True] * (len(row.ids) - 1)) for row in rows
    )
    whole = [i for row in rows for i in row.ids[1:]]
    assert whole == tokenizer("The story of a green house. " * 20, add_special_tokens=False)["input_ids"]


def test_collate_names_the_places_that_predict_a_scored_token(tokenizer: Any) -> None:
    rows = [
        chat_row(tokenizer, [{"role": "user", "content": q}, {"role": "assistant", "content": "No."}], 64)
        for q in ("A?", "Why is that?")
    ]
    batch = collate(rows, 0)
    flat = batch["input_ids"].flatten()
    assert torch.equal(flat[batch["scored"] + 1], batch["targets"])
    assert len(batch["targets"]) == sum(map(sum, (row.scored for row in rows)))
    assert collate(rows, 0, 32)["input_ids"].shape[1] % 32 == 0


def test_the_batch_of_a_step_does_not_depend_on_where_one_began(chats: Path, tokenizer: Any) -> None:
    rows = read_rows(chats, tokenizer, 64)
    batches = batches_of(rows, 5, 1, 0, "cpu")
    from_the_start = batches(0)
    seen = [next(from_the_start)[0][1]["input_ids"] for _ in range(9)]
    assert torch.equal(next(batches(8))[0][1]["input_ids"], seen[8])
    whole = [tuple(i for i in ids.tolist() if i) for batch in seen for ids in batch]
    assert [len(set(whole[at : at + 12])) for at in (0, 12, 24)] == [12] * 3, "every epoch visits every row"
    assert whole[:12] != whole[12:24], "and each in its own order"


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ("{", "not JSON"),
        ('{"prompt": "a"}', "neither a chat"),
        ('{"prompt": "a", "response": " "}', "neither a chat"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "neither a chat"),
        ('{"text": ""}', "nothing to learn"),
    ],
)
def test_a_line_that_teaches_nothing_is_refused_by_name(line: str, match: str, tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(line + "\n", encoding="utf-8")
    with pytest.raises(SourceError, match=match) as refused:
        read_rows(path, tokenizer, 64)
    assert str(path) in str(refused.value)


def test_a_missing_data_file_is_a_usage_error(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(UsageError, match="no such data file"):
        read_rows(tmp_path / "absent.jsonl", tokenizer, 64)
