"""The three intervals: bootstrap-t for means, the same turned around for a quantile, percentile for what is left.

Why these, with the coverage of each, stands in `bootstrap`.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from halfbyte.evaluator.statistics.draws import Draw, Floats
from halfbyte.evaluator.statistics.figures import Elementwise, Figure, Mean, Quantile


@dataclass(frozen=True)
class Estimate:
    """A figure with its uncertainty.

    low, high  limits at `level`; infinite if the documents cannot bound it (fewer than 4, or a bucket in few of them)
    tokens     counted tokens of the smallest cell it is made from
    method     `bootstrap-t`, `inverted bootstrap-t` (one quantile) or `percentile` (a function of quantiles)
    """

    name: str
    point: float
    low: float
    high: float
    standard_error: float
    documents: int
    tokens: int
    level: float
    method: str
    resamples: int

    def as_record(self) -> dict[str, Any]:
        """The same as a dict that strict JSON can hold: an infinite number becomes None."""
        record = asdict(self)
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}


def estimate(draw: Draw, figure: Figure, quantile_resamples: int, level: float) -> Estimate:
    """The figure with the interval that suits it; on the scale that is shown."""
    resamples = len(draw.weights)
    if all(isinstance(statistic, Mean) for statistic in figure.inputs):
        names = [statistic.cell for statistic in figure.inputs]
        sums, counts = (np.stack([table[name] for name in names]) for table in (draw.sums, draw.counts))
        method, found = "bootstrap-t", bootstrap_t(figure.function, sums, counts, draw.weights, level)
    elif figure.is_plain:
        method, found = "inverted bootstrap-t", _quantile_limits(draw, figure.inputs[0], quantile_resamples, level)
    else:
        method, found = "percentile", _percentile(draw, figure, quantile_resamples, level)
        resamples = quantile_resamples
    point, low, high, error = found
    if figure.shown:
        with np.errstate(over="ignore", invalid="ignore"):
            step = 1e-6 * max(1.0, abs(point))
            error *= abs(float(figure.shown(point + step) - figure.shown(point - step))) / (2 * step)
            point, low, high = (float(figure.shown(value)) for value in (point, low, high))
    tokens = min(len(draw.rows[statistic.cell][0]) for statistic in figure.inputs)
    return Estimate(figure.name, point, low, high, error, draw.documents, tokens, level, method, resamples)


def bootstrap_t(
    function: Elementwise, sums: Floats, counts: Floats, weights: Floats, level: float
) -> tuple[float, float, float, float]:
    """(point, low, high, standard error) of function(mean_1, mean_2, ...), mean_j = sums_j over counts_j.

    sums, counts  [inputs, documents]
    weights       [draws, documents]
    returns       the wider of the equal-tailed and the symmetric interval on each side
    """
    n = sums.shape[1]
    here = sums.sum(axis=1, keepdims=True) / counts.sum(axis=1, keepdims=True)  # [inputs, 1]
    with np.errstate(invalid="ignore"):
        there = (sums @ weights.T) / (counts @ weights.T)  # [inputs, draws]
    residuals = sums - here * counts
    # a step far below the spread of the means, and above their rounding
    step = np.maximum(1e-4 * np.nanstd(there, axis=1, keepdims=True), 1e-7 * np.abs(here)) + 1e-300

    def error(means: Floats, times: Floats) -> Floats:
        """[draws]: the linearized standard error in each draw."""
        with np.errstate(invalid="ignore", divide="ignore"):
            gradient = _gradient(function, means, step) / (counts @ times.T)  # [inputs, draws]
            influence = gradient.T @ residuals - (gradient * (means - here)).T @ counts  # [draws, documents]
            spread: Floats = np.sqrt((times * influence**2).sum(axis=1) * n / (n - 1))
        return spread

    point = float(function(*here)[0])
    if n == 1:
        return point, -math.inf, math.inf, math.inf
    own_error = float(error(here, np.ones((1, n)))[0])
    if own_error == 0:
        return point, point, point, 0.0
    with np.errstate(invalid="ignore", divide="ignore"):
        off = function(*there) - point
        scaled = np.where(off == 0, 0.0, off / error(there, weights))
    return point, *_limits(point, own_error, scaled, level), own_error


def _limits(point: float, error: float, scaled: Floats, level: float) -> tuple[float, float]:
    """Limits from t values. One that is not a number (an empty bucket, log of a negative) counts against us, as infinite."""
    tail = (1 - level) / 2
    broken = np.isnan(scaled)
    rank: dict[str, Any] = {"method": "inverted_cdf"}  # picks, never interpolates: inf stays inf
    upper = np.quantile(np.where(broken, np.inf, scaled), 1 - tail, **rank)
    lower = np.quantile(np.where(broken, -np.inf, scaled), tail, **rank)
    both = np.quantile(np.where(broken, np.inf, np.abs(scaled)), level, **rank)
    return point - error * float(max(both, upper)), point + error * float(max(both, -lower))


def _gradient(function: Elementwise, means: Floats, step: Floats) -> Floats:
    """[inputs, draws]: central differences of the figure's function at each draw's means."""
    slopes = np.empty_like(means)
    with np.errstate(invalid="ignore", divide="ignore"):
        for row in range(len(means)):
            up, down = means.copy(), means.copy()
            up[row] += step[row]
            down[row] -= step[row]
            slopes[row] = (function(*up) - function(*down)) / (up[row] - down[row])
    return slopes


def _quantile_limits(
    draw: Draw, statistic: Mean | Quantile, count: int, level: float
) -> tuple[float, float, float, float]:
    """(point, low, high, standard error) of one quantile, through the share of tokens at or below it.

    Woodruff 1952 ("Confidence intervals for medians and other position measures", JASA 47:635-646): that share is a mean,
    so it has a good interval; the values at the interval's ends bound the quantile. A share that reaches 1 leaves the
    quantile unbounded above: too few tokens lie beyond it. So does a quantile that is the largest value met: no document
    varies in the share below it, and that is ignorance, not certainty (unless all values are equal).
    """
    assert isinstance(statistic, Quantile)
    values, index = draw.rows[statistic.cell]
    point = draw.point(statistic)
    below: Floats = np.bincount(index, values <= point, minlength=draw.documents).astype(np.float64)
    share, low, high, unsure = bootstrap_t(
        lambda m: m, below[None], draw.counts[statistic.cell][None], draw.weights, level
    )
    ordered = np.sort(values)
    tokens = len(ordered)
    if unsure == 0 and ordered[0] < ordered[-1]:
        low, high = -math.inf, math.inf
    # around q, not around the observed share: the two differ where values are tied
    low, high = (np.clip(statistic.q + edge - share, 0, 1) * tokens for edge in (low, high))
    first, last = math.ceil(low) - 1, math.floor(high)
    drawn = draw.resampled(statistic, count)
    drawn = drawn[~np.isnan(drawn)]
    spread = float(np.std(drawn, ddof=1)) if draw.documents > 1 and len(drawn) > 1 else math.inf
    return (
        point,
        float(ordered[first]) if first >= 0 else -math.inf,
        float(ordered[last]) if last < tokens else math.inf,
        spread,
    )


def _percentile(draw: Draw, figure: Figure, count: int, level: float) -> tuple[float, float, float, float]:
    """(point, low, high, standard error), the plain percentile interval: for functions that hold a quantile."""
    point = float(figure.function(*(np.array([draw.point(s)]) for s in figure.inputs))[0])
    if draw.documents == 1:
        return point, -math.inf, math.inf, math.inf
    values = np.asarray(figure.function(*(draw.resampled(s, count) for s in figure.inputs)))
    tail, broken = (1 - level) / 2, np.isnan(values)
    low = np.quantile(np.where(broken, -np.inf, values), tail, method="inverted_cdf")
    high = np.quantile(np.where(broken, np.inf, values), 1 - tail, method="inverted_cdf")
    spread = float(np.std(values[~broken], ddof=1)) if (~broken).sum() > 1 else math.inf
    return point, float(low), float(high), spread
