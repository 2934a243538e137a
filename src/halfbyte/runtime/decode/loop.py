"""`decode`: tokens of a transformers model as they come, the whole step recorded once.

    for new in decode(model, inputs, max_new_tokens=200):     # new[row]: that row's tokens since the last time
        ...

    decoder = Decoder(model, rows=8, capacity=4096)           # kept, it records its graphs only once
    for new in decoder.tokens(inputs, 200, speculate=7):
        ...
    decoder.report                                            # steps, acceptance, seconds

The host asks for `every` steps, then has the new tokens copied beside the next `every`, so the GPU never waits for it; a row that ended within them
has computed for nothing, a few milliseconds.

Equal to transformers' greedy `generate`, token by token, wherever the two largest logits are further apart than the rounding of the two ways to
sum: in float32 everywhere we looked, in bf16 up to ties of logits, where either may win.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from halfbyte.errors import UsageError
from halfbyte.runtime.decode.assistant import draft_by, read_assistant, remember
from halfbyte.runtime.decode.cache import SPARE, cache_bytes, new_cache
from halfbyte.runtime.decode.description import Description, describe
from halfbyte.runtime.decode.graph import Recorded, on
from halfbyte.runtime.decode.kernels.append import append
from halfbyte.runtime.decode.prompt import CHUNK, fill, fill_by_model
from halfbyte.runtime.decode.sampling import Sampling, choose, seen_before
from halfbyte.runtime.decode.speculation import draft
from halfbyte.runtime.decode.state import State, begin, new_state
from halfbyte.runtime.decode.step import head, hidden_behind

Tokens = list[list[int]]


def decode(
    model: Any,
    inputs: Mapping[str, Any],
    max_new_tokens: int = 256,
    *,
    sampling: Sampling | None = None,
    speculate: int = 0,
    assistant: Any = None,
    stops: Sequence[int] | None = None,
) -> Iterator[Tokens]:
    """New tokens of each row, a list of lists at a time, until every row has ended. Arguments as of `Decoder` and its `tokens`.

    raises  NotDescribed for a model it does not know, UsageError for inputs that cannot be
    """
    prompts = prompts_of(inputs)
    capacity = max(map(len, prompts)) + max_new_tokens
    yield from Decoder(model, len(prompts), capacity, assistant).tokens(
        inputs, max_new_tokens, sampling=sampling, speculate=speculate, stops=stops
    )


def prompts_of(inputs: Mapping[str, Any]) -> Tokens:
    """The rows of input_ids [rows, n] without their padding. raises UsageError for none"""
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    if ids.dim() != 2 or ids.numel() == 0:
        raise UsageError(f"input_ids of {list(ids.shape)} are no prompts", where="input_ids")
    rows = ids.tolist()
    if mask is None:
        return rows  # type: ignore[no-any-return]
    return [
        [i for i, real in zip(row, kept, strict=True) if real] for row, kept in zip(rows, mask.tolist(), strict=True)
    ]


class Decoder:
    """A model with a cache of its own, ready for texts of up to `capacity` tokens in `rows` rows.

    assistant  Gemma 4's, to draft instead of looking up
    report     of the last texts: tokens, steps, acceptance, seconds
    raises     NotDescribed for a model it does not know
    """

    def __init__(self, model: Any, rows: int = 1, capacity: int = 4096, assistant: Any = None) -> None:
        self.description: Description = describe(model)
        self.rows, self.capacity = rows, capacity
        self.cache = new_cache(self.description, rows, capacity)
        self.state = new_state(rows, capacity, self.description.device)
        self.assistant = None if assistant is None else read_assistant(assistant, self.description, rows)
        self.report: dict[str, Any] = {}
        self._recorded: dict[tuple[int, Sampling], Recorded] = {}

    @property
    def cache_bytes(self) -> int:
        """Bytes of keys and values."""
        return cache_bytes(self.description, self.rows, self.capacity)

    @torch.inference_mode()
    def prepare(self, speculate: int = 0, sampling: Sampling | None = None) -> None:
        """Record the step before it is needed, so that the first text does not wait for it."""
        self._step(speculate + 1, sampling or Sampling())

    @torch.inference_mode()
    def tokens(
        self,
        inputs: Mapping[str, Any],
        max_new_tokens: int = 256,
        *,
        sampling: Sampling | None = None,
        speculate: int = 0,
        stops: Sequence[int] | None = None,
        every: int = 8,
    ) -> Iterator[Tokens]:
        """New tokens of each row since the last time; a stop token is the last of its row.

        inputs     input_ids [rows, n] and attention_mask; for one row pixels as well, as a processor gives them
        speculate  drafts a step, up to 15; the text is the same: bit by bit while rows * (drafts + 1) <= 16, beyond that up to ties
        stops      token ids that end a row; None: the model's own
        every      steps between two looks of the host
        """
        if not 0 <= speculate < SPARE:
            raise UsageError(f"cannot draft {speculate} tokens", where="speculate", todo=f"give 0 to {SPARE - 1}")
        prompts = prompts_of(inputs)
        sampling = sampling or Sampling()
        begin(
            self.state,
            prompts,
            max_new_tokens,
            own_stops(self.description.model) if stops is None else stops,
            sampling.seed,
        )
        if self.assistant is not None:
            self.assistant.hidden.zero_()
        start = time.perf_counter()
        with on(self.description.device):
            if self._through_model(inputs):
                fill_by_model(self.description, self.cache, inputs)
            else:
                fill(self.description, self.cache, prompts, CHUNK)
        step = self._step(speculate + 1, sampling)
        self._wait()
        began = time.perf_counter()
        yield from self._stream(step, speculate + 1, every)
        self._write_report(prompts, speculate, began - start, time.perf_counter() - began)

    def _through_model(self, inputs: Mapping[str, Any]) -> bool:
        """Whether the prompt holds more than text."""
        ids = inputs["input_ids"]
        stands = any(bool((ids == number).any()) for number in self.description.stand_ins)
        return stands or any(name.startswith(("pixel_values", "input_features")) for name in inputs)

    def _step(self, width: int, sampling: Sampling) -> Recorded:
        """The step for `width` new tokens a row, recorded at its first use. The seed is in the table of u, not in the step."""
        key = (width, replace(sampling, seed=0))
        if key not in self._recorded:
            pool = next((recorded.pool for recorded in self._recorded.values()), None)
            step = self._work(width, sampling)
            changed = self.state.tensors if self.assistant is None else (*self.state.tensors, self.assistant.hidden)
            self._recorded[key] = Recorded(step, changed, self.description.device, pool)
        return self._recorded[key]

    def _work(self, width: int, sampling: Sampling) -> Callable[[], None]:
        description, cache, state, assistant = self.description, self.cache, self.state, self.assistant
        at = torch.arange(width, device=description.device)

        def step() -> None:
            drafts = assistant is not None and width > 1
            fed = draft_by(assistant, description, cache, state, width) if drafts else draft(state, width)  # type: ignore[arg-type]
            before = state.length.clone() if assistant is not None else state.length
            hidden = hidden_behind(description, cache, fed, state.length - 1)
            logits = head(description, hidden)
            seen = None
            if sampling.repetition_penalty != 1:
                seen = seen_before(state.history, state.length, fed, logits.shape[-1])
            u = state.u.gather(1, state.length[:, None] + at).reshape(-1) if sampling.do_sample else None
            append(state, fed, choose(logits, sampling, u, seen).view(fed.shape))
            if assistant is not None:
                remember(assistant, state, before, hidden)

        return step

    def _stream(self, step: Recorded, width: int, every: int) -> Iterator[Tokens]:
        """Steps until all rows are done; the first alone, for the sake of the first token."""
        reader = _Reader(self.state, width * every)
        on_gpu = self.description.device.type == "cuda"
        done = False
        waiting: list[Any] = []
        block = 1
        while not done:
            for _ in range(block):
                step()
            waiting.append(reader.note())
            if not on_gpu or len(waiting) > 1 or block == 1:
                new, done = reader.read(waiting.pop(0))
                if any(new):
                    yield new
            block = every if on_gpu else 1

    def _wait(self) -> None:
        if self.description.device.type == "cuda":
            torch.cuda.synchronize(self.description.device)

    def _write_report(self, prompts: Tokens, speculate: int, before: float, seconds: float) -> None:
        lengths, steps = self.state.length.tolist(), self.state.steps.tolist()
        new = sum(lengths) - sum(map(len, prompts))
        drafted = speculate * sum(steps)
        self.report = {
            "rows": self.rows,
            "prompt_tokens": sum(map(len, prompts)),
            "new_tokens": new,
            "steps": max(steps),
            "drafted": drafted,
            "accepted": new - sum(steps),
            "acceptance": round((new - sum(steps)) / drafted, 4) if drafted else None,
            "seconds_before_first_step": round(before, 4),
            "seconds": round(seconds, 4),
            "tokens_per_second": round(new / seconds, 2),
            "cache_bytes": self.cache_bytes,
        }


def own_stops(model: Any) -> list[int]:
    """Token ids at which the model's generation config ends a text."""
    stop = model.generation_config.eos_token_id if model.generation_config else None
    return [] if stop is None else [stop] if isinstance(stop, int) else list(stop)


