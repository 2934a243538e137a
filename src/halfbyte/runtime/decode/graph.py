"""A step recorded as a CUDA graph and replayed: 600 launches for the price of one. On a CPU the step is simply called.

A graph holds addresses, not values: all that changes between replays lies in buffers that never move (cache, state). It is recorded after two
real runs, in which Triton compiles, libraries make their workspaces and kernels choose their variants; afterwards what those runs
changed is put back. Keys and values that they wrote are written again by the first replay.

The catch: with a driver that cannot record one of the model's own operations, recording fails with that operation's error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def on(device: torch.device) -> AbstractContextManager[Any]:
    """While it lasts, kernels are launched on this device: Triton takes the current GPU, not that of its arguments."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


class Recorded:
    """Call it to do a step.

    step     does the work, always on the same tensors
    changed  tensors that a step changes and that must be as before after the warm-up
    pool     of an earlier graph, whose memory for intermediate results may be shared: they never run at once
    """

    def __init__(
        self, step: Callable[[], None], changed: Sequence[torch.Tensor], device: torch.device, pool: Any = None
    ) -> None:
        self.step, self.device = step, device
        self.graph: Any = None
        if device.type == "cuda":
            with on(device):
                self._record(changed, pool)

    def _record(self, changed: Sequence[torch.Tensor], pool: Any) -> None:
        device = self.device
        before = [tensor.clone() for tensor in changed]
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            for _ in range(2):
                self.step()
        torch.cuda.current_stream(device).wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=pool):
            self.step()
        for tensor, value in zip(changed, before, strict=True):
            tensor.copy_(value)

    @property
    def pool(self) -> Any:
        """For the next graph."""
        return None if self.graph is None else self.graph.pool()

    def __call__(self) -> None:
        if self.graph is None:
            self.step()
        else:
            with on(self.device):
                self.graph.replay()
