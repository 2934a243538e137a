"""The shape of the embedded pair: five million weights, everything else as in Gemma 4 31B.

    decoder   6 layers, 5 sliding : 1 full, hidden 192, MLP 768, 4 heads; the full layer has one key/value head of 128, no v_proj
    vision    4 layers, hidden 128, patches of 16, pooled 3 x 3 into 64 soft tokens a square picture
    words     4,096, tied embeddings, softcap 30, `layer_scalar` buffers that are not 1 (so that losing them shows)

Initial values. Gemma 4 divides attention logits by nothing; the learned norms of queries and keys set their size. A weight of
head_dim^-1/4 in both gives the usual 1/sqrt(head_dim) to start from. Embeddings have a standard deviation of 1/sqrt(hidden), and
Gemma multiplies them by sqrt(hidden): the residual stream begins at size one.
"""

from __future__ import annotations

import json
import math
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halfbyte.demo.tiny_gemma4 import gemma4_config, processor_config
from halfbyte.demo.tiny_tokenizer import CHAT_TEMPLATE, special_ids, tokenizer_config, write_tokenizer
from halfbyte.records import write_text_atomic

if TYPE_CHECKING:
    import torch

VOCAB = 4096
TEXT = {
    "hidden_size": 192, "intermediate_size": 768, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
    "num_global_key_value_heads": 1, "global_head_dim": 128, "sliding_window": 128, "max_position_embeddings": 2048,
}  # fmt: skip
VISION = {
    "hidden_size": 128, "intermediate_size": 384, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 32,
    "num_hidden_layers": 4, "position_embedding_size": 256,
}  # fmt: skip


def small_config() -> dict[str, Any]:
    """config.json of the pair, as Google writes it."""
    config = gemma4_config(VOCAB, 6, ragged=False)
    config["text_config"] |= TEXT
    config["vision_config"] |= VISION
    return config


def write_untrained(folder: Path, words: str, seed: int) -> Path:
    """A checkpoint of that shape with random weights; its tokenizer learns from the text `words`."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    ids = special_ids(VOCAB)
    write_tokenizer(folder / "tokenizer.json", VOCAB, words)
    texts = {
        "tokenizer_config.json": tokenizer_config(),
        "processor_config.json": processor_config(),
        "generation_config.json": {
            "bos_token_id": ids["<bos>"],
            "do_sample": False,
            "eos_token_id": [ids["<eos>"], ids["<turn|>"], ids["<|tool_response>"]],
            "pad_token_id": ids["<pad>"],
        },
    }
    for name, body in texts.items():
        write_text_atomic(folder / name, json.dumps(body, indent=2) + "\n")
    write_text_atomic(folder / "chat_template.jinja", CHAT_TEMPLATE)
    config = small_config()
    save_file(_draw(config, seed), folder / "model.safetensors", metadata={"format": "pt"})
    write_text_atomic(folder / "config.json", json.dumps(config, indent=2) + "\n")
    return folder


def _draw(config: dict[str, Any], seed: int) -> dict[str, torch.Tensor]:
    """Initial bf16 values of every tensor, names and shapes from transformers' own class."""
    import torch
    from transformers import Gemma4Config, Gemma4ForConditionalGeneration

    with torch.device("meta"):
        model = Gemma4ForConditionalGeneration(Gemma4Config.from_dict(deepcopy(config)))
    generator = torch.Generator().manual_seed(seed)
    state = {name: t for name, t in model.state_dict().items() if name != "lm_head.weight"}
    return {name: _initial(name, tuple(t.shape), generator).to(torch.bfloat16) for name, t in state.items()}


def _initial(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    import torch

    if name.endswith("layer_scalar"):
        return torch.full(shape, 0.75 + 0.125 * (int(name.split(".")[-2]) % 2))
    if name.endswith("std_bias"):
        return torch.zeros(shape)
    if name.endswith(("q_norm.weight", "k_norm.weight")):
        return torch.full(shape, shape[0] ** -0.25)
    if name.endswith(("post_attention_layernorm.weight", "post_feedforward_layernorm.weight")):
        return torch.full(shape, 0.5)
    if "norm" in name or name.endswith("std_scale"):
        return torch.ones(shape)
    noise = torch.randn(shape, generator=generator)
    if name.endswith("position_embedding_table"):
        return 0.1 * noise
    if name.endswith("embed_tokens.weight"):
        return noise / math.sqrt(shape[1])
    return 0.7 * noise / math.sqrt(shape[-1])
