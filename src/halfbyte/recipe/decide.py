"""Every tensor's decision: `nf4` or `keep`, with the clause that a person reads beside it.

What bitsandbytes can hold is asked first, for it is not a matter of taste: only the 2-d floating weight of a module
that is exactly `nn.Linear` becomes a Linear4bit weight when the checkpoint is loaded. Then the recipe is asked.

    unknown to the model, bias, norm, buffer, embedding, head      -> keep, whatever the recipe says
    convolution, Conv1D (GPT-2), fused 3-d experts                 -> keep, whatever the recipe says
    linear weight that the preset lists (by area or module)        -> keep, for the preset's reason
    linear weight otherwise                                        -> nf4

The catch: buffers. Gemma 4 multiplies `layer_scalar`, a persistent buffer of shape [1], into the residual of every
layer; a converter that walks parameters loses 60 of them without a word. The state dict is walked, not the parameters.
"""

from __future__ import annotations

from collections.abc import Callable

from halfbyte.errors import PlanError, ShapeMismatch
from halfbyte.format.tensors import TensorInfo
from halfbyte.recipe.areas import Areas
from halfbyte.recipe.decisions import Action, Decision
from halfbyte.recipe.linter import installed_rule
from halfbyte.recipe.preset import Preset
from halfbyte.recipe.skeleton import ModelTensor, Skeleton

#: dtypes that NF4 is made from
FLOATING = ("BF16", "F16", "F32")
_WHY_KEPT = {
    "embedding": "embedding stays as it is: rows are looked up, not multiplied",
    "convolution": "convolution: bitsandbytes quantizes linear layers only",
    "conv1d": "Conv1D (not nn.Linear) holds its weight transposed: stays as it is",
    "linear_subclass": "a subclass of nn.Linear: transformers does not make it 4-bit",
    "buffer": "buffer of the model, carried byte for byte",
    "fused_experts": "fused experts: bitsandbytes does not touch them (not nn.Linear)",
}


def decide_all(
    tensors: list[TensorInfo],
    names: dict[str, tuple[str | None, bool]],
    skeleton: Skeleton,
    areas: Areas,
    preset: Preset,
) -> list[Decision]:
    """One decision per source tensor, in the source's order.

    names   name in the source -> (state-dict key or None, converted on loading), from skeleton.model_names
    raises  PlanError if two names load into one tensor or a decoder linear cannot be written; ShapeMismatch if a shape
            is not the model's
    """
    _one_name_each(names)
    keeps = _recipe(skeleton, areas, preset)
    return [_decide(info, *names[info.name], skeleton, areas, keeps) for info in tensors]


def kind_of(tensor: ModelTensor, area: str) -> str:
    """What holds a tensor: as ModelTensor.kind, with the decoder's 3-d parameters told apart as `fused_experts`."""
    if tensor.kind == "parameter" and area == "decoder" and len(tensor.shape) == 3:
        return "fused_experts"
    return tensor.kind


def _recipe(skeleton: Skeleton, areas: Areas, preset: Preset) -> Callable[[str], str | None]:
    """Module path of a linear -> why the recipe keeps it, None if it goes to NF4."""
    if preset.skip_modules is not None:
        verbatim = installed_rule([*preset.skip_modules, *skeleton.keep_in_fp32])
        whys = {entry: (installed_rule([entry]), why) for entry, why in preset.skip_modules.items()}

        def keeps_listed(module: str) -> str | None:
            if not verbatim(module):
                return None
            hit = next((f"listed as {entry!r}: {why}" for entry, (skips, why) in whys.items() if skips(module)), None)
            return hit or "transformers keeps it in float32"

        return keeps_listed

    in_fp32 = installed_rule(skeleton.keep_in_fp32)

    def keeps(module: str) -> str | None:
        area = areas.area_of(module)
        if area == "head":
            return "output head stays as it is: it decides every token's probabilities"
        if in_fp32(module):
            return "transformers keeps it in float32"
        return preset.keep_reason(module, area)

    return keeps


def _decide(
    info: TensorInfo,
    key: str | None,
    converted: bool,
    skeleton: Skeleton,
    areas: Areas,
    keeps: Callable[[str], str | None],
) -> Decision:
    if key is None:
        reason = "not in the model that transformers builds: carried byte for byte"
        return Decision(info.name, info.dtype, info.shape, "keep", reason, "other", "unknown", None)
    tensor = skeleton.tensors[key]
    area = areas.area_of(tensor.module)
    kind = kind_of(tensor, area)
    if not converted and info.shape != tensor.shape:
        raise ShapeMismatch(
            f"{info.name} is {list(info.shape)}, the model of config.json has {list(tensor.shape)} there",
            where=info.file,
            todo="check that config.json belongs to these weights",
        )
    action, reason = _action(info, kind, area, tensor, keeps)
    if action == "nf4" and (converted or info.dtype not in FLOATING):
        what = "is merged or split while loading (an older layout)" if converted else f"has dtype {info.dtype}"
        raise PlanError(
            f"{info.name} {what}, and loaders expect {tensor.module} in 4 bits",
            where=info.file,
            todo="save the model once with save_pretrained in bfloat16, and convert that",
        )
    shown = "parameter" if kind in ("convolution", "linear_subclass") else kind
    return Decision(info.name, info.dtype, info.shape, action, reason, area, shown, tensor.module)


def _action(
    info: TensorInfo, kind: str, area: str, tensor: ModelTensor, keeps: Callable[[str], str | None]
) -> tuple[Action, str]:
    if kind == "linear" and len(tensor.shape) == 2:
        why = keeps(tensor.module)
        return ("keep", why) if why else ("nf4", f"linear of the {area}" if area != "other" else "linear")
    leaf = tensor.key.rpartition(".")[2]
    if kind == "parameter":
        return "keep", "bias" if leaf == "bias" else ("norm or scale" if len(info.shape) <= 1 else "not a linear layer")
    return "keep", _WHY_KEPT[kind]


def _one_name_each(names: dict[str, tuple[str | None, bool]]) -> None:
    """Two source tensors that load into one parameter: one would silently win."""
    first: dict[str, str] = {}
    for name, (key, converted) in names.items():
        if key is None or converted:
            continue
        if key in first:
            raise PlanError(
                f"{first[key]!r} and {name!r} both load into {key!r}",
                where="tensor names",
                todo="remove one of them from the source",
            )
        first[key] = name
