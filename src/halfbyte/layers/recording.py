"""What a model's own forward hands to its layers, found by running it with layers that do nothing.

    decoder(input_ids)  ->  embedding -> masks, rope tables, per-layer inputs -> layer 0 ... layer n -> norm
                                                                                 (each returns what it was given)

Everything but the residual is the same as in a real run, because a forward computes it before the first layer, from ids,
positions and the config. That is an assumption, so it is tested on every batch: each layer and the final norm must be
handed the very values that entered the first. A model that adds something in between (deep image features, a second stream)
fails the test and cannot be streamed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from halfbyte.errors import PlanError
from halfbyte.layers.rows import PictureBatch

if TYPE_CHECKING:
    import torch

_FINAL_NORMS = ("norm", "ln_f", "final_layernorm", "final_layer_norm")


@dataclass(frozen=True, eq=False)
class Call:
    """The arguments of one layer behind the residual."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def to(self, device: str, sent: dict[int, torch.Tensor] | None = None) -> Call:
        """This call with its tensors on `device`; see `send`."""
        kwargs = {name: send(value, device, sent) for name, value in self.kwargs.items()}
        return Call(send(self.args, device, sent), kwargs)


def final_norm(decoder: Any) -> Any:
    """The norm behind the last layer; raises PlanError if the model names it unusually."""
    for name in _FINAL_NORMS:
        if (found := getattr(decoder, name, None)) is not None:
            return found
    raise PlanError("its final norm is not found", where=type(decoder).__name__, todo="score it whole")


def record_calls(
    decoder: Any, layers: Sequence[Any], ids: torch.Tensor, run: Callable[[], torch.Tensor] | None = None
) -> tuple[torch.Tensor, list[Call]]:
    """The residual [rows, length, hidden] that enters the first layer for `ids`, and each layer's call.

    run     what is run instead of the decoder on `ids` (with pictures: the whole model); returns the final norm's output
    raises PlanError if the model does more between its layers than hand the residual on
    """
    import torch

    calls: list[Call] = []
    entered: list[torch.Tensor] = []  # a copy: a layer's input may be changed in place by the model

    def note(number: int, states: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not entered:
            entered.append(states.clone())
        if number != len(calls) or not torch.equal(states, entered[0]):
            raise _cannot_stream(decoder)
        calls.append(Call(args, kwargs))

    norm = final_norm(decoder)
    with passing_through([*layers, norm], note):
        left = decoder(input_ids=ids, use_cache=False).last_hidden_state if run is None else run()
    if len(calls) != len(layers) + 1 or not torch.equal(left, entered[0]):
        raise _cannot_stream(decoder)
    return entered[0], calls[:-1]


def run_base(model: Any, batch: PictureBatch, device: str) -> torch.Tensor:
    """The final norm's output [1, length, hidden] for a row with a picture, by the model's own forward, towers and all.

    raises PlanError if the model runs its decoder other than once
    """
    import torch

    caught: list[Any] = []
    hook = model.get_decoder().register_forward_hook(lambda module, args, output: caught.append(output))
    try:
        ids = torch.from_numpy(batch.tokens).to(device)
        model.base_model(input_ids=ids, use_cache=False, **as_arguments(model, batch.inputs, device))
    finally:
        hook.remove()
    if len(caught) != 1:
        raise PlanError("runs its decoder other than once", where=type(model).__name__, todo="report it")
    found: torch.Tensor = caught[0].last_hidden_state
    return found


def as_arguments(model: Any, inputs: Mapping[str, Any], device: str) -> dict[str, torch.Tensor]:
    """Arrays as tensors on the device, floats in the compute dtype."""
    import torch

    dtype = model.get_decoder().get_input_embeddings().weight.dtype
    found = {name: torch.from_numpy(array) for name, array in inputs.items()}
    return {name: t.to(device, dtype if t.is_floating_point() else t.dtype) for name, t in found.items()}


@contextmanager
def passing_through(
    modules: Sequence[Any], note: Callable[[int, Any, tuple[Any, ...], dict[str, Any]], None] | None = None
) -> Iterator[None]:
    """`modules` return their first argument, inside; `note` is told (number, that argument, the others)."""

    def stand_in(number: int) -> Callable[..., Any]:
        def forward(hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
            if note is not None:
                note(number, hidden_states, args, kwargs)
            return hidden_states

        return forward

    for number, module in enumerate(modules):
        module.forward = stand_in(number)
    try:
        yield
    finally:
        for module in modules:
            del module.forward  # the class's own comes to light again


def send(value: Any, device: str, sent: dict[int, torch.Tensor] | None = None) -> Any:
    """Tensors to `device`, also in tuples and lists. Mappings stay what and where they are: layers talk through them.

    sent  id of a tensor -> where it went, so that a mask which all layers share is moved once
    """
    import torch

    if isinstance(value, torch.Tensor):
        sent = {} if sent is None else sent
        if id(value) not in sent:
            sent[id(value)] = value.to(device)
        return sent[id(value)]
    if isinstance(value, (tuple, list)):
        return type(value)(send(part, device, sent) for part in value)
    return value


def _cannot_stream(decoder: Any) -> PlanError:
    return PlanError(
        "does more between its layers than hand the residual on, or its embedding is not finite",
        where=type(decoder).__name__,
        todo="score it whole (streaming off)",
    )
