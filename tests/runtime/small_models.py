"""Small random models of the classes whose linears are stacked, their decoder's linears quantized by bitsandbytes."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import torch

from halfbyte.runtime.loading.replacement import linears_of

SMALL = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
#: class of transformers -> what its config needs beside SMALL
CLASSES: dict[str, dict[str, Any]] = {
    "Llama": {}, "Qwen2": {"head_dim": 16}, "Qwen3": {}, "Gemma3": {"sliding_window": 8, "query_pre_attn_scalar": 32},
    "Gemma4": {
        "attention_k_eq_v": True, "num_kv_shared_layers": 2, "num_hidden_layers": 4, "global_head_dim": 64, "num_global_key_value_heads": 1,
        "layer_types": ["sliding_attention", "full_attention"] * 2, "hidden_size_per_layer_input": 64, "vocab_size_per_layer_input": 64, "sliding_window": 8, "enable_moe_block": False,
    },
}  # fmt: skip


def quantized(model: torch.nn.Module, nested: bool = True, compute: torch.dtype = torch.float32) -> torch.nn.Module:
    """Its decoder's linears by bitsandbytes, whose dequantize-and-multiply path is the plainest."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    for name, linear in [
        (n, m) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "lm_head" not in n
    ]:
        new = Linear4bit(linear.in_features, linear.out_features, linear.bias is not None, compute, nested, "nf4")
        new.weight = Params4bit(
            linear.weight.data.clone(), compress_statistics=nested, quant_type="nf4", module=new
        ).to("cpu")
        new.bias, new.support_avx512bf16_for_cpu = linear.bias, False
        owner, _, child = name.rpartition(".")
        setattr(model.get_submodule(owner), child, new)
    return model.eval()


def stock_on_gpu(kind: str) -> Any:
    """A small model in bf16 on the GPU, all of bitsandbytes."""
    model = copy.deepcopy(stock(kind))
    for _, linear in linears_of(model):
        linear.compute_dtype = torch.bfloat16
    return model.to(torch.bfloat16).to("cuda")


@cache
def stock(kind: str) -> Any:
    """A random model of a class, two to four layers, on the CPU, in float32; copy it before changing it."""
    import transformers

    torch.manual_seed(3)
    text = "Text" if kind.startswith("Gemma") else ""
    config = getattr(transformers, f"{kind}{text}Config")(**SMALL | CLASSES[kind])
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    return quantized(model)
