"""Intervals for figures over tokens, where the *document* is the unit: one joint paired bootstrap.

Tokens of one document rise and fall together, so 30,000 tokens from 80 documents are 80 observations with some detail
inside, not 30,000. Documents are therefore drawn with replacement, whole, and one draw is used for every cell: what is
hard in a document is hard for all models, and cancels in their difference.

A draw is a row of weights w, the number of times each document came up. With s and c a document's sum and count,

    mean over tokens   m(w) = sum_d w_d s_d / sum_d w_d c_d          two matrix products for all draws at once
    figure             theta(w) = f(m_1(w), m_2(w), ...)             a difference, a perplexity, an interaction
    its influence      u_d = sum_j df/dm_j * (s_jd - m_j c_jd) / C_j with C_j = sum_d w_d c_jd
    standard error     se(w)^2 = n/(n-1) * sum_d w_d u_d^2           (linearization)

Which interval. All were tried on synthetic documents with known truth: lognormal document means (sigma below) and lengths
(sigma 0.8, about 100 tokens), gamma noise inside; the difference is paired. Percent of 800 experiments whose 95 %
interval held the truth, 2,000 draws each (SmolLM2's NF4 KLD over 100 answers has sigma near 0.5):

                                  percentile   BCa   t, linearized   bootstrap-t   symmetric   this one
    n = 20,  sigma 0.5  mean         89.0      87.9       89.6           91.4         93.0        93.9
                        difference   88.5      85.8       89.5           90.9         93.5        94.4
    n = 20,  sigma 1.0  mean         82.2      82.1       81.8           89.6         88.0        90.8
                        difference   84.5      80.1       89.4           86.2         93.9        94.0
    n = 100, sigma 0.5  mean         93.1      91.4       93.0           93.8         93.9        94.5
                        difference   91.9      90.8       92.4           92.4         94.0        94.2
    n = 100, sigma 1.0  mean         88.5      88.8       87.6           90.6         89.9        92.1
                        difference   89.1      85.0       90.5           88.0         92.5        93.1

Percentile and BCa, the usual choices, are too narrow, and miss on the side that flatters: the truth lies above. The
bootstrap-t asks how far theta(w) lies from theta in units of its *own* standard error, t(w) = (theta(w) - theta) / se(w).
Its equal-tailed form follows the skew of a mean but fails for differences; its symmetric form (|t|; Hall 1988, "On
symmetric bootstrap confidence intervals", JRSS B 50:35-45) does the reverse. This one takes the wider of the two on
each side: about 10 % wider than either, nearest to 95 % in every row.

A quantile is turned into a mean: the share of tokens at or below it has an interval, whose ends name two values (Woodruff
1952). 400 experiments with 1,000 draws at n = 20, 100 with sigma 0.5 and n = 20, 100 with sigma 1: median 94.8, 95.0, 95.2,
94.8; p90 94.0, 95.5, 96.0, 96.2; p99 98.2, 95.2, 98.2, 95.2; p99.9 100, 97.5, 100, 98.2 (of 2,000 tokens two lie beyond p99.9,
and the upper limit is infinite). The percentile interval of the same: p99 84.7, p99.9 72.7 at n = 20, sigma 0.5. Differences and
other functions of quantiles have only the percentile interval: too narrow in the tail.

Catch: with a heavy tail (sigma 1) a mean over 20 documents reaches only 91 %; take 100 or more. A bucket that lives in
three documents of twenty has an infinite interval, which is the truth. All documents scoring the same (every token
agrees) gives an interval of width 0: for proportions near 1 prefer `wilson`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from halfbyte.errors import UsageError
from halfbyte.evaluator.statistics.draws import Cell, Draw
from halfbyte.evaluator.statistics.figures import Figure, Mean, Quantile, effects_of_two_by_two
from halfbyte.evaluator.statistics.intervals import Estimate, estimate


def bootstrap_documents(
    cells: Mapping[str, Cell],
    figures: Sequence[Figure],
    *,
    resamples: int = 10_000,
    quantile_resamples: int = 1_000,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, Estimate]:
    """Every figure with its interval, all from one joint resample of documents: figure name -> Estimate.

    cells               name -> Cell; figures refer to the names
    figures             see `figures`; names must differ
    resamples           draws
    quantile_resamples  how many of them, at most, serve a quantile's standard error and functions of quantiles
    seed                equal seeds, documents and options give equal numbers, whatever other figures are asked for
    raises              ShapeMismatch (lengths, document sets), UsageError (unknown cell, no tokens, NaN, twice one name)

    Memory: three float64 arrays of resamples x documents. 10,000 draws of 100 documents take well under a second.
    """
    if len({figure.name for figure in figures}) < len(figures):
        raise UsageError("two figures have the same name", where="figures", todo="give each its own")
    if min(resamples, quantile_resamples) < 2 or not 0 < level < 1:
        raise UsageError(
            f"impossible: {resamples} resamples, {quantile_resamples} for quantiles, level {level}",
            todo="2 draws or more, 0 < level < 1",
        )
    used = sorted({statistic.cell for figure in figures for statistic in figure.inputs})
    if unknown := [name for name in used if name not in cells]:
        raise UsageError(f"no cell {unknown[0]!r}", where="figures", todo=f"cells: {', '.join(sorted(cells))}")
    if not used:
        return {}
    draw = Draw({name: cells[name] for name in used}, resamples, seed)
    return {figure.name: estimate(draw, figure, min(resamples, quantile_resamples), level) for figure in figures}


def two_by_two(
    cells: Mapping[tuple[str, str], Cell],
    *,
    divergence: bool = False,
    of: Callable[[str], Mean | Quantile] = Mean,
    **options: Any,
) -> dict[str, Estimate]:
    """D(vanilla), D(QAT), T and I (`figures`) from one joint bootstrap; an effect whose cells are missing is left out.

    cells       (base, precision) -> Cell; bases `vanilla` and `QAT`, precisions `bf16` and `NF4`; the same documents
    divergence  the metric is a divergence from the base's own bf16: only NF4 cells, D is their mean, no T
    of          the statistic of a cell: Mean, or e.g. `lambda cell: Quantile(cell, 0.99)`
    options     of `bootstrap_documents`
    raises      UsageError (unknown cell; bf16 cells of a divergence), ShapeMismatch (other documents)
    """
    effects = effects_of_two_by_two(cells.keys(), divergence=divergence, of=of)
    return bootstrap_documents({" ".join(key): cell for key, cell in cells.items()}, effects, **options)
