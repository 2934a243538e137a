"""What transformers leaves unread in a GGUF's metadata, and would answer differently for, reaches config.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from format.tiny_gguf import add_before_finish, write_gemma3_gguf, write_gemma4_gguf, write_llama_gguf

from halfbyte.format.gguf_config import complete_config
from halfbyte.format.gguf_header import GgufHeader
from halfbyte.format.gguf_source import GgufSource


def llama3_factors(factor: float, theta: float, head_dim: int) -> np.ndarray:
    """llama.cpp's rope_freqs.weight from transformers' own llama3 scaling: plain frequency / scaled frequency."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = LlamaConfig(hidden_size=4 * head_dim, num_attention_heads=4, rope_theta=theta, rope_scaling=scaling)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = theta ** -(torch.arange(0, head_dim, 2).float() / head_dim)
    return (plain / scaled).numpy().astype(np.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_scaling_is_recovered_from_rope_freqs(
    factor: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_before_finish(monkeypatch, "rope_freqs.weight", llama3_factors(factor, 100_000.0, 64))
    write_llama_gguf(tmp_path / "m.gguf", tensor_type="Q4_K")

    with GgufSource(tmp_path / "m.gguf") as source:
        rope = source.config["rope_parameters"]

    assert (rope["rope_type"], rope["factor"], rope["rope_theta"]) == ("llama3", factor, 100_000.0)
    assert (rope["low_freq_factor"], rope["high_freq_factor"]) == (1.0, 4.0)
    assert rope["original_max_position_embeddings"] == 8192


def test_unknown_rotary_factors_are_noted_not_guessed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_before_finish(monkeypatch, "rope_freqs.weight", np.linspace(1, 3, 8, dtype=np.float32))
    write_llama_gguf(tmp_path / "m.gguf")

    with GgufSource(tmp_path / "m.gguf") as source:
        assert source.config["rope_parameters"]["rope_type"] == "default"
        assert any("not Llama 3's" in note for note in source.notes)


def test_gemma3_linear_scaling_reaches_the_full_layers_only(tmp_path: Path) -> None:
    write_gemma3_gguf(tmp_path / "m.gguf", gemma3__rope__scaling__type="linear", gemma3__rope__scaling__factor=8.0)

    with GgufSource(tmp_path / "m.gguf") as source:
        rope = source.config["rope_parameters"]

    assert (rope["full_attention"]["rope_type"], rope["full_attention"]["factor"]) == ("linear", 8.0)
    assert rope["sliding_attention"]["rope_type"] == "default"
    assert source.notes == []


def test_scaling_that_cannot_be_carried_over_is_noted(tmp_path: Path) -> None:
    write_llama_gguf(tmp_path / "m.gguf", llama__rope__scaling__type="longrope", llama__rope__scaling__factor=4.0)

    with GgufSource(tmp_path / "m.gguf") as source:
        assert any("'longrope'" in note for note in source.notes)


@pytest.mark.parametrize(
    ("architecture", "layers", "hidden", "heads", "scalar"),
    [("gemma3", 62, 5376, 32, 168), ("gemma2", 46, 4608, 32, 144), ("gemma3", 48, 3840, 16, None)],
)
def test_27b_gemmas_scale_queries_by_hidden_over_heads(
    architecture: str, layers: int, hidden: int, heads: int, scalar: int | None
) -> None:
    header = GgufHeader(Path("m.gguf"), 0, 3, {"general.architecture": architecture}, (), 0)
    parsed: dict[str, Any] = {"num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": heads}

    config, notes = complete_config(header, parsed)

    assert config.get("query_pre_attn_scalar") == scalar
    assert notes == []


def test_gemma4_config_says_what_the_published_one_says(tmp_path: Path) -> None:
    write_gemma4_gguf(tmp_path / "m.gguf")

    with GgufSource(tmp_path / "m.gguf") as source:
        config = source.config

    assert config["layer_types"] == ["sliding_attention"] * 5 + ["full_attention"]
    assert (config["num_key_value_heads"], config["num_global_key_value_heads"]) == (2, 1)
    assert (config["head_dim"], config["global_head_dim"]) == (32, 64)
    assert (config["attention_k_eq_v"], config["final_logit_softcapping"]) == (True, 30.0)
    assert config["hidden_size_per_layer_input"] == 0
    assert "per_layer_config" not in config
