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

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from halfbyte.errors import PlanError, SourceError, UsageError
from halfbyte.evaluator.rows import Batch
from halfbyte.evaluator.weights import Weights
from halfbyte.recipe.areas import Areas
from halfbyte.recipe.skeleton import Skeleton, build_skeleton, model_names

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "bfloat16")
ATTENTION = ("sdpa", "eager")
#: a head whose float32 copy is smaller than this is kept in float32; a larger one is cast slice by slice
_HEAD_COPY_BYTES = 1 << 30
_HEAD_SLICE = 32768
#: width of the floor's noise, relative: bf16 keeps 8 significant bits, so neighbours of 1 are 2^-7 apart
BF16_ULP = 2.0**-7


class HiddenStates(Protocol):
    """What the scorer needs of a model, however its weights pass through memory."""

    head: Head

    def hidden_states(self, batches: Sequence[Batch], noise_seed: int | None = None) -> Iterator[torch.Tensor]:
        """For each batch, in order, the final norm's output at its scored positions: [scored, hidden], in the compute dtype.

        noise_seed  None: the model as it is; a number: with one bf16 ulp of noise on the residual after every layer
        """
        ...

    def close(self) -> None: ...


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
        step = total if self.weight.dtype == torch.float32 else _HEAD_SLICE
        for begin in range(0, total, step):
            found[:, begin : begin + step] = rows @ self.weight[begin : begin + step].float().T
        if self.bias is not None:
            found += self.bias
        if self.scale != 1:
            found *= self.scale
        if self.softcap is not None:
            found.div_(self.softcap).tanh_().mul_(self.softcap)
        return found


class WholeModel:
    """Decoder and head on one device, all at once. Implements HiddenStates; `model` is the transformers module (towers empty).

    raises SourceError (a tensor is missing or has another shape), PlanError (transformers cannot build it, or its
    loader would merge tensors), UsageError (dtype, attention)
    """

    def __init__(self, weights: Weights, device: str = "cpu", dtype: str = "float32", attention: str = "sdpa") -> None:
        self.device, self.label = device, weights.label
        skeleton = build_skeleton(weights.config)
        self.model = build_module(skeleton, dtype, attention)
        areas = Areas(skeleton)
        wanted = {key for key in skeleton.tensors if areas.area_of(key.rpartition(".")[0]) in _TEXT}
        state = _read_state(weights, skeleton, wanted, self.model, device)
        self.model.load_state_dict(state, strict=False, assign=True)
        _move_buffers(self.model, device)
        self.model.requires_grad_(False).eval()
        self.decoder = self.model.get_decoder()
        self.head = head_of(self.model)

    def hidden_states(self, batches: Sequence[Batch], noise_seed: int | None = None) -> Iterator[torch.Tensor]:
        import torch

        with torch.inference_mode(), exact_float32(), residual_noise(self.decoder, self.device, noise_seed):
            for batch in batches:
                ids = torch.from_numpy(batch.tokens).to(self.device)
                # padding is on the right and attention is causal: no position that counts can see it
                states = self.decoder(input_ids=ids, use_cache=False).last_hidden_state
                rows, positions = (torch.from_numpy(index).to(self.device) for index in batch.scored)
                yield states[rows, positions]

    def check_head(self, tokens: Sequence[int]) -> None:
        """Raises PlanError unless `head` gives the model's own logits on `tokens` (a few are enough)."""
        import torch

        with torch.inference_mode(), exact_float32():
            ids = torch.tensor([list(tokens)], device=self.device)
            own = self.model(input_ids=ids, use_cache=False).logits[0].float()
            ours = self.head.logits(self.decoder(input_ids=ids, use_cache=False).last_hidden_state[0])
        apart = float((own - ours).abs().max())
        # bf16 rounds the model's own logits by up to 2^-8 of their size, once in the sum and once behind the softcap
        allowed = 3 * 2.0**-8 * float(own.abs().max()) + 1e-5
        if not apart <= allowed:
            raise PlanError(
                f"this architecture does something behind its head that is not known here (logits differ by {apart:.3g})",
                where=f"{self.label}: {type(self.model).__name__}",
                todo="report the model type",
            )

    def close(self) -> None:
        """Let go of the weights; on a GPU the memory goes back to torch's pool."""
        import torch

        del self.model, self.decoder, self.head
        if self.device != "cpu":
            torch.cuda.empty_cache()


_TEXT = ("decoder", "embeddings", "head", "other")


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


def _read_state(
    weights: Weights, skeleton: Skeleton, wanted: set[str], model: Any, device: str
) -> dict[str, torch.Tensor]:
    """State-dict entries for every key in `wanted`, in the model's dtypes on `device`, tied ones shared."""
    places = model_names(skeleton, weights.names())
    kinds = model.state_dict()
    state: dict[str, torch.Tensor] = {}
    for name, (key, converted) in places.items():
        if key is None or key not in wanted or key in skeleton.tied:
            continue
        if converted:
            raise PlanError(
                "transformers merges or splits this tensor while loading; the scorer does not",
                where=f"{weights.label}: tensor {name}",
                todo="convert the checkpoint with transformers' save_pretrained first",
            )
        tensor = weights.load(name, device)
        if tensor.shape != kinds[key].shape:
            raise SourceError(
                f"has shape {list(tensor.shape)}, the model wants {list(kinds[key].shape)}",
                where=f"{weights.label}: tensor {name}",
                todo="config.json and weights belong to different models",
            )
        state[key] = tensor.to(kinds[key].dtype)
    for key, source in skeleton.tied.items():
        if key in wanted and source in state:
            state[key] = state[source]
    if missing := sorted(wanted - state.keys()):
        raise SourceError(
            f"{len(missing)} tensors of the model are not there, first {missing[0]}",
            where=weights.label,
            todo="the checkpoint is incomplete, or of another model than config.json says",
        )
    return state


def _move_buffers(model: Any, device: str) -> None:
    """Non-persistent buffers (rope tables, embedding scales) to `device`; weights are there already, towers stay empty."""
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and not buffer.is_meta:
                module._buffers[name] = buffer.to(device)


def head_of(model: Any) -> Head:
    """The head of a loaded transformers model, with the softcap and scale its config names."""
    config = model.config.get_text_config(decoder=True)
    layer = model.get_output_embeddings()
    weight = layer.weight.detach()
    if weight.numel() * 4 <= _HEAD_COPY_BYTES:
        weight = weight.float()
    bias = getattr(layer, "bias", None)
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    softcap = getattr(config, "final_logit_softcapping", None)
    return Head(weight, None if bias is None else bias.detach().float(), scale, softcap)


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
def residual_noise(decoder: Any, device: str, seed: int | None) -> Iterator[None]:
    """The noise floor: x -> x * (1 + u) after every decoder layer, u uniform, one bf16 ulp (2^-7) wide. None: nothing.

    That is the size of error which storing the residual in bf16 once more would add, so two runs of the *same* model on
    different kernels are about this far apart. Drawn on `device` from `seed`; equal on the same kind of device.
    """
    import torch

    if seed is None:
        yield
        return
    generator = torch.Generator(device).manual_seed(seed)

    def disturb(module: Any, inputs: Any, output: Any) -> Any:
        states = output[0] if isinstance(output, tuple) else output
        draw = torch.rand(states.shape, generator=generator, device=states.device, dtype=torch.float32)
        noisy = (states.float() * (1 + (draw - 0.5) * BF16_ULP)).to(states.dtype)
        return (noisy, *output[1:]) if isinstance(output, tuple) else noisy

    hooks = [layer.register_forward_hook(disturb) for layer in decoder_layers(decoder)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
