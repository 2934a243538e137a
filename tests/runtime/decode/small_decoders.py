"""Small random decoders of every family the loop knows, made lively: a model that says one word for ever proves nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch

from halfbyte.runtime.linear.module import Nf4Linear

VOCABULARY = 300
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None, "tie_word_embeddings": False,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
SLIDING, FULL = "sliding_attention", "full_attention"


def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return lively(LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters=LLAMA3)))


def mistral() -> Any:
    from transformers import MistralConfig, MistralForCausalLM

    return lively(MistralForCausalLM(MistralConfig(**SIZES, sliding_window=24)))


def qwen2() -> Any:
    """Biases; sliding layers behind full ones."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return lively(
        Qwen2ForCausalLM(Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=24, max_window_layers=2))
    )


def qwen3() -> Any:
    """Norms of q and k, heads wider than hidden size / heads."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return lively(Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=32)))


def gemma3() -> Any:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    types = [SLIDING, SLIDING, SLIDING, FULL]
    config = Gemma3TextConfig(**SIZES, head_dim=32, sliding_window=24, query_pre_attn_scalar=24, layer_types=types)
    return lively(Gemma3ForCausalLM(config), norms_at=0.0)


def gemma4_e() -> Any:
    """As E2B and E4B are: per-layer inputs, shared keys, a double-wide MLP behind them, softcap."""
    from transformers import Gemma4ForCausalLM, Gemma4TextConfig

    types = [SLIDING, SLIDING, FULL, SLIDING, SLIDING, FULL, FULL]
    config = Gemma4TextConfig(
        **SIZES | {"num_hidden_layers": 7}, head_dim=16, global_head_dim=32, sliding_window=24, hidden_size_per_layer_input=16,
        vocab_size_per_layer_input=VOCABULARY, num_kv_shared_layers=3, use_double_wide_mlp=True, final_logit_softcapping=30.0,
        layer_types=types,
    )  # fmt: skip
    return lively(Gemma4ForCausalLM(config))


def gemma4_unified() -> Any:
    """As the 12B is: keys that are values, one wide key head, in its full layers."""
    from transformers import Gemma4UnifiedForCausalLM, Gemma4UnifiedTextConfig

    config = Gemma4UnifiedTextConfig(
        **SIZES, head_dim=16, global_head_dim=32, num_global_key_value_heads=1, attention_k_eq_v=True, sliding_window=24,
        final_logit_softcapping=30.0, layer_types=[SLIDING, SLIDING, FULL, FULL],
    )  # fmt: skip
    return lively(Gemma4UnifiedForCausalLM(config))


FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": llama, "mistral": mistral, "qwen2": qwen2, "qwen3": qwen3, "gemma3": gemma3, "gemma4_e": gemma4_e,
    "gemma4_unified": gemma4_unified,
}  # fmt: skip


def lively(model: Any, norms_at: float = 1.0) -> Any:
    """Weights of variance 2.5/fan-in, norms about 1, scalars and biases that show when they are lost."""
    maker = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=maker)
            small = "norm" in name or weight.dim() == 1
            weight.copy_(
                (norms_at if "norm" in name else 0) + 0.2 * noise if small else noise * weight.shape[-1] ** -0.5
            )
        for name, buffer in model.named_buffers():
            if name.endswith("layer_scalar"):
                buffer.fill_(0.8)
    return model.eval()


def fuse(model: Any, weight_of: Callable[[list[int], int, int], Any], expand: Callable[[Any], torch.Tensor]) -> Any:
    """The same model twice in one: NF4 products, q/k/v and gate/up fused, and plain linears that hold the same values.

    weight_of  rows of the parts, columns, seed -> an NF4 weight
    expand     an NF4 weight -> its values
    """
    for number, layer in enumerate(model.model.layers):
        attention, mlp = layer.self_attn, layer.mlp
        stacks = [
            (attention, "qkv_proj", ["q_proj", "k_proj", "v_proj"]), (attention, "o_proj", ["o_proj"]),
            (mlp, "gate_up_proj", ["gate_proj", "up_proj"]), (mlp, "down_proj", ["down_proj"]),
        ]  # fmt: skip
        for owner, name, parts in stacks:
            plain = [getattr(owner, part) for part in parts]
            weight = weight_of([linear.out_features for linear in plain], plain[0].in_features, number)
            values = expand(weight).float().split([linear.out_features for linear in plain])
            for linear, value in zip(plain, values, strict=True):
                linear.weight.data = value.to(linear.weight)
            if len(parts) > 1:
                setattr(owner, name, Nf4Linear(weight))
    return model


def assistant_of_gemma4_e(ordered: bool) -> Any:
    """An assistant whose layers read the keys of `gemma4_e`; ordered: its head looks at the tokens of 4 of 20 centroids."""
    from transformers import Gemma4AssistantConfig, Gemma4AssistantForCausalLM, Gemma4TextConfig

    text = Gemma4TextConfig(
        **SIZES | {"num_hidden_layers": 3, "hidden_size": 32, "tie_word_embeddings": True}, head_dim=16, global_head_dim=32,
        sliding_window=24, hidden_size_per_layer_input=0, vocab_size_per_layer_input=0, num_kv_shared_layers=3,
        layer_types=[SLIDING, SLIDING, FULL],
    )  # fmt: skip
    config = Gemma4AssistantConfig(
        text_config=text, backbone_hidden_size=SIZES["hidden_size"], use_ordered_embeddings=ordered, num_centroids=20,
        centroid_intermediate_top_k=4,
    )  # fmt: skip
    # transformers 5.23 cannot make one: its check of the sharing modes wants a layer with keys of its own
    with mock.patch.object(type(text), "kv_sharing_modes", ["reuse"] * 3):
        model = lively(Gemma4AssistantForCausalLM(config))
    if ordered:
        order = torch.randperm(VOCABULARY, generator=torch.Generator().manual_seed(2))
        model.masked_embedding.token_ordering.copy_(order)
    return model
