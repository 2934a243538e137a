"""A Gemma 4 of about 3 MB: random weights, but every trait of the real 31B that a quantizer can get wrong.

What is kept in miniature, and why it is here:

    5:1 sliding and full attention   the full layer has fewer, wider key/value heads and **no v_proj** (`attention_k_eq_v`)
    `layer_scalar`                   a persistent *buffer* per decoder layer; not 1 here, so that losing it changes answers
    vision tower and projector       linears that must stay bf16; `.linear` inside Gemma's clippable wrapper
    tied embeddings, softcap 30      `lm_head` has no tensor of its own
    two shards and an index          one decoder layer lies across both

The weights are drawn, not trained, so the model babbles; but it babbles finite words. Three choices make it so: the final
norm's weight is about 4, which gives logits a spread of about 4 (a flat distribution would make KLD and top-1 figures
meaningless); embeddings of special, byte and unused tokens are near zero, so greedy decoding stays inside words and
never ends early; and linear weights have variance 1/fan-in, which keeps the residual stream finite at any depth.

`config.json` is written in the style Google publishes (`global_head_dim`, `rope_type: default`). It must not come from
`save_pretrained`: transformers 5.23 rewrites both keys on save, and 5.10 cannot read the result (KeyError 'axial').

Tokenizer and chat template are our own: a small BPE with byte fallback, trained on the text in `tiny_tokenizer.py`, with
Gemma 4's special tokens at Gemma 4's low ids, and a template that has Gemma 4's turn frame and nothing else.

Catch: widths that are multiples of 64 never leave a ragged last block, because every decoder linear has the hidden size
as one side. `ragged=True` writes a model whose hidden size is 96 and whose MLP is 251 wide: its MLP weights end in half a block.
"""

from __future__ import annotations

import json
import math
import os
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halfbyte.demo.tiny_tokenizer import CHAT_TEMPLATE, special_ids, tokenizer_config, write_tokenizer
from halfbyte.records import current_umask, write_text_atomic

if TYPE_CHECKING:
    import torch

SOFT_TOKENS = 70  # per image: the smallest count that Gemma 4's image processor accepts
LICENSE = "Random weights written by halfbyte's demo. Public domain (CC0-1.0): do with them what you like.\n"


def write_tiny_gemma4(
    folder: Path, *, seed: int = 0, vocab_size: int = 2048, layers: int = 6, ragged: bool = False
) -> Path:
    """Write a small random Gemma 4 image-text checkpoint into `folder` (made if absent) and return it.

    seed        equal seeds give equal bytes (with equal torch versions)
    vocab_size  at least 1024: specials, 256 bytes, words, and `<unusedN>` for the rest
    layers      decoder layers; every sixth and the last use full attention
    ragged      odd widths, so that some weights end in a block of fewer than 64 elements
    raises      ValueError if vocab_size or layers is too small

    Loads in stock transformers: AutoModelForImageTextToText, AutoProcessor, text and images.
    """
    if vocab_size < 1024 or layers < 1:
        raise ValueError(f"need vocab_size >= 1024 and layers >= 1, got {vocab_size} and {layers}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = gemma4_config(vocab_size, layers, ragged)
    words = write_tokenizer(folder / "tokenizer.json", vocab_size)
    _write_shards(folder, _draw_weights(config, words, seed))

    ids = special_ids(vocab_size)
    texts = {
        "config.json": config,
        "generation_config.json": {
            "bos_token_id": ids["<bos>"],
            "do_sample": True,
            "eos_token_id": [ids["<eos>"], ids["<turn|>"], ids["<|tool_response>"]],
            "pad_token_id": ids["<pad>"],
            "temperature": 1.0,
            "top_k": 64,
            "top_p": 0.95,
        },
        "tokenizer_config.json": tokenizer_config(),
        "processor_config.json": processor_config(),
    }
    for name, body in texts.items():
        write_text_atomic(folder / name, json.dumps(body, indent=2) + "\n")
    write_text_atomic(folder / "chat_template.jinja", CHAT_TEMPLATE)
    write_text_atomic(folder / "LICENSE", LICENSE)
    return folder


def gemma4_config(vocab_size: int, layers: int, ragged: bool) -> dict[str, Any]:
    """config.json as Google writes it for Gemma 4 31B (same keys, same spelling), with small numbers in it."""
    ids = special_ids(vocab_size)
    return {
        "architectures": ["Gemma4ForConditionalGeneration"],
        "audio_config": None,
        "audio_token_id": ids["<|audio|>"],
        "boa_token_id": ids["<|audio>"],
        "boi_token_id": ids["<|image>"],
        "dtype": "bfloat16",
        "eoa_token_id": ids["<audio|>"],
        "eoa_token_index": ids["<audio|>"],
        "eoi_token_id": ids["<image|>"],
        "eos_token_id": [ids["<eos>"], ids["<turn|>"]],
        "image_token_id": ids["<|image|>"],
        "initializer_range": 0.02,
        "model_type": "gemma4",
        "text_config": _text_config(vocab_size, layers, ragged),
        "tie_word_embeddings": True,
        "transformers_version": "5.5.0",
        "video_token_id": ids["<|video|>"],
        "vision_config": _vision_config(),
        "vision_soft_tokens_per_image": SOFT_TOKENS,
    }


def _text_config(vocab_size: int, layers: int, ragged: bool) -> dict[str, Any]:
    ids = special_ids(vocab_size)
    kinds = ["sliding_attention" if (i + 1) % 6 and i + 1 < layers else "full_attention" for i in range(layers)]
    return {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attention_k_eq_v": True,
        "bos_token_id": ids["<bos>"],
        "dtype": "bfloat16",
        "enable_moe_block": False,
        "eos_token_id": ids["<eos>"],
        "final_logit_softcapping": 30.0,
        "global_head_dim": 64,
        "head_dim": 32,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 96 if ragged else 128,
        "hidden_size_per_layer_input": 0,
        "initializer_range": 0.02,
        "intermediate_size": 251 if ragged else 256,
        "layer_types": kinds,
        "max_position_embeddings": 4096,
        "model_type": "gemma4_text",
        "moe_intermediate_size": None,
        "num_attention_heads": 4,
        "num_experts": None,
        "num_global_key_value_heads": 1,
        "num_hidden_layers": layers,
        "num_key_value_heads": 2,
        "num_kv_shared_layers": 0,
        "pad_token_id": ids["<pad>"],
        "rms_norm_eps": 1e-06,
        "rope_parameters": {
            "full_attention": {"partial_rotary_factor": 0.25, "rope_theta": 1000000.0, "rope_type": "proportional"},
            "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"},
        },
        "sliding_window": 64,
        "tie_word_embeddings": True,
        "top_k_experts": None,
        "use_bidirectional_attention": "vision",
        "use_cache": True,
        "use_double_wide_mlp": False,
        "vocab_size": vocab_size,
        "vocab_size_per_layer_input": vocab_size,
    }


