"""The school: exact questions, a split that holds, pictures and frames that are the processor's own."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from halfbyte.demo.school import questions
from halfbyte.demo.school.held_out import examine
from halfbyte.demo.school.lessons import Frame, Lessons, Mixture, Pages, batches_of_lessons, join, read_pages
from halfbyte.demo.school.picture_questions import draw_picture, draw_picture_questions
from halfbyte.demo.school.pictures import PALETTE, SIZE, Figure, Scene, draw, patches, picture
from halfbyte.demo.school.questions import Item, draw_question, draw_questions
from halfbyte.demo.school.small_gemma4 import write_untrained

WORDS = "\n".join(f"{item.prompt}\n{item.answer}" for item in draw_questions(1, 400, held_out=False))
PAGES = Pages("A long page about a river and the sea. " * 200, (("Say yes.", "Yes."), ("Name a river.", "The Elbe.")))


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_untrained(tmp_path_factory.mktemp("school") / "start", WORDS, seed=1)


@pytest.fixture(scope="module")
def processor(untrained: Path) -> Any:
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(untrained)


@pytest.fixture(scope="module")
def lessons(processor: Any) -> Lessons:
    return Lessons(processor.tokenizer, PAGES, Mixture(3, 1, 1, 2), seed=5, steps=4)


def test_the_untrained_model_is_small_enough_and_loads(untrained: Path) -> None:
    from transformers import AutoModelForImageTextToText

    _, info = AutoModelForImageTextToText.from_pretrained(untrained, output_loading_info=True)
    assert not any(info.values()), info
    assert sum(path.stat().st_size for path in untrained.iterdir()) < 12e6


def test_training_and_held_out_questions_share_no_content() -> None:
    rng = random.Random(0)
    taught = {(item.kind, item.key) for item in (draw_question(rng, held_out=False) for _ in range(3000))}
    asked = draw_questions(0, 300, held_out=True)
    assert len({(item.kind, item.key) for item in asked}) == 300
    assert not taught & {(item.kind, item.key) for item in asked}
    assert {item.kind for item in asked} == {family(rng).kind for family in questions.FAMILIES}
    seen = {item.key for _ in range(500) for item in draw_picture(rng, held_out=False).items}
    assert not seen & {item.key for _, item in draw_picture_questions(0, 100, held_out=True)}


def test_the_order_of_summands_does_not_make_a_new_question() -> None:
    sums = [item for item in draw_questions(3, 400, held_out=True) if item.kind == "sum"]
    pairs = [item.key for item in sums]
    assert len(pairs) == len(set(pairs)) > 20
    for item in sums:
        a, b = map(int, item.key.split())
        assert a <= b
        assert item.answer == str(a + b)


def test_what_is_read_is_in_the_sentence() -> None:
    read = [item for item in draw_questions(4, 300, held_out=False) if item.kind == "read"]
    assert len(read) > 20
    for item in read:
        assert item.answer.rstrip(".").lower() in item.prompt.lower()


def test_every_fact_is_taught_in_some_phrasing_and_asked_in_another() -> None:
    """A fact all of whose phrasings were held out could not be known."""
    for known, phrases in questions.FACTS:
        for thing in known:
            held = [Item("fact", p.format(thing), "", "").held_out for p in phrases]
            assert held.count(False) >= 3, thing


def test_what_training_sees_of_a_picture_is_what_the_processor_hands_over(processor: Any) -> None:
    scene = draw_picture(random.Random(8), held_out=False).scene
    by_processor = processor.image_processor(picture(scene), return_tensors="pt")
    pixels, places = patches(draw([scene]))
    assert torch.equal(by_processor["pixel_values"][:, : pixels.shape[1]], pixels)
    assert torch.equal(by_processor["image_position_ids"][:, : pixels.shape[1]], places)
    assert (by_processor["image_position_ids"][:, pixels.shape[1] :] == -1).all()


@pytest.mark.parametrize("image", [False, True])
def test_a_turn_in_token_ids_is_the_chat_template(image: bool, processor: Any) -> None:
    scene = Scene(0, (Figure("ring", 192, 192, 40, "red"),))
    content: list[dict[str, Any]] = [{"type": "image", "image": picture(scene)}] if image else []
    content.append({"type": "text", "text": "What do you see?"})
    by_template = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )["input_ids"][0].tolist()
    frame = Frame(processor.tokenizer)
    row = join([frame.turn("What do you see?", "A red ring.", image=image)], frame)
    assert list(row.ids[: len(by_template)]) == by_template
    answer = [i for i, scored in zip(row.ids, row.scored, strict=True) if scored]
    assert processor.decode(answer) == "A red ring.<turn|>"
    assert row.scored.index(True) == len(by_template)


def test_figures_have_their_colour_at_their_centre_and_the_ground_around() -> None:
    for kind in ("circle", "square", "triangle", "diamond", "cross", "8"):
        canvas = draw([Scene(0, (Figure(kind, 100, 150, 40, "green"),))])[0]
        assert tuple(canvas[150, 100].tolist()) == PALETTE["green"], kind
        assert tuple(canvas[0, 0].tolist()) == (255, 255, 255)
        coloured = int((canvas[..., 0] != 255).sum())
        assert 0.05 * 80 * 80 < coloured < 1.1 * 80 * 80, kind
    ring = draw([Scene(0, (Figure("ring", 100, 150, 40, "green"),))])[0]
    assert tuple(ring[150, 100].tolist()) == (255, 255, 255)
    assert ring.shape == (SIZE, SIZE, 3)


def test_the_lesson_of_a_step_is_a_function_of_the_step(lessons: Lessons) -> None:
    for one, again in zip(lessons[2], lessons[2], strict=True):
        assert all(torch.equal(one[name], again[name]) for name in one)
    assert not torch.equal(lessons[1][0]["targets"], lessons[2][0]["targets"])
    later = next(batches_of_lessons(lessons, "cpu", 0)(2))
    assert torch.equal(later[0][1]["input_ids"], lessons[2][0]["input_ids"])
    assert [weight for weight, _ in later] == [2 / 3, 1 / 3]
    assert later[1][1]["pixel_values"].shape == (2, 576, 768)


def test_examining_an_untrained_model_finds_nothing_right(untrained: Path, processor: Any) -> None:
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(untrained, dtype=torch.float32).eval()
    found = examine(model, processor.tokenizer, texts=20, pictures=4, device="cpu")
    sizes = {area: (score["n"], score["right"]) for area, score in found.items()}
    assert sizes == {"text": (20, 0), "image": (4, 0), "apart": (1, 0)}
    assert list(found["apart"]["kinds"]) == ["side"]
    assert sum(n for _, n in found["text"]["kinds"].values()) == 20


def test_pages_leave_the_end_of_the_text_out(tmp_path: Path) -> None:
    (tmp_path / "wikipedia").mkdir()
    (tmp_path / "chat").mkdir()
    articles = [f'<doc id="{i}" url="u" title="t">\nArticle {i}.\n</doc>\n' for i in range(40)]
    (tmp_path / "wikipedia" / "wiki.utf8").write_text("".join(articles), encoding="utf-8")
    for name in ("seed_tasks.jsonl", "user_oriented_instructions.jsonl"):
        line = '{"instruction": "Say", "instances": [{"input": "", "output": "Yes."}, {"input": "no", "output": ""}]}'
        (tmp_path / "chat" / name).write_text(line + "\n", encoding="utf-8")
    pages = read_pages(tmp_path)
    assert pages.wikipedia.startswith("Article 0.\n\nArticle 1.")
    assert pages.wikipedia.endswith("Article 37.")
    assert pages.instructions == (("Say", "Yes."), ("Say", "Yes."))


def test_the_forward_pass_of_lessons_is_the_models_own(untrained: Path, processor: Any, lessons: Lessons) -> None:
    from transformers import AutoModelForImageTextToText

    from halfbyte.demo.school.forward import LessonForward
    from halfbyte.trainer.losses import IGNORE, scored_logits

    model = AutoModelForImageTextToText.from_pretrained(untrained, dtype=torch.float32).eval()
    quick = LessonForward(model, lessons.frame.image_start, 64)
    ((_, text), (_, shown)) = next(batches_of_lessons(lessons, "cpu", 0)(0))
    for batch in (text, shown):
        counted = batch["targets"] != IGNORE
        with torch.inference_mode():
            own, ours = scored_logits(model, batch)[counted], scored_logits(quick, batch)[counted]
        assert counted.any()
        assert torch.allclose(own, ours, atol=1e-5), float((own - ours).abs().max())


def test_rooms_hold_what_is_scored(processor: Any) -> None:
    from halfbyte.trainer.losses import IGNORE

    mixture = Mixture(20, 2, 3, 12)
    many = Lessons(processor.tokenizer, PAGES, mixture, seed=1, steps=10)
    for step in range(4):
        text, shown = many[step]
        assert text["targets"].shape == (mixture.text_room,)
        assert text["targets"][-1] == IGNORE, "nothing was cut off"
        assert shown["targets"].shape == (mixture.picture_room,)
        assert shown["targets"][-1] == IGNORE
