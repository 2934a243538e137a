"""Cells by document, and the one draw of documents that every figure shares.

Drawing documents with replacement is the same as weighting each by how often it came up, so a draw is a row of whole
numbers, and the sums of all draws are one matrix product with the sums by document. Quantiles are not sums: the tokens
are sorted once, and each draw's weights are accumulated along that order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from halfbyte.errors import ShapeMismatch, UsageError
from halfbyte.evaluator.statistics.figures import Mean, Quantile

Floats = NDArray[np.float64]
#: elements of a block of expanded weights while quantiles are taken (int32: 32 MiB)
BLOCK_ELEMENTS = 1 << 23


@dataclass(frozen=True)
class Cell:
    """One model measured under one protocol: a value a token.

    values     [tokens], finite; e.g. KLD in nats, NLL in nats, 0/1 for top-1 agreement
    documents  [tokens], any integer ids; the same document has the same id in every cell
    where      [tokens] of bool or None: which tokens count (a bucket). A document with none stays a document.

    Cells may have different rows (two bases wrote their own answers to the same prompts), but the same documents.
    """

    values: ArrayLike
    documents: ArrayLike
    where: ArrayLike | None = None


class Draw:
    """The cells by document, and the weights that every figure shares."""

    def __init__(self, cells: Mapping[str, Cell], resamples: int, seed: int) -> None:
        self.ids: NDArray[Any] | None = None
        self.rows: dict[str, tuple[Floats, NDArray[np.intp]]] = {}
        self.sums: dict[str, Floats] = {}
        self.counts: dict[str, Floats] = {}
        for name, cell in cells.items():
            self._add(name, cell)
        assert self.ids is not None
        n = len(self.ids)
        self.documents: int = n
        picks = np.random.default_rng(seed).integers(0, n, size=(resamples, n))
        picks += n * np.arange(resamples)[:, None]
        times = np.bincount(picks.ravel(), minlength=resamples * n).reshape(resamples, n)
        self.weights: Floats = times.astype(np.float64)
        self._quantiles: dict[tuple[Quantile, int], Floats] = {}

    def _add(self, name: str, cell: Cell) -> None:
        values, documents = np.asarray(cell.values, np.float64), np.asarray(cell.documents)
        where = np.ones(values.shape, bool) if cell.where is None else np.asarray(cell.where)
        if values.ndim != 1 or values.shape != documents.shape or values.shape != where.shape or where.dtype != bool:
            raise ShapeMismatch(
                f"values {values.shape}, documents {documents.shape}, where {where.shape} of {where.dtype}",
                where=f"cell {name}",
                todo="give one value, one document id and one bool a token",
            )
        ids, index = np.unique(documents, return_inverse=True)
        if self.ids is not None and not np.array_equal(ids, self.ids):
            raise ShapeMismatch(
                f"has {len(ids)} documents that are not the {len(self.ids)} of the others",
                where=f"cell {name}",
                todo="score all cells on the same documents; without that nothing is paired",
            )
        self.ids = ids
        values, index = values[where], index[where]
        if not len(values) or not np.isfinite(values).all():
            raise UsageError(
                "holds NaN or infinity" if len(values) else "has no tokens to count", where=f"cell {name}",
                todo="print it as not measured",
            )  # fmt: skip
        self.rows[name] = values, index
        self.sums[name] = np.bincount(index, values, minlength=len(ids)).astype(np.float64)
        self.counts[name] = np.bincount(index, minlength=len(ids)).astype(np.float64)

    def point(self, statistic: Mean | Quantile) -> float:
        """The statistic over all documents, each once."""
        if isinstance(statistic, Mean):
            return float(self.sums[statistic.cell].sum() / self.counts[statistic.cell].sum())
        return float(weighted_quantile(*self.rows[statistic.cell], statistic.q, np.ones((1, self.documents)))[0])

    def resampled(self, statistic: Mean | Quantile, count: int) -> Floats:
        """The statistic in the first `count` draws; NaN where a draw has no token of the cell."""
        weights = self.weights[:count]
        if isinstance(statistic, Mean):
            with np.errstate(invalid="ignore"):
                means: Floats = (weights @ self.sums[statistic.cell]) / (weights @ self.counts[statistic.cell])
            return means
        if (statistic, count) not in self._quantiles:
            taken = weighted_quantile(*self.rows[statistic.cell], statistic.q, weights)
            self._quantiles[statistic, count] = taken
        return self._quantiles[statistic, count]


def weighted_quantile(values: Floats, index: NDArray[np.intp], q: float, weights: Floats) -> Floats:
    """[draws]: the smallest value v such that the tokens <= v carry at least a share q of a draw's weight.

    values, index  [tokens]: value and document (0 .. documents-1)
    weights        [draws, documents], whole numbers: how often each document was drawn
    returns        NaN for a draw without tokens; numpy's `inverted_cdf` over the drawn tokens written out
    """
    order = np.argsort(values, kind="stable")
    ordered, owner = values[order], index[order]
    block = max(1, BLOCK_ELEMENTS // len(ordered))
    found: Floats = np.empty(len(weights))
    for begin in range(0, len(weights), block):
        share: NDArray[np.int32] = weights[begin : begin + block].astype(np.int32)[:, owner]
        np.cumsum(share, axis=1, out=share)
        total = share[:, -1]
        # q * total may miss a whole number by an ulp: 0.07 * 100 is 7.000000000000001
        target = np.maximum(np.ceil(q * total * (1 - 1e-12)), 1)
        first = (share < target[:, None]).sum(axis=1)
        drawn: Floats = np.where(total > 0, ordered[np.minimum(first, len(ordered) - 1)], np.nan)
        found[begin : begin + block] = drawn
    return found
