"""The model without its weights: what transformers would build from a config.json, on torch's meta device.

A checkpoint's header lists names and shapes; it does not say which of them are `nn.Linear` (bitsandbytes touches
nothing else), which are buffers, which belong to a vision tower. The class does. Built on the meta device it costs a
fraction of a second and no memory, whatever the model's size, and it is the very class that will load the result.

    config.json -> config class -> model on meta -> tensors (parameters + persistent buffers), convertible modules, ties

Names in the file are not always names in the model: transformers renames while loading (LLaVA before 4.52, Mixtral's
experts, Gemma 4 unified). We ask transformers' own renaming, so a plan speaks of the modules that a loader will see.

Catches. Config classes change the dicts they are given (Gemma 4's does): deepcopy first. Code from a repository is
never run: a model type that the installed transformers does not know is an error. `type(m) is nn.Linear`, not
`isinstance`: transformers >= 5.10 tests the exact type, so a subclass stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from halfbyte.errors import PlanError
from halfbyte.format.tensors import DTYPES, TensorInfo

if TYPE_CHECKING:
    import torch

#: what a bitsandbytes loader may turn into Linear4bit: exactly nn.Linear, a subclass of it (4.x only), GPT-2's Conv1D
CONVERTIBLE = ("linear", "linear_subclass", "conv1d")


@dataclass(frozen=True)
class ModelTensor:
    """One entry of the model's state dict: key, shape, safetensors dtype and what holds it.

    kind  `linear`, `linear_subclass` or `conv1d` for such a module's weight (its bias is a `parameter`), `embedding`,
          `convolution`, `buffer`, else `parameter`
    """

    key: str
    shape: tuple[int, ...]
    dtype: str
    kind: str

    @property
    def module(self) -> str:
        return self.key.rpartition(".")[0]


@dataclass(frozen=True)
class Skeleton:
    """A transformers model on the meta device, read once.

    model         the module itself (meta device; never run)
    model_type    as in config.json
    architecture  name of the model class
    auto_class    `AutoModelForImageTextToText` or `AutoModelForCausalLM`: what a user loads it with
    tensors       state-dict key -> ModelTensor, in the model's order
    tied          key -> the key whose tensor it shares (`lm_head.weight` -> `...embed_tokens.weight`)
    convertible   module path -> one of CONVERTIBLE, in the model's order
    keep_in_fp32  patterns that the model's class adds to every skip list
    """

    model: Any
    model_type: str
    architecture: str
    auto_class: str
    tensors: Mapping[str, ModelTensor]
    tied: Mapping[str, str]
    convertible: Mapping[str, str]
    keep_in_fp32: tuple[str, ...]

    @property
    def text_config(self) -> Any:
        """The decoder's part of the config (the config itself for a text-only model)."""
        return self.model.config.get_text_config(decoder=True)


def build_skeleton(config: Mapping[str, Any]) -> Skeleton:
    """Build the transformers model of a parsed config.json on the meta device.

    raises PlanError if the model type is unknown, has no language model head, or the config does not fit its class
    """
    import torch
    import transformers

    model_config = _model_config(config)
    auto_class = _auto_class(model_config)
    try:
        with torch.device("meta"):
            model = getattr(transformers, auto_class).from_config(
                model_config, dtype=_config_dtype(config), trust_remote_code=False
            )
    except Exception as error:
        raise PlanError(
            f"transformers cannot build this model: {type(error).__name__}: {error}",
            where=f"config.json, model_type {model_config.model_type!r}",
            todo="compare config.json with the published one",
        ) from error
    convertible = {name: kind for name, module in model.named_modules() if (kind := _convertible_kind(module))}
    tied = dict(getattr(model, "all_tied_weights_keys", None) or {})
    return Skeleton(
        model=model,
        model_type=str(model_config.model_type),
        architecture=type(model).__name__,
        auto_class=auto_class,
        tensors=_model_tensors(model),
        tied=tied,
        convertible=convertible,
        keep_in_fp32=tuple(sorted(getattr(model, "_keep_in_fp32_modules", None) or ())),
    )


def tensors_of(skeleton: Skeleton) -> list[TensorInfo]:
    """The tensors a checkpoint of this model holds, tied ones once: for a plan made from a bare config.json.

    Names are the model's own; `file` says `config.json` and `start` is 0, as there is no file yet.
    """
    return [
        TensorInfo(name=key, dtype=tensor.dtype, shape=tensor.shape, file="config.json", start=0)
        for key, tensor in skeleton.tensors.items()
        if key not in skeleton.tied
    ]


