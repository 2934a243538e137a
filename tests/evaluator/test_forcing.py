"""Forced texts: right are exactly those whose every target token transformers' own logits put on top, given the text before it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from halfbyte.errors import SourceError
from halfbyte.evaluator.forcing import OTHERWISE, Forced, force, forced_rows
from halfbyte.evaluator.scoring.choosing import greedy_choices
from halfbyte.layers.rows import Rows
from halfbyte.layers.weights import Weights, open_weights
from halfbyte.texts.protocols import load_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread_for_all")
TEXTS = [
    Forced("a", "k", "The owl looked down at the fox and said nothing to the", " river"),
    Forced("b", "k", "It was", " unbelievable"),
    Forced("c", "k", "He put the letter back into the small wooden box, closed it, and looked for a long time at the", " box"),
]  # fmt: skip


@pytest.fixture(scope="module")
def source(tiny_gemma4: Path) -> Iterator[Weights]:
    weights = open_weights(tiny_gemma4)
    yield weights
    weights.close()


@pytest.fixture(scope="module")
def tokenizer(source: Weights) -> Any:
    return load_tokenizer(source)


@pytest.fixture(scope="module")
def model(tiny_gemma4: Path) -> Any:
    import torch
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(tiny_gemma4, dtype=torch.float32).eval()


def by_transformers(model: Any, ids: np.ndarray) -> np.ndarray:
    import torch

    with torch.inference_mode():
        found: np.ndarray = model(input_ids=torch.from_numpy(ids.astype(np.int64))[None]).logits[0].argmax(-1).numpy()
    return found


def test_what_counts_is_the_target_and_the_text_goes_in_raw(tokenizer: Any) -> None:
    rows = forced_rows(TEXTS, tokenizer)
    for text, ids, mask in zip(TEXTS, rows.tokens, rows.scored, strict=True):
        assert tokenizer.decode(ids[1:][mask[:-1]]) == text.target
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.decode(ids[1:]) == text.before + text.target, "no template, and one <bos>"


def test_choices_are_those_of_transformers_own_logits_in_any_batch(source: Weights, tokenizer: Any, model: Any) -> None:
    rows = forced_rows(TEXTS, tokenizer)
    for batch in (1, 3):
        for streaming in (False, True):
            found = greedy_choices(source, rows, device="cpu", dtype="float32", batch=batch, streaming=streaming)
            for top, ids, mask in zip(found, rows.tokens, rows.scored, strict=True):
                assert top.tolist() == by_transformers(model, ids)[mask].tolist()


def test_one_wrong_token_makes_the_word_wrong_and_ends_what_is_said(
    source: Weights, tokenizer: Any, model: Any
) -> None:
    """Rows by hand: the target is what the model would say (three tokens), then the same with its second token changed."""
    ids = forced_rows(TEXTS[:1], tokenizer).tokens[0]
    for _ in range(3):
        ids = np.append(ids, by_transformers(model, ids)[-1]).astype(np.int32)
    other = ids.copy()
    other[-2] += 1
    mask = np.zeros(len(ids), bool)
    mask[-4:-1] = True
    texts = [Forced("own", "k", "x", tokenizer.decode(ids[-3:])), Forced("other", "k", "x", " something else")]
    rows = Rows("forced", 1, [ids, other], [mask, mask], ["own", "other"])
    own, changed = force(source, texts, rows, tokenizer, device="cpu", dtype="float32", batch=2)
    assert (own.correct, own.text, own.tokens) == (True, texts[0].target, tuple(ids[-3:].tolist()))
    assert (changed.correct, changed.text) == (False, tokenizer.decode(ids[-3:-1])), (
        "up to and with the first other token"
    )


class Merging:
    """A tokenizer of letters that knows "ab" as one token."""

    bos_token_id, chat_template = None, None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [ord(letter) for letter in text.replace("ab", "\1")]

    def decode(self, ids: list[int]) -> str:
        return "".join("ab" if each == 1 else chr(each) for each in ids)

    def get_vocab(self) -> dict[str, int]:
        return {"ab": 1}


def test_a_token_merged_across_the_cut_is_asked_whole() -> None:
    (ids,), (mask,) = (lambda r: (r.tokens, r.scored))(forced_rows([Forced("a", "k", "xa", "bc")], Merging()))
    assert ids.tolist() == [ord("x"), 1, ord("c")]
    assert mask.tolist() == [True, True, False]


def test_the_same_letters_in_other_tokens_are_not_the_target(monkeypatch: pytest.MonkeyPatch) -> None:
    """As lm-eval judges: tokens are compared, and what is said shows why it was wrong."""
    from halfbyte.evaluator import forcing

    text = Forced("a", "k", "xy", "ab")
    rows = Rows("forced", 1, [np.array([120, 121, 97, 98], np.int32)], [np.array([False, True, True, False])], ["a"])
    monkeypatch.setattr(forcing, "greedy_choices", lambda *a, **k: [np.array([1, 98])])
    (answer,) = force(None, [text], rows, Merging(), device="cpu", dtype="float32", batch=1)  # type: ignore[arg-type]
    assert (answer.correct, answer.text) == (False, "ab" + OTHERWISE)


def test_a_text_that_begins_with_its_target_cannot_be_asked() -> None:
    with pytest.raises(SourceError, match="no token before its last word") as caught:
        forced_rows([Forced("17", "k", "a", "bc")], Merging())
    assert "17" in str(caught.value)


class Framed(Merging):
    """With a <bos> of its own (a token 7), a template, and a choice of what either writes."""

    bos_token_id, chat_template = 7, "a template"

    def __init__(self, alone: list[int], first: list[int], turn: list[int]) -> None:
        self.alone, self.first, self.turn = alone, first, turn

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [*(self.alone if add_special_tokens else []), *super().encode(text)]

    def apply_chat_template(self, messages: list[Any], **options: Any) -> dict[str, list[int]]:
        return {"input_ids": [*self.first, *(id for _ in messages for id in (*self.turn, 97))]}


@pytest.mark.parametrize(
    ("alone", "first", "turn", "starts"),
    [([7], [], [], [7]), ([], [7], [8], [7]), ([], [], [7], []), ([], [], [8], []), ([], [8], [7], [])],
)
def test_bos_stands_in_front_of_bare_text_unless_it_opens_every_turn(
    alone: list[int], first: list[int], turn: list[int], starts: list[int]
) -> None:
    rows = forced_rows([Forced("a", "k", "x", " y")], Framed(alone, first, turn))
    assert rows.tokens[0].tolist() == [*starts, *map(ord, "x y")]


@pytest.mark.gpu
def test_gpu_choices_are_the_cpu_s(source: Weights, tokenizer: Any) -> None:
    rows = forced_rows(TEXTS, tokenizer)
    cpu, gpu = (greedy_choices(source, rows, device=each, dtype="float32", batch=2) for each in ("cpu", "cuda"))
    assert [top.tolist() for top in gpu] == [top.tolist() for top in cpu]
