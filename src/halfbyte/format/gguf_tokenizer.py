"""The files beside the weights, rebuilt from a GGUF's metadata: tokenizer, chat template, generation settings.

transformers converts the vocabulary; `save_pretrained` writes the files as every loader expects them:

    tokenizer.json, tokenizer_config.json   vocabulary, merges, special tokens, whether <bos> is added
    chat_template.jinja                     if the metadata has one
    generation_config.json                  bos, eos, pad; llama.cpp's end-of-turn and end-of-message tokens join eos

The file is read through a link in an otherwise empty folder: transformers prefers a tokenizer.json that happens to lie
beside the GGUF to the vocabulary inside it.

Two catches. transformers' classes bring default tokens along (GPT-2's <|endoftext|>) and number those that the file
lacks from its vocabulary's end on, where the embedding has no row: `_within` takes them out again. And a GGUF names its
pre-tokenizer (`tokenizer.ggml.pre`) but does not describe it: for a name transformers does not know it splits text as
GPT-2 does; the vocabulary is right then, rare splits may not be.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from halfbyte.errors import SourceError
from halfbyte.format.gguf_header import ArrayLength, GgufHeader

#: keys that say how the file was found on this machine, not what is in it
LOCAL_KEYS = ("is_local", "local_files_only", "name_or_path", "gguf_file")
END_TOKENS = ("eos_token_id", "eot_token_id", "eom_token_id")


def companion_files(header: GgufHeader, config: Mapping[str, Any]) -> dict[str, bytes]:
    """File name -> content of everything but weights and config.json.

    config   the model's config: a list of end tokens in it (Gemma 4 has three) goes first
    raises   SourceError if the file has no tokenizer, or one that transformers cannot rebuild
    """
    if not isinstance(header.metadata.get("tokenizer.ggml.model"), str):
        raise SourceError(
            "this GGUF holds no tokenizer (tokenizer.ggml.model)",
            where=str(header.path),
            todo="use a complete GGUF, as llama.cpp's convert_hf_to_gguf.py writes it",
        )
    with tempfile.TemporaryDirectory(prefix="halfbyte-gguf-") as name:
        folder = Path(name)
        _save_tokenizer(header, folder)
        files = {path.name: path.read_bytes() for path in sorted((folder / "saved").iterdir())}
    settings = json.loads(files["tokenizer_config.json"])
    for key in LOCAL_KEYS:
        settings.pop(key, None)
    files["tokenizer.json"], strangers = _within(files["tokenizer.json"], _vocabulary_size(header))
    settings = {key: value for key, value in settings.items() if not (isinstance(value, str) and value in strangers)}
    files["tokenizer_config.json"] = _as_json(settings)
    files["generation_config.json"] = _as_json(generation_config(header.metadata, config))
    return files


def generation_config(metadata: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """bos, eos and pad ids for generation_config.json; `eos_token_id` is a list if several tokens end an answer."""
    stated = config.get("eos_token_id")
    ends = list(stated) if isinstance(stated, list) else [stated]
    ends += [metadata.get(f"tokenizer.ggml.{key}") for key in END_TOKENS]
    unique = list(dict.fromkeys(end for end in ends if end is not None))
    body = {
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": unique[0] if len(unique) == 1 else unique or None,
        "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id"),
    }
    return {key: value for key, value in body.items() if value is not None}


def _save_tokenizer(header: GgufHeader, folder: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    (folder / "model.gguf").symlink_to(header.path.resolve())
    try:
        # not AutoTokenizer: it first builds the model's config from the file, which fails for Gemma 4
        tokenizer = PreTrainedTokenizerFast.from_pretrained(str(folder), gguf_file="model.gguf", local_files_only=True)
        tokenizer.save_pretrained(folder / "saved")
    except Exception as error:  # a third party's converter: whatever it raises, this vocabulary cannot be rebuilt
        raise SourceError(
            f"transformers cannot rebuild the tokenizer {header.metadata['tokenizer.ggml.model']!r}: "
            f"{type(error).__name__}: {error}",
            where=str(header.path),
            todo="give the Hugging Face checkpoint that this GGUF was made from",
        ) from error


def _vocabulary_size(header: GgufHeader) -> int:
    tokens = header.metadata.get("tokenizer.ggml.tokens", [])
    return tokens.count if isinstance(tokens, ArrayLength) else len(tokens)


def _within(content: bytes, size: int) -> tuple[bytes, set[str]]:
    """tokenizer.json without tokens numbered `size` or more, and those tokens; untouched if there are none."""
    body = json.loads(content)
    strangers = {token["content"] for token in body["added_tokens"] if token["id"] >= size}
    if not strangers:
        return content, strangers
    body["added_tokens"] = [token for token in body["added_tokens"] if token["id"] < size]
    return _as_json(body), strangers


def _as_json(body: Mapping[str, Any]) -> bytes:
    return (json.dumps(body, indent=2, ensure_ascii=False) + "\n").encode()