def model_names(skeleton: Skeleton, names: Iterable[str]) -> dict[str, tuple[str | None, bool]]:
    """Name in the file -> (state-dict key or None, converted), through transformers' own renaming.

    converted  True if loading does more than rename it: merges, splits or reorders (single experts -> fused experts)
    A name that transformers would rename to something the model lacks is tried as it stands; then it is unknown: None.
    """
    import transformers.core_model_loading as loading
    from transformers.conversion_mapping import get_model_conversion_mapping

    transforms = get_model_conversion_mapping(skeleton.model)
    renamings = [entry for entry in transforms if isinstance(entry, loading.WeightRenaming)]
    converters = [entry for entry in transforms if isinstance(entry, loading.WeightConverter)]
    state = dict.fromkeys(skeleton.tensors, True)
    prefix = skeleton.model.base_model_prefix
    found: dict[str, tuple[str | None, bool]] = {}
    for name in names:
        key, pattern = loading.rename_source_key(name, renamings, converters, prefix, state)
        if key not in state:
            key, pattern = loading.rename_source_key(name, [], [], prefix, state)
        found[name] = (key if key in state else None, pattern is not None)
    return found


def _model_config(config: Mapping[str, Any]) -> Any:
    """The config object, from a copy: Gemma 4's class changes the dicts it is given."""
    from transformers import CONFIG_MAPPING

    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        from importlib.metadata import version

        remote = " (it brings its own code, which halfbyte never runs)" if config.get("auto_map") else ""
        raise PlanError(
            f"transformers {version('transformers')} knows no model type {model_type!r}{remote}",
            where="config.json: model_type",
            todo="upgrade transformers, or check that config.json is the model's own",
        )
    plain = {key: value for key, value in config.items() if key != "auto_map"}
    try:
        return CONFIG_MAPPING[model_type].from_dict(deepcopy(plain))
    except Exception as error:
        raise PlanError(
            f"config does not fit model type {model_type!r}: {type(error).__name__}: {error}",
            where="config.json",
            todo="compare it with the published config.json",
        ) from error


def auto_class_of(config: Mapping[str, Any]) -> str:
    """`AutoModelForImageTextToText` or `AutoModelForCausalLM`, from a parsed config.json; raises PlanError for other models."""
    return _auto_class(_model_config(config))


def _auto_class(model_config: Any) -> str:
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    )

    if type(model_config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return "AutoModelForImageTextToText"
    if type(model_config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return "AutoModelForCausalLM"
    raise PlanError(
        f"transformers has no language model of type {model_config.model_type!r} (no class with a text head)",
        where="config.json: model_type",
        todo="halfbyte converts decoders (AutoModelForCausalLM) and image-text models (AutoModelForImageTextToText)",
    )


def _config_dtype(config: Mapping[str, Any]) -> torch.dtype:
    """The floating dtype a config names (old and new spelling), bfloat16 if it names none."""
    import torch

    for part in (config, config.get("text_config") or {}):
        for key in ("dtype", "torch_dtype"):
            found = getattr(torch, str(part.get(key)).removeprefix("torch."), None)
            if isinstance(found, torch.dtype) and found.is_floating_point:
                return found
    return torch.bfloat16


def _convertible_kind(module: Any) -> str | None:
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    if type(module) is nn.Linear:
        return "linear"
    if isinstance(module, nn.Linear):
        return "linear_subclass"
    return "conv1d" if isinstance(module, Conv1D) else None


def _model_tensors(model: Any) -> dict[str, ModelTensor]:
    """Every state-dict entry with what holds it. The state dict has the persistent buffers and not the others."""
    import torch

    spelling = {getattr(torch, attribute): name for name, (_, attribute) in DTYPES.items()}
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    found: dict[str, ModelTensor] = {}
    for key, value in model.state_dict().items():
        kind = _holder_kind(model, key) if key in parameters else "buffer"
        found[key] = ModelTensor(key, tuple(value.shape), spelling[value.dtype], kind)
    return found


def _holder_kind(model: Any, key: str) -> str:
    from torch import nn

    path, _, leaf = key.rpartition(".")
    module = model.get_submodule(path)
    if isinstance(module, nn.Embedding):
        return "embedding"
    if isinstance(module, nn.modules.conv._ConvNd):
        return "convolution"
    return (_convertible_kind(module) if leaf == "weight" else None) or "parameter"
