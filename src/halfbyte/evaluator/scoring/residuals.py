"""Where the loss enters: how far the residual stream has drifted from the reference's after the embedding, every layer, the final norm.

    SQNR = 10 log10( sum |h|^2 / sum |h - h'|^2 )  dB      h of the reference, h' of the candidate, over the same positions

A layer's weights say how much was rounded there, the residual says what came of it: errors add up, cancel, are damped by a norm
or blown up by one large channel. Pooled over the positions, padding left out.

Pooled alone it misleads. Many models park a huge activation at their first token: in SmolLM2-135M one position of 23 holds 99.9 % of
the energy behind layer 11, which lifts the pooled figure of an NF4 from 14.7 to 24.2 dB there and drops it again by 9 dB where
the model takes it back, while the other positions decline steadily from 19.5 to 8.3 dB. So each position's own SQNR is taken too, and
its median is what sentences and drawings speak of.

It is taken in the pass that is scored anyway: both kinds of model tell a `Tap` what the stream is at each point, and no weight
is read twice. The reference's states are kept for a *sample*: the first rows, cut where SAMPLE_BYTES or SAMPLE_POSITIONS are full
(a 31B in bf16: 805 positions), so memory does not grow with the rows, nor with the layers.

    point 0   behind the embedding, as the first layer is given it
    point k   behind layer k - 1, for k = 1 ... layers
    last      behind the final norm, what the head sees

Sums are float64, of each batch by itself and then of the batches, so that layer by layer gives the bits of the whole.
The catch: with pictures or without, positions of the prompt count like those of the answer.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from halfbyte.layers.rows import Rows
from halfbyte.layers.tap import Tap

if TYPE_CHECKING:
    import numpy as np
    import torch

SAMPLE_POSITIONS, SAMPLE_BYTES = 2048, 512 << 20


@runtime_checkable
class Tapped(Protocol):
    """A model that can be tapped: `tap` may be set before a pass; `decoder` is the text decoder's module."""

    tap: Tap | None
    decoder: Any


def shape_of(model: Tapped) -> tuple[int, int]:
    """(points, width) of a model's residual stream."""
    config = model.decoder.config
    return int(config.num_hidden_layers) + 2, int(config.hidden_size)


class Sample:
    """Which positions are compared: per batch, (row in the batch, how many of its first positions).

    rows, positions  how many of each
    """

    def __init__(self, rows: Rows, batch: int, shape: tuple[int, int], itemsize: int) -> None:
        points, width = shape
        room = max(1, min(SAMPLE_POSITIONS, SAMPLE_BYTES // (points * width * itemsize)))
        taken: dict[int, int] = {}
        for row, ids in enumerate(rows.tokens):
            if room:
                taken[row] = min(len(ids), room)
                room -= taken[row]
        self.places = [
            [(at, taken[int(row)]) for at, row in enumerate(chosen) if int(row) in taken]
            for chosen in rows.order(batch)
        ]
        self.rows, self.positions = len(taken), sum(taken.values())

    def take(self, batch: int, states: torch.Tensor) -> torch.Tensor:
        """[positions of the batch, hidden], on the CPU."""
        import torch

        return torch.cat([states[at, :count] for at, count in self.places[batch]]).cpu()


class _Sums:
    """Signal and noise by point and batch; a batch noted twice counts once."""

    def __init__(self) -> None:
        self._found: dict[int, dict[int, tuple[float, float]]] = {}
        self._ratios: dict[int, dict[int, np.ndarray]] = {}

    def add(self, point: int, batch: int, mine: torch.Tensor, theirs: torch.Tensor) -> None:
        h = mine.double()
        signal, noise = h.square().sum(dim=1), (h - theirs.double()).square().sum(dim=1)
        self._found.setdefault(point, {})[batch] = float(signal.sum()), float(noise.sum())
        same = noise == 0  # also where the signal is 0 too
        self._ratios.setdefault(point, {})[batch] = (noise / signal).masked_fill(same, 0.0).numpy()

    def arrays(self, sample: Sample) -> dict[str, np.ndarray]:
        """{"signal", "noise", "median"}: float64, an entry a point; {"sample"}: rows and positions.

        median  over positions, of each one's noise over its signal (the lower of two middle ones; NaN if any is)
        """
        import numpy as np

        points = [[self._found[point][batch] for batch in sorted(self._found[point])] for point in sorted(self._found)]
        return {
            "signal": np.array([math.fsum(signal for signal, _ in sums) for sums in points]),
            "median": np.array(
                [_median(np.concatenate(list(self._ratios[point].values()))) for point in sorted(self._found)]
            ),
            "noise": np.array([math.fsum(noise for _, noise in sums) for sums in points]),
            "sample": np.array([sample.rows, sample.positions], np.int64),
        }


def _median(ratios: np.ndarray) -> float:
    import numpy as np

    return float(np.quantile(ratios, 0.5, method="inverted_cdf")) if not np.isnan(ratios).any() else math.nan


class KeptResiduals:
    """The reference's side: keeps the plain pass's states, compares the noisy pass with them. A Tap."""

    def __init__(self, sample: Sample, shape: tuple[int, int]) -> None:
        self.sample, self.shape = sample, shape
        self.states: dict[tuple[int, int], torch.Tensor] = {}
        self._floor = _Sums()

    def note(self, point: int, batch: int, seed: int | None, states: torch.Tensor) -> None:
        if not self.sample.places[batch]:
            return
        found = self.sample.take(batch, states)
        if seed is None:
            self.states[point, batch] = found
        else:
            self._floor.add(point, batch, self.states[point, batch], found)

    def floor(self) -> dict[str, np.ndarray]:
        """As `ResidualErrors.arrays`, of the reference with noise; empty arrays if there was no such pass."""
        return self._floor.arrays(self.sample)


class ResidualErrors:
    """A candidate's side: compares as the model runs, and keeps nothing but sums. A Tap."""

    def __init__(self, kept: KeptResiduals) -> None:
        self.kept = kept
        self._sums = _Sums()

    def note(self, point: int, batch: int, seed: int | None, states: torch.Tensor) -> None:
        if self.kept.sample.places[batch]:
            self._sums.add(point, batch, self.kept.states[point, batch], self.kept.sample.take(batch, states))

    def arrays(self) -> dict[str, np.ndarray]:
        return self._sums.arrays(self.kept.sample)
