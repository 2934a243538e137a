"""A model built from any `Weights`, and the one head that turns its hidden states into logits.

Scoring needs two things of a model: the hidden states behind its final norm, and its output embedding. They are kept
apart, because hidden states are small (30k positions of a 31B: 0.32 GB) where logits are not (31 GB), and because the head
must be computed more exactly than the rest: in bf16 the two best tokens tie at one position in sixteen.

    Weights -> skeleton with real buffers -> tensors assigned -> text decoder -> hidden states [n, hidden]
    hidden states -> head in float32, a slice of the vocabulary at a time -> softcap -> logits [n, vocabulary]

Every candidate is computed with by the same arithmetic: plain linears on dequantized weights, no bitsandbytes kernels.
What then differs is the weights alone. (That stock kernels compute what they should is the verifier's concern.)

The skeleton is transformers' own class, built so that parameters take no memory and buffers are real: rope tables and embedding scales are
computed in constructors and are in no file. Tied weights share one tensor. Only the text decoder and the head are loaded:
the scorer feeds it text, and towers play no part in it.

Dtype: float32 is exact in the sense that rounding in the forward is far below what 4 bits cost, and fast on CPUs, most of
which lack bf16 units: there bf16 is slow, and depends on the shape of the batch. bf16 is what people run on GPUs.

The catch: some architectures do more behind the head than the softcap and scales known here. `check_head` compares with
the model's own logits once and refuses to score if they disagree.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import TYPE_CHECKING, Any, Protocol

from halfbyte.errors import PlanError, UsageError
from halfbyte.layers.head import Head, compare_head, make_head
from halfbyte.layers.places import Places
from halfbyte.layers.rows import Batch
from halfbyte.layers.tap import Tap, tapping
from halfbyte.layers.weights import Weights
from halfbyte.recipe.skeleton import Skeleton, build_skeleton

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "bfloat16")
ATTENTION = ("sdpa", "eager")
#: width of the floor's noise, relative: bf16 keeps 8 significant bits, so neighbours of 1 are 2^-7 apart
BF16_ULP = 2.0**-7


class HiddenStates(Protocol):
    """What the scorer needs of a model, however its weights pass through memory."""

    @property
    def head(self) -> Head: ...

    def hidden_states(self, batches: Sequence[Batch], noise_seed: int | None = None) -> Iterator[torch.Tensor]:
        """For each batch, in order, the final norm's output at its scored positions: [scored, hidden], in the compute dtype.

        noise_seed  None: the model as it is; a number: with one bf16 ulp of noise on the residual after every layer
        """
        ...

    def close(self) -> None: ...


class WholeModel:
    """Decoder and head on one device, all at once. Implements HiddenStates; `model` is the transformers module.

    towers  loaded too; else they stay empty
    tap     told the residual stream of every pass while it is set
    raises SourceError (a tensor is missing or has another shape), PlanError (transformers cannot build it, or its
    loader would merge tensors), UsageError (dtype, attention)
    """

    def __init__(
        self,
        weights: Weights,
        device: str = "cpu",
        dtype: str = "float32",
        attention: str = "sdpa",
        *,
        towers: bool = False,
    ) -> None:
        self.device, self.label = device, weights.label
        skeleton = build_skeleton(weights.config)
        self.model = build_module(skeleton, dtype, attention)
        places = Places(weights, skeleton, self.model, towers=towers)
        state = {key: places.load(key, device) for key in places.keys}
        state |= {key: state[of] for key, of in places.tied.items()}
        self.model.load_state_dict(state, strict=False, assign=True)
        move_buffers(self.model, device)
        self.model.requires_grad_(False).eval()
        self.decoder = self.model.get_decoder()
        self.head = head_of(self.model)
        self.tap: Tap | None = None

    def hidden_states(self, batches: Sequence[Batch], noise_seed: int | None = None) -> Iterator[torch.Tensor]:
        import torch

        with torch.inference_mode(), exact_float32():
            layers = decoder_layers(self.decoder) if self.tap is not None else ()
            for number, batch in enumerate(batches):
                # hooks run in the order they were set: the tap sees what the noise has made of a layer's output
                with residual_noise(self.decoder, noise_seed, number), tapping(layers, self.tap, number, noise_seed):
                    states = self.run(batch)
                if self.tap is not None:
                    self.tap.note(len(layers) + 1, number, noise_seed, states)
                yield take_scored(batch, states)

    def run(self, batch: Batch) -> torch.Tensor:
        """The final norm's output [rows, length, hidden] for a batch."""
        import torch

        ids = torch.from_numpy(batch.tokens).to(self.device)
        # padding is on the right and attention is causal: no position that counts can see it
        states: torch.Tensor = self.decoder(input_ids=ids, use_cache=False).last_hidden_state
        return states

    def check_head(self, tokens: Sequence[int]) -> None:
        """Raises PlanError unless `head` gives the model's own logits on `tokens` (a few are enough)."""
        import torch

        with torch.inference_mode(), exact_float32():
            compare_head(self.model, self.head, torch.tensor([list(tokens)], device=self.device), self.label)

    def close(self) -> None:
        """Let go of the weights; on a GPU the memory goes back to torch's pool."""
        import torch

        del self.model, self.decoder, self.head
        if self.device != "cpu":
            torch.cuda.empty_cache()


