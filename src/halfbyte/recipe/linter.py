"""What each loader makes of a skip list: the same words, four readings.

`llm_int8_skip_modules` is written once and matched by everyone's own rule. Which modules become Linear4bit:

    transformers 4.x   unless the leaf name is listed, or an entry is the dotted name, or entry + "." is part of it
    early 5.x          unless an entry is an end of the name, or matches its start as a regex; nothing anchors the end
                       of that match: `layers.1` also hits `layers.11`
    installed          its own function, asked directly (5.23: as early 5.x, but ending at a module boundary)
    vLLM               unless an entry is a component, or a dotted prefix, of *vLLM's* name for the module

So `vision_tower` protects nothing in transformers 5 (`model.vision_tower...` does not start with it) and
`model.vision_tower` nothing in vLLM (whose name is `vision_tower...`). A loader that makes another set of modules 4-bit
than the file holds fills them with noise, or stops at a missing weight. All four must agree with the plan.

The catches. transformers adds the class's `_keep_in_fp32_modules` to any list. vLLM fuses q, k, v into `qkv_proj` and
gate, up into `gate_up_proj` before it asks: one part cannot be skipped alone. vLLM names modules as the *checkpoint*
does, so Gemma 4 12B's patch embedder is `vision_embedder` there. In transformers 5 an entry is a regular expression.

Sources: transformers 4.57.3, 5.0.0 and 5.10.2 (integrations/bitsandbytes.py, quantizers/quantizers_utils.py); vLLM's
bitsandbytes quantization (is_layer_skipped_bnb) and `hf_to_vllm_mapper` of its models, read, not run.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from importlib.metadata import version
from typing import Any

from halfbyte.errors import UsageError
from halfbyte.recipe.areas import Areas
from halfbyte.recipe.decisions import AREAS
from halfbyte.recipe.skeleton import CONVERTIBLE, Skeleton

#: loader -> how it is called in a table (`installed` gets its version)
LOADERS = {
    "transformers_4": "transformers 4.x",
    "transformers_5_early": "transformers 5.0-5.10",
    "transformers_installed": "transformers",
    "vllm": "vLLM bitsandbytes plug-in",
}
_FUSED = {
    "q_proj": "qkv_proj",
    "k_proj": "qkv_proj",
    "v_proj": "qkv_proj",
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
}
#: model type -> paths that the checkpoint, and with it vLLM, spells otherwise than transformers' modules
_CHECKPOINT_NAMES = {
    "gemma4_unified": {
        "model.embed_vision.multimodal_embedder": "model.embed_vision",
        "model.embed_vision": "model.vision_embedder",
    }
}
_SHOWN = 5


def lint(
    skip_modules: Sequence[str],
    skeleton: Skeleton,
    *,
    wanted: Collection[str] | None = None,
    areas: Areas | None = None,
) -> dict[str, Any]:
    """The matrix: what every loader makes of `skip_modules` on this model.

    wanted   module paths that are to be Linear4bit (the plan's); None: what the installed transformers makes 4-bit
    returns  loader -> {"label", "modules": count, "by_area": {area: count}, "agrees": bool,
             "extra": first modules it makes 4-bit and should not, "missing": first ones it should and does not}
    raises   UsageError if an entry is not a regular expression
    """
    areas = areas or Areas(skeleton)
    found = {loader: converted_by(loader, skip_modules, skeleton, areas) for loader in LOADERS}
    target = dict.fromkeys(found["transformers_installed"] if wanted is None else wanted)
    matrix: dict[str, Any] = {}
    for loader, modules in found.items():
        made = set(modules)
        extra = [name for name in modules if name not in target]
        missing = [name for name in target if name not in made]
        where = [areas.area_of(name) for name in modules]
        matrix[loader] = {
            "label": _label(loader),
            "modules": len(modules),
            "by_area": {area: where.count(area) for area in AREAS if area in where},
            "agrees": not extra and not missing,
            "extra": extra[:_SHOWN],
            "missing": missing[:_SHOWN],
        }
    return matrix


def converted_by(loader: str, skip_modules: Sequence[str], skeleton: Skeleton, areas: Areas) -> list[str]:
    """Modules that `loader` (a key of LOADERS) turns into Linear4bit, in the model's order."""
    check_patterns(skip_modules)
    if loader == "vllm":
        skips = vllm_rule(skip_modules)
        names = vllm_names(skeleton)
        return [name for name in skeleton.convertible if areas.area_of(name) != "head" and not skips(names[name])]
    rules = {"transformers_4": transformers_4_rule, "transformers_5_early": early_5_rule}
    skips = rules.get(loader, installed_rule)([*skip_modules, *skeleton.keep_in_fp32])
    # 4.x and 5.0 test isinstance(nn.Linear), 5.10 and later the exact type
    kinds = ("linear", "conv1d") if loader == "transformers_installed" else CONVERTIBLE
    return [name for name, kind in skeleton.convertible.items() if kind in kinds and not skips(name)]


def transformers_4_rule(skip_modules: Sequence[str]) -> Callable[[str], bool]:
    """Whether transformers 4.x leaves a module alone (4.57.3, _replace_with_bnb_linear)."""
    listed = set(skip_modules)

    def skips(name: str) -> bool:
        return name.rpartition(".")[2] in listed or any(key + "." in name or key == name for key in listed)

    return skips


def early_5_rule(skip_modules: Sequence[str]) -> Callable[[str], bool]:
    """Whether transformers 5.0.0 to 5.10.2 leave a module alone (should_convert_module); nothing anchors the end."""
    compiled = [(key, re.compile(f"{key}\\."), re.compile(key)) for key in skip_modules]

    def skips(name: str) -> bool:
        return any(dotted.match(name) or bare.match(name) or name.endswith(key) for key, dotted, bare in compiled)

    return skips


def installed_rule(skip_modules: Sequence[str]) -> Callable[[str], bool]:
    """Whether the installed transformers leaves a module alone: its own function, not our reading of it."""
    from transformers.quantizers.quantizers_utils import should_convert_module

    listed = list(skip_modules)
    return lambda name: not should_convert_module(name, listed)


def vllm_rule(skip_modules: Sequence[str]) -> Callable[[str], bool]:
    """Whether vLLM leaves a module alone; takes vLLM's own name for it (see vllm_names)."""
    listed = set(skip_modules)

    def skips(name: str) -> bool:
        parts = name.split(".")
        return any(part in listed for part in parts) or any(
            ".".join(parts[:end]) in listed for end in range(1, len(parts) + 1)
        )

    return skips


def vllm_names(skeleton: Skeleton) -> dict[str, str]:
    """Module path here -> vLLM's name of the module that holds it, fused parts under the fused name."""
    nested = is_nested(skeleton)
    renamed = _CHECKPOINT_NAMES.get(skeleton.model_type, {})
    names = {}
    for name in skeleton.convertible:
        old = next((path for path in renamed if name.startswith(path + ".")), None)
        names[name] = vllm_name(name if old is None else renamed[old] + name.removeprefix(old), nested)
    return names


def is_nested(skeleton: Skeleton) -> bool:
    """Whether the model holds its text model as `model.language_model`, beside towers and projectors."""
    return any(name.startswith("model.language_model.") for name in skeleton.convertible)


def vllm_name(path: str, nested: bool) -> str:
    """vLLM's spelling of one module path.

    nested  True for a model that holds its text model as `model.language_model` (Gemma 3 and 4, Qwen-VL, LLaVA): vLLM
            wraps a complete language model there and puts everything else at the top. Text-only names are unchanged.
    """
    if nested:
        if path == "lm_head" or path.startswith("lm_head."):
            path = "language_model." + path
        elif path == "model.language_model" or path.startswith("model.language_model."):
            path = "language_model.model" + path.removeprefix("model.language_model")
        else:
            path = path.removeprefix("model.")
    parent, dot, leaf = path.rpartition(".")
    return parent + dot + _FUSED.get(leaf, leaf)


def check_patterns(skip_modules: Sequence[str]) -> None:
    """Raises UsageError if an entry is empty or not a regular expression: transformers 5 would stop inside `re`."""
    for key in skip_modules:
        if not isinstance(key, str) or not key:
            raise UsageError(f"skip list entry {key!r} is not a module name", where="llm_int8_skip_modules")
        try:
            re.compile(f"(?:{key})")
            re.compile(key)
        except re.error as error:
            raise UsageError(
                f"skip list entry {key!r} is not a regular expression ({error}), and transformers 5 reads it as one",
                where="llm_int8_skip_modules",
                todo="write a module name, or escape special characters with a backslash",
            ) from None


def mark_of(row: Mapping[str, Any], matrix: Mapping[str, Any]) -> str:
    """What a table says beside one loader of the matrix; nothing beside one that agrees with the plan.

    A list written verbatim makes the plan whatever the installed transformers makes of it, so "the plan" would name the
    wrong side: the others differ from *that* reading.
    """
    if row["agrees"]:
        return ""
    installed = matrix["transformers_installed"]
    return f"differs from {installed['label']}" if installed["agrees"] else "differs from this plan"


def matrix_lines(matrix: dict[str, Any]) -> list[str]:
    """The matrix as lines of text, for the message of a disagreement."""
    lines = []
    for row in matrix.values():
        by_area = ", ".join(f"{count} {area}" for area, count in row["by_area"].items()) or "none"
        mark = mark_of(row, matrix)
        lines.append(
            f"{row['label']}: {row['modules']} modules in 4 bits ({by_area})" + (f"  <- {mark}" if mark else "")
        )
        lines += [f"    4-bit there, kept in the plan: {name}" for name in row["extra"][:2]]
        lines += [f"    kept there, nf4 in the plan:   {name}" for name in row["missing"][:2]]
    return lines


def _label(loader: str) -> str:
    return f"transformers {version('transformers')}" if loader == "transformers_installed" else LOADERS[loader]
