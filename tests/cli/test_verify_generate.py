"""`halfbyte verify` and `halfbyte generate` on the tiny checkpoint, good and broken."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path

import pytest
from cli.conftest import Refused, Run

from halfbyte.format.headers import read_checkpoint

CODES = "model.language_model.layers.0.mlp.up_proj.weight"


def png_bomb(path: Path, width: int, height: int) -> Path:
    """A PNG that claims a size and holds no pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b""))
    return path


def flip_a_byte(checkpoint: Path, name: str) -> None:
    (info,) = [info for info in read_checkpoint(checkpoint) if info.name == name]
    with (checkpoint / info.file).open("r+b") as file:
        file.seek(info.start)
        byte = file.read(1)[0]
        file.seek(info.start)
        file.write(bytes([byte ^ 0x10]))


def test_verify_of_a_good_checkpoint_is_exit_0(run: Run, checkpoint: Path, tiny_gemma4: Path) -> None:
    outcome = run("verify", checkpoint, "--source", tiny_gemma4, "--no-generate")
    assert outcome.code == 0, outcome
    assert outcome.out.endswith("\nverified\n")
    assert "FAILED" not in outcome.out


@pytest.mark.parametrize("with_source", [True, False])
def test_one_flipped_bit_is_exit_1_with_a_sentence(
    run: Run, checkpoint: Path, tiny_gemma4: Path, with_source: bool
) -> None:
    flip_a_byte(checkpoint, CODES)
    options = ["--source", tiny_gemma4] if with_source else []
    outcome = run("verify", checkpoint, "--no-generate", *options)
    assert outcome.code == 1
    assert outcome.out.endswith("\nFAILED\n")
    assert (CODES if with_source else "model.safetensors") in outcome.err
    assert "error: " in outcome.err


def test_verify_json_says_passed(run: Run, checkpoint: Path) -> None:
    good = run("verify", checkpoint, "--no-generate", "--json")
    flip_a_byte(checkpoint, CODES)
    bad = run("verify", checkpoint, "--no-generate", "--json")
    assert (good.code, json.loads(good.out)["passed"]) == (0, True)
    assert (bad.code, json.loads(bad.out)["passed"]) == (1, False)


def test_generate_json_with_an_image(run: Run, finished: Path, tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (64, 48), "red").save(tmp_path / "red.png")
    ask = ["generate", finished, "--prompt", "What is this?", "--max-new-tokens", 4, "--device", "cpu", "--json"]
    words, seen = run(*ask), run(*ask, "--image", tmp_path / "red.png")
    plain, answer = json.loads(words.out), json.loads(seen.out)
    assert (words.code, seen.code) == (0, 0)
    assert plain["new_tokens"] == answer["new_tokens"] == len(answer["token_ids"]) == 4
    assert answer["prompt_tokens"] > plain["prompt_tokens"] + 30, "the image is not in the prompt"


def test_fast_generates_by_our_loop_and_guessing_ahead_changes_nothing(run: Run, finished: Path) -> None:
    ask = ["generate", finished, "--prompt", "Hello", "--max-new-tokens", 12, "--device", "cpu", "--fast", "--json"]
    plain, ahead = (json.loads(run(*ask, *more).out) for more in ([], ["--speculate", 5]))
    assert plain["decoded_by"] == {"name": "halfbyte", "why": None}
    assert plain["new_tokens"] > 3
    assert ahead["token_ids"] == plain["token_ids"]
    assert ahead["speculation"]["steps"] <= plain["new_tokens"]


def test_guessing_ahead_without_our_loop_is_refused(refused: Refused, finished: Path) -> None:
    message = refused("generate", finished, "--prompt", "?", "--device", "cpu", "--speculate", 3)
    assert "the CPU's default" in message


def test_generate_prints_the_answer_on_stdout_and_figures_on_stderr(run: Run, finished: Path) -> None:
    outcome = run("generate", finished, "--prompt", "Hello", "--max-new-tokens", 6, "--device", "cpu")
    assert outcome.code == 0
    assert len(outcome.out.strip()) > 3
    assert "6 tokens, first after" in outcome.err
    assert "by bitsandbytes (" in outcome.err
    assert "faster on a CPU" in outcome.err


def test_an_address_as_image_is_refused(refused: Refused, finished: Path) -> None:
    address = "http://127.0.0.1/cat.png"
    message = refused("generate", finished, "--prompt", "What is this?", "--image", address)
    assert "not from addresses" in message
    assert address in message


@pytest.mark.parametrize("side", [100_000, 8_000])
def test_a_png_that_claims_too_many_pixels_is_refused_by_its_header(
    refused: Refused, finished: Path, tmp_path: Path, side: int
) -> None:
    """10^10 pixels are stopped by Pillow, 64 million by our own bound; neither is decoded."""
    bomb = png_bomb(tmp_path / "bomb.png", side, side)
    message = refused("generate", finished, "--prompt", "What is this?", "--image", bomb)
    assert "pixels" in message
    assert str(bomb) in message


def test_a_file_that_is_no_image_is_refused(refused: Refused, finished: Path, tmp_path: Path) -> None:
    (tmp_path / "cat.png").write_text("meow")
    assert "cannot be read as an image" in refused(
        "generate", finished, "--prompt", "?", "--image", tmp_path / "cat.png"
    )


def test_temperature_without_sampling_is_refused(refused: Refused, finished: Path) -> None:
    ask = ["generate", finished, "--prompt", "?", "--device", "cpu", "--no-do-sample", "--temperature", 0.5]
    assert "temperature has no effect" in refused(*ask)


def test_an_unknown_device_is_refused(refused: Refused, finished: Path) -> None:
    assert "unknown device 'tpu'" in refused("generate", finished, "--prompt", "?", "--device", "tpu")
