"""`kld[assistant,on-policy,image]` on the tiny Gemma 4: pixels count, content and frame are apart, stock transformers agrees."""

from __future__ import annotations

import json
import re
import shutil
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cards.small_schema import violations
from evaluator.test_untouched import TOWER, change_one_weight
from PIL import Image

import halfbyte
from halfbyte.cards.report import report, section
from halfbyte.cards.report.page import render as page_of
from halfbyte.cli.text.evaluation import render
from halfbyte.errors import PlanError, SourceError, UsageError
from halfbyte.evaluator.job.settings import choose_protocols
from halfbyte.evaluator.scoring.pack import write_pack
from halfbyte.evaluator.scoring.scorer import keep_reference
from halfbyte.layers.weights import open_weights
from halfbyte.texts.protocols import IMAGE
from halfbyte.texts.vision import answers as written
from halfbyte.texts.vision import model as seeing
from halfbyte.texts.vision.model import SeeingModel
from halfbyte.texts.vision.prompts import read_picture_prompts
from halfbyte.texts.vision.rows import PictureRows, load_processor, look, picture_rows, sees

END = 106  # <turn|>
TEXT = "kld[assistant,on-policy]"
OPTIONS = {"device": "cpu", "limit": 6, "max_new_tokens": 4, "resamples": 200}


pytestmark = pytest.mark.usefixtures("one_thread_for_all")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six questions about five files; two of the questions are about one picture, and two of the files are one picture."""
    folder = tmp_path_factory.mktemp("pictures")
    for name, colour, size in (("a", "red", (64, 48)), ("b", "blue", (200, 90)), ("c", "white", (30, 120)), ("d", "green", (80, 80))):  # fmt: skip
        picture = Image.new("RGB", size, colour)
        picture.paste("black", (3, 5, 20, 25))
        picture.save(folder / f"{name}.png")
    shutil.copy(folder / "d.png", folder / "e.png")
    asked = [
        ("a", "Which colour is it?"),
        ("a", "Name an animal."),
        *((name, "Which colour is it?") for name in "bcde"),
    ]
    path = folder / "pictures.jsonl"
    path.write_text("".join(json.dumps({"prompt": p, "image": f"{name}.png"}) + "\n" for name, p in asked))
    return path


@pytest.fixture(scope="module")
def other_tower(tiny_gemma4: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = Path(shutil.copytree(tiny_gemma4, tmp_path_factory.mktemp("other") / "tower"))
    change_one_weight(folder, TOWER, 8.0)
    return folder


@pytest.fixture(scope="module")
def out(tiny_gemma4: Path, other_tower: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model never ends a turn, so one is ended for it: three words and <turn|>."""
    folder = tmp_path_factory.mktemp("evaluation")
    stop = written.until_stop
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(written, "until_stop", lambda ids, stops: [*stop(ids, stops)[:3], END])
        halfbyte.evaluate(
            tiny_gemma4, [str(tiny_gemma4), f"{tiny_gemma4}@nf4", str(other_tower)], data=[data],
            protocol=[IMAGE, TEXT], out=folder, **OPTIONS,
        )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def record(out: Path) -> dict[str, Any]:
    body: dict[str, Any] = json.loads((out / "halfbyte" / "evaluate.json").read_text())
    return body


def block(record: dict[str, Any], protocol: str = IMAGE) -> dict[str, Any]:
    (found,) = [each for each in record["protocols"] if each["protocol"] == protocol]
    return dict(found)


def vectors(out: Path, found: dict[str, Any]) -> dict[str, Any]:
    with np.load(out / found["vectors"]["file"]) as file:
        return {name: file[name] for name in file.files}


def figure(found: dict[str, Any], name: str) -> dict[str, Any]:
    (one,) = [f for f in found["figures"] if f["figure"] == name]
    return dict(one)


def test_the_same_weights_tie_at_exactly_zero_and_nf4_does_not(record: dict[str, Any]) -> None:
    same, nf4, _ = block(record)["candidates"]
    assert same["kld_max"] == figure(same, "kld mean")["high"] == 0.0
    assert figure(nf4, "kld mean")["value"] > block(record)["floor"]["value"] > 0
    assert all(test["value"] == 0.0 and test["passed"] for test in record["self_tests"])
    assert same["residual"]["points"][-1]["identical"]
    assert not nf4["residual"]["points"][1]["identical"]


