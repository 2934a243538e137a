"""A transformers model, read into frozen descriptions of its layers: all that a step needs, and a refusal of anything else.

Three families are known, by the class of their decoder layers:

              norms a layer   q/k/v norms       scores times      rotary            besides
    Gemma 4   4 (sandwich)    q, k, v           1                 per layer type    layer_scalar, keys as values, shared keys,
                                                                                    per-layer inputs, softcap 30
    Gemma 3   4, weight + 1   q, k              pre_attn^-1/2     per layer type
    Llama     2, late weight  none; Qwen3 q, k  head_dim^-1/2     one               Mistral and Qwen2 as well

A layer of E2B or E4B that shares keys reads the cache of the last layer of its type that has its own (`source`).

What is refused, with the reason (`NotDescribed`): mixtures of experts, bidirectional text attention, soft-capped scores, rotary embeddings that
change with the length (dynamic, longrope), weights on several devices or on none. Better no fast path than a wrong word.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from halfbyte.errors import UsageError
from halfbyte.runtime.decode.kernels.gate import ACTIVATIONS
from halfbyte.runtime.decode.kernels.norm import Norm
from halfbyte.runtime.decode.kernels.rotary import HeadNorms
from halfbyte.runtime.decode.linears import Linears, Product, linears_of, product

FAMILIES = {
    "Gemma4TextDecoderLayer": "gemma4",
    "Gemma4UnifiedTextDecoderLayer": "gemma4",
    "Gemma3DecoderLayer": "gemma3",
    "LlamaDecoderLayer": "llama",
    "MistralDecoderLayer": "llama",
    "Qwen2DecoderLayer": "llama",
    "Qwen3DecoderLayer": "llama",
}
WIDEST_HEAD = 512
STATIC_ROPE = ("default", "linear", "llama3", "yarn", "proportional")


class NotDescribed(UsageError):
    """A model that this decode loop does not know; the caller takes transformers' generate, and says so."""


@dataclass(frozen=True)
class PerLayer:
    """Gemma's per-layer input of one layer: x + norm(projection(act(gate(x)) * input))."""

    gate: Product
    projection: Product
    norm: Norm


@dataclass(frozen=True)
class Layer:
    """One decoder layer.

    source   number of the layer whose cache it reads: its own, unless it shares keys
    window   a token sees itself and window - 1 before it; 0: all
    rope     name of its rotary embedding
    scale    what scores are multiplied by
    scalar   what the layer's result is multiplied by
    """

    index: int
    source: int
    heads: int
    kv_heads: int
    head_dim: int
    window: int
    rope: str
    scale: float
    scalar: float
    activation: str
    linears: Linears
    head_norms: HeadNorms
    before_attention: Norm
    after_attention: Norm | None
    before_mlp: Norm
    after_mlp: Norm | None
    per_layer: PerLayer | None


@dataclass(frozen=True)
class Description:
    """A model's text decoder.

    decoder   transformers' module: its embeddings are called as they are (they know their scales)
    ropes     name -> (inverse frequencies float32 [head_dim / 2], factor of cosine and sine)
    stand_ins token ids that stand for pictures and sound
    fed_as    int64 [vocabulary], token -> the token whose embedding it gets: padding for stand-ins, as in transformers; None if none
    """

    model: Any
    decoder: Any
    layers: tuple[Layer, ...]
    ropes: dict[str, tuple[torch.Tensor, float]]
    norm: Norm
    head: torch.nn.Module
    softcap: float | None
    vocabulary: int
    per_layer_width: int
    stand_ins: tuple[int, ...]
    fed_as: torch.Tensor | None
    dtype: torch.dtype
    device: torch.device

    @property
    def last_source(self) -> int:
        """The last layer that writes a cache: a prompt needs nothing behind its keys."""
        return max(layer.source for layer in self.layers)


def describe(model: Any) -> Description:
    """Read a model of AutoModelForCausalLM or AutoModelForImageTextToText. raises NotDescribed with the reason"""
    decoder = decoder_of(model)
    config = decoder.config
    family = FAMILIES[type(decoder.layers[0]).__name__]
    check_config(config, family)
    device = _device_of(decoder, model)
    types = list(getattr(config, "layer_types", None) or ["full_attention"] * len(decoder.layers))
    sources = _sources(decoder.layers, types)
    layers = tuple(
        layer_of(module, types[i], sources[i], sources[i] == i, family) for i, module in enumerate(decoder.layers)
    )
    whole = model.config
    special = [getattr(whole, f"{kind}_token_id", None) for kind in ("image", "video", "audio")]
    stand_ins = tuple(i for i in special if isinstance(i, int)) if family == "gemma4" and whole is not config else ()
    fed_as = None
    if stand_ins:
        fed_as = torch.arange(config.vocab_size, device=device)
        fed_as[list(stand_ins)] = int(config.pad_token_id or 0)
    head = model.get_output_embeddings()
    require(type(head) is torch.nn.Linear or callable(head), "it has no output head")
    return Description(
        model, decoder, layers, ropes_of(decoder, layers), norm_of(decoder.norm, family), head,
        getattr(config, "final_logit_softcapping", None), head.out_features,
        int(getattr(config, "hidden_size_per_layer_input", 0) or 0), stand_ins, fed_as,
        decoder.embed_tokens.weight.dtype, device,
    )  # fmt: skip


