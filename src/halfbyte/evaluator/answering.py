"""A model that answers, image path and all, with the weights of any candidate.

Scoring needs only the decoder; answering needs the whole model and its processor. It is built once by stock transformers from
the reference's own folder, and then given each candidate's weights in turn: NF4 expanded to what a loader computes with, a
grid, another checkpoint of the same architecture. So every candidate answers through one and the same arithmetic (float32 by
default: batches then do not change answers), and what differs is the weights alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from halfbyte.errors import ShapeMismatch, SourceError
from halfbyte.evaluator.weights import Weights


class Answerer:
    """A transformers model and processor, whose weights can be exchanged.

    folder  bf16 checkpoint folder of the reference
    dtype   `float32` or `bfloat16`
    """

    def __init__(self, folder: Path, *, device: str = "cpu", dtype: str = "float32") -> None:
        import torch
        import transformers

        from halfbyte.format.checkpoint import read_config
        from halfbyte.recipe.skeleton import auto_class_of, build_skeleton

        config = read_config(folder)
        local = {"local_files_only": True, "trust_remote_code": False}
        try:
            loader = getattr(transformers, auto_class_of(config))
            model = loader.from_pretrained(folder, dtype=getattr(torch, dtype), **local)
            sees = any(folder.glob("*processor_config.json"))
            self.processor: Any = (transformers.AutoProcessor if sees else transformers.AutoTokenizer).from_pretrained(
                folder, **local
            )
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise SourceError(f"transformers cannot load it: {error}", where=str(folder)) from error
        self.model = model.to(device).eval()
        self.device = device
        self._skeleton = build_skeleton(config)

    def wear(self, weights: Weights) -> None:
        """Give the model these weights (in place), every tensor of them.

        raises  ShapeMismatch if a tensor is missing or has another shape: they belong to another architecture
        """
        import torch

        from halfbyte.recipe.skeleton import model_names

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
