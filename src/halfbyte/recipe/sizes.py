"""What a plan costs: bytes on disk and on the GPU, bits per weight, the key/value cache, and whether it fits a card.

    NF4 weight of n elements   ceil(n/2) codes + ceil(n/b) scale codes + 4 ceil(blocks/256) second-level scales
                               + 64 + 1024 bytes of levels + the JSON of quant_state (on disk only)
    cache of one token         per layer that stores its own keys and values: (K width + V width) x 2 bytes

For b = 64 that is 0.5 + 1/64 + 4/(64 x 256) = 0.51587 bytes a weight. K and V widths are read off the model's `k_proj`
and `v_proj`, so a layer with fewer, wider heads counts as it is; a layer without `v_proj` (Gemma 4's full attention)
still caches both, as transformers does; a layer that reuses another's keys stores nothing; a sliding layer stops at its
window.

Catches. The JSON holds a decimal number, so its length is an estimate (a few bytes a tensor) until the file is written.
Headers (some hundred KiB), tokenizer and config are not counted. A "24 GB" card has 24 x 2^30 bytes, never all for you.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

from halfbyte.format.nf4_layout import QUANT_STATE_SUFFIX, component_sizes
from halfbyte.format.tensors import DTYPES
from halfbyte.recipe.areas import Areas
from halfbyte.recipe.decisions import AREAS, Decision
from halfbyte.recipe.skeleton import Skeleton

GIB = 1 << 30
#: block sizes whose file is worked out beside the plan's own
COMPARED = (64, 32)
#: held back on a card for the CUDA context, the allocator's slack and the activations of a step (batch 1)
RESERVE_BYTES = 3 * GIB // 2
CONTEXTS = (1024, 8192, 32768)
CACHE_BYTES_PER_VALUE = 2  # bfloat16
_BOUNDED = ("sliding_attention", "chunked_attention")
_GROWING = ("full_attention",)


def nf4_bytes(shape: Sequence[int], blocksize: int = 64, quant_state_json_len: int | None = None) -> int:
    """Bytes on disk of the six tensors of one NF4 weight.

    shape                 of the weight
    quant_state_json_len  the JSON's real length, if known; otherwise the plan's fixed estimate
    """
    parts = component_sizes("w", shape, blocksize)
    sizes = {name: prod(size) * DTYPES[dtype][0] for name, (dtype, size) in parts.items()}
    estimate = sizes.pop(f"w.{QUANT_STATE_SUFFIX}")
    return sum(sizes.values()) + (estimate if quant_state_json_len is None else quant_state_json_len)


def source_bytes(decision: Decision) -> int:
    """Bytes of the tensor in the source."""
    return prod(decision.shape) * DTYPES[decision.dtype][0]


def output_bytes(decision: Decision, blocksize: int) -> int:
    """Bytes that will be written for the tensor, in blocks of `blocksize` unless the decision names its own."""
    if decision.action != "nf4":
        return source_bytes(decision)
    return nf4_bytes(decision.shape, decision.blocksize or blocksize)


def summarize(
    decisions: Sequence[Decision], skeleton: Skeleton, areas: Areas, *, blocksize: int, card_gb: float
) -> dict[str, Any]:
    """The numbers that `halfbyte plan` prints; plain JSON values, byte counts as integers.

    modules              {linear, nf4, by_area: {area: {linear, nf4}}}: modules that can become 4-bit, and those that do
    bytes                {source, file, gpu, nf4, keep}: tensors only; file = nf4 + keep; gpu: less what stays on disk
    areas                area -> {tensors, source_bytes, output_bytes, nf4_modules}
    blocksizes           {"64": {file, bits_per_weight}, "32": ...}: the same plan in blocks of one size
    bits_per_weight      of all elements of the source; bits_per_weight_nf4: of those in NF4 (None if there are none)
    kv_cache             {bytes_per_1k_tokens_growing, sliding_window_bytes_full, sliding_window, at: {"1024": n, ...}}
    fit                  {card_gb, usable_bytes, reserve_bytes, weights_bytes, max_context_tokens, fits}
    assumptions          what these figures take for granted, in words
    """
    nf4 = [d for d in decisions if d.action == "nf4"]
    nf4_total = sum(output_bytes(d, blocksize) for d in nf4)
    keep_total = sum(source_bytes(d) for d in decisions if d.action == "keep")
    on_disk_only = sum(source_bytes(d) for d in decisions if d.kind == "unknown") + sum(
        output_bytes(d, blocksize) - nf4_bytes(d.shape, d.blocksize or blocksize, 0) for d in nf4
    )
    gpu = nf4_total + keep_total - on_disk_only
    elements, elements_nf4 = (sum(prod(d.shape) for d in group) for group in (decisions, nf4))
    cache = KvCache(skeleton, areas)
    return {
        "modules": _modules(skeleton, areas, {d.module for d in nf4}),
        "bytes": {
            "source": sum(map(source_bytes, decisions)),
            "file": nf4_total + keep_total,
            "gpu": gpu,
            "nf4": nf4_total,
            "keep": keep_total,
        },
        "blocksizes": {str(size): _uniform(nf4, keep_total, elements, size) for size in COMPARED},
        "areas": _areas(decisions, blocksize),
        "bits_per_weight": 8 * (nf4_total + keep_total) / elements if elements else None,
        "bits_per_weight_nf4": 8 * nf4_total / elements_nf4 if elements_nf4 else None,
        "kv_cache": cache.to_dict(),
        "fit": _fit(gpu, cache, card_gb, skeleton),
        "assumptions": _assumptions(cache),
    }


def _uniform(nf4: Sequence[Decision], keep_total: int, elements: int, blocksize: int) -> dict[str, Any]:
    """The file if every NF4 tensor had blocks of this size."""
    file = keep_total + sum(nf4_bytes(d.shape, blocksize) for d in nf4)
    return {"file": file, "bits_per_weight": 8 * file / elements if elements else None}


class KvCache:
    """The decoder's key/value cache for batch 1, from the model's layers.

    growing   bytes a token in layers that keep every token
    sliding   (bytes a token, window) of each layer that keeps only its window
    stateful  layers of other types (linear attention, state space): their state does not grow and is not counted
    """

    def __init__(self, skeleton: Skeleton, areas: Areas) -> None:
        config = skeleton.text_config
        layers = int(getattr(config, "num_hidden_layers", 0) or 0)
        window = getattr(config, "sliding_window", None)
        types = getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention"] * layers
        own = layers - int(getattr(config, "num_kv_shared_layers", 0) or 0)
        self.growing, self.stateful = 0, 0
        self.sliding: list[tuple[int, int]] = []
        for index, kind in enumerate(types[:own]):
            width = _layer_width(skeleton, areas, index) * CACHE_BYTES_PER_VALUE
            bound = getattr(config, "attention_chunk_size", None) if kind == "chunked_attention" else window
            if kind in _BOUNDED and bound:
                self.sliding.append((width, int(bound)))
            elif kind in _BOUNDED or kind in _GROWING:
                self.growing += width
            else:
                self.stateful += 1

    def at(self, tokens: int) -> int:
        """Bytes held once `tokens` tokens have been read."""
        return self.growing * tokens + sum(width * min(tokens, window) for width, window in self.sliding)

    def to_dict(self) -> dict[str, Any]:
        return {
            "bytes_per_1k_tokens_growing": self.growing * 1024,
            "sliding_window_bytes_full": sum(width * window for width, window in self.sliding),
            "sliding_window": max((window for _, window in self.sliding), default=None),
            "at": {str(tokens): self.at(tokens) for tokens in CONTEXTS},
        }


def _layer_width(skeleton: Skeleton, areas: Areas, index: int) -> int:
    """K plus V values that decoder layer `index` caches for a token."""
    widths: dict[str, int] = {}
    for stem in ("layers", "h"):
        for leaf in ("k_proj", "v_proj"):
            tensor = skeleton.tensors.get(f"{areas.text_root}.{stem}.{index}.self_attn.{leaf}.weight")
            if tensor is not None:
                widths[leaf] = tensor.shape[0]
    if "k_proj" in widths:
        return widths["k_proj"] + widths.get("v_proj", widths["k_proj"])
    config = skeleton.text_config
    heads = int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
    head = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    keys = int(getattr(config, "qk_head_dim", None) or head)
    return heads * (keys + int(getattr(config, "v_head_dim", None) or head))


def _modules(skeleton: Skeleton, areas: Areas, nf4: set[str | None]) -> dict[str, Any]:
    by_area: dict[str, dict[str, int]] = {area: {"linear": 0, "nf4": 0} for area in AREAS}
    for module in skeleton.convertible:
        row = by_area[areas.area_of(module)]
        row["linear"] += 1
        row["nf4"] += module in nf4
    return {
        "linear": len(skeleton.convertible),
        "nf4": len(nf4),
        "by_area": {area: row for area, row in by_area.items() if row["linear"]},
    }


def _areas(decisions: Sequence[Decision], blocksize: int) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    for area in AREAS:
        inside = [d for d in decisions if d.area == area]
        if inside:
            found[area] = {
                "tensors": len(inside),
                "source_bytes": sum(map(source_bytes, inside)),
                "output_bytes": sum(output_bytes(d, blocksize) for d in inside),
                "nf4_modules": sum(d.action == "nf4" for d in inside),
            }
    return found


def _fit(weights: int, cache: KvCache, card_gb: float, skeleton: Skeleton) -> dict[str, Any]:
    """How long a context fits beside the weights: the largest n with weights + cache(n) <= usable."""
    usable = max(0, int(card_gb * GIB) - RESERVE_BYTES)
    longest = int(getattr(skeleton.text_config, "max_position_embeddings", 0) or 1 << 20)
    low, high = 0, longest
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if weights + cache.at(middle) <= usable else (low, middle - 1)
    return {
        "card_gb": card_gb,
        "usable_bytes": usable,
        "reserve_bytes": RESERVE_BYTES,
        "weights_bytes": weights,
        "max_context_tokens": low,
        "fits": weights < usable and low > 0,
    }


def _assumptions(cache: KvCache) -> str:
    text = (
        "Tensors only: file headers, tokenizer and config not counted. quant_state JSON taken at a fixed length (a few "
        "bytes a tensor of uncertainty). Kept tensors at the source's dtype. Cache: batch 1, bfloat16, sliding layers "
        "bounded by their window, a layer without v_proj caches keys and values alike, layers that share another "
        "layer's keys and values store none. Card: GB read as 2^30 bytes, "
        f"{RESERVE_BYTES / GIB:.1f} GiB held back for context, allocator and activations; "
        "image and sound inputs not counted."
    )
    if cache.stateful:
        text += f" {cache.stateful} layers keep a state that does not grow with the context: not counted."
    return text
