"""The commands as a person uses them: what they print, how they refuse, what they leave alone."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from halfbyte.cli import main as cli


def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object
) -> tuple[int, str, str]:
    """Run the command line in this process; returns (exit code, stdout, stderr)."""
    monkeypatch.setattr(sys, "argv", ["halfbyte", *map(str, arguments)])
    code = 0
    try:
        cli.main()
    except SystemExit as ended:
        code = int(ended.code or 0)
    printed = capsys.readouterr()
    return code, printed.out, printed.err


@pytest.fixture
def halfbyte(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):  # type: ignore[no-untyped-def]
    return lambda *arguments: run(monkeypatch, capsys, *arguments)


def refused(result: tuple[int, str, str]) -> str:
    code, _, err = result
    assert code == 2, err
    assert "Traceback" not in err
    assert "next:" in err
    return err


def test_plan_of_the_31b_counts_410_and_nothing_in_the_vision_tower(halfbyte, shared_data: Path) -> None:  # type: ignore[no-untyped-def]
    config = shared_data / "gemma4" / "gemma-4-31B-it" / "config.json"
    code, out, _ = halfbyte("plan", config, "--json")
    body = json.loads(out)
    assert code == 0
    assert body["modules"]["nf4"] == 410
    assert body["modules"]["by_area"]["vision"]["nf4"] == 0
    assert (round(body["bytes"]["gpu"] / 2**30, 2), round(body["bytes"]["source"] / 2**30, 2)) == (17.77, 58.25)
    assert body["areas"]["decoder"]["nf4_modules"] == 410


def test_the_bare_unsloth_list_is_shown_as_a_disagreement_and_refused(halfbyte, shared_data: Path) -> None:  # type: ignore[no-untyped-def]
    config = shared_data / "gemma4" / "gemma-4-31B-it" / "config.json"
    code, out, _ = halfbyte("plan", config, "--preset", "unsloth")
    assert code == 0
    assert "disagree (601 / 410)" in out
    assert "601" in refused(halfbyte("plan", config, "--preset", "unsloth", "--no-allow-disagreement"))


def test_quantize_again_is_a_no_op_and_another_job_is_refused(halfbyte, tiny_gemma4: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    out = tmp_path / "out"
    assert halfbyte("quantize", tiny_gemma4, out)[0] == 0
    stamp = (out / "model.safetensors").stat().st_mtime_ns
    code, _, err = halfbyte("quantize", tiny_gemma4, out)
    assert code == 0
    assert "already done" in err
    assert (out / "model.safetensors").stat().st_mtime_ns == stamp
    assert "--overwrite" in refused(halfbyte("quantize", tiny_gemma4, out, "--max-shard-size", "500KB"))
    assert halfbyte("quantize", tiny_gemma4, out, "--max-shard-size", "500KB", "--overwrite")[0] == 0
    assert not (out / "model.safetensors").exists()


def test_a_folder_that_is_not_ours_is_never_touched(halfbyte, tiny_gemma4: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "thesis.tex").write_text("years of work")
    refused(halfbyte("quantize", tiny_gemma4, tmp_path, "--overwrite"))
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_output_inside_the_source_is_refused(halfbyte, tiny_gemma4: Path) -> None:  # type: ignore[no-untyped-def]
    assert "overlap" in refused(halfbyte("quantize", tiny_gemma4, tiny_gemma4 / "out"))


def test_a_full_disk_is_refused_before_anything_is_written(  # type: ignore[no-untyped-def]
    halfbyte, tiny_gemma4: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert "GiB are free" in refused(halfbyte("quantize", tiny_gemma4, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("tensor", ["layers.0.mlp.gate_proj.weight", "layers.0.input_layernorm.weight"])
def test_nan_in_the_source_is_refused_by_name(halfbyte, tiny_gemma4: Path, tmp_path: Path, tensor: str) -> None:  # type: ignore[no-untyped-def]
    source = shutil.copytree(tiny_gemma4, tmp_path / "source")
    for shard in source.glob("*.safetensors"):
        tensors = load_file(shard)
        for name in (n for n in tensors if n.endswith(f"language_model.{tensor}")):
            tensors[name].view(-1)[7] = float("nan")
        save_file(tensors, shard)
    assert tensor in refused(halfbyte("quantize", source, tmp_path / "out"))
    assert list((tmp_path / "out").glob("*.safetensors")) == []


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("plan", "no-such-thing.gguf"), "no such file"),
        (("plan", "org/name-that-is-not-here"), "hub did not give it"),
        (("quantize", "SOURCE", "OUT", "--device", "tpu"), "unknown device"),
        (("quantize", "SOURCE", "OUT", "--max-shard-size", "many"), "not a size"),
        (("quantize", "SOURCE", "OUT", "--preset", "no-such-preset"), "preset"),
        (("generate", "SOURCE", "--prompt", "x", "--image", "http://127.0.0.1/x.png"), "not from addresses"),
        (("card", "SOURCE"), "quantize"),
    ],
)
def test_a_mistake_says_what_where_and_what_next(  # type: ignore[no-untyped-def]
    halfbyte, tiny_gemma4: Path, tmp_path: Path, arguments: tuple[str, ...], says: str
) -> None:
    places = {"SOURCE": tiny_gemma4, "OUT": tmp_path / "out"}
    assert says in refused(halfbyte(*(places.get(a, a) for a in arguments)))


def test_verify_ends_with_1_and_a_sentence_when_a_byte_is_flipped(halfbyte, tiny_gemma4: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    out = tmp_path / "out"
    halfbyte("quantize", tiny_gemma4, out)
    assert halfbyte("verify", out, "--source", tiny_gemma4, "--no-generate")[0] == 0
    path = out / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-60_000] ^= 0x10
    path.write_bytes(data)
    code, printed, err = halfbyte("verify", out, "--source", tiny_gemma4, "--no-generate")
    assert code == 1
    assert "FAILED" in printed
    assert "sha256" in err or "differ" in err


def test_a_picture_of_ten_billion_pixels_is_refused_by_its_header(tmp_path: Path) -> None:
    import struct
    import zlib

    from halfbyte.errors import SourceError
    from halfbyte.runtime.images import open_image

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    path = tmp_path / "bomb.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b""))
    with pytest.raises(SourceError, match=r"exceeds|decompression bomb"):
        open_image(path)


def test_memory_does_not_grow_with_the_largest_tensor(tmp_path: Path) -> None:
    """VmHWM of quantizing a 600 MB kept tensor stays within 3 workers x slices (150 MiB) + 300 MiB of a tiny run's."""
    import subprocess

    from transformers import LlamaConfig

    peaks = []
    for rows in (64, 300_000):
        config = LlamaConfig(
            vocab_size=rows, hidden_size=1024, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
            num_key_value_heads=4, head_dim=64, tie_word_embeddings=True, architectures=["LlamaForCausalLM"],
        )  # fmt: skip
        source = tmp_path / f"source-{rows}"
        config.save_pretrained(source)
        from transformers import LlamaForCausalLM

        with torch.device("meta"):
            shapes = {k: v.shape for k, v in LlamaForCausalLM(config).state_dict().items() if k != "lm_head.weight"}
        save_file({k: torch.ones(s, dtype=torch.bfloat16) for k, s in shapes.items()}, source / "model.safetensors")
        program = (
            "import halfbyte, halfbyte.memory\n"
            f"halfbyte.quantize({str(source)!r}, {str(tmp_path / f'out-{rows}')!r})\nprint(halfbyte.memory.peak_rss_bytes())"
        )
        ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        peaks.append(int(ended.stdout.split()[-1]))
    assert peaks[1] - peaks[0] < 450 << 20, f"grew by {(peaks[1] - peaks[0]) >> 20} MiB for a 586 MiB tensor"
