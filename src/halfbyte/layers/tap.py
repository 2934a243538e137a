"""Listening to the residual stream while a model runs: what enters the first layer, what leaves each.

One Protocol for both ways of running (`model`, `streaming`), so that whoever compares streams (halfbyte.evaluator.scoring.residuals)
does so in a pass that is made anyway, and no weight is read twice for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch


class Tap(Protocol):
    """Is told the residual stream as a model runs."""

    def note(self, point: int, batch: int, seed: int | None, states: torch.Tensor) -> None:
        """`states` [rows, length, hidden] at `point` of batch number `batch`, in the pass with this noise seed."""
        ...


@contextmanager
def tapping(layers: Sequence[Any], tap: Tap | None, batch: int, seed: int | None) -> Iterator[None]:
    """`tap` is told what enters the first of `layers` and what leaves each, inside; the final norm is the caller's to tell."""
    if tap is None:
        yield
        return

    def entered(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tap.note(0, batch, seed, args[0] if args else kwargs["hidden_states"])

    def left(point: int) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            tap.note(point, batch, seed, output[0] if isinstance(output, tuple) else output)

        return hook

    with ExitStack() as stack:
        first = layers[0].register_forward_pre_hook(entered, with_kwargs=True)
        stack.callback(first.remove)
        for number, layer in enumerate(layers):
            stack.callback(layer.register_forward_hook(left(number + 1)).remove)
        yield
