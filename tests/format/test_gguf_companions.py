"""Config, tokenizer and generation settings written from a GGUF work as a plain Hugging Face folder does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from format.tiny_gguf import WRITERS, smollm2, write_gemma3_gguf, write_gemma4_gguf, write_llama_gguf

from halfbyte.errors import SourceError
from halfbyte.format.gguf_source import GgufSource

CHAT = [{"role": "user", "content": "the 12 cats\n  and a dog"}]


def write_folder(source: GgufSource, folder: Path) -> Path:
    """A plain bf16 checkpoint from everything that the source hands out."""
    from safetensors.torch import save_file

    folder.mkdir()
    tensors = {info.name: source.read(info, 0, info.numel).reshape(info.shape) for info in source.tensors}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(source.config))
    for name, content in source.companions().items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.read_bytes())
    return folder


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_written_folder_answers_exactly_as_the_gguf_does(family: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    WRITERS[family](tmp_path / "m.gguf", tensor_type="Q8_0")
    with GgufSource(tmp_path / "m.gguf") as source:
        folder = write_folder(source, tmp_path / "plain")
    ids = torch.tensor([[2, 30, 31, 32, 200, 201]])

    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    direct = AutoModelForCausalLM.from_pretrained(str(tmp_path), gguf_file="m.gguf", dtype=torch.float32)
    for parameter in direct.parameters():
        parameter.data = parameter.data.to(torch.bfloat16).float()

    assert torch.equal(plain(ids).logits, direct(ids).logits)


def test_gemma4_loads_from_the_written_folder_with_every_layer_scalar(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    expected = write_gemma4_gguf(tmp_path / "m.gguf")
    with GgufSource(tmp_path / "m.gguf") as source:
        folder = write_folder(source, tmp_path / "plain")

    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)

    state = model.state_dict()
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert len([name for name in expected if name.endswith("layer_scalar")]) == 6
    for name, values in expected.items():
        assert torch.equal(state[name], torch.from_numpy(values).bfloat16().float()), name
    assert (model.config.final_logit_softcapping, model.config.attention_k_eq_v) == (30.0, True)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_config_says_what_transformers_reads_from_the_gguf(family: str, tmp_path: Path) -> None:
    from transformers import AutoConfig

    WRITERS[family](tmp_path / "m.gguf")
    with GgufSource(tmp_path / "m.gguf") as source:
        (tmp_path / "plain").mkdir()
        (tmp_path / "plain" / "config.json").write_text(json.dumps(source.config))

    written = AutoConfig.from_pretrained(tmp_path / "plain").to_dict()
    read = AutoConfig.from_pretrained(str(tmp_path), gguf_file="m.gguf").to_dict()

    differing = {key for key in written.keys() | read.keys() if written.get(key) != read.get(key)}
    assert differing <= {"architectures", "dtype", "_model_name_or_path", "_name_or_path"}, differing
    assert written["architectures"] == [{"llama": "LlamaForCausalLM", "gemma3": "Gemma3ForCausalLM"}[family]]
    assert source.config["dtype"] == "bfloat16"
    assert source.config["tie_word_embeddings"] is True


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_written_tokenizer_is_the_ggufs(family: str, tmp_path: Path) -> None:
    WRITERS[family](tmp_path / "m.gguf")

    assert_same_tokenizer(tmp_path / "m.gguf", tmp_path / "plain")


@pytest.mark.real
def test_smollm2_tokenizer_is_the_ggufs(tmp_path: Path) -> None:
    assert_same_tokenizer(smollm2(), tmp_path / "plain")


def assert_same_tokenizer(path: Path, folder: Path) -> None:
    from transformers import AutoTokenizer

    with GgufSource(path) as source:
        folder.mkdir()
        for name, content in source.companions().items():
            assert isinstance(content, bytes)
            (folder / name).write_bytes(content)
        (folder / "config.json").write_text(json.dumps(source.config))
    written: Any = AutoTokenizer.from_pretrained(folder)
    direct: Any = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)

    for text in ("the cat and 1234 dogs  on\n a mat", "", " x", "Ünïcödé ☃"):
        assert written(text)["input_ids"] == direct(text)["input_ids"], text
    assert written.special_tokens_map.items() <= direct.special_tokens_map.items()
    assert len(written) == source.config["vocab_size"]
    assert written.apply_chat_template(CHAT, tokenize=False) == direct.apply_chat_template(CHAT, tokenize=False)


def test_gemma_turns_are_single_tokens_and_bos_is_written_once(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    write_gemma3_gguf(tmp_path / "m.gguf")
    with GgufSource(tmp_path / "m.gguf") as source:
        folder = write_folder(source, tmp_path / "plain")
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)

    ids = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)

    turn = tokenizer.convert_tokens_to_ids("<start_of_turn>")
    assert ids[:2] == [2, turn]
    assert (ids.count(2), ids.count(turn)) == (1, 2)
    assert tokenizer("the")["input_ids"][0] == 2


def test_end_of_turn_joins_the_tokens_that_end_an_answer(tmp_path: Path) -> None:
    write_gemma3_gguf(tmp_path / "m.gguf")
    with GgufSource(tmp_path / "m.gguf") as source:
        content = source.companions()["generation_config.json"]

    assert isinstance(content, bytes)
    assert json.loads(content) == {"bos_token_id": 2, "eos_token_id": [1, 6], "pad_token_id": 0}


def test_files_lying_beside_the_gguf_do_not_leak_in(tmp_path: Path) -> None:
    write_llama_gguf(tmp_path / "m.gguf")
    (tmp_path / "tokenizer.json").write_text('{"added_tokens": [{"id": 0, "content": "intruder"}]}')
    with GgufSource(tmp_path / "m.gguf") as source:
        files = source.companions()

    settings = json.loads(files["tokenizer_config.json"])  # type: ignore[arg-type]
    assert b"intruder" not in files["tokenizer.json"]  # type: ignore[operator]
    assert json.loads(files["tokenizer.json"])["model"]["type"] == "BPE"  # type: ignore[arg-type]
    assert not {"is_local", "local_files_only", "name_or_path"} & settings.keys()
    assert not any(str(tmp_path).encode() in content for content in files.values() if isinstance(content, bytes))


def test_gguf_without_tokenizer_is_a_source_error(tmp_path: Path) -> None:
    write_llama_gguf(tmp_path / "m.gguf")
    raw = (tmp_path / "m.gguf").read_bytes()
    (tmp_path / "m.gguf").write_bytes(raw.replace(b"tokenizer.ggml.model", b"tokenizer.ggml.mOdel"))

    with GgufSource(tmp_path / "m.gguf") as source, pytest.raises(SourceError, match="holds no tokenizer"):
        source.companions()


def test_default_tokens_of_a_tokenizer_class_do_not_outgrow_the_embedding(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    write_llama_gguf(tmp_path / "m.gguf")
    with GgufSource(tmp_path / "m.gguf") as source:
        folder = write_folder(source, tmp_path / "plain")

    ids = AutoTokenizer.from_pretrained(folder)("the <|endoftext|>")["input_ids"]

    assert max(ids) < source.config["vocab_size"]
