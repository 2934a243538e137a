"""config.json of the output: the source's own, key for key, plus one: `quantization_config`.

Writing back what transformers parsed would be wrong: 5.23 rewrites Gemma 4's config on save (`global_head_dim` becomes
`per_layer_config`, the vision rope type becomes `axial`) and 5.10 cannot load the result. The block itself is spelled
by the installed transformers (`BitsAndBytesConfig.to_dict`), so it is what stock `save_pretrained` would write.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from halfbyte.errors import SourceError


def quantization_config(skip_modules: Sequence[str]) -> dict[str, Any]:
    """The `quantization_config` block: nf4, double quantization, bf16 compute, uint8 storage, this skip list."""
    import torch
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_quant_storage=torch.uint8,
        llm_int8_skip_modules=list(skip_modules),
    )
    body = {key: getattr(value, "value", value) for key, value in config.to_dict().items()}
    return dict(sorted(body.items()))


def check_unquantized(config: dict[str, Any], where: str) -> None:
    """Raises SourceError if the checkpoint is quantized already: its weights are no longer the model's own."""
    block = config.get("quantization_config") or (config.get("text_config") or {}).get("quantization_config")
    if block:
        method = block.get("quant_method", "?") if isinstance(block, dict) else "?"
        raise SourceError(
            f"already quantized ({method})", where=where, todo="start from the bf16 checkpoint it was made from"
        )


def config_json(source_config: dict[str, Any], skip_modules: Sequence[str]) -> str:
    """Text of the output's config.json: the source's keys in their order, then `quantization_config`."""
    body = {**source_config, "quantization_config": quantization_config(skip_modules)}
    return json.dumps(body, indent=2, ensure_ascii=False) + "\n"