def require(condition: Any, reason: str) -> None:
    """raises NotDescribed with the reason unless the condition holds"""
    if not condition:
        raise NotDescribed(
            f"the decode loop does not take this model: {reason}", todo="transformers' generate is used instead"
        )


def decoder_of(model: Any) -> Any:
    """The one text decoder in a model. raises NotDescribed"""
    found = [
        module
        for module in model.modules()
        if len(getattr(module, "layers", ())) and type(module.layers[0]).__name__ in FAMILIES
    ]
    named = type(model).__name__
    require(len(found) == 1, f"{named} has {len(found)} decoders of a known family ({', '.join(FAMILIES)})")
    require(
        type(found[0].layers[0]).__module__.startswith("transformers.models."), "its layers are not transformers' own"
    )
    require(not model.training, "it is in training mode")
    return found[0]


def check_config(config: Any, family: str) -> None:
    """raises NotDescribed for what no family's step does"""
    bidirectional = getattr(config, "use_bidirectional_attention", None)
    require(not bidirectional or (family == "gemma4" and bidirectional == "vision"), "its text attention looks ahead")
    require(not getattr(config, "enable_moe_block", False), "it is a mixture of experts")
    require(getattr(config, "attn_logit_softcapping", None) is None, "its attention scores are capped")
    activation = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
    require(activation in ACTIVATIONS, f"its activation is {activation!r}")


def _device_of(decoder: Any, model: Any) -> torch.device:
    tensors = [*decoder.parameters(), *decoder.buffers(), *model.get_output_embeddings().parameters()]
    devices: set[torch.device] = {tensor.device for tensor in tensors}
    require(len(devices) == 1 and next(iter(devices)).type != "meta", f"its weights lie on {sorted(map(str, devices))}")
    return next(iter(devices))


def _sources(layers: Any, types: list[str]) -> list[int]:
    """For each layer, the layer whose keys it reads."""
    sources: list[int] = []
    last_own: dict[str, int] = {}
    for index, (module, kind) in enumerate(zip(layers, types, strict=True)):
        if not getattr(module.self_attn, "is_kv_shared_layer", False):
            last_own[kind] = index
        sources.append(last_own[kind])
    return sources


def layer_of(module: Any, kind: str, source: int, own: bool, family: str) -> Layer:
    """A decoder layer of type `kind` that reads the cache of layer `source`; own: it has keys of its own. raises NotDescribed"""
    attention, mlp = module.self_attn, module.mlp
    config = attention.config
    sandwich = family != "llama"
    scalar = getattr(module, "layer_scalar", None)
    window = getattr(attention, "sliding_window", None)
    if type(module).__name__ == "MistralDecoderLayer":
        window = config.sliding_window
    require(
        attention.head_dim <= WIDEST_HEAD and attention.head_dim % 2 == 0, f"its heads are {attention.head_dim} wide"
    )
    return Layer(
        attention.layer_idx, source, config.num_attention_heads, config.num_attention_heads // attention.num_key_value_groups,
        attention.head_dim, int(window or 0), kind if sandwich else "all", float(attention.scaling),
        1.0 if scalar is None else float(scalar), getattr(config, "hidden_activation", None) or config.hidden_act,
        linears_of(attention, mlp, own), HeadNorms(
            norm_of(getattr(attention, "q_norm", None), family),
            norm_of(getattr(attention, "k_norm", None), family) if own else None,
            norm_of(getattr(attention, "v_norm", None), family) if own else None,
        ),
        norm_of(module.input_layernorm, family),
        norm_of(module.post_attention_layernorm, family) if sandwich else None,
        norm_of(module.pre_feedforward_layernorm if sandwich else module.post_attention_layernorm, family),
        norm_of(module.post_feedforward_layernorm, family) if sandwich else None,
        _per_layer(module, family),
    )  # fmt: skip


def _per_layer(module: Any, family: str) -> PerLayer | None:
    if not getattr(module, "hidden_size_per_layer_input", 0):
        return None
    return PerLayer(
        product(module.per_layer_input_gate),
        product(module.per_layer_projection),
        norm_of(module.post_per_layer_input_norm, family),
    )


def norm_of(module: Any, family: str) -> Any:
    """A Norm, or None for a norm that a model does not have."""
    if module is None:
        return None
    eps = float(getattr(module, "eps", None) or module.variance_epsilon)
    weight = getattr(module, "weight", None)
    if weight is not None:
        weight = weight.detach().float()
        if family == "gemma3":
            weight = 1.0 + weight
    return Norm(weight, eps, late=family == "llama")


def ropes_of(decoder: Any, layers: tuple[Layer, ...]) -> dict[str, tuple[torch.Tensor, float]]:
    """The rotary embeddings that the layers name. raises NotDescribed"""
    rotary, found = decoder.rotary_emb, {}
    for layer in layers:
        if layer.rope in found:
            continue
        one = layer.rope == "all"
        kind = rotary.rope_type if one else rotary.rope_type.get(layer.rope)
        require(kind in STATIC_ROPE, f"its rotary embedding is {kind!r}")
        prefix = "" if one else f"{layer.rope}_"
        frequencies = getattr(rotary, f"{prefix}inv_freq").float()
        require(len(frequencies) * 2 == layer.head_dim, "only a part of each head is rotated")
        scaling = rotary.attention_scaling if one else getattr(rotary, f"{prefix}attention_scaling")
        found[layer.rope] = (frequencies, float(scaling))
    return found
