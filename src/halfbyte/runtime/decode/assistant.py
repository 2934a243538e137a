"""Drafts by Gemma 4's assistant: four small layers that have no keys of their own and read the big model's cache.

The assistant sees the last token's embedding beside the hidden state behind the token before it, both of the big model's width, and
gives the next token and a hidden state of that width, so it can go on from what it drafted itself:

    x      = pre([embedding of the last token, hidden])          its layers' queries stay at the last token's position
    token  = argmax of its head,  hidden = post(normed output)   and again, T - 1 times

A layer attends to the cache of the big model's last layer of its type with keys of its own: nothing is prefilled, nothing stored. In the first step
of a text there is no hidden state yet, and its drafts are worthless; what is kept is decided by the big model as ever
(halfbyte.runtime.decode.kernels.append).

Some assistants (E2B, E4B) do not look at the whole vocabulary: the nearest centroids are found first, and only their tokens are compared.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from halfbyte.runtime.decode.cache import Cache
from halfbyte.runtime.decode.description import (
    Description,
    Layer,
    check_config,
    decoder_of,
    layer_of,
    norm_of,
    require,
    ropes_of,
)
from halfbyte.runtime.decode.kernels.attention import attend
from halfbyte.runtime.decode.kernels.norm import Norm
from halfbyte.runtime.decode.kernels.rotary import Target, rotate
from halfbyte.runtime.decode.linears import KeysValues, Product, product
from halfbyte.runtime.decode.state import State
from halfbyte.runtime.decode.step import angles_at, embedded, through_layers

CLASSES = ("Gemma4AssistantForCausalLM", "Gemma4UnifiedAssistantForCausalLM")


@dataclass(frozen=True)
class Assistant:
    """An assistant, read for one model and one batch.

    layers      their `source` is a layer of the big model
    hidden      [rows, width of the big model], behind each row's last token but one
    ordering    int64 [centroids, tokens of each], or None: the head looks at all
    centroids   and the product that finds them
    most        how many are looked at
    """

    layers: tuple[Layer, ...]
    norm: Norm
    ropes: dict[str, tuple[torch.Tensor, float]]
    before: Product
    behind: Product
    head: Product
    weight: torch.Tensor
    hidden: torch.Tensor
    ordering: torch.Tensor | None
    centroids: Product | None
    most: int


def read_assistant(model: Any, description: Description, rows: int) -> Assistant:
    """Read an assistant of transformers for the big model. raises NotDescribed"""
    require(type(model).__name__ in CLASSES, f"{type(model).__name__} is not an assistant of Gemma 4")
    decoder = decoder_of(model)
    check_config(decoder.config, "gemma4")
    last_own = {layer.rope: layer for layer in description.layers if layer.source == layer.index}
    found = []
    for module, kind in zip(decoder.layers, decoder.config.layer_types, strict=True):
        require(kind in last_own, f"its assistant wants {kind} keys")
        found.append(layer_of(module, kind, last_own[kind].index, False, "gemma4"))
        same = (last_own[kind].kv_heads, last_own[kind].head_dim) == (found[-1].kv_heads, found[-1].head_dim)
        require(same, "its assistant was made for another model's keys")
    weight = model.lm_head.weight
    width = description.norm.weight.shape[0] if description.norm.weight is not None else 0
    require(model.post_projection.out_features == width, "its assistant was made for another width")
    require((weight.dtype, weight.device) == (description.dtype, description.device), "its assistant lies elsewhere")
    nearest = model.masked_embedding
    layers = tuple(found)
    return Assistant(
        layers, norm_of(decoder.norm, "gemma4"), ropes_of(decoder, layers), product(model.pre_projection),
        product(model.post_projection), product(model.lm_head), weight, weight.new_zeros(rows, width),
        None if nearest is None else nearest.token_ordering.long().view(nearest.num_centroids, -1),
        None if nearest is None else product(nearest.centroids), 0 if nearest is None else nearest.centroid_intermediate_top_k,
    )  # fmt: skip


def draft_by(assistant: Assistant, description: Description, cache: Cache, state: State, steps: int) -> torch.Tensor:
    """int64 [rows, steps]: each row's last token, then steps - 1 guesses of the assistant."""
    place = state.length - 1
    # the last token's own keys are not there yet: its queries see what is before it
    seen = (place - 1).clamp_min(0)
    angles = angles_at(assistant.ropes, place, description.dtype)

    def mix(layer: Layer, q: torch.Tensor, kv: KeysValues | None) -> torch.Tensor:
        keys, values = cache.keys[layer.source], cache.values[layer.source]
        queries = rotate(q, kv, layer.head_norms, angles[layer.rope], Target(keys, values, place))
        return attend(queries, keys, values, seen, layer.scale, layer.window)

    tokens = [state.history.gather(1, place[:, None])[:, 0]]
    hidden = assistant.hidden
    for _ in range(steps - 1):
        x = assistant.before(torch.cat([embedded(description, tokens[-1]), hidden], dim=-1))
        h = through_layers(assistant.layers, assistant.norm, x, None, mix)
        assert h is not None
        hidden = assistant.behind(h)
        tokens.append(best(assistant, h))
    return torch.stack(tokens, dim=1)


def best(assistant: Assistant, h: torch.Tensor) -> torch.Tensor:
    """int64 [rows]: the token whose logit is largest, among those of the nearest centroids if the assistant has them."""
    if assistant.ordering is None or assistant.centroids is None:
        return assistant.head(h).argmax(-1)
    near = assistant.centroids(h).topk(assistant.most, dim=-1).indices
    candidates = assistant.ordering[near].flatten(1)
    logits = torch.matmul(assistant.weight[candidates], h[:, :, None])[..., 0]
    return candidates.gather(1, logits.argmax(-1, keepdim=True))[:, 0]


def remember(assistant: Assistant, state: State, before: torch.Tensor, hidden: torch.Tensor) -> None:
    """Keep the hidden state behind the last token that was fed and kept: hidden [rows * T, width], before: lengths before the step."""
    rows = len(before)
    last = (state.length - before - 1).clamp_min(0)
    by_row = hidden.view(rows, -1, hidden.shape[-1])
    assistant.hidden.copy_(by_row[torch.arange(rows, device=last.device), last])
