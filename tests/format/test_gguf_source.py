"""A GGUF read through GgufSource is the model transformers would load from it, rounded to bf16, bit for bit."""

from __future__ import annotations

import os
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from format.tiny_gguf import TENSOR_TYPES, WRITERS, add_before_finish, smollm2, write_gemma3_gguf, write_llama_gguf

from halfbyte.errors import HeaderError, SourceError
from halfbyte.format.gguf_source import GgufSource
from halfbyte.format.tensors import Source


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """bf16 as integers: -0.0 differs from 0.0, and NaN equals itself."""
    return tensor.to(torch.bfloat16).reshape(-1).view(torch.int16)


def loaded(path: Path) -> dict[str, torch.Tensor]:
    """The oracle: transformers' own model of the GGUF, in float32."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(path.parent), gguf_file=path.name, dtype=torch.float32)
    return dict(model.state_dict())


def assert_equals_transformers(path: Path) -> None:
    oracle = loaded(path)
    with GgufSource(path) as source:
        for info in source.tensors:
            assert info.shape == tuple(oracle[info.name].shape), info.name
            assert torch.equal(source.read(info, 0, info.numel).view(torch.int16), bits(oracle[info.name])), info.name
        assert oracle.keys() - {info.name for info in source.tensors} == {"lm_head.weight"}


@pytest.mark.parametrize("family", WRITERS)
@pytest.mark.parametrize("tensor_type", TENSOR_TYPES)
def test_every_tensor_equals_what_was_stored(family: str, tensor_type: str, tmp_path: Path) -> None:
    expected = WRITERS[family](tmp_path / "m.gguf", seed=3, tensor_type=tensor_type)

    with GgufSource(tmp_path / "m.gguf") as source:
        found = {info.name: (info.shape, source.read(info, 0, info.numel)) for info in source.tensors}

    assert found.keys() == expected.keys()
    for name, (shape, values) in found.items():
        assert shape == expected[name].shape
        assert values.dtype == torch.bfloat16
        assert torch.equal(values.view(torch.int16), bits(torch.from_numpy(expected[name]))), name


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("tensor_type", ["BF16", "Q4_0", "Q6_K"])
def test_every_tensor_equals_transformers_rounded_to_bf16(family: str, tensor_type: str, tmp_path: Path) -> None:
    WRITERS[family](tmp_path / "m.gguf", tensor_type=tensor_type)

    assert_equals_transformers(tmp_path / "m.gguf")


@pytest.mark.real
def test_smollm2_equals_transformers_rounded_to_bf16() -> None:
    assert_equals_transformers(smollm2())


@pytest.mark.real
def test_largest_tensor_passes_through_a_few_mebibytes() -> None:
    with GgufSource(smollm2()) as source:
        info = max(source.tensors, key=lambda tensor: tensor.numel)
        source.read(info, 0, 1)

        tracemalloc.start()
        source.read(info, 0, info.numel)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()

    assert info.numel * 4 > 100 << 20
    assert peak < 10 << 20


@pytest.mark.parametrize("family", WRITERS)
@pytest.mark.parametrize("cuts", [(1, 63, 64, 65), (31, 32, 700, 2049), (5, 6, 7, 4095)])
def test_slices_concatenate_to_the_whole(
    family: str, cuts: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    WRITERS[family](tmp_path / "m.gguf", tensor_type="Q5_0")
    with GgufSource(tmp_path / "m.gguf") as source:
        whole = [source.read(info, 0, info.numel) for info in source.tensors]
        monkeypatch.setattr("halfbyte.format.gguf_source.PIECE", 200)  # several pieces a slice, three rows each
        for info, expected in zip(source.tensors, whole, strict=True):
            edges = [0, *(cut for cut in cuts if cut < info.numel), info.numel]
            pieces = [source.read(info, a, b) for a, b in pairwise(edges)]
            assert torch.equal(torch.cat(pieces), expected), info.name
            assert source.read(info, 1, 1).numel() == 0


def test_threads_read_the_same_as_one_after_the_other(tmp_path: Path) -> None:
    write_llama_gguf(tmp_path / "m.gguf")
    with GgufSource(tmp_path / "m.gguf") as source, ThreadPoolExecutor(8) as pool:
        one = [source.read(info, 0, info.numel) for info in source.tensors]
        many = list(pool.map(lambda info: source.read(info, 0, info.numel), [*source.tensors] * 5))

    assert all(torch.equal(many[i], one[i % len(one)]) for i in range(len(many)))


def test_tensors_are_described_as_a_bf16_checkpoint_in_file_order(tmp_path: Path) -> None:
    write_gemma3_gguf(tmp_path / "m.gguf")
    source: Source = GgufSource(tmp_path / "m.gguf", "org/model")

    starts = [info.start for info in source.tensors]

    assert (source.kind, source.label, source.path) == ("gguf", "org/model", tmp_path / "m.gguf")
    assert starts == sorted(starts)
    assert {(info.dtype, info.file) for info in source.tensors} == {("BF16", "m.gguf")}
    source.close()


def test_unknown_tensor_is_named_in_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_before_finish(monkeypatch, "rope_freqs.weight", np.ones(8, dtype=np.float32))
    write_llama_gguf(tmp_path / "m.gguf")

    with GgufSource(tmp_path / "m.gguf") as source:
        assert source.skipped == ["rope_freqs.weight"]
        assert any("rope_freqs.weight" in note for note in source.notes)
        assert "rope_freqs.weight" not in {info.name for info in source.tensors}


def test_separate_output_matrix_becomes_an_untied_lm_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    head = np.random.default_rng(1).standard_normal((268, 64)).astype(np.float32)
    add_before_finish(monkeypatch, "output.weight", head)
    write_llama_gguf(tmp_path / "m.gguf")

    with GgufSource(tmp_path / "m.gguf") as source:
        info = next(info for info in source.tensors if info.name == "lm_head.weight")
        assert torch.equal(source.read(info, 0, info.numel).view(torch.int16), bits(torch.from_numpy(head)))
        assert source.config["tie_word_embeddings"] is False


def test_missing_tensor_is_refused_where_transformers_would_draw_random_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("format.tiny_gguf._Weights.norm", skipping("blk.1.ffn_norm.weight"))
    write_llama_gguf(tmp_path / "m.gguf")

    with pytest.raises(HeaderError, match=r"1 of the model's .* 'model.layers.1.post_attention_layernorm.weight'"):
        GgufSource(tmp_path / "m.gguf")


def test_shape_that_contradicts_the_metadata_is_refused(tmp_path: Path) -> None:
    write_llama_gguf(tmp_path / "m.gguf")
    edit(tmp_path / "m.gguf", b"llama.feed_forward_length", (128).to_bytes(4, "little"), (160).to_bytes(4, "little"))

    with pytest.raises(HeaderError, match=r"shape \[128, 64\]; the metadata makes it \[160, 64\]"):
        GgufSource(tmp_path / "m.gguf")


def test_absurd_layer_count_is_refused_before_a_model_is_built(tmp_path: Path) -> None:
    write_llama_gguf(tmp_path / "m.gguf")
    edit(tmp_path / "m.gguf", b"llama.block_count", (2).to_bytes(4, "little"), (1 << 30).to_bytes(4, "little"))

    with pytest.raises(HeaderError, match=r"block_count is 1073741824 in a file of 20 tensors"):
        GgufSource(tmp_path / "m.gguf")


@pytest.mark.parametrize("architecture", ["clipx", "gpt_2"])
def test_architecture_unknown_to_transformers_is_a_source_error(architecture: str, tmp_path: Path) -> None:
    write_llama_gguf(tmp_path / "m.gguf")
    raw = (tmp_path / "m.gguf").read_bytes()
    (tmp_path / "m.gguf").write_bytes(raw.replace(b"llama", architecture.encode()))

    with pytest.raises(SourceError, match=f"architecture '{architecture}'"):
        GgufSource(tmp_path / "m.gguf")


def test_fused_layout_is_refused_by_name(tmp_path: Path) -> None:
    write_llama_gguf(tmp_path / "m.gguf")
    raw = (tmp_path / "m.gguf").read_bytes()
    (tmp_path / "m.gguf").write_bytes(raw.replace(b"llama", b"bloom"))

    with pytest.raises(SourceError, match="'bloom' is stored fused or transposed"):
        GgufSource(tmp_path / "m.gguf")


def test_file_shortened_while_open_is_a_header_error(tmp_path: Path) -> None:
    write_llama_gguf(tmp_path / "m.gguf")
    with GgufSource(tmp_path / "m.gguf") as source:
        last = source.tensors[-1]
        os.truncate(tmp_path / "m.gguf", last.start + 10)
        with pytest.raises(HeaderError, match="cut short"):
            source.read(last, 0, last.numel)


def test_importing_the_module_imports_nothing_heavy() -> None:
    code = (
        "import sys, halfbyte.format.gguf_source; print({'torch', 'transformers', 'gguf', 'numpy'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"


def skipping(unwanted: str) -> Callable[..., None]:
    """A `_Weights.norm` that leaves one out."""
    from format.tiny_gguf import _Weights

    original = _Weights.norm

    def norm(self: Any, name: str, *rest: Any, **options: Any) -> None:
        if name != unwanted:
            original(self, name, *rest, **options)

    return norm


def edit(path: Path, key: bytes, old: bytes, new: bytes) -> None:
    """Change the scalar value that follows `key` in the header: key | type u32 | value."""
    raw = path.read_bytes()
    assert raw.count(key) == 1
    at = raw.index(key) + len(key) + 4
    assert raw[at : at + len(old)] == old
    path.write_bytes(raw[:at] + new + raw[at + len(new) :])
