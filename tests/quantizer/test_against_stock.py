"""Our checkpoint against the one that stock transformers + bitsandbytes write with the same quantization_config."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import halfbyte
from halfbyte.format.headers import read_checkpoint


@pytest.fixture(scope="module")
def ours(tiny_gemma4: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("ours") / "nf4"
    halfbyte.quantize(tiny_gemma4, out, max_shard_size="500KB")
    return out


@pytest.fixture(scope="module")
def stock(tiny_gemma4: Path, ours: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

    skip = json.loads((ours / "config.json").read_text())["quantization_config"]["llm_int8_skip_modules"]
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16, llm_int8_skip_modules=skip,
    )  # fmt: skip
    model = AutoModelForImageTextToText.from_pretrained(tiny_gemma4, dtype="auto", quantization_config=config)
    out = tmp_path_factory.mktemp("stock") / "nf4"
    model.save_pretrained(out)
    return out


def every_tensor(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    found = {}
    for info in read_checkpoint(folder):
        with safe_open(folder / info.file, "pt") as file:
            data = file.get_tensor(info.name).reshape(-1).view(torch.uint8).numpy().tobytes()
        found[info.name] = (info.dtype, info.shape, data)
    return found


def test_every_tensor_equals_stock_byte_for_byte(ours: Path, stock: Path) -> None:
    mine, theirs = every_tensor(ours), every_tensor(stock)
    assert mine.keys() == theirs.keys()
    assert [name for name in mine if mine[name] != theirs[name]] == []
    assert sum(".quant_state." in name for name in mine) > 30


def test_the_quantization_config_is_spelled_as_transformers_spells_it(ours: Path, stock: Path) -> None:
    mine = json.loads((ours / "config.json").read_text())["quantization_config"]
    theirs = json.loads((stock / "config.json").read_text())["quantization_config"]
    assert mine == theirs


def test_config_is_the_source_config_plus_one_key(ours: Path, tiny_gemma4: Path) -> None:
    written = json.loads((ours / "config.json").read_text())
    written.pop("quantization_config")
    assert written == json.loads((tiny_gemma4 / "config.json").read_text())


def test_companions_are_carried_byte_for_byte(ours: Path, tiny_gemma4: Path) -> None:
    names = {p.name for p in tiny_gemma4.iterdir() if p.suffix != ".safetensors"} - {
        "config.json", "model.safetensors.index.json",
    }  # fmt: skip
    assert {"LICENSE", "tokenizer.json", "chat_template.jinja"} <= names
    assert [name for name in names if (ours / name).read_bytes() != (tiny_gemma4 / name).read_bytes()] == []


def test_buffers_survive_with_their_values(ours: Path, tiny_gemma4: Path) -> None:
    source, result = every_tensor(tiny_gemma4), every_tensor(ours)
    scalars = [name for name in source if name.endswith("layer_scalar")]
    assert len(scalars) == 6
    assert all(result[name] == source[name] for name in scalars)


def test_stock_loading_of_both_answers_with_identical_tokens_from_text_and_image(
    ours: Path, stock: Path, tmp_path: Path
) -> None:
    from PIL import Image, ImageDraw

    from halfbyte.runtime.generate import Chat

    image = Image.new("RGB", (96, 96), "white")
    ImageDraw.Draw(image).rectangle((24, 24, 72, 72), fill="red")
    for name in ("processor_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (stock / name).write_bytes((ours / name).read_bytes())
    answers = []
    for folder in (ours, stock):
        chat = Chat(folder, "cpu")
        text = chat.answer("Name three primary colors.", [], None, {"max_new_tokens": 12})
        seen = chat.answer("What is in this image?", [image], None, {"max_new_tokens": 12})
        answers.append((text["token_ids"], seen["token_ids"], seen["prompt_tokens"] - text["prompt_tokens"]))
    assert answers[0] == answers[1]
    assert answers[0][2] > 4, "the image brought tokens of its own"