def _vision_config() -> dict[str, Any]:
    return {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "default_output_length": SOFT_TOKENS,
        "dtype": "bfloat16",
        "global_head_dim": 32,
        "head_dim": 32,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 64,
        "initializer_range": 0.02,
        "intermediate_size": 128,
        "max_position_embeddings": 4096,
        "model_type": "gemma4_vision",
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "patch_size": 16,
        "pooling_kernel_size": 3,
        "position_embedding_size": 1024,
        "rms_norm_eps": 1e-06,
        "rope_parameters": {"rope_theta": 100.0, "rope_type": "default"},
        "standardize": True,
        "use_clipped_linears": False,
    }


def processor_config() -> dict[str, Any]:
    """Image settings of Gemma 4: pixels in [0, 1], no mean or deviation, patches of 16, pools of 3 x 3."""
    pixels = {
        "do_convert_rgb": True,
        "do_normalize": False,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.0, 0.0, 0.0],
        "image_std": [1.0, 1.0, 1.0],
        "max_soft_tokens": SOFT_TOKENS,
        "patch_size": 16,
        "pooling_kernel_size": 3,
        "resample": 3,
        "rescale_factor": 1 / 255,
    }
    return {
        "audio_ms_per_token": 40,
        "audio_seq_length": 750,
        "feature_extractor": {
            "feature_extractor_type": "Gemma4AudioFeatureExtractor",
            "feature_size": 128,
            "sampling_rate": 16000,
        },
        "image_processor": {**pixels, "image_processor_type": "Gemma4ImageProcessor"},
        "image_seq_length": SOFT_TOKENS,
        "processor_class": "Gemma4Processor",
        "video_processor": {**pixels, "num_frames": 32, "video_processor_type": "Gemma4VideoProcessor"},
    }


def _draw_weights(config: dict[str, Any], words: range, seed: int) -> dict[str, torch.Tensor]:
    """Every tensor a Gemma 4 checkpoint holds, name -> bf16 values; names and shapes come from transformers itself.

    words  ids of the tokens that should be able to win: only their embeddings are large
    """
    import torch
    from transformers import Gemma4Config, Gemma4ForConditionalGeneration

    with torch.device("meta"):
        # deepcopy: Gemma4Config edits the dictionaries that it is given
        model = Gemma4ForConditionalGeneration(Gemma4Config.from_dict(deepcopy(config)))
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, empty in model.state_dict().items():
        if name == "lm_head.weight":
            continue  # tied: it lives once, as the embedding
        shape = tuple(empty.shape)
        noise = torch.randn(shape, generator=generator)
        if name.endswith("layer_scalar"):
            values = 0.6 + 0.1 * noise.clamp(-2, 2)
        elif name.endswith("language_model.norm.weight"):
            values = 4 + 0.1 * noise
        elif "norm" in name or name.endswith("std_scale"):
            values = 1 + 0.1 * noise
        elif name.endswith("std_bias"):
            values = 0.05 * noise
        elif name.endswith("embed_tokens.weight"):
            loud = torch.full((shape[0], 1), 0.05)
            loud[words.start : words.stop] = 1.0
            values = noise * loud / math.sqrt(shape[1])
        elif name.endswith("position_embedding_table"):
            values = 0.1 * noise
        else:
            values = noise / math.sqrt(shape[-1])
        weights[name] = values.to(torch.bfloat16)
    return weights


def _write_shards(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    """Two safetensors shards cut at half the bytes, and their index."""
    from safetensors.torch import save_file

    total = sum(t.nbytes for t in weights.values())
    shards: list[dict[str, torch.Tensor]] = [{}, {}]
    written = 0
    for name, tensor in weights.items():
        shards[written >= total / 2][name] = tensor
        written += tensor.nbytes
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        os.chmod(folder / file, 0o666 & ~current_umask())  # save_file leaves 0600
        weight_map.update(dict.fromkeys(shard, file))
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_text_atomic(folder / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")
