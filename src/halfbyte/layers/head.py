"""The output embedding and what follows it: hidden states [n, hidden] -> logits [n, vocabulary], in float32.

It is kept apart from the model because it must be computed more exactly than the rest (in bf16 the two best tokens tie at
one position in sixteen), and because it is the largest tensor of all: the weight stays in the dtype it is stored in and is cast a
slice of the vocabulary at a time. Slices are the same whatever the stored dtype, so a head held in bf16 gives the bits of
its float32 copy.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from halfbyte.errors import PlanError

if TYPE_CHECKING:
    import torch

#: a head whose float32 copy is smaller than this is kept in float32; a larger one is cast slice by slice
COPY_BYTES = 1 << 30
SLICE = 32768


@dataclass(frozen=True, eq=False)
class Head:
    """The output embedding and what follows it.

    weight    [vocabulary, hidden], in float32 if that is small enough, else as loaded
    bias      float32 [vocabulary] or None
    scale     logits are multiplied by this (Cohere's logit_scale, 1 / Granite's logits_scaling)
    softcap   c: logits become c * tanh(logits / c) (Gemma); None: they stay
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    scale: float
    softcap: float | None

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """float32 [n, vocabulary] from hidden states [n, hidden] of any float dtype; n of 128 to 256 is sensible."""
        import torch

        rows = hidden.to(self.weight.device, torch.float32)
        total = self.weight.shape[0]
        found = torch.empty(rows.shape[0], total, dtype=torch.float32, device=rows.device)
        for begin in range(0, total, SLICE):
            found[:, begin : begin + SLICE] = rows @ self.weight[begin : begin + SLICE].float().T
        if self.bias is not None:
            found += self.bias
        if self.scale != 1:
            found *= self.scale
        if self.softcap is not None:
            found.div_(self.softcap).tanh_().mul_(self.softcap)
        return found

    def digest(self) -> str:
        """sha256 of the values (as float32, so bf16 and its exact copy agree), the bias, scale and softcap."""
        total = hashlib.sha256(json.dumps([list(self.weight.shape), self.scale, self.softcap]).encode())
        for begin in range(0, self.weight.shape[0], SLICE):
            total.update(self.weight[begin : begin + SLICE].float().cpu().numpy().tobytes())
        if self.bias is not None:
            total.update(self.bias.cpu().numpy().tobytes())
        return "sha256:" + total.hexdigest()

    def to(self, device: str) -> Head:
        """This head on another device, its weight in float32 if that is small enough."""
        weight = self.weight.to(device)
        bias = None if self.bias is None else self.bias.to(device)
        return replace(self, weight=weight.float() if _is_small(weight) else weight, bias=bias)


def make_head(model: Any, weight: torch.Tensor, bias: torch.Tensor | None) -> Head:
    """A head of `weight` (any float dtype) and `bias`, with the softcap and scale that the model's config names."""
    config = model.config.get_text_config(decoder=True)
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    softcap = getattr(config, "final_logit_softcapping", None)
    kept = weight.float() if _is_small(weight) else weight
    return Head(kept, None if bias is None else bias.float(), scale, softcap)


def compare_head(model: Any, head: Head, ids: torch.Tensor, label: str) -> None:
    """Raises PlanError unless `head` gives the model's own logits on `ids` [1, n], as far as their dtype can tell."""
    own = model(input_ids=ids, use_cache=False).logits[0].float()
    ours = head.logits(model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[0])
    apart = float((own - ours).abs().max())
    # bf16 rounds the model's own logits by up to 2^-8 of their size, once in the sum and once behind the softcap
    allowed = 3 * 2.0**-8 * float(own.abs().max()) + 1e-5
    if not apart <= allowed:
        raise PlanError(
            f"this architecture does something behind its head that is not known here (logits differ by {apart:.3g})",
            where=f"{label}: {type(model).__name__}",
            todo="report the model type",
        )


def _is_small(weight: torch.Tensor) -> bool:
    return weight.numel() * 4 <= COPY_BYTES
