"""One step: B rows times T new tokens in, normed hidden states and logits out. Nothing in it waits for the host.

Launches a layer with fused products, in order:

    1 qkv | 2 norms, rotary, cache write | 3, 4 attention and its join | 5 o | 6 residual, norm, norm | 7 gate and up | 8 act * up
    9 down | 10 residual, norm, scalar, norm of the next layer

10 launches (14 with per-layer inputs, 13 where q, k, v, gate and up are apart); around the layers about 25: embeddings, angles, lm_head, choice, append.

`through_layers` knows nothing of how attention is done: a step reads the cache (`mix_with_cache`), a prompt its own chunk as well
(halfbyte.runtime.decode.prompt).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from halfbyte.runtime.decode.cache import Cache
from halfbyte.runtime.decode.description import Description, Layer
from halfbyte.runtime.decode.kernels.attention import attend
from halfbyte.runtime.decode.kernels.dense import dense
from halfbyte.runtime.decode.kernels.gate import gated
from halfbyte.runtime.decode.kernels.norm import Norm, add_norm
from halfbyte.runtime.decode.kernels.rotary import Target, rotate
from halfbyte.runtime.decode.linears import KeysValues

Angles = dict[str, tuple[torch.Tensor, torch.Tensor]]
#: (layer, q, keys and values) -> what attention gives, [tokens, heads * head_dim]; None ends the pass
Mix = Callable[[Layer, torch.Tensor, KeysValues | None], torch.Tensor | None]


def logits_of(description: Description, cache: Cache, tokens: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """Logits [rows * T, vocabulary] behind each of tokens; arguments as of `hidden_behind`."""
    return head(description, hidden_behind(description, cache, tokens, position))


def hidden_behind(description: Description, cache: Cache, tokens: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """Normed hidden states [rows * T, n] behind each of tokens int64 [rows, T]; position int64 [rows] is that of the first.

    The tokens' keys and values are in the cache afterwards.
    """
    steps = tokens.shape[1]
    places = (position[:, None] + torch.arange(steps, device=position.device)).reshape(-1)
    angles = angles_at(description.ropes, places, description.dtype)

    def mix_with_cache(layer: Layer, q: torch.Tensor, kv: KeysValues | None) -> torch.Tensor:
        keys, values = cache.keys[layer.index], cache.values[layer.index]
        queries = rotate(q, kv, layer.head_norms, angles[layer.rope], Target(keys, values, position))
        return attend(queries, keys, values, position, layer.scale, layer.window)

    hidden = through_model(description, tokens.reshape(-1), mix_with_cache)
    assert hidden is not None
    return hidden


def head(description: Description, hidden: torch.Tensor) -> torch.Tensor:
    """lm_head and softcap of normed hidden states [rows, n]."""
    module = description.head
    if type(module) is torch.nn.Linear:
        return dense(hidden, module.weight, module.bias, description.softcap)
    logits: torch.Tensor = module(hidden)
    return logits if description.softcap is None else torch.tanh(logits / description.softcap) * description.softcap


def angles_at(ropes: dict[str, tuple[torch.Tensor, float]], places: torch.Tensor, dtype: torch.dtype) -> Angles:
    """Cosines and sines [tokens, head_dim / 2] for positions int [tokens], by rotary embedding."""
    found = {}
    for name, (frequencies, scaling) in ropes.items():
        turn = places[:, None].float() * frequencies
        cos, sin = turn.cos(), turn.sin()
        if scaling != 1:
            cos, sin = cos * scaling, sin * scaling
        found[name] = cos.to(dtype), sin.to(dtype)
    return found


def embedded(description: Description, tokens: torch.Tensor) -> torch.Tensor:
    """Embeddings [n, width] of tokens int64 [n], as the model scales them."""
    if description.fed_as is not None:
        tokens = description.fed_as[tokens]
    x: torch.Tensor = description.decoder.embed_tokens(tokens)
    return x


def through_model(description: Description, tokens: torch.Tensor, mix: Mix) -> torch.Tensor | None:
    """Normed hidden states behind the last layer, for tokens int64 [n]; None if `mix` ended the pass."""
    x = embedded(description, tokens)
    if description.fed_as is not None and description.per_layer_width:
        tokens = description.fed_as[tokens]
    return through_layers(description.layers, description.norm, x, per_layer_inputs(description, tokens, x), mix)


def through_layers(
    layers: tuple[Layer, ...], norm: Norm, x: torch.Tensor, inputs: torch.Tensor | None, mix: Mix
) -> torch.Tensor | None:
    """The same for embeddings x [n, width]; inputs [n, layers, per-layer width] or None."""
    following = [layer.before_attention for layer in layers[1:]] + [norm]
    x, h = add_norm(x, None, None, 1.0, layers[0].before_attention)
    for layer, after in zip(layers, following, strict=True):
        mixed = mix(layer, *layer.linears.qkv(h))
        if mixed is None:
            return None
        x, h = add_norm(x, layer.linears.o(mixed), layer.after_attention, 1.0, layer.before_mlp)
        y = layer.linears.down(gated(*layer.linears.gate_up(h), layer.activation))
        if layer.per_layer is not None and inputs is not None:
            x, _ = add_norm(x, y, layer.after_mlp, 1.0, None)
            y = layer.per_layer.projection(gated(layer.per_layer.gate(x), inputs[:, layer.index], layer.activation))
            x, h = add_norm(x, y, layer.per_layer.norm, layer.scalar, after)
        else:
            x, h = add_norm(x, y, layer.after_mlp, layer.scalar, after)
    return h


def per_layer_inputs(description: Description, tokens: torch.Tensor, x: torch.Tensor) -> torch.Tensor | None:
    """Gemma's per-layer inputs [tokens, layers, width], of embeddings of their own and of the first hidden states."""
    if not description.per_layer_width:
        return None
    decoder = description.decoder
    shape = (len(tokens), len(description.layers), description.per_layer_width)
    plain = decoder.per_layer_model_projection
    context = dense(x, plain.weight) if type(plain) is torch.nn.Linear else plain(x)
    context = decoder.per_layer_projection_norm((context * decoder.per_layer_model_projection_scale).view(shape))
    inputs: torch.Tensor = (
        context + decoder.embed_tokens_per_layer(tokens).view(shape)
    ) * decoder.per_layer_input_scale
    return inputs
