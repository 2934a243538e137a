"""Sizes held against what bitsandbytes itself would save, byte for byte."""

from __future__ import annotations

import pytest
import torch
from recipe.small_models import gpt2, llama, plan_of, skeleton_of, text_model

from halfbyte.recipe.areas import Areas
from halfbyte.recipe.sizes import KvCache, nf4_bytes
from halfbyte.recipe.skeleton import Skeleton


def saved_by_bitsandbytes(shape: tuple[int, int], blocksize: int) -> tuple[int, int]:
    """(bytes of the six tensors, length of the JSON among them) as bitsandbytes packs a weight of that shape."""
    from bitsandbytes.functional import quantize_4bit

    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    codes, state = quantize_4bit(weight, blocksize=blocksize, compress_statistics=True, quant_type="nf4")
    parts = state.as_dict(packed=True)
    json_length = parts["quant_state.bitsandbytes__nf4"].numel()
    return codes.nbytes + sum(part.nbytes for part in parts.values()), json_length


@pytest.mark.parametrize("blocksize", [32, 64, 128])
@pytest.mark.parametrize("shape", [(64, 64), (96, 251), (1, 65), (512, 2048), (3, 5461)])
def test_nf4_bytes_equals_what_bitsandbytes_saves(shape: tuple[int, int], blocksize: int) -> None:
    total, json_length = saved_by_bitsandbytes(shape, blocksize)
    assert nf4_bytes(shape, blocksize, json_length) == total
    # the plan takes 20 characters for a number that prints in 3 to 24
    assert -4 <= nf4_bytes(shape, blocksize) - total <= 17


def test_a_large_weight_costs_0_51587_bytes() -> None:
    assert nf4_bytes((21504, 5376)) / (21504 * 5376) == pytest.approx(0.5 + 1 / 64 + 4 / (64 * 256), abs=2e-5)


def test_sums_agree_with_each_other() -> None:
    plan = plan_of(llama())
    sizes, areas = plan.summary["bytes"], plan.summary["areas"]
    assert sum(row["source_bytes"] for row in areas.values()) == sizes["source"]
    assert sum(row["output_bytes"] for row in areas.values()) == sizes["file"] == sizes["nf4"] + sizes["keep"]
    assert sum(row["tensors"] for row in areas.values()) == len(plan.decisions)
    elements = 12 * 64 * (64 + 32 + 32 + 64 + 3 * 128)
    assert plan.summary["bits_per_weight_nf4"] == 8 * sizes["nf4"] / elements


def cache_of(skeleton_and_areas: tuple[Skeleton, Areas]) -> KvCache:
    return KvCache(*skeleton_and_areas)


def filled(config: dict[str, object], tokens: int) -> int:
    """The oracle: bytes in transformers' own DynamicCache after a forward pass of `tokens` tokens in bf16."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(skeleton_of(config)[0].model.config, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        cache = model(torch.ones((1, tokens), dtype=torch.long), use_cache=True).past_key_values
    parts = [getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values")]
    return sum(part.nbytes for part in parts if part is not None)


GEMMA4 = {
    "head_dim": 16,
    "global_head_dim": 32,
    "num_global_key_value_heads": 1,
    "attention_k_eq_v": True,
    "num_kv_shared_layers": 2,
    "num_hidden_layers": 6,
    "sliding_window": 64,
    "layer_types": ["sliding_attention", "full_attention"] * 3,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 128,
}


@pytest.mark.parametrize(
    "config",
    [
        llama(),
        text_model("gemma4_text", **GEMMA4),
        text_model("mistral", sliding_window=64, head_dim=16),
        text_model("phi3", pad_token_id=0),
        gpt2(),
    ],
    ids=["llama", "gemma4", "mistral", "phi3", "gpt2"],
)
def test_cache_is_what_transformers_fills(config: dict[str, object]) -> None:
    cache = cache_of(skeleton_of(config))
    assert cache.at(40) == filled(config, 40)


def test_a_sliding_cache_stops_at_its_window() -> None:
    config = text_model("mistral", sliding_window=64, head_dim=16)
    cache = cache_of(skeleton_of(config))
    assert cache.at(64) == cache.at(10_000)
    # transformers keeps the window less the token to come
    assert filled(config, 100) == cache.at(63)
