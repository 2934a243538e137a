"""A model that answers, image path and all, with the weights of any candidate.

Scoring needs only the decoder; answering needs the whole model and its processor. It is built once by stock transformers from
the reference's own folder, and then given each candidate's weights in turn: NF4 expanded to what a loader computes with, a
grid, another checkpoint of the same architecture. So every candidate answers through one and the same arithmetic (float32 by
default: batches then do not change answers), and what differs is the weights alone.

A reference that is no plain folder (a GGUF file, a folder in NF4) has nothing that stock transformers would load: its model is built
empty from its config, on the device, and wears the reference's weights like any others.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from halfbyte.errors import ShapeMismatch, SourceError
from halfbyte.layers.weights import PlainWeights, Weights


def takes_images(weights: Weights) -> bool:
    """Whether the model comes with a processor that shows it images."""
    return _has_processor(weights.companions_folder())


class Answerer:
    """A transformers model and processor, whose weights can be exchanged.

    reference  bf16 checkpoint folder, or opened weights of any kind
    dtype      `float32` or `bfloat16`
    raises     SourceError if transformers cannot load model or processor
    """

    def __init__(self, reference: Path | Weights, *, device: str = "cpu", dtype: str = "float32") -> None:
        from halfbyte.format.checkpoint import read_config
        from halfbyte.recipe.skeleton import auto_class_of, build_skeleton

        weights = None if isinstance(reference, Path) else reference
        folder = reference if isinstance(reference, Path) else reference.companions_folder()
        config = read_config(folder) if weights is None else weights.config
        self.device = device
        self._worn: str | None = None
        self._skeleton = build_skeleton(config)
        self.processor: Any = _processor(folder)
        if weights is None or _is_folder(weights):
            self.model = _loaded(folder, auto_class_of(config), dtype).to(device).eval()
            self._worn = None if weights is None else weights.digest
        else:
            self.model = _empty(self._skeleton, dtype, device)
            self.wear(weights)
        if weights is not None:
            self._stop_as_traces_do(weights)

    def wear(self, weights: Weights) -> None:
        """Give the model these weights (in place), every tensor of them.

        raises  ShapeMismatch if a tensor is missing or has another shape: they belong to another architecture
        """
        import torch

        from halfbyte.recipe.skeleton import model_names

        if self._worn == weights.digest:
            return
        self._worn = None  # half of one and half of the other, if this fails
        state = self.model.state_dict()
        names = {name: key for name, (key, _) in model_names(self._skeleton, weights.names()).items() if key}
        tied = {key for key, same in self._skeleton.tied.items() if same in names.values()}
        missing = [key for key in state if key not in names.values() and key not in tied]
        if missing:
            raise ShapeMismatch(f"has no {missing[0]} ({len(missing)} missing)", where=weights.label)
        with torch.no_grad():
            for name, key in names.items():
                tensor = weights.load(name, self.device)
                if tensor.shape != state[key].shape:
                    raise ShapeMismatch(f"{list(tensor.shape)} where {list(state[key].shape)} belongs", where=name)
                state[key].copy_(tensor)
        self._worn = weights.digest

    def _stop_as_traces_do(self, weights: Weights) -> None:
        """End answers at the tokens at which the answers of kld[assistant,on-policy] end."""
        from halfbyte.texts.traces import stop_ids

        tokenizer = getattr(self.processor, "tokenizer", self.processor)
        self.model.generation_config.eos_token_id = stop_ids(weights, tokenizer) or None


def _is_folder(weights: Weights) -> bool:
    return type(weights) is PlainWeights and weights.source.kind == "safetensors"


def _has_processor(folder: Path) -> bool:
    return any(folder.glob("*processor_config.json"))


def _processor(folder: Path) -> Any:
    import transformers

    loader = transformers.AutoProcessor if _has_processor(folder) else transformers.AutoTokenizer
    return _load(loader, folder)


def _loaded(folder: Path, auto_class: str, dtype: str) -> Any:
    import torch
    import transformers

    return _load(getattr(transformers, auto_class), folder, dtype=getattr(torch, dtype))


def _load(loader: Any, folder: Path, **options: Any) -> Any:
    try:
        return loader.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **options)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise SourceError(f"transformers cannot load it: {error}", where=str(folder)) from error


def _empty(skeleton: Any, dtype: str, device: str) -> Any:
    """The model with room for every tensor, tied ones sharing it; only its tables (rope, embedding scales) have values."""
    import torch

    from halfbyte.layers.model import build_module, move_buffers

    model = build_module(skeleton, dtype, "sdpa")
    state = {key: torch.empty_like(value, device=device) for key, value in model.state_dict().items()}
    state |= {key: state[same] for key, same in skeleton.tied.items()}
    model.load_state_dict(state, strict=False, assign=True)
    move_buffers(model, device)
    return model.requires_grad_(False).eval()
