"""The shapes of the published Gemma 4 text models, and models of those shapes with random weights in NF4.

Nobody publishes 20 GB for a benchmark: what a step or a load costs depends on shapes, not on values. The skeleton is made with its linears
on meta, each is then filled with random codes and scales in bitsandbytes' own structures, on the device, so the memory needed is the model.
As in what `halfbyte quantize` writes by default, the linears of attention and MLP are NF4; embeddings, the head, and E4B's gates and projections
of per-layer inputs are bf16.

    31b    keys are values in full layers, 4 wide key heads there
    12b    the same with one key head (published as Gemma4Unified; its text layers are those of Gemma 4)
    e4b    per-layer inputs (an embedding of 5.6 GB that is only looked up in), the last 18 of 42 layers read the keys of others

The catch: random weights say random words. Anything that depends on the text (how many drafts are right) cannot be read off them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
from runtime.stored_weights import draw

SLIDING, FULL = "sliding_attention", "full_attention"
#: what all Gemma 4 have in common
COMMON: dict[str, Any] = {
    "head_dim": 256, "global_head_dim": 512, "vocab_size": 262144, "final_logit_softcapping": 30.0, "rms_norm_eps": 1e-6,
    "hidden_activation": "gelu_pytorch_tanh", "max_position_embeddings": 131072, "enable_moe_block": False, "pad_token_id": 0,
    "tie_word_embeddings": True, "attention_bias": False, "vocab_size_per_layer_input": 262144,
    "rope_parameters": {
        FULL: {"partial_rotary_factor": 0.25, "rope_theta": 1e6, "rope_type": "proportional"},
        SLIDING: {"rope_theta": 1e4, "rope_type": "default"},
    },
}  # fmt: skip
#: the sizes of the published text models; every sixth layer attends to everything
SHAPES: dict[str, dict[str, Any]] = {
    "31b": {
        "hidden_size": 5376, "intermediate_size": 21504, "num_hidden_layers": 60, "num_attention_heads": 32, "num_key_value_heads": 16,
        "num_global_key_value_heads": 4, "attention_k_eq_v": True, "sliding_window": 1024, "hidden_size_per_layer_input": 0,
    },
    "12b": {
        "hidden_size": 3840, "intermediate_size": 15360, "num_hidden_layers": 48, "num_attention_heads": 16, "num_key_value_heads": 8,
        "num_global_key_value_heads": 1, "attention_k_eq_v": True, "sliding_window": 1024, "hidden_size_per_layer_input": 0,
    },
    "e4b": {
        "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 42, "num_attention_heads": 8, "num_key_value_heads": 2,
        "attention_k_eq_v": False, "sliding_window": 512, "hidden_size_per_layer_input": 256, "num_kv_shared_layers": 18,
    },
}  # fmt: skip
#: what --tiny makes of them: every trait, a few MB
TINY: dict[str, Any] = {
    "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 64,
    "head_dim": 32, "global_head_dim": 64, "vocab_size": 2048, "vocab_size_per_layer_input": 2048, "max_position_embeddings": 4096,
}  # fmt: skip


def text_sizes(shape: str, tiny: bool = False, layers: int | None = None) -> dict[str, Any]:
    """Keys of a Gemma 4 text config, layer types among them; `layers` instead of the shape's own number."""
    sizes = COMMON | SHAPES[shape]
    if tiny:
        sizes |= TINY | {"num_hidden_layers": 6}
        if sizes["hidden_size_per_layer_input"]:
            sizes |= {"hidden_size_per_layer_input": 64, "num_hidden_layers": 12, "num_kv_shared_layers": 6}
        if "num_global_key_value_heads" in sizes:
            sizes["num_global_key_value_heads"] = 1
    if layers:
        sizes["num_hidden_layers"] = layers
    kinds = [SLIDING if (i + 1) % 6 else FULL for i in range(sizes["num_hidden_layers"])]
    kinds[-1] = FULL  # transformers insists on it
    return sizes | {"layer_types": kinds}


def text_config(shape: str, tiny: bool = False, file: Path | None = None) -> Any:
    """Gemma4TextConfig of a shape, or of a config.json (the file's own, or its text_config)."""
    from transformers import Gemma4TextConfig

    if file is not None:
        body = json.loads(file.read_text(encoding="utf-8"))
        return Gemma4TextConfig(**body.get("text_config", body))
    return Gemma4TextConfig(**text_sizes(shape, tiny))


@contextmanager
def linears_on_meta() -> Iterator[None]:
    """nn.Linear without memory, everything else where it belongs."""
    init = torch.nn.Linear.__init__

    def without_memory(self: Any, i: int, o: int, bias: bool = True, device: Any = None, dtype: Any = None) -> None:
        init(self, i, o, bias, "meta", dtype)

    torch.nn.Linear.__init__ = without_memory  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.nn.Linear.__init__ = init  # type: ignore[method-assign]


def build(config: Any, device: str) -> Any:
    """The model on `device`, in bf16, linears of attention and MLP random NF4 of bitsandbytes; lm_head stays tied to the embedding."""
    from bitsandbytes.nn import Linear4bit, Params4bit
    from transformers import Gemma4ForCausalLM

    with linears_on_meta(), torch.device(device):
        model = Gemma4ForCausalLM._from_config(config, dtype=torch.bfloat16)
    model.tie_weights()
    for number, (name, linear) in enumerate([*model.model.named_modules()]):
        if not isinstance(linear, torch.nn.Linear):
            continue
        owner, _, child = name.rpartition(".")
        if not owner.endswith((".self_attn", ".mlp")):  # E4B's gates and projections of per-layer inputs
            linear.to_empty(device=device)
            with torch.no_grad():
                linear.weight.normal_(0, linear.in_features**-0.5)
            continue
        new = Linear4bit(
            linear.in_features, linear.out_features, linear.bias is not None, torch.bfloat16, True, "nf4", device="meta"
        )
        tensors = draw(linear.out_features, linear.in_features, number, device=device).to_dict()
        packed = tensors.pop("weight")
        new.weight = Params4bit.from_prequantized(packed, tensors, device=device, module=new)
        new.support_avx512bf16_for_cpu = False  # on a CPU its first call would reorder the bytes for good
        setattr(model.model.get_submodule(owner), child, new)
    left = [name for name, tensor in model.named_parameters() if tensor.is_meta]
    assert not left, left
    model.generation_config.eos_token_id = None  # random weights must not end early
    return model.eval()


def bytes_a_token(model: Any) -> int:
    """Bytes of weights that a decoding step reads; of tables that are looked up in, nothing; of experts, all (too many)."""
    looked_up = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    looked_up -= {id(model.lm_head.weight)}
    found = sum(p.nbytes for p in model.parameters() if id(p) not in looked_up)
    for module in model.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None:
            found += state.absmax.nbytes + state.state2.absmax.nbytes
    return found