class _Reader:
    """Copies what is new to the host without stopping the GPU: two pinned buffers, taken in turn."""

    def __init__(self, state: State, window: int) -> None:
        self.state = state
        pinned = state.length.is_cuda
        rows = len(state.length)
        self.ahead = torch.arange(window, device=state.length.device)
        self.read_at = state.length.clone()
        self.buffers = [torch.zeros(rows, window + 3, dtype=torch.int64, pin_memory=pinned) for _ in range(2)]
        self.notes = 0

    def note(self) -> tuple[torch.Tensor, Any]:
        """Ask for the tokens since the last note: a buffer, and the event after which it is filled."""
        state = self.state
        place = (self.read_at[:, None] + self.ahead).clamp_max(state.history.shape[1] - 1)
        fresh = torch.cat(
            [self.read_at[:, None], state.length[:, None], state.done[:, None].long(), state.history.gather(1, place)],
            dim=1,
        )
        buffer = self.buffers[self.notes % 2]
        self.notes += 1
        buffer.copy_(fresh, non_blocking=True)
        self.read_at.copy_(state.length)
        event = None
        if state.length.is_cuda:
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(state.length.device))
        return buffer, event

    def read(self, note: tuple[torch.Tensor, Any]) -> tuple[Tokens, bool]:
        """(new tokens of each row, whether all rows are done)."""
        buffer, event = note
        if event is not None:
            event.synchronize()
        rows = buffer.tolist()
        return [row[3 : 3 + row[1] - row[0]] for row in rows], all(row[2] for row in rows)
