"""What may be asked of a bootstrap: named figures, made of means and quantiles of cells; and the 2 x 2 of base and precision.

A `Figure` is a function of statistics, each of one cell. The function sees arrays (one entry a resample) and must work
element by element, which plain arithmetic and numpy's functions do. Some figures are exponentials (perplexity): their
interval is made on the inner scale, where the figure is nearly normal, and carried over by `shown`.

    mean("kld", "nf4")                             mean over tokens
    difference("dNLL", "nf4", "bf16")              mean(nf4) - mean(bf16), paired
    perplexity("ppl", "bf16")                      exp(mean of NLL)
    perplexity_ratio("ratio", "nf4", "bf16")       exp(difference of NLL)
    quantile("p99", "nf4", 0.99)                   quantile over tokens
    Figure("rms", (Mean("squared"),), np.sqrt)     anything else

The 2 x 2 (`two_by_two`), m being a metric and B a base:

    D(B) = m(B, NF4) - m(B, bf16)          what quantization costs this base
    T    = m(QAT, bf16) - m(vanilla, bf16) what QAT training did, before any quantization
    I    = D(QAT) - D(vanilla)             does QAT make quantization cheaper? Only this answers it

A divergence (KLD from the base's own bf16) is already a difference: m(B, bf16) is 0 by definition, and there is no T.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import numpy as np

from halfbyte.errors import UsageError

#: element-wise: arrays of equal length in, one array of that length out
Elementwise = Callable[..., Any]
BASES = ("vanilla", "QAT")
PRECISIONS = ("bf16", "NF4")


@dataclass(frozen=True)
class Mean:
    """Mean over the counted tokens of a cell: sum of the documents' sums over sum of their counts."""

    cell: str


@dataclass(frozen=True)
class Quantile:
    """The q-quantile of a cell's counted tokens (0 < q < 1): the smallest value that a share q does not exceed."""

    cell: str
    q: float

    def __post_init__(self) -> None:
        if not 0 < self.q < 1:
            raise UsageError(f"a quantile lies between 0 and 1, not at {self.q}", todo="0.5 is the median")


@dataclass(frozen=True)
class Figure:
    """A named number: shown(function(*inputs)).

    function  element-wise, one argument an input, smooth where the data lie
    shown     increasing and element-wise, or None: the scale a reader sees (np.exp for a perplexity)
    """

    name: str
    inputs: tuple[Mean | Quantile, ...]
    function: Elementwise
    shown: Elementwise | None = None

    @property
    def is_plain(self) -> bool:
        """Whether it is one statistic, unchanged."""
        return self.function is _same


def mean(name: str, cell: str) -> Figure:
    """Mean over tokens."""
    return Figure(name, (Mean(cell),), _same)


def difference(name: str, cell: str, reference: str) -> Figure:
    """mean(cell) - mean(reference), over the same documents."""
    return Figure(name, (Mean(cell), Mean(reference)), _minus)


def perplexity(name: str, nll: str) -> Figure:
    """exp of the mean NLL (nats)."""
    return Figure(name, (Mean(nll),), _same, np.exp)


def perplexity_ratio(name: str, nll: str, reference_nll: str) -> Figure:
    """Perplexity over the reference's perplexity: exp of the difference of mean NLLs."""
    return Figure(name, (Mean(nll), Mean(reference_nll)), _minus, np.exp)


def quantile(name: str, cell: str, q: float) -> Figure:
    """The q-quantile over tokens."""
    return Figure(name, (Quantile(cell, q),), _same)


def effects_of_two_by_two(
    measured: Collection[tuple[str, str]], *, divergence: bool = False, of: Callable[[str], Mean | Quantile] = Mean
) -> list[Figure]:
    """The effects D(vanilla), D(QAT), T and I that the measured (base, precision) cells allow, over cells named `base precision`.

    divergence  bf16 cells are 0 by definition: they may not be given, and there is no T
    of          the statistic that is taken of each cell
    raises      UsageError (unknown cell, or a bf16 cell of a divergence)
    """
    for base, precision in measured:
        if base not in BASES or precision not in PRECISIONS:
            raise UsageError(f"no such cell: {base}, {precision}", todo=f"bases {BASES}, precisions {PRECISIONS}")
        if divergence and precision == "bf16":
            raise UsageError(
                f"a divergence is measured from {base}'s bf16, which is 0 by definition", todo="leave that cell out"
            )
    # what each effect adds and takes away: (base, precision) -> +1 or -1
    effects = {
        "D(vanilla)": {("vanilla", "NF4"): 1, ("vanilla", "bf16"): -1},
        "D(QAT)": {("QAT", "NF4"): 1, ("QAT", "bf16"): -1},
        "T": {("QAT", "bf16"): 1, ("vanilla", "bf16"): -1},
        "I": {("QAT", "NF4"): 1, ("QAT", "bf16"): -1, ("vanilla", "NF4"): -1, ("vanilla", "bf16"): 1},
    }
    figures = []
    for name, signs in effects.items():
        kept = {key: sign for key, sign in signs.items() if not (divergence and key[1] == "bf16")}
        if kept and all(key in measured for key in kept):
            inputs = tuple(of(" ".join(key)) for key in kept)
            figures.append(Figure(name, inputs, _signed_sum(tuple(kept.values()))))
    return figures


def _same(value: Any) -> Any:
    return value


def _minus(value: Any, reference: Any) -> Any:
    return value - reference


def _signed_sum(signs: tuple[int, ...]) -> Elementwise:
    def total(*values: Any) -> Any:
        return sum(sign * value for sign, value in zip(signs, values, strict=True))

    return total
