"""What the user got wrong: every refusal names the value, the place and what to do, and leaves with exit code 2."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cli.conftest import Refused

from halfbyte.format.headers import read_checkpoint

KEPT = "model.language_model.embed_tokens.weight"
NF4 = "model.language_model.layers.0.mlp.up_proj.weight"
NAN = (0x7FC0).to_bytes(2, "little")


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (["--device", "tpu"], "unknown device 'tpu'"),
        (["--max-shard-size", "5 apples"], "'5 apples' is not a size"),
        (["--max-shard-size", "0"], "'0' is not a size"),
        (["--preset", "smallest"], "no such preset: smallest"),
    ],
)
def test_an_option_that_cannot_be_is_refused(
    refused: Refused, tiny_gemma4: Path, tmp_path: Path, options: list[str], what: str
) -> None:
    assert what in refused("quantize", tiny_gemma4, tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()


def test_a_gpu_that_is_not_there_is_refused_before_work_begins(
    refused: Refused, tiny_gemma4: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for arguments in (
        ["quantize", tiny_gemma4, tmp_path / "out"], ["verify", finished], ["generate", finished, "--prompt", "?"],
    ):  # fmt: skip
        message = refused(*arguments, "--device", "cuda:7")
        assert "there is no CUDA device 7" in message
        assert message.endswith("torch sees cuda:0\n")
    assert not (tmp_path / "out").exists()
    assert not (finished / "halfbyte" / "verify.json").exists()


@pytest.mark.parametrize("name", ["absent", "absent.gguf"])
@pytest.mark.parametrize("verb", ["plan", "quantize"])
def test_a_missing_source_is_refused(refused: Refused, tmp_path: Path, verb: str, name: str) -> None:
    missing = tmp_path / name
    arguments = [missing] if verb == "plan" else [missing, tmp_path / "out"]
    message = refused(verb, *arguments)
    assert "no such file or folder" in message
    assert str(missing) in message


@pytest.mark.parametrize("verb", ["verify", "card", "push", "generate"])
def test_a_missing_checkpoint_is_refused(refused: Refused, tmp_path: Path, verb: str) -> None:
    more = {"push": ["org/name"], "generate": ["--prompt", "hello"]}.get(verb, [])
    assert str(tmp_path / "absent") in refused(verb, tmp_path / "absent", *more)


def test_a_card_for_what_quantize_did_not_write_is_refused(refused: Refused, source: Path) -> None:
    assert "no quantize record" in refused("card", source)
    assert not (source / "README.md").exists()


def test_a_hub_id_without_network_is_refused_in_one_message(tmp_path: Path) -> None:
    """In a process of its own: no traceback may come from anywhere."""
    command = [sys.executable, "-m", "halfbyte.cli.main", "quantize", "acme/not-a-model", str(tmp_path / "out")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("error: not on this disk, and the hub did not give it: ")
    assert "\n  where: acme/not-a-model\n  next:  check the name" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", [KEPT, NF4])
def test_nan_in_the_source_is_refused_with_file_and_tensor(
    refused: Refused, source: Path, tmp_path: Path, name: str
) -> None:
    (info,) = [info for info in read_checkpoint(source) if info.name == name]
    with (source / info.file).open("r+b") as file:
        file.seek(info.start + info.nbytes - 2)
        file.write(NAN)
    message = refused("quantize", source, tmp_path / "out")
    assert "holds NaN or infinity" in message
    assert f"{info.file}: tensor {name}" in message
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [".halfbyte-work"]


def test_a_shard_cut_short_is_refused_by_its_name(refused: Refused, source: Path, tmp_path: Path) -> None:
    shard = source / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    assert shard.name in refused("quantize", source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_source_that_is_quantized_already_is_refused(refused: Refused, finished: Path, tmp_path: Path) -> None:
    assert "already quantized (bitsandbytes)" in refused("quantize", finished, tmp_path / "out")
    assert "already quantized (bitsandbytes)" in refused("plan", finished)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("place", [".", "nf4", "deep/er/nf4", ".."])
def test_output_and_source_may_not_overlap(refused: Refused, source: Path, place: str) -> None:
    before = sorted(source.parent.rglob("*"))
    assert "output and source overlap" in refused("quantize", source, source / place, "--overwrite")
    assert sorted(source.parent.rglob("*")) == before


def test_an_output_that_is_a_file_is_refused(refused: Refused, tiny_gemma4: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    assert "is a file" in refused("quantize", tiny_gemma4, tmp_path / "out", "--overwrite")
    assert (tmp_path / "out").read_text() == "mine"


def test_a_skip_list_that_loaders_read_differently_is_refused(
    refused: Refused, tiny_gemma4: Path, tmp_path: Path
) -> None:
    assert "--allow-disagreement" in refused("quantize", tiny_gemma4, tmp_path / "out", "--preset", "unsloth")
    assert not (tmp_path / "out").exists()


def test_a_record_that_is_not_json_is_refused(refused: Refused, tiny_gemma4: Path, checkpoint: Path) -> None:
    (checkpoint / "halfbyte" / "quantize.json").write_text(json.dumps({"schema": 99}))
    assert "record has schema 99" in refused("quantize", tiny_gemma4, checkpoint)
