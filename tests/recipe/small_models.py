"""Small configs of many architectures: a plan needs no weights, so a few numbers are a model."""

from __future__ import annotations

from typing import Any

from halfbyte.recipe.areas import Areas
from halfbyte.recipe.decisions import Plan
from halfbyte.recipe.plan import make_plan
from halfbyte.recipe.skeleton import Skeleton, build_skeleton

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 12,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TOWER = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}


def text_model(model_type: str, **changes: Any) -> dict[str, Any]:
    return {"model_type": model_type, **SMALL, **changes}


def llama(**changes: Any) -> dict[str, Any]:
    return text_model("llama", **changes)


def mixtral() -> dict[str, Any]:
    return text_model("mixtral", num_local_experts=2, num_hidden_layers=1)


def qwen2_moe() -> dict[str, Any]:
    sizes = {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 32}
    return text_model("qwen2_moe", num_experts=4, **sizes)


def gpt2() -> dict[str, Any]:
    ids = {"bos_token_id": 1, "eos_token_id": 2}
    return {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 128, **ids}


def llava() -> dict[str, Any]:
    return {
        "model_type": "llava",
        "text_config": llama(),
        "vision_config": {"model_type": "clip_vision_model", **TOWER},
    }


def qwen2_vl() -> dict[str, Any]:
    vision = {"depth": 2, "embed_dim": 64, "hidden_size": 64, "num_heads": 4}
    return {"model_type": "qwen2_vl", "text_config": dict(SMALL), "vision_config": vision}


def skeleton_of(config: dict[str, Any]) -> tuple[Skeleton, Areas]:
    skeleton = build_skeleton(config)
    return skeleton, Areas(skeleton)


def nf4_modules(plan: Plan) -> list[str]:
    return [d.module or "" for d in plan.decisions if d.action == "nf4"]


def counts(plan: Plan) -> dict[str, int]:
    """Loader -> modules it makes 4-bit."""
    return {loader: row["modules"] for loader, row in plan.loaders.items()}


def plan_of(config: dict[str, Any], **options: Any) -> Plan:
    return make_plan(config, None, **options)
