"""Answers in batches are the answers one at a time, exact match forgives what it says, and flips are counted both ways."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from halfbyte.errors import ShapeMismatch, SourceError, UsageError
from halfbyte.evaluator.answers import Answer, Question, answer_questions, compare_answers, normalise
from halfbyte.progress import listening

PROMPTS = (
    "Name an animal.",
    "What is in this image? Please explain it step by step, and count to ten.",
    "Who?",
    "Yes or no",
)


@pytest.fixture(scope="module")
def loaded(tiny_gemma4: Path) -> Any:
    """In float32: padding changes the shapes, and bf16's last bits with them."""
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(tiny_gemma4, dtype=torch.float32).eval()
    return model, AutoProcessor.from_pretrained(tiny_gemma4)


def ask(prompt: str, number: int, image: Any = None) -> Question:
    return Question(f"q{number}", "colour" if image else "text", prompt, image, "none")


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> list[Question]:
    """Text and images in turn, of several lengths and sizes; one image from a file."""
    file = tmp_path_factory.mktemp("images") / "red.png"
    Image.new("RGB", (64, 48), "red").save(file)
    images = [file, Image.new("RGBA", (200, 90), "blue"), Image.new("L", (30, 120), 200)]
    asked = []
    for i, prompt in enumerate(PROMPTS):
        asked += [ask(prompt, 2 * i), ask(prompt, 2 * i + 1, images[i % 3])]
    return asked


@pytest.fixture(scope="module")
def one_by_one(loaded: Any, questions: list[Question]) -> list[Answer]:
    return answer_questions(*loaded, questions, batch_size=1, max_new_tokens=10)


@pytest.mark.parametrize("batch_size", [3, 8])
def test_batched_answers_equal_one_by_one(
    loaded: Any, questions: list[Question], one_by_one: list[Answer], batch_size: int
) -> None:
    assert answer_questions(*loaded, questions, batch_size=batch_size, max_new_tokens=10) == one_by_one
    assert [answer.id for answer in one_by_one] == [question.id for question in questions]
    assert len({answer.tokens for answer in one_by_one}) == len(questions), (
        "every answer differs: prompt and image count"
    )


def test_one_answer_is_what_transformers_gives_for_the_chat(
    loaded: Any, questions: list[Question], one_by_one: list[Answer]
) -> None:
    model, processor = loaded
    for question, answer in zip(questions[:2], one_by_one, strict=False):
        content: list[dict[str, Any]] = [{"type": "text", "text": question.prompt}]
        if question.image is not None:
            content.insert(0, {"type": "image", "image": Image.open(question.image).convert("RGB")})
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
        )  # fmt: skip
        assert (inputs["input_ids"] == 2).sum() == 1, "one <bos>"
        output = model.generate(**inputs, max_new_tokens=10, do_sample=False, temperature=None, top_k=None, top_p=None)
        assert tuple(output[0, inputs["input_ids"].shape[1] :].tolist()) == answer.tokens


def test_a_tokenizer_serves_text_and_its_padding_side_comes_back(
    loaded: Any, questions: list[Question], one_by_one: list[Answer]
) -> None:
    model, processor = loaded
    tokenizer = processor.tokenizer
    tokenizer.padding_side = "right"
    try:
        found = answer_questions(model, tokenizer, questions[::2], batch_size=4, max_new_tokens=10)
        assert tokenizer.padding_side == "right"
    finally:
        tokenizer.padding_side = "left"
    assert found == one_by_one[::2]
    with pytest.raises(UsageError, match="takes no images"):
        answer_questions(model, tokenizer, questions)


