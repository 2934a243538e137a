"""One optimizer step; and the same step recorded once as a CUDA graph and replayed.

A step of a small model is a few thousand kernels of a few microseconds each: the CPU that launches them is what takes the
time (5.4 M weights on an H100: 140 ms a step, whatever the batch). A CUDA graph launches all of them at once. What a graph
asks for in return: every tensor stays where it is and keeps its shape, and nothing in the step may wait for the GPU (no
`.item()`, no boolean indexing, no mask whose size is data). So it is for models whose forward pass was written or checked for
that; batches of another shape than the recorded one take the plain path.

The first steps run plainly (they are real steps, and they set up the optimizer's state and the libraries' workspaces); then one
is recorded. Recording runs nothing, so the recorded step is replayed at once for the batch that it was recorded with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from torch import nn

from halfbyte.trainer.losses import Batch

Micro = list[tuple[float, Batch]]
_PLAIN_STEPS = 3


@dataclass
class Step:
    """Gradients of the weighted micro-batches, clipped, one optimizer step.

    precision    makes the context of each forward pass (autocast, or nothing)
    before_step  called before each step's first forward pass
    """

    parameters: Mapping[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    loss_of: Callable[[Batch], torch.Tensor]
    clip: float
    precision: Callable[[], AbstractContextManager[object]]
    before_step: Callable[[], None]

    def __call__(self, micro: Micro) -> torch.Tensor:
        """Take the step; returns the weighted loss as a tensor of no dimensions, not waited for."""
        total = self.run(micro)
        self.optimizer.zero_grad(set_to_none=True)
        return total

    def run(self, micro: Micro) -> torch.Tensor:
        self.before_step()
        total = torch.zeros((), device=next(iter(self.parameters.values())).device)
        for weight, batch in micro:
            with self.precision():
                loss = self.loss_of(batch) * weight
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        nn.utils.clip_grad_norm_(self.parameters.values(), self.clip)
        self.optimizer.step()
        return total


@dataclass
class GraphedStep(Step):
    """The same, recorded. The optimizer must be `capturable`, with its learning rate in a tensor."""

    _plain: int = 0
    _graph: torch.cuda.CUDAGraph | None = None
    _inputs: Micro = field(default_factory=list)
    _total: torch.Tensor | None = None

    def __call__(self, micro: Micro) -> torch.Tensor:
        if self._plain < _PLAIN_STEPS:
            self._plain += 1
            return self._beside(micro)
        if self._graph is None:
            self._record(micro)
        if _shapes(micro) != _shapes(self._inputs):
            return super().__call__(micro)
        for (_, static), (_, batch) in zip(self._inputs, micro, strict=True):
            for name, tensor in static.items():
                tensor.copy_(batch[name])
        assert self._graph is not None
        assert self._total is not None
        self._graph.replay()
        return self._total.clone()

    def _beside(self, micro: Micro) -> torch.Tensor:
        """A plain step on a stream of its own, as recording will be."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            total = super().__call__(micro)
        torch.cuda.current_stream().wait_stream(stream)
        return total

    def _record(self, micro: Micro) -> None:
        self._inputs = [(weight, {name: tensor.clone() for name, tensor in batch.items()}) for weight, batch in micro]
        self.optimizer.zero_grad(set_to_none=True)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._total = self.run(self._inputs)


def _shapes(micro: Micro) -> list[tuple[float, dict[str, tuple[int, ...]]]]:
    return [(weight, {name: tuple(tensor.shape) for name, tensor in batch.items()}) for weight, batch in micro]
