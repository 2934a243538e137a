"""One model that wears every candidate's weights answers as each candidate would by itself."""

from __future__ import annotations

from pathlib import Path

import pytest

import halfbyte
from halfbyte.demo import write_tiny_gemma4
from halfbyte.errors import ShapeMismatch
from halfbyte.evaluator.answering import Answerer
from halfbyte.evaluator.answers import Question, answer_questions
from halfbyte.layers.weights import open_weights


def asked(answerer: Answerer, picture: object) -> list[tuple[int, ...]]:
    questions = [
        Question("1", "text", "How many days?", None, "7"),
        Question("2", "image", "What?", picture, "A house"),
    ]  # type: ignore[arg-type]
    answers = answer_questions(answerer.model, answerer.processor, questions, max_new_tokens=8)
    return [answer.tokens for answer in answers]


def test_it_answers_as_the_checkpoint_whose_weights_it_wears(tiny_gemma4: Path, tmp_path: Path) -> None:
    from PIL import Image

    other = write_tiny_gemma4(tmp_path / "other", seed=9)
    picture = Image.linear_gradient("L").convert("RGB")
    worn = Answerer(tiny_gemma4)
    at_first = asked(worn, picture)
    worn.wear(open_weights(str(other)))
    assert asked(worn, picture) == asked(Answerer(other), picture) != at_first
    worn.wear(open_weights(str(tiny_gemma4)))
    assert asked(worn, picture) == at_first


def test_nf4_weights_are_worn_as_the_folder_holds_them(tiny_gemma4: Path, tmp_path: Path) -> None:
    from PIL import Image

    halfbyte.quantize(tiny_gemma4, tmp_path / "nf4")
    picture = Image.linear_gradient("L").convert("RGB")
    worn = Answerer(tiny_gemma4)
    at_first = asked(worn, picture)
    worn.wear(open_weights(str(tmp_path / "nf4")))
    from_folder = asked(worn, picture)
    worn.wear(open_weights(f"{tiny_gemma4}@nf4"))
    assert asked(worn, picture) == from_folder != at_first


def test_weights_of_another_architecture_are_refused(tiny_gemma4: Path, tmp_path: Path) -> None:
    shallow = write_tiny_gemma4(tmp_path / "shallow", layers=2)
    with pytest.raises(ShapeMismatch, match="missing"):
        Answerer(tiny_gemma4).wear(open_weights(str(shallow)))
