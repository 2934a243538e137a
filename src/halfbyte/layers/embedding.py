"""Token embeddings of which only the rows in use are in memory.

The embedding is the largest tensor of a model (a 31B: 262,144 x 5,376, 2.6 GiB in bf16; E2B's per-layer embedding: 4.4 GiB), and
30k tokens use a few thousand of its rows. So: read it slice by slice, keep the rows whose tokens occur, and translate ids
to places in that small table in front of the module. Its own forward (Gemma's scale in the weight's dtype) runs unchanged.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from halfbyte.errors import PlanError, ShapeMismatch
from halfbyte.layers.places import Places
from halfbyte.layers.rows import Batch

if TYPE_CHECKING:
    import torch

#: bytes of an embedding that exist at a time while rows are gathered from it
SLICE_BYTES = 64 << 20


class TokenEmbeddings:
    """The modules of a decoder that are asked with token ids: those with as many rows as its input embedding.

    keys  their weights' state-dict keys
    """

    def __init__(self, model: Any, decoder: Any, places: Places) -> None:
        from torch import nn

        rows = decoder.get_input_embeddings().num_embeddings
        self.places = places
        self._pad = getattr(decoder.config, "pad_token_id", None)
        self._modules: dict[str, Any] = {}
        for path, module in model.named_modules():
            key = places.holder(f"{path}.weight")
            if isinstance(module, nn.Embedding) and module.num_embeddings == rows and key is not None:
                self._modules[key] = module
                module.padding_idx = None  # torch checks it against the table's size, and uses it for gradients only

    @property
    def keys(self) -> list[str]:
        return list(self._modules)

    @contextmanager
    def gathered(self, batches: Sequence[Batch], device: str) -> Iterator[None]:
        """The modules answer for every token in `batches`, inside; empty again after.

        raises ShapeMismatch if a token is not in the vocabulary
        """
        import torch
        from torch import nn

        used = torch.cat([torch.from_numpy(batch.tokens).unique() for batch in batches]).unique()
        if self._pad is not None and self._pad >= 0:  # image-text models put it in place of images
            used = torch.cat([used, used.new_tensor([self._pad])]).unique()
        with ExitStack() as stack:
            for key, module in self._modules.items():
                empty = module.weight
                table = self._gather(key, used).to(device)
                module.weight = nn.Parameter(table, requires_grad=False)
                stack.callback(setattr, module, "weight", empty)
                hook = module.register_forward_pre_hook(_translate(used.to(device)))
                stack.callback(hook.remove)
            yield

    def _gather(self, key: str, used: torch.Tensor) -> torch.Tensor:
        import torch

        rows, _ = self.places.shape(key)
        if int(used[0]) < 0 or int(used[-1]) >= rows:
            raise ShapeMismatch(
                f"token {int(used[-1])} in a vocabulary of {rows}", where=key, todo="rows and model belong together"
            )
        step = max(1, SLICE_BYTES * rows // self.places.nbytes(key))
        found = []
        for begin in range(0, rows, step):
            inside = used[(used >= begin) & (used < begin + step)]
            if len(inside):
                found.append(self.places.load_rows(key, begin, begin + step)[inside - begin])
        return torch.cat(found)


def _translate(used: torch.Tensor) -> Any:
    """A forward hook that turns token ids into places in the sorted `used`."""
    import torch

    def hook(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        places = torch.searchsorted(used, args[0]).clamp_(max=len(used) - 1)
        if not torch.equal(used[places], args[0]):
            raise PlanError(
                "the model asks its embedding for tokens that are in no row",
                where=type(module).__name__,
                todo="score it whole (streaming off)",
            )
        return (places, *args[1:])

    return hook
