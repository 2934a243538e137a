"""Weights that are in no file: drawn from a seed in the shapes of a config, and a count of what was read of them."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from halfbyte.demo.tiny_gemma4 import gemma4_config
from halfbyte.recipe.skeleton import build_skeleton

SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 160, "dtype": "bfloat16",
}  # fmt: skip


class DrawnWeights:
    """Implements Weights. `read` counts tensors read whole, `rows_read` rows read one by one; `changes` replaces tensors."""

    def __init__(self, config: dict[str, Any], label: str = "drawn", *, seed: int = 0) -> None:
        self.config, self.label, self.seed = config, label, seed
        skeleton = build_skeleton(config)
        self._shapes = {key: t.shape for key, t in skeleton.tensors.items() if key not in skeleton.tied}
        self.changes: dict[str, torch.Tensor] = {}
        self.read: Counter[str] = Counter()
        self.rows_read: Counter[str] = Counter()

    @property
    def digest(self) -> str:
        return f"drawn:{self.label}:{self.seed}"

    def names(self) -> list[str]:
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def load(self, name: str, device: str = "cpu") -> torch.Tensor:
        self.read[name] += 1
        return self._draw(name).to(device)

    def load_rows(self, name: str, begin: int, end: int, device: str = "cpu") -> torch.Tensor:
        self.rows_read[name] += end - begin
        return self._draw(name)[begin:end].to(device)

    def companions_folder(self) -> Path:
        raise NotImplementedError

    def close(self) -> None:
        pass

    def _draw(self, name: str) -> torch.Tensor:
        if name in self.changes:
            return self.changes[name]
        shape = self._shapes[name]
        own = int.from_bytes(hashlib.sha256(f"{self.seed}/{name}".encode()).digest()[:6], "little")
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(own))
        if name.endswith("layer_scalar"):
            noise = 0.6 + 0.1 * noise.clamp(-2, 2)
        elif "norm" in name:
            noise = 1 + 0.1 * noise
        elif len(shape) > 1:
            noise = noise / math.sqrt(shape[-1])
        return noise.bfloat16()


class WideWeights(DrawnWeights):
    """Of any size at no cost: one random piece, repeated to every shape."""

    piece = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)).bfloat16() / 32

    def _draw(self, name: str) -> torch.Tensor:
        size = torch.Size(self.shape(name))
        return self.piece.repeat(-(-size.numel() // len(self.piece)))[: size.numel()].view(size)


def gemma4_e_config(*, shared: int = 3) -> dict[str, Any]:
    """Gemma 4 E2B in small: per-layer inputs, the last `shared` of 7 layers without keys and values of their own, wide MLPs there."""
    config = gemma4_config(1024, 7, False)
    kinds = ["sliding_attention"] * 2 + ["full_attention"] + ["sliding_attention"] * 3 + ["full_attention"]
    config["text_config"] |= {
        "attention_k_eq_v": False, "hidden_size": 96, "hidden_size_per_layer_input": 16, "layer_types": kinds,
        "num_global_key_value_heads": None, "num_kv_shared_layers": shared, "num_key_value_heads": 1,
        "sliding_window": 16, "use_bidirectional_attention": None, "use_double_wide_mlp": True,
    }  # fmt: skip
    return config


def config_of(family: str) -> dict[str, Any]:
    """A small config of a family, by the name of its model type (`gemma4_e` for E2B and E4B)."""
    if family == "gemma4_e":
        return gemma4_e_config()
    if family == "gemma4":
        config = gemma4_config(1024, 6, False)
        config["text_config"]["sliding_window"] = 16
        return config
    if family == "gemma3_text":
        kinds = ["sliding_attention", "full_attention", "sliding_attention"]
        more = {"layer_types": kinds, "sliding_window": 16, "query_pre_attn_scalar": 16, "tie_word_embeddings": True}
        return {"model_type": family, **SIZES, **more}
    return {"model_type": family, **SIZES, "tie_word_embeddings": family == "qwen3"}
