"""A prompt into the cache, less its last token: that one is the first step's, which chooses the first word.

So a prompt needs no logits, and no layer behind the last one that writes keys: of E4B's 42 layers a prompt runs through 24. Text goes through our
own layers in chunks of CHUNK tokens: a chunk's queries see the cache and the chunk itself through torch's scaled dot product attention, then
its keys go into the cache. Prompts of several rows share a chunk, padded on the right; a padded token is seen by no real one (attention looks
back only) and its keys are not stored.

Pictures go through the model's own forward pass, because Gemma lets the tokens of a picture see each other in both directions;
transformers' cache is then copied into ours, slot by slot. One row at a time, and the last token must be text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from halfbyte.errors import UsageError
from halfbyte.runtime.decode.cache import Cache
from halfbyte.runtime.decode.description import Description, Layer
from halfbyte.runtime.decode.kernels.rotary import Target, rotate
from halfbyte.runtime.decode.linears import KeysValues
from halfbyte.runtime.decode.step import angles_at, through_model

#: tokens that go through the layers at once
CHUNK = 1024
#: what has a place for every token of the prompt
BY_TOKEN = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")


def fill(description: Description, cache: Cache, prompts: Sequence[Sequence[int]], chunk: int = CHUNK) -> None:
    """Write keys and values of each prompt's tokens but the last into the cache's rows."""
    order = sorted(range(len(prompts)), key=lambda row: -len(prompts[row]))
    while order:
        longest = len(prompts[order[0]]) - 1
        together = max(chunk // max(min(longest, chunk), 1), 1)
        rows, order = order[:together], order[together:]
        for start in range(0, longest, chunk):
            pieces = [list(prompts[row][:-1][start : start + chunk]) for row in rows]
            through_model(description, *_Chunk(description, cache, rows, start, pieces).arguments)


class _Chunk:
    """Tokens start .. start + width of some rows on their way through the layers."""

    def __init__(
        self, description: Description, cache: Cache, rows: list[int], start: int, pieces: list[list[int]]
    ) -> None:
        self.description, self.cache, self.start = description, cache, start
        device = description.device
        self.counts = [len(piece) for piece in pieces]
        self.width = max(self.counts)
        self.rows = torch.tensor(rows, device=device)
        padded = [piece + [0] * (self.width - len(piece)) for piece in pieces]
        self.tokens = torch.tensor(padded, device=device).reshape(-1)
        self.places = start + torch.arange(self.width, device=device)
        self.angles = angles_at(description.ropes, self.places.repeat(len(rows)), description.dtype)
        self.zero = torch.zeros(len(rows), dtype=torch.int64, device=device)
        self.shared = {layer.source for layer in description.layers if layer.source < layer.index}
        self.held: dict[int, KeysValues] = {}
        self.masks: dict[int, torch.Tensor] = {}
        self.targets: dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}

    @property
    def arguments(self) -> tuple[torch.Tensor, Any]:
        """What `through_model` takes."""
        return self.tokens, self.mix

    def mix(self, layer: Layer, q: torch.Tensor, kv: KeysValues | None) -> torch.Tensor | None:
        """Attention of a layer over cache and chunk; the chunk's keys are in the cache afterwards."""
        shape = (len(self.rows), layer.kv_heads, self.width, layer.head_dim)
        own = Target(q.new_empty(shape), q.new_empty(shape), self.zero)
        queries = rotate(q, kv, layer.head_norms, self.angles[layer.rope], own)
        if kv is None:
            keys, values = self.held[layer.source]
        else:
            keys, values = self._with_cache(layer, own)
            self._store(layer, own)
            if layer.index in self.shared:
                self.held[layer.index] = keys, values
            if layer.index == self.description.last_source:
                return None
        queries = queries.view(len(self.rows), self.width, layer.heads, layer.head_dim).transpose(1, 2)
        mixed = self._attention(layer, queries, keys, values)
        return mixed.transpose(1, 2).reshape(len(self.tokens), layer.heads * layer.head_dim)

    def _old(self, layer: Layer) -> torch.Tensor:
        """Positions in the cache that the chunk's first token sees, or a later one."""
        first = max(0, self.start - layer.window + 1) if layer.window else 0
        return torch.arange(first, self.start, device=self.rows.device)

    def _with_cache(self, layer: Layer, own: Target) -> KeysValues:
        if self.start == 0:
            return own.keys, own.values
        slots = self._old(layer) % self.cache.keys[layer.index].shape[2]
        old = [cached[self.rows[:, None], :, slots].transpose(1, 2) for cached in self._cached(layer)]
        return torch.cat([old[0], own.keys], dim=2), torch.cat([old[1], own.values], dim=2)

    def _cached(self, layer: Layer) -> KeysValues:
        return self.cache.keys[layer.index], self.cache.values[layer.index]

    def _store(self, layer: Layer, own: Target) -> None:
        keys, values = self._cached(layer)
        slots = keys.shape[2]
        if slots not in self.targets:
            # of a chunk longer than the ring only its end: two tokens must not want one slot
            kept = [(r, t) for r, n in enumerate(self.counts) for t in range(max(0, n - slots), n)]
            row, token = torch.tensor(kept, dtype=torch.int64, device=keys.device).view(-1, 2).unbind(1)
            self.targets[slots] = row, token, (self.start + token) % slots
        row, token, slot = self.targets[slots]
        keys[self.rows[row], :, slot] = own.keys[row, :, token]
        values[self.rows[row], :, slot] = own.values[row, :, token]

    def _attention(self, layer: Layer, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        mask = None
        if self.start or (layer.window and self.width > layer.window):
            if layer.window not in self.masks:
                held = torch.cat([self._old(layer), self.places])
                seen = held <= self.places[:, None]
                self.masks[layer.window] = seen & (held > self.places[:, None] - layer.window) if layer.window else seen
            mask = self.masks[layer.window]
        if layer.heads != layer.kv_heads:
            # with a mask, torch's fast kernels do not take fewer key heads than query heads
            keys, values = (t.repeat_interleave(layer.heads // layer.kv_heads, dim=1) for t in (keys, values))
        return torch.nn.functional.scaled_dot_product_attention(
            q, keys, values, attn_mask=mask, is_causal=mask is None, scale=layer.scale
        )


def fill_by_model(description: Description, cache: Cache, inputs: Mapping[str, Any]) -> None:
    """The same through transformers' forward pass, for one row with pictures or sound in it.

    inputs  what the processor gave: input_ids [1, n], pixel_values, ...
    raises  UsageError for several rows, for padding, and for a prompt that ends in a picture
    """
    from transformers import DynamicCache

    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    length = ids.shape[1] - 1
    if len(ids) != 1 or (mask is not None and not bool(mask.all())):
        raise UsageError("pictures go one prompt at a time", todo="give one row, without padding")
    if length < 1 or int(ids[0, -1]) in description.stand_ins:
        raise UsageError("a prompt with pictures must end in text")
    cut = {name: value[:, :-1] if name in BY_TOKEN else value for name, value in inputs.items()}
    past = DynamicCache(config=description.decoder.config)
    description.model(**cut, past_key_values=past, use_cache=True, logits_to_keep=1)
    for layer in description.layers:
        if layer.source != layer.index:
            continue
        held = past.layers[layer.index]
        keys, values = cache.keys[layer.index], cache.values[layer.index]
        kept = min(held.keys.shape[2], keys.shape[2])
        slots = torch.arange(length - kept, length, device=keys.device) % keys.shape[2]
        keys[0, :, slots] = held.keys[0, :, -kept:].to(keys.dtype)
        values[0, :, slots] = held.values[0, :, -kept:].to(values.dtype)
