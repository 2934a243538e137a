"""The decoder walked once, layer by layer, every linear fitted to what it will read: calibration rows through the quantized prefix.

    layer 0 from the source -> its linears fitted -> all rows through the fitted layer -> layer 1 from the source -> ...

A linear in layer 20 reads what nineteen quantized layers hand it, so that is what its inputs are measured on: each layer is
fitted to undo, as far as it can, what those before it did. In memory are one layer, the residual of all rows, and moments.

Linears that are handed the same tensor share its moments (q, k and v; gate and up): found by watching one batch, so nothing of an
architecture is written down here. `sequential` keeps the order inside the layer too: the o_proj is measured after q, k and v
were replaced, the down_proj after gate and up. That costs a partial pass a group (a pass ends where its group was reached), and
holds one group's moments at a time; at once, all groups are measured in one pass of the layer as the source has it.

That is the default because it needs less memory and measures what is true; it cost 4 % more time on SmolLM2-135M (4,000 tokens, CPU).

Memory: one layer in the compute dtype; one group's Hessian, twice while its mean is taken, then once beside what the fit makes of it
(a copy and an inverse); one weight in float32 a few times; the residual of all rows and one batch's activations. Of a 31B in bf16,
computed from shapes: 1 GB of layer, 3 x 1.85 GB of Hessian for the down_proj's 21,504 inputs, 0.7 GB of residual for 65,536 tokens.

Resuming. The residual is not saved: what is fitted is read back from the shards, and the rows run through it again, one pass a
layer instead of several and a fit. The same bits come out of the same weights, rows and machine, so the job ends in the same bytes.

The catch: equal bytes need the same kind of device and, on a CPU, the same number of threads: sums change their order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from halfbyte.layers.model import exact_float32
from halfbyte.layers.rows import Rows
from halfbyte.layers.streaming import StreamedModel, Work

if TYPE_CHECKING:
    import torch

    from halfbyte.codec.fitting import Moments


@dataclass(frozen=True, eq=False)
class Inputs:
    """What one group of linears reads, over all rows.

    tokens        how many inputs were seen
    mean_squares  float32 [columns]; None where there is a Hessian, whose diagonal it is
    hessian       float32 [columns, columns], or None
    """

    tokens: int
    mean_squares: torch.Tensor | None
    hessian: torch.Tensor | None


class Store(Protocol):
    """Where fitted tensors come from and go to."""

    def is_done(self, name: str) -> bool:
        """Whether the tensor is written already."""
        ...

    def load(self, name: str) -> torch.Tensor:
        """A written tensor as a loader will expand it: bfloat16 [rows, columns]."""
        ...

    def fit(self, name: str, inputs: Inputs | None) -> torch.Tensor:
        """Fit the source's tensor to these inputs (None: it was never called), write it; returns what `load` will."""
        ...


@dataclass(frozen=True)
class Group:
    """Linears of one layer that are handed the same tensor, in the order of their calls, and how often a pass calls the first."""

    names: tuple[str, ...]
    calls: int


class _Enough(Exception):
    """Ends a pass once what it was for has been seen."""


def fit_layers(
    model: StreamedModel, rows: Rows, wanted: set[str], store: Store, new_moments: Callable[[int], Moments], *,
    batch: int, sequential: bool,
) -> None:  # fmt: skip
    """Fit every linear of the decoder layers whose name is in `wanted` and that `store` lacks.

    new_moments  columns -> an empty collection of what one group's inputs are
    """
    import torch

    targets = [
        {name: module for name, module in model.linears(number).items() if name in wanted}
        for number in range(len(model.layers))
    ]
    open_layers = [n for n, linears in enumerate(targets) if not all(map(store.is_done, linears))]
    if not open_layers:
        return
    work = [Work(each, number, None) for number, each in enumerate(rows.batches(batch))]
    with torch.inference_mode(), exact_float32():
        model.enter(work)
        for number in range(open_layers[-1] + 1):
            with model.materialised(number, lambda amount: None):
                if number in open_layers:
                    _fit_layer(_Layer(model, number, targets[number], work), store, new_moments, sequential)
                else:
                    for name, module in targets[number].items():
                        _replace(module, store.load(name))
                if number < open_layers[-1]:
                    for item in work:
                        model.step(item, number)