def test_an_answer_ends_with_its_stop_token_and_the_rest_is_padding(
    loaded: Any, questions: list[Question], one_by_one: list[Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = loaded
    stop = one_by_one[0].tokens[3]
    monkeypatch.setattr(model.generation_config, "eos_token_id", [1, stop])
    found = answer_questions(model, processor, questions[::2], batch_size=4, max_new_tokens=10)
    expected = [tuple(a.tokens[: a.tokens.index(stop) + 1]) if stop in a.tokens else a.tokens for a in one_by_one[::2]]
    assert [answer.tokens for answer in found] == expected
    assert any(len(tokens) < 10 for tokens in expected)
    assert any(len(tokens) == 10 for tokens in expected)


def test_a_batch_takes_one_step_a_token_and_ends_with_its_longest_answer(
    loaded: Any, questions: list[Question], one_by_one: list[Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a GPU's time is made of: forward passes. One over the prompts, then one token a row, until every row has stopped."""
    model, processor = loaded
    stops = {answer.tokens[3] for answer in one_by_one[::2]}
    monkeypatch.setattr(model.generation_config, "eos_token_id", sorted(stops))
    widths: list[int] = []
    hook = model.register_forward_pre_hook(
        lambda module, inputs, given: widths.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    found = answer_questions(model, processor, questions[::2], batch_size=4, max_new_tokens=10)
    hook.remove()
    longest = max(len(answer.tokens) for answer in found)
    assert longest <= 4
    assert widths[1:] == [1] * (longest - 1)


def test_the_right_answer_is_correct_whatever_its_case(
    loaded: Any, questions: list[Question], one_by_one: list[Answer]
) -> None:
    question = replace(questions[0], answer=f" {one_by_one[0].text.upper()}.")
    assert answer_questions(*loaded, [question], max_new_tokens=10)[0].correct
    assert not one_by_one[0].correct


def test_progress_counts_questions(loaded: Any, questions: list[Question]) -> None:
    from contextlib import contextmanager

    done: list[int] = []

    @contextmanager
    def task(title: str, total: int, unit: str) -> Any:
        assert (total, unit) == (3, "questions")
        yield done.append

    with listening(SimpleNamespace(task=task, note=print)):
        answer_questions(*loaded, questions[:3], batch_size=2, max_new_tokens=1)
    assert sum(done) == 3


def test_refusals(loaded: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="same id"):
        answer_questions(*loaded, [ask("a", 1), ask("b", 1)])
    with pytest.raises(UsageError, match="batch_size 0"):
        answer_questions(*loaded, [ask("a", 1)], batch_size=0)
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(SourceError, match=r"broken\.png"):
        answer_questions(*loaded, [ask("a", 1, tmp_path / "broken.png")])


@pytest.mark.parametrize(
    ("text", "normal"),
    [("  Red. ", "red"), ("a\n\t b", "a b"), ("3.0", "3.0"), ("Straße", "strasse"), ("no..", "no."), (".", ""), ("red .", "red")],
)  # fmt: skip
def test_normalise(text: str, normal: str) -> None:
    assert normalise(text) == normal


def marked(*right: int, n: int = 20) -> list[Answer]:
    return [Answer(str(i), "even" if i % 2 == 0 else "odd", str(i in right), i in right, (i,)) for i in range(n)]


def test_flips_are_counted_both_ways_and_by_kind() -> None:
    found = compare_answers(marked(0, 1, 2, 3, 4), list(reversed(marked(2, 3, 4, 6, 7, 8, 9))))
    assert list(found) == ["all", "even", "odd"]
    total = found["all"]
    assert (total.n, total.reference, total.candidate) == (20, 5, 7)
    assert (total.only_reference, total.only_candidate, total.same_text) == (2, 4, 14)
    assert total.p == pytest.approx(0.6875)  # 2 * (1 + 6 + 15) / 64
    assert total.difference == pytest.approx(0.1)
    assert total.low < 0 < total.difference < total.high
    assert total.reference_interval[0] < 0.25 < total.reference_interval[1]
    assert (found["even"].only_reference, found["odd"].only_candidate) == (1, 2)


def test_equal_answers_have_no_flips_and_still_an_interval() -> None:
    total = compare_answers(marked(1, 2), marked(1, 2))["all"]
    assert (total.only_reference, total.only_candidate, total.p, total.same_text) == (0, 0, 1.0, 20)
    assert total.low == pytest.approx(-total.high)
    assert total.high > 0.1


def test_answers_to_other_questions_are_not_compared() -> None:
    with pytest.raises(ShapeMismatch, match="same questions"):
        compare_answers(marked(n=3), marked(n=4))
    with pytest.raises(ShapeMismatch):
        compare_answers(marked(n=2), [marked(n=2)[0]] * 2)
    with pytest.raises(UsageError, match="no answers"):
        compare_answers([], [])