def build_module(skeleton: Skeleton, dtype: str, attention: str) -> Any:
    """The transformers model with parameters on the meta device and buffers computed for real, in `dtype`.

    How: constructors allocate weights with `torch.empty` and compute tables with everything else (arange, full, tensor),
    so only the former is sent to the meta device.
    """
    import torch
    import transformers
    from torch.overrides import TorchFunctionMode

    if dtype not in DTYPES or attention not in ATTENTION:
        raise UsageError(
            f"dtype {dtype!r}, attention {attention!r}",
            where="scorer",
            todo=f"dtypes: {', '.join(DTYPES)}; attention: {', '.join(ATTENTION)}",
        )

    class WeightsOnMeta(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            if func in (torch.empty, torch.rand, torch.randn) and kwargs.get("device") is None:
                kwargs = {**kwargs, "device": "meta"}
            return func(*args, **kwargs)

    with WeightsOnMeta():
        return getattr(transformers, skeleton.auto_class).from_config(
            deepcopy(skeleton.model.config), dtype=getattr(torch, dtype), attn_implementation=attention
        )


def move_buffers(model: Any, device: str) -> None:
    """Non-persistent buffers (rope tables, embedding scales) to `device`; weights are there already, towers stay empty."""
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and not buffer.is_meta:
                module._buffers[name] = buffer.to(device)


def head_of(model: Any) -> Head:
    """The head of a loaded transformers model, with the softcap and scale its config names."""
    layer = model.get_output_embeddings()
    bias = getattr(layer, "bias", None)
    return make_head(model, layer.weight.detach(), None if bias is None else bias.detach())


def take_scored(batch: Batch, states: torch.Tensor) -> torch.Tensor:
    """[scored, hidden]: of states [rows, length, hidden], those whose predictions count."""
    import torch

    rows, positions = (torch.from_numpy(index).to(states.device) for index in batch.scored)
    return states[rows, positions]


@contextmanager
def exact_float32() -> Iterator[None]:
    """float32 products in float32 (no TF32, which has bf16's neighbourhood of precision), inside."""
    import torch

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def decoder_layers(decoder: Any) -> Sequence[Any]:
    """The decoder layers in the order of the residual stream; raises PlanError if the model names them unusually."""
    for name in ("layers", "h", "blocks"):
        layers = getattr(decoder, name, None)
        if layers is not None:
            found: Sequence[Any] = layers[: decoder.config.num_hidden_layers]
            return found
    raise PlanError("its layers are not found", where=type(decoder).__name__, todo="report the model type")


@contextmanager
def residual_noise(decoder: Any, seed: int | None, batch: int) -> Iterator[None]:
    """The noise floor: `disturb` after every decoder layer, for one batch (its number). seed None: nothing."""
    if seed is None:
        yield
        return

    def hook(layer: int, output: Any) -> Any:
        if isinstance(output, tuple):
            return (disturb(output[0], seed, batch, layer), *output[1:])
        return disturb(output, seed, batch, layer)

    hooks = [
        layer.register_forward_hook(lambda module, inputs, output, number=number: hook(number, output))
        for number, layer in enumerate(decoder_layers(decoder))
    ]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()


def disturb(states: torch.Tensor, seed: int, batch: int, layer: int) -> torch.Tensor:
    """x * (1 + u), u uniform and one bf16 ulp (2^-7) wide.

    That is the size of error which storing the residual in bf16 once more would add, so two runs of the *same* model on
    different kernels are about this far apart. Each (seed, batch, layer) has a draw of its own, so the order in which
    they are computed does not matter; equal on the same kind of device.
    """
    import torch

    own = hashlib.sha256(f"{seed}/{batch}/{layer}".encode()).digest()
    generator = torch.Generator(states.device).manual_seed(int.from_bytes(own[:7], "little"))
    draw = torch.rand(states.shape, generator=generator, device=states.device, dtype=torch.float32)
    return (states.float() * (1 + (draw - 0.5) * BF16_ULP)).to(states.dtype)
