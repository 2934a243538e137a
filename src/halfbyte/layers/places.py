"""Where each tensor of a model's text part comes from: state-dict keys -> tensors of a `Weights`, checked before one is read.

transformers renames while loading, ties weights, and has towers that a text scorer does not need. All that is settled here
from names and shapes alone; what is missing or misshapen is an error before the first byte of weights is read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from halfbyte.errors import PlanError, SourceError
from halfbyte.layers.weights import Weights
from halfbyte.recipe.areas import Areas
from halfbyte.recipe.skeleton import Skeleton, model_names

if TYPE_CHECKING:
    import torch

_TEXT = ("decoder", "embeddings", "head", "other")


class Places:
    """The tensors that the text decoder and the head of one model need.

    towers  all else's too
    keys    state-dict keys with a tensor of their own, in the model's order
    tied    key -> the key in `keys` whose tensor it shares
    raises  SourceError (missing, another shape), PlanError (transformers would merge or split a tensor while loading)
    """

    def __init__(self, weights: Weights, skeleton: Skeleton, model: Any, *, towers: bool = False) -> None:
        areas = Areas(skeleton)
        wanted = {key for key in skeleton.tensors if towers or areas.area_of(key.rpartition(".")[0]) in _TEXT}
        self.weights = weights
        self._kinds = model.state_dict()
        self._names: dict[str, str] = {}
        for name, (key, converted) in model_names(skeleton, weights.names()).items():
            if key is None or key not in wanted or key in skeleton.tied:
                continue
            self._check(name, key, converted)
            self._names[key] = name
        self.keys = [key for key in skeleton.tensors if key in self._names]
        self.tied = {key: of for key, of in skeleton.tied.items() if key in wanted and of in self._names}
        if missing := sorted(wanted - self._names.keys() - self.tied.keys()):
            raise SourceError(
                f"{len(missing)} tensors of the model are not there, first {missing[0]}",
                where=weights.label,
                todo="the checkpoint is incomplete, or of another model than config.json says",
            )

    def _check(self, name: str, key: str, converted: bool) -> None:
        where = f"{self.weights.label}: tensor {name}"
        if converted:
            raise PlanError(
                "transformers merges or splits this tensor while loading; the scorer does not",
                where=where,
                todo="convert the checkpoint with transformers' save_pretrained first",
            )
        there, wanted = list(self.weights.shape(name)), list(self._kinds[key].shape)
        if there != wanted:
            raise SourceError(
                f"has shape {there}, the model wants {wanted}",
                where=where,
                todo="config.json and weights belong to different models",
            )

    def load(self, key: str, device: str) -> torch.Tensor:
        """The tensor for `key` in the model's dtype, on `device`."""
        return self._cast(self.weights.load(self._names[key], device), key)

    def load_stored(self, key: str, device: str) -> torch.Tensor:
        """As `load`, but in the stored dtype if that is the narrower one: the same values in less memory."""
        tensor = self.weights.load(self._names[key], device)
        return tensor if tensor.dtype.itemsize < self._kinds[key].dtype.itemsize else self._cast(tensor, key)

    def load_rows(self, key: str, begin: int, end: int) -> torch.Tensor:
        """Rows [begin, end) of the tensor for `key`, as far as there are any, in the model's dtype, on the CPU."""
        return self._cast(self.weights.load_rows(self._names[key], begin, min(end, self.shape(key)[0])), key)

    def name(self, key: str) -> str:
        """The name in the files of the tensor for `key`, which has one of its own."""
        return self._names[key]

    def holder(self, key: str) -> str | None:
        """The key whose tensor `key` uses: itself, or the one it is tied to; None if the model's text part has no such key."""
        return key if key in self._names else self.tied.get(key)

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._kinds[key].shape)

    def nbytes(self, key: str) -> int:
        """Bytes of the tensor in the model's dtype."""
        kind = self._kinds[key]
        return int(kind.numel()) * int(kind.dtype.itemsize)

    def _cast(self, tensor: torch.Tensor, key: str) -> torch.Tensor:
        return tensor.to(self._kinds[key].dtype)
