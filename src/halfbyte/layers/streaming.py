"""Scoring a model that does not fit: one decoder layer in memory at a time, all rows through it, then the next.

A whole model takes each batch through all layers; here all batches go through one layer, and its weights are dropped
before the next one's are read. Same kernels, same shapes, another order: the hidden states are equal to the bit.

    1  embedding   only the rows whose tokens occur, gathered from slices (`embedding`)
    2  record      the model's own forward, once a batch, with layers that do nothing, to learn what each is called with (`recording`)
    3  layers      for each: read, run over every batch with that batch's own arguments, drop
    4  final norm, and the scored positions kept; the head when it is asked for (tied: the embedding's file bytes once more)

Nothing of an architecture is written down here. The two rope tables and two masks of Gemma, the per-layer inputs of E2B and
E4B, and the dictionary through which their layers share keys and values all come out of step 2, batch by batch.

A row with a picture goes the same way: in step 2 the whole model runs, its towers read for that step alone, and the residual that enters
layer 0 holds the picture's soft tokens.

Memory: one layer in the compute dtype, one tensor of it as stored, the residual of all rows, what one batch's attention and
MLP need, and behind the layers the head. It does not grow with the number of layers. The residual stays on a GPU if it
is a small part of what is free there, else in the CPU's memory.

The catch: several passes over the rows (reference, self-test, floor) would read all weights each; `prepare` does them in one go.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from halfbyte.layers.embedding import TokenEmbeddings
from halfbyte.layers.head import Head, compare_head, make_head
from halfbyte.layers.model import (
    build_module,
    decoder_layers,
    disturb,
    exact_float32,
    move_buffers,
    take_scored,
)
from halfbyte.layers.places import Places
from halfbyte.layers.recording import Call, final_norm, passing_through, record_calls, run_base
from halfbyte.layers.rows import Batch, PictureBatch
from halfbyte.layers.tap import Tap
from halfbyte.layers.weights import Weights
from halfbyte.progress import track
from halfbyte.recipe.skeleton import build_skeleton

if TYPE_CHECKING:
    import torch

#: tokens, and entries of the vocabulary, on which the head is compared with the model's own
_CHECKED_TOKENS, _CHECKED_ENTRIES = 8, 1024
#: the residual stays on a GPU if this many of it would fit into what is free
_ROOM = 8
Pass = tuple[Sequence[Batch], int | None]


@runtime_checkable
class Prepares(Protocol):
    """A model for which several passes in one go are cheaper than one after the other."""

    def prepare(self, passes: Sequence[Pass]) -> None:
        """Compute these (batches, noise_seed) now; `hidden_states` of the same then only hands them out, once."""
        ...


@dataclass(eq=False)
class Work:
    """One batch under way: its number in its pass, the pass's noise, the residual, and the calls still to be made."""

    batch: Batch
    number: int
    seed: int | None
    states: Any = None
    calls: list[Call | None] = field(default_factory=list)


@dataclass(eq=False)
class _Done:
    """A pass ready to be handed out; its batches are held so that their ids, by which it is found, stay theirs."""

    batches: Sequence[Batch]
    states: list[torch.Tensor]