@dataclass(frozen=True, eq=False)
class _Layer:
    """One layer, materialised, with its linears to be fitted and the rows that reach it."""

    model: StreamedModel
    number: int
    linears: Mapping[str, Any]
    work: Sequence[Work]

    def run(self, item: Work) -> None:
        with suppress(_Enough):
            self.model.run_layer(item, self.number)


def _fit_layer(layer: _Layer, store: Store, new_moments: Callable[[int], Moments], sequential: bool) -> None:
    groups = find_groups(layer)
    for stage in [[group] for group in groups] if sequential else [groups]:
        unfinished = [group for group in stage if not all(map(store.is_done, group.names))]
        found = dict(zip(unfinished, _measure(layer, unfinished, new_moments), strict=True))
        for group in stage:
            for name in group.names:
                done = store.is_done(name)
                _replace(layer.linears[name], store.load(name) if done else store.fit(name, found[group]))
            found.pop(group, None)
    reached = {name for group in groups for name in group.names}
    for name in (name for name in layer.linears if name not in reached and not store.is_done(name)):
        store.fit(name, None)


def find_groups(layer: _Layer) -> list[Group]:
    """Which linears are handed the same tensor, in the order of their first call, from one batch."""
    seen: dict[str, list[Any]] = {}  # the inputs are held: their addresses stay theirs

    def note(name: str, tensor: torch.Tensor) -> None:
        seen.setdefault(name, []).append(tensor)

    with _watching(layer.linears, note):
        layer.run(layer.work[0])
    groups: dict[Any, list[str]] = {}
    for name, inputs in seen.items():
        key = tuple((tensor.data_ptr(), tensor.shape, tensor.stride()) for tensor in inputs)
        groups.setdefault(key, []).append(name)
    return [Group(tuple(names), len(key)) for key, names in groups.items()]


def _measure(layer: _Layer, groups: Sequence[Group], new_moments: Callable[[int], Moments]) -> list[Inputs | None]:
    """What each group is handed, over all rows; None if it never was. A pass ends where the last group was reached."""
    if not groups:
        return []
    first = {group.names[0]: group for group in groups}
    moments = {name: new_moments(layer.linears[name].in_features) for name in first}
    last = groups[-1].names[0]
    stops = groups[-1].calls == 1 and all(group.calls == 1 for group in groups)
    places: Any = None

    def note(name: str, tensor: torch.Tensor) -> None:
        moments[name].add(_counted(tensor, places))
        if stops and name == last:
            raise _Enough

    with _watching({name: layer.linears[name] for name in first}, note):
        for item in layer.work:
            places = _places(item, layer.model.device)
            layer.run(item)
    return [_inputs(moments.pop(name)) for name in list(moments)]  # one at a time: a Hessian is a copy of its sum


def _inputs(moments: Moments) -> Inputs | None:
    if not moments.tokens:
        return None
    hessian = moments.hessian
    return Inputs(moments.tokens, moments.mean_squares if hessian is None else None, hessian)


@contextmanager
def _watching(linears: Mapping[str, Any], note: Callable[[str, Any], None]) -> Iterator[None]:
    """`note` is told (name, input) at every call of one of `linears`, inside."""
    with ExitStack() as stack:
        for name, module in linears.items():
            hook = module.register_forward_pre_hook(lambda module, args, name=name: note(name, args[0]))
            stack.callback(hook.remove)
        yield


def _places(item: Work, device: str) -> torch.Tensor:
    """bool [rows, length]: positions that count, padding left out."""
    import torch

    mask = torch.zeros(item.batch.tokens.shape, dtype=torch.bool)
    rows, positions = (torch.from_numpy(index) for index in item.batch.scored)
    mask[rows, positions] = True
    return mask.to(device)


def _counted(tensor: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """[n, columns]: the inputs at `places`; all of them where they are no longer in rows (experts are handed a choice)."""
    if tensor.shape[: places.dim()] == places.shape:
        return tensor[places]
    flat = tensor.reshape(-1, tensor.shape[-1])
    return flat[places.reshape(-1)] if len(flat) == places.numel() else flat


def _replace(module: Any, weight: torch.Tensor) -> None:
    """The module computes with `weight`, in its own dtype, from now on."""
    from torch import nn

    kind = module.weight
    module.weight = nn.Parameter(weight.to(kind.device, kind.dtype).view(kind.shape), requires_grad=False)