def test_a_changed_tower_shows_with_pictures_only_and_is_said_aloud(record: dict[str, Any], out: Path) -> None:
    """Why the protocol is there: no text score sees the tower."""
    in_text, in_pictures = (block(record, name)["candidates"][2] for name in (TEXT, IMAGE))
    assert in_text["kld_max"] == 0.0
    assert in_pictures["kld_max"] > 0
    assert not in_pictures["residual"]["points"][0]["identical"], "it enters with the embedding"
    said = "VISION TOWER NOT THE REFERENCE'S: only 29 of 30 tensors identical"
    page = report(out).read_text(encoding="utf-8")
    assert said.replace("'", "&#39;") in page.partition('class="stress"')[2]
    assert said in render(record)
    assert render(record).count("32 of 32 tensors identical to the reference's") == 2


def test_frame_tokens_are_apart_from_content(record: dict[str, Any], out: Path) -> None:
    own = vectors(out, block(record))
    assert own["frame"].tolist() == [False, False, False, True] * 6
    assert (own["label"] == END).tolist() == own["frame"].tolist()
    assert block(record)["rows"]["n"] == 18
    assert block(record)["rows"]["facts"]["frame_tokens"] == 6
    for candidate in block(record)["candidates"]:
        kld, frame = vectors(out, candidate)["kld"], candidate["frame"]
        assert figure(candidate, "kld mean")["value"] == pytest.approx(kld[~own["frame"]].mean())
        assert (figure(candidate, "kld mean")["n"], frame["n"]) == (18, 6)
        assert figure(frame, "kld mean")["value"] == pytest.approx(kld[own["frame"]].mean())
        assert candidate["kld_max"] == kld[~own["frame"]].max()
        assert all(token["token"] != "<turn|>" for token in candidate["worst"])
    assert "frame tokens apart (n = 6), KLD" in render(record)
    assert {c["frame"] for c in block(record, TEXT)["candidates"]} == {None}


def test_a_picture_is_a_document_whatever_its_file_is_called(record: dict[str, Any], out: Path) -> None:
    assert block(record)["rows"]["documents"] == 4
    own = vectors(out, block(record))
    assert own["documents"].tolist() == ["a.png", "b.png", "c.png", "d.png"]
    assert own["documents"][own["document"]][::4].tolist() == [f"{name}.png" for name in "aabcdd"]