class StreamedModel:
    """Decoder and head of `weights`, a layer at a time. Implements HiddenStates and Prepares.

    Each weight is read once for all the passes that `prepare` is given; a tied embedding once more, as the head.
    raises  as WholeModel does; PlanError also for a model that cannot be streamed (see `recording`)
    """

    def __init__(self, weights: Weights, device: str = "cpu", dtype: str = "float32", attention: str = "sdpa") -> None:
        self.device, self.label = device, weights.label
        skeleton = build_skeleton(weights.config)
        self._weights, self._skeleton = weights, skeleton
        self.model = build_module(skeleton, dtype, attention)
        self.places = Places(weights, skeleton, self.model)
        move_buffers(self.model, device)
        self.model.requires_grad_(False).eval()
        self.decoder = self.model.get_decoder()
        self.layers = decoder_layers(self.decoder)
        self.embeddings = TokenEmbeddings(self.model, self.decoder, self.places)
        paths = {id(module): path for path, module in self.model.named_modules()}
        self._layer_paths = [paths[id(layer)] + "." for layer in self.layers]
        self._layer_keys = [[key for key in self.places.keys if key.startswith(path)] for path in self._layer_paths]
        head = paths[id(self.model.get_output_embeddings())]
        self._head_weight, self._head_bias = (self.places.holder(f"{head}.{name}") for name in ("weight", "bias"))
        self._head: Head | None = None
        self.tap: Tap | None = None
        self._ready: dict[tuple[int | None, ...], list[_Done]] = {}
        self._load_rest()

    @property
    def head(self) -> Head:
        """Read when first asked for: then it is not in memory beside the layers of its own model."""
        if self._head is None:
            self._head = self._make_head(lambda key: self.places.load_stored(key, self.device))
        return self._head

    def prepare(self, passes: Sequence[Pass]) -> None:
        work = [Work(batch, number, seed) for batches, seed in passes for number, batch in enumerate(batches)]
        found = iter(self._run(work))
        for batches, seed in passes:
            done = _Done(batches, [next(found) for _ in batches])
            self._ready.setdefault(_name(batches, seed), []).append(done)

    def hidden_states(self, batches: Sequence[Batch], noise_seed: int | None = None) -> Iterator[torch.Tensor]:
        name = _name(batches, noise_seed)
        if not self._ready.get(name):
            self.prepare([(batches, noise_seed)])
        states = self._ready[name].pop(0).states
        while states:
            yield states.pop(0)

    def close(self) -> None:
        """Let go of what is left; on a GPU the memory goes back to torch's pool."""
        import torch

        del self.model, self.decoder, self.layers, self.embeddings
        self._head, self._ready = None, {}
        if self.device != "cpu":
            torch.cuda.empty_cache()

    def _load_rest(self) -> None:
        """What is neither layer nor token embedding nor head: norms, the projection of per-layer inputs."""
        apart = {key for keys in self._layer_keys for key in keys} | {*self.embeddings.keys}
        apart |= {key for key in (self._head_weight, self._head_bias) if key is not None}
        state = {key: self.places.load(key, self.device) for key in self.places.keys if key not in apart}
        self.model.load_state_dict(state, strict=False, assign=True)

    def _run(self, work: Sequence[Work]) -> list[torch.Tensor]:
        """The final norm's output at the scored positions of each batch, on the CPU."""
        import torch

        total = sum(map(self.layer_bytes, range(len(self.layers))))
        with torch.inference_mode(), exact_float32(), track(f"layers of {self.label}", total) as advance:
            self.enter(work, check_head=True)
            for number in range(len(self.layers)):
                with self.materialised(number, advance):
                    for item in work:
                        self.step(item, number)
            return [self._finish(item) for item in work]

    def enter(self, work: Sequence[Work], *, check_head: bool = False) -> None:
        """Give every batch the residual that enters the first layer, and what each layer will be called with.

        Call it, `run_layer` and `step` under `torch.inference_mode`; raises as the class does
        """
        home = self._home(work)
        pictures = any(isinstance(item.batch, PictureBatch) for item in work)
        with self._towers(wanted=pictures), self.embeddings.gathered([item.batch for item in work], self.device):
            if check_head:
                self._check_head(work[0].batch)
            for item in work:
                states, calls = self._record(item.batch)
                sent: dict[int, torch.Tensor] = {}  # lives as long as `calls`: ids stay true
                item.states, item.calls = states.to(home), [call.to(home, sent) for call in calls]
                self._tell(item, 0, states)

    def _record(self, batch: Batch) -> tuple[torch.Tensor, list[Call]]:
        import torch

        ids = torch.from_numpy(batch.tokens).to(self.device)
        if not isinstance(batch, PictureBatch):
            return record_calls(self.decoder, self.layers, ids)
        return record_calls(self.decoder, self.layers, ids, lambda: run_base(self.model, batch, self.device))

    @contextmanager
    def _towers(self, *, wanted: bool) -> Iterator[None]:
        """What turns pictures into embeddings (towers, projectors) has its weights, inside; empty again after."""
        if not wanted:
            yield
            return
        places = Places(self._weights, self._skeleton, self.model, towers=True)
        own = set(self.places.keys)
        keys = [key for key in places.keys if key not in own]
        self.model.load_state_dict({key: places.load(key, self.device) for key in keys}, strict=False, assign=True)
        self.model.requires_grad_(False)
        try:
            yield
        finally:
            kinds = self.model.state_dict()
            self.model.load_state_dict({key: kinds[key].to("meta") for key in keys}, strict=False, assign=True)

    def _finish(self, item: Work) -> torch.Tensor:
        states = final_norm(self.decoder)(item.states.to(self.device))
        self._tell(item, len(self.layers) + 1, states)
        return take_scored(item.batch, states).cpu()

    def _tell(self, item: Work, point: int, states: torch.Tensor) -> None:
        if self.tap is not None:
            self.tap.note(point, item.number, item.seed, states)

    def run_layer(self, item: Work, number: int) -> torch.Tensor:
        """What layer `number`, materialised, makes of the batch's residual, which stays as it is."""
        recorded = item.calls[number]
        assert recorded is not None, "a layer behind which the batch has stepped"
        call = recorded.to(self.device)
        states = self.layers[number](item.states.to(self.device), *call.args, **call.kwargs)
        found: torch.Tensor = states[0] if isinstance(states, tuple) else states
        return found

    def step(self, item: Work, number: int) -> None:
        """`run_layer`, and the batch's residual is now what came out."""
        states = self.run_layer(item, number)
        if item.seed is not None:
            states = disturb(states, item.seed, item.number, number)
        self._tell(item, number + 1, states)
        item.states, item.calls[number] = states.to(item.states.device), None

    def linears(self, number: int) -> dict[str, Any]:
        """The nn.Linear modules of layer `number`: name of the weight in the files -> module. Filled while materialised."""
        from torch import nn

        modules, cut = dict(self.layers[number].named_modules()), len(self._layer_paths[number])
        keys = [key for key in self._layer_keys[number] if key.endswith(".weight")]
        found = {self.places.name(key): modules[key[cut:].removesuffix(".weight")] for key in keys}
        return {name: module for name, module in found.items() if type(module) is nn.Linear}

    def layer_bytes(self, number: int) -> int:
        """Bytes of the layer's weights in the compute dtype: what `materialised` tells its `advance`."""
        return sum(self.places.nbytes(key) for key in self._layer_keys[number])

    @contextmanager
    def materialised(self, number: int, advance: Callable[[int], None]) -> Iterator[None]:
        """Layer `number` has its weights and buffers, inside; after that it is empty, and running it would be an error."""
        layer, cut = self.layers[number], len(self._layer_paths[number])
        for key in self._layer_keys[number]:
            layer.load_state_dict({key[cut:]: self.places.load(key, self.device)}, strict=False, assign=True)
            advance(self.places.nbytes(key))
        try:
            yield
        finally:
            empty = {name: tensor.to("meta") for name, tensor in layer.state_dict().items()}
            layer.load_state_dict(empty, assign=True)

    def _make_head(self, load: Callable[[str], torch.Tensor]) -> Head:
        assert self._head_weight is not None, "Places has found every tensor of the head"
        return make_head(
            self.model, load(self._head_weight), None if self._head_bias is None else load(self._head_bias)
        )

    def _check_head(self, batch: Batch) -> None:
        """`compare_head` on a few tokens and the first entries of the vocabulary, with layers that do nothing."""
        import torch
        from torch import nn

        few = self._make_head(lambda key: self.places.load_rows(key, 0, _CHECKED_ENTRIES).to(self.device))
        layer = self.model.get_output_embeddings()
        empty, dtype = (layer.weight, layer.bias), layer.weight.dtype
        # soft tokens mean nothing without their picture
        few_tokens = 1 if isinstance(batch, PictureBatch) else _CHECKED_TOKENS
        ids = torch.from_numpy(batch.tokens[:1, :few_tokens]).to(self.device)
        try:
            layer.weight = nn.Parameter(few.weight.to(dtype), requires_grad=False)
            if few.bias is not None:
                layer.bias = nn.Parameter(few.bias.to(dtype), requires_grad=False)
            with passing_through(self.layers):
                compare_head(self.model, few, ids, self.label)
        finally:
            layer.weight, layer.bias = empty

    def _home(self, work: Sequence[Work]) -> str:
        """Where the residual of all batches waits: on the device if it is a small part of what is free there."""
        import torch

        if self.device == "cpu":
            return "cpu"
        weight = final_norm(self.decoder).weight
        size = sum(item.batch.tokens.size for item in work) * weight.numel() * weight.element_size()
        return self.device if _ROOM * size < torch.cuda.mem_get_info(self.device)[0] else "cpu"


def must_stream(weights: Weights, device: str, dtype: str) -> bool:
    """Whether text decoder and head in `dtype` would take more than half of the memory now available on `device`."""
    skeleton = build_skeleton(weights.config)
    places = Places(weights, skeleton, build_module(skeleton, dtype, "sdpa"))
    return 2 * sum(places.nbytes(key) for key in places.keys) > available_bytes(device)


def available_bytes(device: str) -> int:
    """Memory that can be had now: the GPU's free memory, or what the kernel can free and the control group allows."""
    if device != "cpu":
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    lines = Path("/proc/meminfo").read_text().splitlines()
    available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    return min(available, _left_in_control_group(Path("/sys/fs/cgroup")))


def _left_in_control_group(folder: Path) -> int:
    """Bytes below the limit of a version 2 control group, file cache not counted; no limit: a very large number."""
    try:
        limit = int((folder / "memory.max").read_text())
        used = int((folder / "memory.current").read_text())
        cache = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())["file"]
    except (OSError, ValueError, KeyError):  # no such group, or its limit reads "max"
        return 1 << 62
    return max(0, limit - used + int(cache))


def _name(batches: Sequence[Batch], seed: int | None) -> tuple[int | None, ...]:
    return (seed, *map(id, batches))
