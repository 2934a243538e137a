"""Right or wrong, question by question: intervals and tests for paired counts, and the verdict on any interval.

Two models answer the same n questions. Four counts say everything:

                        candidate right    candidate wrong
    reference right     both               only_reference   (lost)
    reference wrong     only_candidate     neither
                        (gained)

Accuracies may agree while many answers flip both ways; so flips are reported, not only the difference. Questions are
taken as independent (cluster them yourself if one image carries ten questions).

    accuracy of one model    Wilson's score interval: sound at 0 and at n, where the textbook one has width 0
    has anything changed     McNemar's test, exact: under no change each flip is a fair coin
    by how much              Tango's score interval of the paired difference: the differences that a score test does not
                             reject. It needs only the flips and n, and no flips in n questions still leave +- z^2/(n + z^2)

Newcombe's method 10 (1998) was the other candidate. Tango's test at zero is McNemar's own score test, so interval and
p-value answer the same question; they can differ near the border, because the p-value is exact and the interval is not.
"""

from __future__ import annotations

import math
from statistics import NormalDist

from halfbyte.errors import UsageError


def wilson(successes: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Interval of a proportion (Wilson 1927, "Probable inference", JASA 22:209-212; no continuity correction).

    raises  UsageError unless 0 <= successes <= n and n >= 1
    """
    _check(n, successes)
    z = _z(level)
    share = successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    # exact at the ends, where rounding would leave 1e-17 or 1 - 1e-16
    return (0.0 if successes == 0 else centre - half, 1.0 if successes == n else centre + half)


def mcnemar(only_reference: int, only_candidate: int) -> float:
    """Two-sided exact p of "flips go both ways alike": a binomial test of the smaller count among all flips at 1/2.

    McNemar 1947, Psychometrika 12:153-157, in its exact form. No flips: p = 1.
    """
    flips = only_reference + only_candidate
    _check(max(flips, 1), only_reference, only_candidate)
    fewer = min(only_reference, only_candidate)
    # whole numbers until the one division: exact for any count
    term, tail = 1, 1
    for i in range(1, fewer + 1):
        term = term * (flips - i + 1) // i
        tail += term
    return min(1.0, 2 * tail / (1 << flips))


def paired_difference(
    only_reference: int, only_candidate: int, n: int, level: float = 0.95
) -> tuple[float, float, float]:
    """(point, low, high) of accuracy(candidate) - accuracy(reference) over the same n questions.

    Tango 1998, "Equivalence test and confidence interval for the difference in proportions for the paired-sample
    design", Statistics in Medicine 17:891-908: the roots in delta of

        (b - c - n delta) / sqrt(n (2 q + delta (1 - delta))) = +- z

    with b gained, c lost, and q the likeliest share of lost given delta (a quadratic). Found by bisection to 1e-12.
    raises  UsageError unless both counts are >= 0 and fit into n
    """
    _check(n, only_reference, only_candidate, only_reference + only_candidate)
    gained, lost, z = only_candidate, only_reference, _z(level)
    point = (gained - lost) / n
    return point, -_upper(lost, gained, n, z), _upper(gained, lost, n, z)


def _upper(gained: int, lost: int, n: int, z: float) -> float:
    """The largest difference that is not rejected (the smallest is this one with the flips exchanged, negated)."""

    def rejected(delta: float) -> bool:
        linear = -gained - lost + (2 * n - gained + lost) * delta
        q = (math.sqrt(max(linear**2 + 8 * n * lost * delta * (1 - delta), 0.0)) - linear) / (4 * n)
        variance = n * (2 * q + delta * (1 - delta))
        return (gained - lost - n * delta) ** 2 > z * z * max(variance, 0.0)

    inside, outside = (gained - lost) / n, 1.0
    if not rejected(outside):
        return outside
    while outside - inside > 1e-12:
        middle = (inside + outside) / 2
        inside, outside = (inside, middle) if rejected(middle) else (middle, outside)
    return inside


def verdict(low: float, high: float, margin: float, *, better: str = "lower") -> str:
    """What an interval of candidate - reference says, given a margin stated before looking.

    tie        -margin <= low and high <= margin: whatever the difference is, it is too small to matter. With a 95 %
               interval this is the two one-sided tests of Schuirmann (1987) at 2.5 % each, stricter than the usual 5 %
    win, loss  not a tie, and the interval lies entirely on one side of zero: high < 0 is a win if `better` is
               "lower" (KLD, NLL) and a loss if it is "higher" (accuracy); low > 0 the other way round
    undecided  anything else: more documents are needed. An infinite limit or NaN ends here

    "No significant difference" is not a tie. A real difference inside the margin is a tie, not a win.
    margin   >= 0, in the units of the interval; 0 makes only exact equality a tie
    raises   UsageError (negative margin, low above high, `better` unknown)
    """
    if better not in ("lower", "higher"):
        raise UsageError(f"better is {better!r}", todo="say lower or higher")
    if not margin >= 0 or low > high:
        raise UsageError(f"impossible: margin {margin}, interval {low} to {high}", todo="margin >= 0 and low <= high")
    if math.isnan(low) or math.isnan(high):
        return "undecided"
    if -margin <= low and high <= margin:
        return "tie"
    if high < 0 or low > 0:
        return "win" if (high < 0) == (better == "lower") else "loss"
    return "undecided"


def _z(level: float) -> float:
    if not 0 < level < 1:
        raise UsageError(f"level {level} is not between 0 and 1", todo="0.95 is usual")
    return NormalDist().inv_cdf((1 + level) / 2)


def _check(n: int, *counts: int) -> None:
    if n < 1 or min(counts) < 0 or max(counts) > n:
        raise UsageError(f"counts {counts} do not fit into {n} questions", todo="count again")