def test_vectors_are_what_stock_transformers_says(
    record: dict[str, Any], out: Path, tiny_gemma4: Path, other_tower: Path, data: Path
) -> None:
    """The loader's own model on the processor's own tensors, the answer behind the prompt; KLD in float64 by hand."""
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(tiny_gemma4)
    models = [
        AutoModelForImageTextToText.from_pretrained(f, dtype=torch.float32).eval() for f in (tiny_gemma4, other_tower)
    ]
    own, theirs = vectors(out, block(record)), vectors(out, block(record)["candidates"][2])
    for row, asked in enumerate(read_picture_prompts(data)[:3]):
        turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": asked.prompt}]}]
        text = processor.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
        inputs = processor(
            text=[text], images=[[Image.open(asked.image)]], return_tensors="pt", add_special_tokens=False
        )
        inside = own["row"] == row
        answer = torch.from_numpy(own["label"][inside])[None]
        prompt = inputs.pop("input_ids")
        del inputs["attention_mask"]
        inputs["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], torch.zeros_like(answer)], 1)
        with torch.inference_mode():
            p, q = (
                model(input_ids=torch.cat([prompt, answer], 1), **inputs).logits[0, prompt.shape[1] - 1 : -1].double().log_softmax(-1)
                for model in models
            )  # fmt: skip
        assert own["position"][inside][0] == prompt.shape[1] - 1
        nll = -p.gather(1, answer[0][:, None])[:, 0]
        assert own["nll"][inside] == pytest.approx(nll.numpy(), rel=1e-4, abs=1e-5)
        assert theirs["kld"][inside] == pytest.approx((p.exp() * (p - q)).sum(-1).numpy(), rel=2e-3, abs=1e-7)


def test_record_is_valid_and_the_page_is_made_of_it(record: dict[str, Any], out: Path) -> None:
    schema = json.loads((Path(halfbyte.__file__).parent / "evaluator/job/evaluate.schema.json").read_text())
    assert list(violations(record, schema, schema)) == []
    page = report(out).read_text(encoding="utf-8")
    assert "18 content tokens of 4 documents" in page
    assert "Error of weights and residual by layer" in page
    for series in ("weights", "residual"):
        assert f"{tiny_name(record)}@nf4, {series}" in page


def tiny_name(record: dict[str, Any]) -> str:
    return str(record["bases"][0]["reference"]).rpartition("/")[2]


# ---- rows, answers, refusals


@pytest.fixture(scope="module")
def processor(tiny_gemma4: Path) -> Any:
    return load_processor(open_weights(tiny_gemma4))


def rows_of(processor: Any, data: Path, answers: list[list[int]] | None = None) -> PictureRows:
    seen = look(processor, read_picture_prompts(data)[:2])
    return picture_rows(processor, seen, answers or [[400, 401, END], [402, END]], {})


def test_other_pixels_are_other_rows(processor: Any, data: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(data.parent, tmp_path / "other"))
    same = rows_of(processor, folder / data.name)
    Image.new("RGB", (64, 48), "yellow").save(folder / "a.png")
    other = rows_of(processor, folder / data.name)
    assert same.digest == rows_of(processor, data).digest != other.digest
    assert [ids.tolist() for ids in same.tokens] == [ids.tolist() for ids in other.tokens], (
        "the ids do not tell them apart"
    )


def test_answers_are_written_once_and_again_for_another_picture(
    processor: Any, tiny_gemma4: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(data.parent, tmp_path / "other"))
    Image.new("RGB", (64, 48), "yellow").save(folder / "a.png")
    weights = open_weights(tiny_gemma4)
    seen, other = (look(processor, read_picture_prompts(place / data.name)[:1]) for place in (data.parent, folder))
    assert seen[0].ids == other[0].ids, "only the pixels differ"
    options = {"max_new_tokens": 3}
    first, facts = written.write_picture_answers(weights, processor, seen, tmp_path, **options)
    second, more = written.write_picture_answers(weights, processor, other, tmp_path, **options)
    assert facts["trace"] != more["trace"]
    assert [len(answer) for answer in (*first, *second)] == [3, 3]
    monkeypatch.setattr(written, "SeeingModel", None)
    assert written.write_picture_answers(weights, processor, seen, tmp_path, **options) == (first, facts)


def test_an_answer_without_words_is_no_content(processor: Any, data: Path) -> None:
    with pytest.raises(SourceError, match="no answer has a word"):
        rows_of(processor, data, [[END], [END]])
    left = rows_of(processor, data, [[400, END], []])
    assert (len(left.tokens), left.facts["empty_answers"]) == (1, 1)


def test_rows_with_pictures_are_scored_whole_or_not_at_all(
    processor: Any, tiny_gemma4: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, rows = open_weights(tiny_gemma4), rows_of(processor, data)
    with pytest.raises(PlanError, match="cannot be scored layer by layer"):
        keep_reference(weights, rows, streaming=True)
    kept = keep_reference(weights, rows, floor=False)
    with pytest.raises(UsageError, match="hold no pixels"):
        write_pack(tmp_path / "pack", kept)
    monkeypatch.setattr(seeing, "available_bytes", lambda device: 1 << 20)
    with pytest.raises(PlanError, match="whole model in memory"):
        SeeingModel(weights)


def test_pictures_are_refused_by_a_model_that_takes_none(
    tiny_gemma4: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blind = Path(shutil.copytree(tiny_gemma4, tmp_path / "blind"))
    (blind / "processor_config.json").unlink()
    assert sees(open_weights(tiny_gemma4))
    assert not sees(open_weights(blind))
    monkeypatch.setattr(seeing, "SeeingModel", None)
    for protocol in ([IMAGE], []):
        with pytest.raises(UsageError, match="takes no images"):
            halfbyte.evaluate(blind, ["uniform"], data=[data], protocol=protocol, out=tmp_path / "out", device="cpu")
    with pytest.raises(UsageError, match="no picture was given"):
        halfbyte.evaluate(tiny_gemma4, ["uniform"], protocol=[IMAGE], out=tmp_path / "out", device="cpu")
    assert not (tmp_path / "out").exists()


def test_pictures_bring_their_protocol() -> None:
    assert choose_protocols((), instruct=True, has_text=False, has_pictures=True) == (TEXT, IMAGE)
    assert choose_protocols((), instruct=False, has_text=False, has_pictures=True) == ("ppl[raw]", IMAGE)
    assert choose_protocols((TEXT,), instruct=True, has_text=False, has_pictures=True) == (TEXT,)


def test_a_record_from_before_these_measurements_can_still_be_read(record: dict[str, Any], out: Path) -> None:
    old = deepcopy(record)
    for candidate in old["bases"][0]["candidates"]:
        del candidate["areas"]
    for found in old["protocols"]:
        for candidate in found["candidates"]:
            del candidate["residual"]
    assert "areas outside the decoder: not measured" in render(old)
    assert "areas outside the decoder: not measured" in section(old)
    assert re.search(
        r"residual stream against the reference.{5}s</td>(<td class=\"n\">not measured</td>){3}", page_of(old, out)
    )
