"""What steps carry from one to the next, in buffers that never move: a recorded graph knows only addresses.

    history  every row's text, prompt and answer, as token ids
    length   how many of them are known; the last one has not been through the model yet
    limit    the length at which a row ends
    done     rows that ended, by a stop token or by the limit: they go on computing, but nothing of theirs moves

A step feeds history[length - 1] (and drafts of what may follow), writes keys and values at position length - 1, and appends
what it chose (halfbyte.runtime.decode.kernels.append): positions advance on the device, the host only reads. All starts with the prompt less its last token in the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from halfbyte.errors import UsageError
from halfbyte.runtime.decode.cache import SPARE
from halfbyte.runtime.decode.sampling import uniforms

MOST_STOPS = 16


@dataclass(frozen=True)
class State:
    """history int64 [rows, width], length, limit, steps int64 [rows], done bool [rows], stops int64 [16], u float64 [rows, width]."""

    history: torch.Tensor
    length: torch.Tensor
    limit: torch.Tensor
    done: torch.Tensor
    steps: torch.Tensor
    stops: torch.Tensor
    u: torch.Tensor

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Everything that a step changes."""
        return self.history, self.length, self.done, self.steps


def new_state(rows: int, capacity: int, device: torch.device) -> State:
    """Buffers for `rows` texts of up to `capacity` tokens."""
    width = capacity + 2 * SPARE

    def numbers(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.int64, device=device)

    return State(
        numbers(rows, width), numbers(rows) + 1, numbers(rows) + 1, torch.ones(rows, dtype=torch.bool, device=device),
        numbers(rows), numbers(MOST_STOPS) - 1, torch.zeros(rows, width, dtype=torch.float64, device=device),
    )  # fmt: skip


def begin(state: State, prompts: Sequence[Sequence[int]], new: int, stops: Sequence[int], seed: int) -> None:
    """Fill the buffers for new texts.

    new     tokens to add to each, at most
    raises  UsageError if they do not fit
    """
    rows, width = state.history.shape
    longest = max(map(len, prompts))
    if len(prompts) != rows or longest + new > width - 2 * SPARE or min(map(len, prompts)) < 1 or new < 1:
        raise UsageError(
            f"{len(prompts)} prompts of up to {longest} tokens and {new} more do not fit",
            where=f"{rows} rows of {width - 2 * SPARE} tokens",
            todo="give at least one token a prompt, or make a decoder of that size",
        )
    if len(stops) > MOST_STOPS:
        raise UsageError(f"{len(stops)} stop tokens are too many", todo=f"give at most {MOST_STOPS}")
    padded = torch.tensor([[*prompt, *[0] * (width - len(prompt))] for prompt in prompts])
    state.history.copy_(padded)
    length = torch.tensor([len(prompt) for prompt in prompts])
    state.length.copy_(length)
    state.limit.copy_(length + new)
    state.done.zero_()
    state.steps.zero_()
    state.stops.copy_(torch.tensor([*stops, *[-1] * (MOST_STOPS - len(stops))]))
    state.u.copy_(uniforms(rows, width, seed))
