"""The tiny Gemma 4: small, deterministic, and with the traits of the real one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from halfbyte.demo import write_tiny_gemma4
from halfbyte.demo.tiny_tokenizer import special_ids
from halfbyte.format.headers import read_checkpoint

DECODER = "model.language_model.layers."


@pytest.fixture(scope="module")
def loaded(tiny_gemma4: Path) -> Any:
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model, info = AutoModelForImageTextToText.from_pretrained(
        tiny_gemma4, dtype=torch.bfloat16, output_loading_info=True
    )
    assert not any(info.values()), info
    return model.eval(), AutoProcessor.from_pretrained(tiny_gemma4)


def test_checkpoint_is_under_ten_megabytes_in_two_shards(tiny_gemma4: Path) -> None:
    assert sum(path.stat().st_size for path in tiny_gemma4.iterdir()) < 10e6
    assert len(list(tiny_gemma4.glob("*.safetensors"))) == 2
    layer = {info.file for info in read_checkpoint(tiny_gemma4) if info.name.startswith(f"{DECODER}1.")}
    assert len(layer) == 2, "one layer lies across both shards"


def test_equal_seeds_give_equal_bytes_in_another_process(tiny_gemma4: Path, tmp_path: Path) -> None:
    code = f"from halfbyte.demo import write_tiny_gemma4; write_tiny_gemma4({str(tmp_path / 'again')!r})"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, capture_output=True)
    names = sorted(path.name for path in tiny_gemma4.iterdir())
    assert names == sorted(path.name for path in (tmp_path / "again").iterdir())
    assert all((tiny_gemma4 / name).read_bytes() == (tmp_path / "again" / name).read_bytes() for name in names)


def test_another_seed_gives_other_weights(tiny_gemma4: Path, tmp_path: Path) -> None:
    name = "model-00001-of-00002.safetensors"
    assert (write_tiny_gemma4(tmp_path, seed=1) / name).read_bytes() != (tiny_gemma4 / name).read_bytes()


def test_full_attention_layer_has_wide_heads_and_no_v_proj(tiny_gemma4: Path) -> None:
    shapes = {info.name: info.shape for info in read_checkpoint(tiny_gemma4)}
    assert f"{DECODER}4.self_attn.v_proj.weight" in shapes
    assert f"{DECODER}5.self_attn.v_proj.weight" not in shapes
    assert shapes[f"{DECODER}4.self_attn.k_proj.weight"] == (2 * 32, 128)
    assert shapes[f"{DECODER}5.self_attn.k_proj.weight"] == (1 * 64, 128)
    assert shapes[f"{DECODER}5.self_attn.q_norm.weight"] == (64,)
    assert "lm_head.weight" not in shapes


def test_layer_scalars_are_not_the_value_a_loader_would_invent(loaded: Any) -> None:
    model, _ = loaded
    scalars = {name: float(value) for name, value in model.named_buffers() if name.endswith("layer_scalar")}
    assert len(scalars) == 6
    assert all(abs(value - 1) > 0.05 for value in scalars.values()), scalars


def test_ragged_model_ends_weights_in_half_a_block(tmp_path: Path) -> None:
    infos = read_checkpoint(write_tiny_gemma4(tmp_path, ragged=True, layers=1))
    ragged = [info.name for info in infos if info.numel % 64 and ".mlp." in info.name and "language" in info.name]
    assert len(ragged) == 3


def test_config_has_the_keys_of_the_published_one(tiny_gemma4: Path, shared_data: Path) -> None:
    real = json.loads((shared_data / "gemma4" / "gemma-4-31B-it" / "config.json").read_text())
    ours = json.loads((tiny_gemma4 / "config.json").read_text())
    assert ours.keys() == real.keys()
    for part in ("text_config", "vision_config"):
        assert ours[part].keys() == real[part].keys()


def test_special_tokens_have_gemma4_s_ids(tiny_gemma4: Path, shared_data: Path, loaded: Any) -> None:
    real = json.loads((shared_data / "gemma4" / "tokenizer" / "tokenizer.json").read_text())["added_tokens"]
    low = {token["content"]: token["id"] for token in real if token["id"] < 1000}
    tokenizer = loaded[1].tokenizer
    assert {token: tokenizer.convert_tokens_to_ids(token) for token in low} == low
    config = json.loads((tiny_gemma4 / "config.json").read_text())
    assert tokenizer.convert_tokens_to_ids("<|image|>") == config["image_token_id"] == special_ids(2048)["<|image|>"]


def test_text_of_any_script_survives_the_tokenizer(loaded: Any) -> None:
    tokenizer = loaded[1].tokenizer
    text = "Name three primary colors.\n  naïve 日本 🙂"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_template_writes_the_turn_frame_and_expands_the_image(loaded: Any) -> None:
    from PIL import Image

    content = [{"type": "image", "image": Image.new("RGB", (96, 96), "red")}, {"type": "text", "text": "What?"}]
    inputs = loaded[1].apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
    )  # fmt: skip
    text = loaded[1].tokenizer.decode(inputs["input_ids"][0])
    tokens = text.count("<|image|>")
    frame = f"<|turn>user\n<|image>{'<|image|>' * tokens}<image|>What?<turn|>\n<|turn>model\n"
    assert text == "<bos>" + frame + "<|channel>thought\n<channel|>"
    assert 1 < tokens <= 70


def test_picture_changes_the_answer(loaded: Any) -> None:
    import torch
    from PIL import Image

    model, processor = loaded
    answers = []
    for color in ("red", "blue"):
        content = [{"type": "image", "image": Image.new("RGB", (96, 96), color)}, {"type": "text", "text": "What?"}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
        )  # fmt: skip
        with torch.inference_mode():
            answers.append(model(**inputs).logits[0, -1].float())
    assert torch.isfinite(torch.stack(answers)).all()
    assert (answers[0] - answers[1]).abs().max() > 0.1


def test_too_small_a_vocabulary_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="vocab_size >= 1024"):
        write_tiny_gemma4(tmp_path, vocab_size=512)
