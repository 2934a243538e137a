"""Two small models to score with: the tiny Gemma 4 (softcap, tied, towers) and a tiny untied Llama with a tokenizer of its own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from layers.small_rows import random_rows

from halfbyte.layers.rows import Rows


@pytest.fixture(scope="module")
def one_thread_for_all() -> Iterator[None]:
    """As `one_thread`, for the fixtures of a module too: put it into the module's `pytestmark`."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with an output embedding of its own, bf16, written by transformers; no tokenizer."""
    import torch
    from recipe.small_models import llama
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    config = LlamaConfig(**{**llama(num_hidden_layers=2), "initializer_range": 0.15, "tie_word_embeddings": False})
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["model_type"] == "llama"
    return folder


@pytest.fixture
def gemma_rows() -> Rows:
    return random_rows(low=363, high=900)
