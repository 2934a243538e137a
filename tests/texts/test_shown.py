"""Pictures among calibration rows: which models are shown them, what counts, that the walk streams them, and that they are known again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import halfbyte
from halfbyte.errors import PlanError, UsageError
from halfbyte.images import open_image, picture_hash
from halfbyte.layers import streaming
from halfbyte.layers.rows import PictureBatch
from halfbyte.layers.streaming import StreamedModel
from halfbyte.layers.weights import PlainWeights, open_weights
from halfbyte.texts.calibration import DRAWN, Writing, calibration_rows, read_calibration
from halfbyte.texts.vision import shown
from halfbyte.texts.vision.drawn import draw_pictures
from halfbyte.texts.vision.model import SeeingModel
from halfbyte.texts.vision.shown import MixedRows

pytestmark = pytest.mark.usefixtures("one_thread")
END = 106  # <turn|>


@pytest.fixture(scope="module")
def weights(tiny_gemma4: Path) -> Iterator[PlainWeights]:
    found = open_weights(tiny_gemma4)
    assert isinstance(found, PlainWeights)
    yield found
    found.close()


@pytest.fixture
def writing(tmp_path: Path) -> Writing:
    return Writing(3, "cpu", "float32", 2, tmp_path / "traces")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two questions about pictures, the first with its answer, and a chat."""
    folder = tmp_path_factory.mktemp("file")
    for name, colour in (("a", "red"), ("b", "blue")):
        picture = Image.new("RGB", (60, 48), colour)
        picture.paste("black", (3, 5, 20, 25))
        picture.save(folder / f"{name}.png")
    lines = [
        {"prompt": "What is it?", "image": "a.png", "answer": "Red."}, {"prompt": "And this?", "image": "b.png"},
        {"prompt": "Say a word.", "response": "A word."},
    ]  # fmt: skip
    (folder / "own.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder / "own.jsonl"


def test_drawn_pictures_are_always_the_same_and_none_is_in_the_demos_examination(tmp_path: Path) -> None:
    from halfbyte.demo.school.held_out import SEED
    from halfbyte.demo.school.picture_questions import draw_picture_questions
    from halfbyte.demo.school.pictures import picture

    (tmp_path / "again").mkdir()
    drawn = [
        [picture_hash(open_image(p)) for _, _, p in draw_pictures(f, DRAWN)] for f in (tmp_path, tmp_path / "again")
    ]
    assert drawn[0] == drawn[1]
    assert len(set(drawn[0])) == DRAWN
    assert drawn[0][:3] == ["df913d9b948e830a", "761c56b89825d43b", "b8bc2892db62cef1"], (
        "rows of a record can be made again"
    )
    examined = {picture_hash(picture(scene)) for scene, _ in draw_picture_questions(SEED, 12, held_out=True)}
    assert not examined & set(drawn[0])


def test_a_model_that_sees_is_shown_built_in_pictures_and_another_is_not(
    weights: PlainWeights, writing: Writing, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = replace(read_calibration("builtin"), documents=(), chats=read_calibration("builtin").chats[:2])
    rows, facts = calibration_rows(replace(texts, drawn=4), weights, tokens=9999, seed=0, writing=writing)
    assert isinstance(rows, MixedRows)
    assert (facts["pictures"], facts["chats"], facts["text_only"]) == (4, 2, False)
    assert len(facts["hashes"]) >= 6
    kinds = [isinstance(batch, PictureBatch) for batch in rows.batches(8)]
    assert kinds == [False, True, True, True, True]
    _, less = calibration_rows(replace(texts, drawn=4), weights, tokens=4 * 150, seed=0, writing=writing)
    assert 0 < less["picture_tokens"] <= 150, "a quarter of the tokens"
    monkeypatch.setattr(shown, "sees", lambda weights: False)
    blind, blind_facts = calibration_rows(texts, weights, tokens=1500, seed=0, writing=writing)
    assert not isinstance(blind, MixedRows)
    assert (blind_facts["pictures"], blind_facts["text_only"]) == (0, True)


def test_pictures_of_a_file_bring_their_answers_or_get_the_sources_own(
    weights: PlainWeights, writing: Writing, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, facts = calibration_rows(read_calibration(file), weights, tokens=9999, seed=0, writing=writing)
    assert isinstance(rows, MixedRows)
    assert (facts["pictures"], facts["rows"], facts["answers"]) == (2, 3, "given and written by the source")
    given, own = [at for at, inputs in enumerate(rows.inputs) if inputs is not None]
    assert rows.tokens[given][-1] == END
    assert picture_hash(Image.open(file.parent / "a.png")) in facts["hashes"]
    types = rows.inputs[own]["mm_token_type_ids"]  # type: ignore[index]
    soft = int(types.sum())
    assert soft > 10
    assert rows.scored[own].sum() == len(rows.tokens[own]) - 1, "soft tokens count as words do"
    brighter = replace(rows, inputs=[None if i is None else {**i, "pixel_values": i["pixel_values"] + 1} for i in rows.inputs])  # fmt: skip
    assert brighter.digest != rows.digest
    monkeypatch.setattr(shown, "sees", lambda weights: False)
    _, facts = calibration_rows(read_calibration(file), weights, tokens=9999, seed=0, writing=writing)
    assert (facts["pictures"], facts["pictures_left_out"]) == (0, 2)


def test_streamed_layers_see_what_the_whole_model_sees_and_the_tower_is_gone_before_the_first(
    weights: PlainWeights, writing: Writing, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, _ = calibration_rows(read_calibration(file), weights, tokens=9999, seed=0, writing=writing)
    pictures = [batch for batch in rows.batches(1) if isinstance(batch, PictureBatch)]
    whole = list(SeeingModel(weights).hidden_states(pictures))
    streamed = StreamedModel(weights)
    held: list[bool] = []
    materialised = StreamedModel.materialised

    def watching(model: StreamedModel, number: int, advance: Any) -> Any:
        held.append(any(not p.is_meta for n, p in model.model.named_parameters() if "vision" in n))
        return materialised(model, number, advance)

    monkeypatch.setattr(StreamedModel, "materialised", watching)
    found = list(streamed.hidden_states(pictures))
    assert len(whole) == len(found) == 2
    assert all(torch.equal(one, other) for one, other in zip(whole, found, strict=True))
    assert not any(held)
    dark = [replace(batch, inputs={**batch.inputs, "pixel_values": batch.inputs["pixel_values"] * 0}) for batch in pictures]  # fmt: skip
    assert not any(torch.equal(a, b) for a, b in zip(found, streamed.hidden_states(dark), strict=True))


def test_a_checkpoint_calibrated_on_a_picture_is_not_measured_on_it_again(
    tiny_gemma4: Path, file: Path, tmp_path: Path
) -> None:
    record = halfbyte.quantize(
        tiny_gemma4, tmp_path / "nf4", method="scale", calibration=file, fit="candidates=2", max_new_tokens=3
    )
    calibration = record["method"]["calibration"]
    fits = [t["fit"] for t in record["tensors"].values() if t.get("fit")]
    assert {fit["inputs"] for fit in fits} == {calibration["tokens"] - calibration["rows"]}
    Image.open(file.parent / "b.png").save(tmp_path / "other-name.bmp")
    (tmp_path / "asked.jsonl").write_text('{"id": "seen", "prompt": "Which colour?", "image": "other-name.bmp"}')
    with pytest.raises(UsageError, match="calibrated on 1 of the documents to be measured on: seen"):
        halfbyte.evaluate(tiny_gemma4, [str(tmp_path / "nf4")], data=[tmp_path / "asked.jsonl"], out=tmp_path / "out")
    assert np.array(Image.open(tmp_path / "other-name.bmp")).shape == (48, 60, 3)


def test_a_model_that_cannot_be_walked_with_pictures_goes_without_ours_and_refuses_yours(
    weights: PlainWeights, writing: Writing, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def between_layers(*_: Any) -> Any:
        raise PlanError("does more between its layers", where="Deep", todo="none")

    monkeypatch.setattr(streaming, "record_calls", between_layers)
    texts = replace(read_calibration("builtin"), documents=(), chats=read_calibration(file).chats, drawn=2)
    _, facts = calibration_rows(texts, weights, tokens=999, seed=0, writing=writing)
    assert (facts["pictures"], facts["rows"]) == (0, 1)
    with pytest.raises(PlanError, match="does more between its layers"):
        calibration_rows(read_calibration(file), weights, tokens=999, seed=0, writing=writing)
