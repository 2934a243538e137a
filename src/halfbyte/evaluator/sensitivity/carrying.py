"""Many slightly different models in one pass: layers are read once, and every model's residual is carried through them.

A variant is the model with some of its linears rounded. Up to the first layer that it changes it *is* the model, so there it
begins, as a copy of the model's residual; from then on it has a residual of its own:

    layer 0      model ----+----------------+-- ...
                           +- q,k,v of 0 in NF4-64 ------ ...
                           +- q,k,v of 0 in NF4-32 ------ ...
    layer 1      model ----------+------------- ...
                                 +- o of 1 in NF4-64 ---- ...

How a weight looks in NF4 is not decided here: rounded to nearest, or what another method made of it (`fits`).

A layer is read once for all of them; a variant's rounded weights are put into it while that variant runs. With g groups a layer
in two choices that is 2 g L / 2 forward passes of L layers, and one reading. Nothing is approximated: the hidden states are, to
the bit, those of the streamed model whose tensors are rounded (tests/evaluator/sensitivity/test_carrying.py).

Memory: one layer, its rounded linears in bf16 (twice), and one residual a variant: tokens x hidden x bytes of the dtype. If all do
not fit, they are carried in several passes, each of which reads the layers again.

The catch: layers that talk through a dictionary (Gemma 4 E2B's shared keys and values) would talk across variants. Each variant
gets its own copy of every mapping in a call, taken where it begins.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from halfbyte.layers.model import exact_float32, take_scored
from halfbyte.layers.recording import Call, final_norm, record_calls
from halfbyte.layers.rows import Batch
from halfbyte.layers.streaming import StreamedModel, available_bytes
from halfbyte.layers.weights import Weights, round_to_nf4
from halfbyte.progress import track

if TYPE_CHECKING:
    import torch

#: (name in the files, weight, block size) -> the weight in NF4 as a loader will expand it
Coarse = Callable[[str, Any, int], Any]
#: the residuals stay on a GPU if this many times their size is free there
_ROOM = 4


@dataclass(eq=False)
class Variant:
    """The model with the weights `keys` (state-dict keys) in NF4 with blocks of `blocksize`, all others as they are.

    first   the layer at which it begins
    states  per batch: its residual; in the end the final norm's output at the scored positions
    drift   mean over positions of |h - h'|^2 / |h|^2 behind layer `first`; None if it changes nothing
    """

    name: str
    choice: str
    keys: frozenset[str]
    blocksize: int
    first: int = 0
    states: list[torch.Tensor] = field(default_factory=list)
    drift: float | None = None
    _mappings: list[dict[int, Any]] = field(default_factory=list)


@dataclass(eq=False)
class _Passing:
    """What one pass carries: the batches' calls, the model's own residuals, the variants."""

    calls: list[list[Call]]
    states: list[torch.Tensor]
    variants: Sequence[Variant]


class CarryingModel(StreamedModel):
    """A streamed model that carries variants of itself; see the top of this file.

    coarse  how a weight looks in NF4; to begin with, rounded to nearest
    """

    def __init__(self, weights: Weights, device: str = "cpu", dtype: str = "float32") -> None:
        super().__init__(weights, device, dtype)
        self.coarse: Coarse = rounded_to_nearest

    def layer_of(self, key: str) -> int | None:
        """The decoder layer that holds the weight `key`, None if none does."""
        return next((n for n, keys in enumerate(self._layer_keys) if key in keys), None)

    def carry(self, batches: Sequence[Batch], variants: Sequence[Variant]) -> list[torch.Tensor]:
        """Run all of them over `batches`: fills `states` and `drift` of each; returns the model's own states.

        Each as `Variant.states` in the end: per batch [scored, hidden], on the CPU.
        """
        import torch

        steps = sum(len(self.layers) - v.first for v in variants) + len(self.layers)
        with (
            torch.inference_mode(),
            exact_float32(),
            track("sensitivity", steps * len(batches), "layers") as advance,
            self.embeddings.gathered(batches, self.device),
        ):
            self._check_head(batches[0])
            home = self._home_of(batches, len(variants) + 1)
            states, calls = [], []
            for batch in batches:
                entered, recorded = record_calls(
                    self.decoder, self.layers, torch.from_numpy(batch.tokens).to(self.device)
                )
                states.append(entered.to(home))
                calls.append(recorded)
            passing = _Passing(calls, states, variants)
            for number in range(len(self.layers)):
                with self.materialised(number, lambda amount: None):
                    self._through(number, passing, home, advance)
            return self._finish_all(batches, passing)

    def _through(self, number: int, passing: _Passing, home: str, advance: Callable[[int], None]) -> None:
        """Layer `number` on every variant that has begun, then on the model itself (whose mappings variants copy first)."""
        calls = [own[number].to(self.device) for own in passing.calls]
        rounded: dict[tuple[str, int], torch.Tensor] = {}
        begun = [v for v in passing.variants if v.first <= number]
        for variant in begun:
            if variant.first == number:
                variant.states = [states.clone() for states in passing.states]
                variant._mappings = [_copies(own[number:]) for own in passing.calls]
            with self._wearing(number, variant, rounded):
                for at, call in enumerate(calls):
                    own = _with(call, variant._mappings[at])
                    variant.states[at] = self._layer(number, variant.states[at], own).to(home)
                    advance(1)
        for at, call in enumerate(calls):
            passing.states[at] = self._layer(number, passing.states[at], call).to(home)
            advance(1)
        for variant in begun:
            if variant.first == number and variant.keys:
                variant.drift = _drift(passing.states, variant.states)

    def _layer(self, number: int, states: torch.Tensor, call: Call) -> torch.Tensor:
        found = self.layers[number](states.to(self.device), *call.args, **call.kwargs)
        behind: torch.Tensor = found[0] if isinstance(found, tuple) else found
        return behind

    @contextmanager
    def _wearing(self, number: int, variant: Variant, rounded: dict[tuple[str, int], torch.Tensor]) -> Iterator[None]:
        """Layer `number` has the variant's weights, inside; `rounded` keeps them for the next that wears the same."""
        layer, cut = self.layers[number], len(self._layer_paths[number])
        before = {key[cut:]: layer.get_parameter(key[cut:]) for key in self._layer_keys[number] if key in variant.keys}
        for path, weight in before.items():
            name = (path, variant.blocksize)
            if name not in rounded:
                stored = self.places.name(self._layer_paths[number] + path)
                rounded[name] = self.coarse(stored, weight, variant.blocksize)
            layer.load_state_dict({path: rounded[name].to(weight.dtype)}, strict=False, assign=True)
        try:
            yield
        finally:
            if before:
                layer.load_state_dict(before, strict=False, assign=True)

    def _finish_all(self, batches: Sequence[Batch], passing: _Passing) -> list[torch.Tensor]:
        norm = final_norm(self.decoder)

        def finish(all_states: list[torch.Tensor]) -> list[torch.Tensor]:
            pairs = zip(batches, all_states, strict=True)
            return [take_scored(batch, norm(states.to(self.device))).cpu() for batch, states in pairs]

        for variant in passing.variants:
            variant.states = finish(variant.states)
            variant._mappings = []
        return finish(passing.states)

    def _home_of(self, batches: Sequence[Batch], count: int) -> str:
        import torch

        if self.device == "cpu":
            return "cpu"
        total = count * self.residual_bytes(batches)
        return self.device if _ROOM * total < torch.cuda.mem_get_info(self.device)[0] else "cpu"

    def residual_bytes(self, batches: Sequence[Batch]) -> int:
        """Of one variant."""
        weight = final_norm(self.decoder).weight
        return int(sum(batch.tokens.size for batch in batches) * weight.numel() * weight.element_size())

    def carried_at_once(self, batches: Sequence[Batch]) -> int:
        """How many variants' residuals half of the CPU's free memory holds; at least one."""
        return max(1, available_bytes("cpu") // 2 // self.residual_bytes(batches))


def rounded_to_nearest(name: str, weight: torch.Tensor, blocksize: int) -> torch.Tensor:
    """A `Coarse` that needs the weight alone."""
    return round_to_nf4(weight, blocksize)


def _copies(calls: Sequence[Call]) -> dict[int, Any]:
    """id of every mapping in `calls` -> a copy of its own."""
    found: dict[int, Any] = {}
    for call in calls:
        for value in (*call.args, *call.kwargs.values()):
            if isinstance(value, MutableMapping) and id(value) not in found:  # transformers' own is no dict
                found[id(value)] = copy(value)
    return found


def _with(call: Call, mappings: dict[int, Any]) -> Call:
    """`call` with its mappings replaced."""
    if not mappings:
        return call
    args = tuple(mappings.get(id(value), value) for value in call.args)
    return Call(args, {name: mappings.get(id(value), value) for name, value in call.kwargs.items()})


def _drift(model: Sequence[torch.Tensor], variant: Sequence[torch.Tensor]) -> float:
    """Mean over all positions: not pooled, since one position may hold nearly all of the energy (scoring.residuals)."""
    total, count = 0.0, 0
    for own, other in zip(model, variant, strict=True):
        apart = (own.float() - other.float()).square().sum(-1) / own.float().square().sum(-1)
        total, count = total + float(apart.double().sum()), count + apart.numel()
    return total / count
