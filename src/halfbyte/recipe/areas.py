"""Where in a model a module lives: decoder, vision, audio, projector, embeddings, head or other.

"Quantize the decoder" needs to know where the decoder ends. Names alone are a poor guide (`embed_tokens` may sit in a
tower, `visual` is a tower), and structure alone is too (a projector is just a module). So, in this order:

    1. the module transformers calls the output embedding                      -> head
    2. sub-models whose config is the config's vision or audio part            -> vision, audio
    3. below the text model: nn.Embedding -> embeddings, everything else       -> decoder
    4. outside it: a known name in the path (`vision_tower`, `embed_audio`...) -> vision, audio, projector
    5. what is left (a newline embedding on the model itself)                  -> other

The catch: a model with no separate text model (every text-only one) has its whole base model as decoder, so there names
are asked before "below the text model" is; Qwen-VL's `visual.merger` belongs to the tower that holds it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from halfbyte.recipe.skeleton import Skeleton

_NAMES = {
    "vision": {"vision_tower", "vision_model", "vision_encoder", "visual", "image_encoder", "vision_backbone"},
    "audio": {"audio_tower", "audio_model", "audio_encoder", "speech_encoder"},
    "projector": {
        "multi_modal_projector", "mm_projector", "embed_vision", "embed_audio", "vision_embedder", "connector",
        "aligner", "merger", "modality_projection", "image_projection", "vision_projection", "audio_projection",
    },
}  # fmt: skip


class Areas:
    """Answers `area_of(module path)` for one model."""

    def __init__(self, skeleton: Skeleton) -> None:
        from torch import nn

        model = skeleton.model
        self._head = _path_of(model, model.get_output_embeddings())
        self._text = _text_root(model)
        self._text_is_base = self._text in ("", model.base_model_prefix)
        self._towers = dict(_towers(model))
        self._embeddings = {name for name, module in model.named_modules() if isinstance(module, nn.Embedding)}

    def area_of(self, module: str) -> str:
        """The area of a module path (one of `decisions.AREAS`)."""
        if self._head is not None and _below(module, self._head):
            return "head"
        for root, area in self._towers.items():
            if _below(module, root):
                return area
        in_text = _below(module, self._text)
        if in_text and not self._text_is_base:
            return self._area_in_text(module)
        parts = set(module.split("."))
        named = next((area for area, names in _NAMES.items() if parts & names), None)
        if named is not None:
            return named
        return self._area_in_text(module) if in_text else "other"

    def _area_in_text(self, module: str) -> str:
        return "embeddings" if module in self._embeddings else "decoder"

    @property
    def text_root(self) -> str:
        """Module path of the text model (`model.language_model`, `model`, `transformer`)."""
        return self._text

    @property
    def head(self) -> str | None:
        """Module path of the output embedding, None if the model has none."""
        return self._head


def _below(module: str, root: str) -> bool:
    return root == "" or module == root or module.startswith(root + ".")


def _path_of(model: Any, wanted: Any) -> str | None:
    if wanted is None:
        return None
    return next((name for name, module in model.named_modules() if module is wanted), None)


def _text_root(model: Any) -> str:
    """The text model: what transformers calls the decoder, else the base model."""
    find = getattr(model, "get_decoder", None)
    path = _path_of(model, find()) if find is not None else None
    return path if path else str(model.base_model_prefix)


def _towers(model: Any) -> Iterator[tuple[str, str]]:
    """(path, area) of the topmost sub-models whose config is the vision or the audio part of the model's config."""
    from transformers import PreTrainedModel

    wanted: dict[str, str] = {}
    for area in ("vision", "audio"):
        part: Any = getattr(model.config, f"{area}_config", None)
        if getattr(part, "model_type", None):
            wanted[part.model_type] = area
    found: list[str] = []
    for name, module in model.named_modules():
        if not name or not isinstance(module, PreTrainedModel) or any(_below(name, root) for root in found):
            continue
        if module.config.model_type in wanted:
            found.append(name)
            yield name, wanted[module.config.model_type]
