"""What a GGUF says of its model and transformers does not carry over: each gap closed here would change the answers.

`load_gguf_checkpoint` maps a fixed list of keys per architecture. Left out by 5.23, read from the same file:

    llama    Llama 3.1+ rotary scaling, stored as the tensor rope_freqs.weight  -> rope_scaling llama3
    several  rope.scaling.type linear or yarn                                   -> rope_scaling (Gemma 3: full layers)
    gemma2/3 the 27B scale queries by hidden/heads, not by head_dim             -> query_pre_attn_scalar
    gemma4   per-layer KV heads, layer kinds, head sizes, K = V, softcap, both rotary bases, per-layer inputs

Sources: llama.cpp's convert_hf_to_gguf.py (what is written) and its graph builders (the two 27B scales, which are in no
key). llama3's factors: https://huggingface.co/docs/transformers (modeling_rope_utils, `llama3`).

The catch: rope_freqs.weight keeps the result, not the four parameters. Three of them are the same in every published
Llama 3; with them the factor is the tensor's maximum, and the whole tensor is recomputed and compared before use.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from typing import Any

from halfbyte.format.gguf_header import GgufHeader

LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
SCALABLE = ("llama", "qwen2", "qwen3", "gemma3")
#: (architecture, layers) of the models whose query scale is hidden_size / heads
QUERY_BY_HIDDEN = {("gemma2", 46), ("gemma3", 62)}


def complete_config(header: GgufHeader, parsed: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """transformers' config arguments with the gaps closed, and a sentence for each one that stays open.

    parsed   load_gguf_checkpoint(...)["config"]
    """
    architecture = header.metadata["general.architecture"]
    config, notes = dict(parsed), []
    if architecture == "gemma4":
        config |= _gemma4(header, parsed)
    if (architecture, parsed.get("num_hidden_layers")) in QUERY_BY_HIDDEN:
        config["query_pre_attn_scalar"] = parsed["hidden_size"] // parsed["num_attention_heads"]
    scaling, note = _stated_scaling(header, architecture)
    factors = _rope_factors(header) if architecture == "llama" else []
    if any(factor != 1.0 for factor in factors):
        scaling = _llama3(factors, parsed.get("rope_theta", 10_000.0))
        if scaling is None:
            note = "rope_freqs.weight holds rotary factors that are not Llama 3's: long texts will be read differently"
    if scaling:
        config["rope_scaling"] = scaling
    if note:
        notes.append(note)
    return config, notes


def _stated_scaling(header: GgufHeader, architecture: str) -> tuple[dict[str, Any] | None, str | None]:
    """rope_scaling as the metadata states it, or why it cannot be carried over."""
    prefix = f"{architecture}.rope.scaling."
    stated = {key.removeprefix(prefix): value for key, value in header.metadata.items() if key.startswith(prefix)}
    kind, factor = stated.pop("type", None), stated.pop("factor", None)
    length = stated.pop("original_context_length", None)
    stated.pop("finetuned", None)
    if kind in (None, "none") and not stated and factor in (None, 1.0):
        return None, None
    if architecture in SCALABLE and isinstance(factor, float) and not stated:
        if kind == "linear":
            return {"rope_type": "linear", "factor": factor}, None
        if kind == "yarn" and isinstance(length, int):
            return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": length}, None
    return None, f"rotary scaling {kind!r} of {architecture!r} is not carried over: long texts will be read differently"


def _rope_factors(header: GgufHeader) -> Sequence[float]:
    """The values of rope_freqs.weight, one for each pair of a head's dimensions; empty if the file has none."""
    for tensor in header.tensors:
        if tensor.name == "rope_freqs.weight" and tensor.kind == "F32":
            with header.path.open("rb") as file:
                file.seek(tensor.start)
                return struct.unpack(f"<{tensor.nbytes // 4}f", file.read(tensor.nbytes))
    return []


def _llama3(factors: Sequence[float], theta: float) -> dict[str, Any] | None:
    """The llama3 parameters that give exactly these factors, or None.

    A frequency whose wave fits into the original context `high` times keeps its speed (factor 1), one that does not fit
    `low` times is slowed by `factor`, those between are interpolated.
    """
    low, high = LLAMA3["low_freq_factor"], LLAMA3["high_freq_factor"]
    factor = round(max(factors), 3)
    for i, stored in enumerate(factors):
        waves = LLAMA3["original_max_position_embeddings"] / (2 * math.pi * theta ** (i / len(factors)))
        smooth = min(1.0, max(0.0, (waves - low) / (high - low)))
        if not math.isclose(stored, 1 / ((1 - smooth) / factor + smooth), rel_tol=1e-3):
            return None
    return {"rope_type": "llama3", "factor": factor, **LLAMA3}


def _gemma4(header: GgufHeader, parsed: Mapping[str, Any]) -> dict[str, Any]:
    """Gemma 4's text config: what differs by kind of layer is a list in the metadata, two keys in config."""
    keys = {key.removeprefix("gemma4."): value for key, value in header.metadata.items()}
    layers = parsed["num_hidden_layers"]
    sliding = keys.get("attention.sliding_window_pattern")
    if not isinstance(sliding, list) or len(sliding) != layers:
        sliding = [(i + 1) % 6 != 0 for i in range(layers)]
    kv_heads = keys.get("attention.head_count_kv")
    kv_heads = kv_heads if isinstance(kv_heads, list) and len(kv_heads) == layers else [kv_heads] * layers
    widths = keys.get("feed_forward_length")
    widths = widths if isinstance(widths, list) else [widths]
    names = {tensor.name for tensor in header.tensors}
    config = {
        "layer_types": ["sliding_attention" if each else "full_attention" for each in sliding],
        "num_key_value_heads": next((n for n, each in zip(kv_heads, sliding, strict=True) if each), kv_heads[0]),
        "num_global_key_value_heads": next((n for n, each in zip(kv_heads, sliding, strict=True) if not each), None),
        # the full layers use their keys as values; nothing but the missing tensor says so
        "attention_k_eq_v": any(
            f"blk.{i}.attn_k.weight" in names and f"blk.{i}.attn_v.weight" not in names for i in range(layers)
        ),
        "head_dim": keys.get("attention.key_length_swa", 256),
        "global_head_dim": keys.get("attention.key_length", 512),
        "hidden_size_per_layer_input": keys.get("embedding_length_per_layer_input", 0),
        "num_kv_shared_layers": keys.get("attention.shared_kv_layers", 0),
        "intermediate_size": min(widths),
        "use_double_wide_mlp": len(set(widths)) > 1,
        "final_logit_softcapping": keys.get("final_logit_softcapping"),
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": keys.get("rope.freq_base_swa", 10_000.0)},
            "full_attention": {
                "rope_type": "proportional",
                "partial_rotary_factor": 0.25,
                "rope_theta": keys.get("rope.freq_base", 1_000_000.0),
            },
        },
    }
    config["vocab_size_per_layer_input"] = parsed["vocab_size"]
    return config
