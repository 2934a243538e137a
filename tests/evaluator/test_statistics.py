"""Intervals hold what they promise: against scipy, against written-out resamples, and on documents whose truth is known."""

from __future__ import annotations

import json
import math
from itertools import pairwise

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import optimize, stats

from halfbyte.errors import ShapeMismatch, UsageError
from halfbyte.evaluator.statistics import (
    Cell,
    Estimate,
    Figure,
    Mean,
    Quantile,
    bootstrap_documents,
    difference,
    mcnemar,
    mean,
    paired_difference,
    perplexity,
    perplexity_ratio,
    quantile,
    two_by_two,
    verdict,
    wilson,
)
from halfbyte.evaluator.statistics.draws import Draw, weighted_quantile
from halfbyte.evaluator.statistics.intervals import bootstrap_t

Floats = NDArray[np.float64]


def draw_documents(rng: np.random.Generator, n: int, sigma: float = 0.5) -> tuple[NDArray[np.intp], Floats]:
    """(document, value) of each token: lognormal lengths and document means (expectation exp(sigma^2 / 2)), gamma noise."""
    documents = np.repeat(np.arange(n), rng.lognormal(4.3, 0.8, n).astype(int).clip(8))
    return documents, rng.lognormal(0, sigma, n)[documents] * rng.gamma(0.25, 4.0, len(documents))


def degrade(rng: np.random.Generator, documents: NDArray[np.intp], values: Floats, factor: float) -> Floats:
    """The same tokens under a candidate: `factor` worse in expectation, unevenly over documents."""
    uneven = rng.lognormal(-(0.2**2) / 2, 0.2, documents[-1] + 1)
    return np.asarray(values * factor * uneven[documents], np.float64)


def one(values: Floats, documents: NDArray[np.intp], figure: Figure, **options: int) -> Estimate:
    return bootstrap_documents({"a": Cell(values, documents)}, [figure], **options)[figure.name]


# ---- the bootstrap against second implementations


def test_points_are_the_textbook_figures() -> None:
    documents, values = draw_documents(np.random.default_rng(0), 30)
    other = values + 0.25
    figures = [
        mean("mean", "a"), difference("d", "b", "a"), perplexity("ppl", "a"), perplexity_ratio("ratio", "b", "a"),
        quantile("p90", "a", 0.9), Figure("rms", (Mean("sq"),), np.sqrt),
        Figure("dp50", (Quantile("b", 0.5), Quantile("a", 0.5)), np.subtract),
    ]  # fmt: skip
    cells = {"a": Cell(values, documents), "b": Cell(other, documents), "sq": Cell(values**2, documents)}
    found = {
        name: e.point for name, e in bootstrap_documents(cells, figures, resamples=200, quantile_resamples=50).items()
    }
    assert found == pytest.approx({
        "mean": values.mean(), "d": 0.25, "ppl": np.exp(values.mean()), "ratio": np.exp(0.25),
        "p90": np.quantile(values, 0.9, method="inverted_cdf"), "rms": np.sqrt((values**2).mean()), "dp50": 0.25,
    }, rel=1e-12)  # fmt: skip


def test_resampled_means_and_quantiles_equal_the_tokens_written_out() -> None:
    documents, values = draw_documents(np.random.default_rng(1), 7)
    draw = Draw({"a": Cell(values, documents)}, 40, seed=3)
    means, quantiles = draw.resampled(Mean("a"), 40), draw.resampled(Quantile("a", 0.9), 40)
    for row, times in enumerate(draw.weights.astype(int)):
        tokens = np.concatenate([np.tile(values[documents == d], times[d]) for d in range(7)])
        assert means[row] == pytest.approx(tokens.mean(), rel=1e-12)
        assert quantiles[row] == np.quantile(tokens, 0.9, method="inverted_cdf")
    assert (draw.weights.sum(axis=1) == 7).all()


def test_quantiles_do_not_slip_by_one_at_round_shares() -> None:
    assert math.ceil(0.07 * 100) == 8
    assert weighted_quantile(np.arange(100.0), np.arange(100), 0.07, np.ones((1, 100)))[0] == 6


def test_standard_error_and_percentiles_of_the_draw_match_scipys_bootstrap() -> None:
    documents, values = draw_documents(np.random.default_rng(2), 60)
    sums, counts = np.bincount(documents, values), np.bincount(documents)
    theirs = stats.bootstrap(
        (sums, counts), lambda s, c, axis: s.sum(axis) / c.sum(axis), paired=True, vectorized=True,
        n_resamples=9999, method="percentile", rng=np.random.default_rng(0),
    )  # fmt: skip
    drawn = Draw({"a": Cell(values, documents)}, 9999, seed=0).resampled(Mean("a"), 9999)
    interval = theirs.confidence_interval
    assert np.quantile(drawn, [0.025, 0.975]) == pytest.approx([interval.low, interval.high], rel=0.02)
    ours = one(values, documents, mean("m", "a"))
    assert ours.standard_error == pytest.approx(theirs.standard_error, rel=0.05)
    assert ours.low < interval.low < ours.point < interval.high < ours.high


def test_bootstrap_t_of_a_plain_mean_is_the_one_written_as_a_loop() -> None:
    x = np.random.default_rng(4).lognormal(size=15)
    weights = Draw({"a": Cell(x, np.arange(15))}, 300, seed=1).weights
    point, low, high, error = bootstrap_t(lambda m: m, x[None], np.ones((1, 15)), weights, 0.95)
    t = []
    for times in weights.astype(int):
        again = np.repeat(x, times)
        t.append(
            (again.mean() - x.mean()) / (again.std() * math.sqrt(1 / 14))
        )  # s.e. of 15 draws: std * sqrt(15/14) / sqrt(15)
    t.sort()
    both = sorted(map(abs, t))[285 - 1]
    assert (point, error) == pytest.approx((x.mean(), x.std(ddof=1) / math.sqrt(15)))
    assert low == pytest.approx(point - error * max(both, t[293 - 1]))
    assert high == pytest.approx(point + error * max(both, -t[8 - 1]))


# ---- coverage


def test_intervals_hold_the_truth_as_often_as_they_say(capsys: pytest.CaptureFixture[str]) -> None:
    """200 experiments a row; a true 95 % gives at least 184 (1 % quantile of the binomial). The seeds were not chosen."""
    least, lines, misses = int(stats.binom.ppf(0.01, 200, 0.95)), [], []
    for n in (20, 100):
        rng = np.random.default_rng(11)
        held = dict.fromkeys(("mean", "difference", "ratio", "p90", "p99", "percentile"), 0)
        truth = math.exp(0.5**2 / 2)
        wide = np.random.default_rng(8)
        sample = wide.lognormal(0, 0.5, 10**6) * wide.gamma(0.25, 4.0, 10**6)
        expected = {
            "mean": truth, "difference": 0.2 * truth, "ratio": 1.2, "percentile": truth,
            "p90": np.quantile(sample, 0.9), "p99": np.quantile(sample, 0.99),
        }  # fmt: skip
        ratio = Figure("ratio", (Mean("b"), Mean("a")), np.divide)
        asked = [mean("mean", "a"), difference("difference", "b", "a"), ratio, quantile("p90", "a", 0.9),
                 quantile("p99", "a", 0.99)]  # fmt: skip
        for seed in range(200):
            documents, values = draw_documents(rng, n)
            cells = {"a": Cell(values, documents), "b": Cell(degrade(rng, documents, values, 1.2), documents)}
            found = bootstrap_documents(cells, asked, resamples=1000, quantile_resamples=2, seed=seed)
            limits = {name: (e.low, e.high) for name, e in found.items()}
            drawn = Draw({"a": cells["a"]}, 1000, seed).resampled(Mean("a"), 1000)
            limits["percentile"] = tuple(np.quantile(drawn, [0.025, 0.975]))
            for name, (low, high) in limits.items():
                held[name] += low <= expected[name] <= high
        lines.append(f"n = {n}: " + ", ".join(f"{name} {count / 2:.1f} %" for name, count in held.items()))
        misses += [(n, name, count) for name, count in held.items() if name != "percentile" and count < least]
        assert held["percentile"] < held["mean"], "the plain percentile interval holds less often on the same documents"
    with capsys.disabled():
        print("\ncoverage of 95 % intervals, 200 experiments each:", *lines, sep="\n  ")
    assert misses == []


def test_a_planted_degradation_is_found_and_no_degradation_is_a_tie() -> None:
    rng = np.random.default_rng(5)
    documents, values = draw_documents(rng, 100)
    cells = {
        "reference": Cell(values, documents),
        "worse": Cell(degrade(rng, documents, values, 1.2), documents),
        "same": Cell(values + rng.normal(0, 0.01, len(values)), documents),
    }
    found = bootstrap_documents(cells, [difference(c, c, "reference") for c in ("worse", "same")], resamples=2000)
    assert verdict(found["worse"].low, found["worse"].high, 0.01) == "loss"
    assert verdict(found["same"].low, found["same"].high, 0.01) == "tie"


def test_pairing_narrows_the_interval() -> None:
    rng = np.random.default_rng(6)
    documents, values = draw_documents(rng, 100)
    cells = {"a": Cell(values, documents), "b": Cell(degrade(rng, documents, values, 1.1), documents)}
    found = bootstrap_documents(cells, [mean("a", "a"), mean("b", "b"), difference("d", "b", "a")], resamples=1000)
    unpaired = math.hypot(found["a"].standard_error, found["b"].standard_error)
    assert found["d"].standard_error < unpaired / 3


# ---- edges


def test_an_exact_copy_has_difference_zero_without_width() -> None:
    documents, values = draw_documents(np.random.default_rng(7), 20)
    cells = {"a": Cell(values, documents), "b": Cell(values.copy(), documents), "kld": Cell(0 * values, documents)}
    found = bootstrap_documents(cells, [difference("d", "b", "a"), mean("kld", "kld"), quantile("p99", "kld", 0.99)])
    assert {(e.point, e.low, e.high) for e in found.values()} == {(0.0, 0.0, 0.0)}
    assert verdict(found["d"].low, found["d"].high, 0.0) == "tie"


def test_perplexity_interval_is_the_exponential_of_the_means() -> None:
    documents, values = draw_documents(np.random.default_rng(8), 30)
    cells = {"a": Cell(values, documents)}
    found = bootstrap_documents(cells, [mean("m", "a"), perplexity("p", "a")], resamples=500)
    m, p = found["m"], found["p"]
    assert (p.point, p.low, p.high) == pytest.approx(tuple(math.exp(x) for x in (m.point, m.low, m.high)))
    assert p.standard_error == pytest.approx(p.point * m.standard_error, rel=1e-4)


@pytest.mark.parametrize("figure", [mean("m", "a"), quantile("q", "a", 0.5)], ids=["mean", "median"])
@pytest.mark.parametrize("n", [1, 2])
def test_too_few_documents_bound_nothing(n: int, figure: Figure) -> None:
    found = one(np.arange(10.0 * n) ** 2, np.repeat(np.arange(n), 10), figure, resamples=500, quantile_resamples=500)
    assert (found.low, found.high) == (-math.inf, math.inf)
    record = found.as_record()
    assert record["low"] is None
    json.dumps(record, allow_nan=False)
    assert verdict(found.low, found.high, 1.0) == "undecided"


def test_a_bucket_counts_its_tokens_only_and_keeps_every_document() -> None:
    documents, values = draw_documents(np.random.default_rng(9), 40)
    where = values > 1
    bucket = bootstrap_documents({"a": Cell(values, documents, where)}, [mean("m", "a")], resamples=500)["m"]
    assert bucket.point == pytest.approx(values[where].mean())
    assert (bucket.tokens, bucket.documents) == (where.sum(), 40)
    lonely = documents < 2  # two documents of forty: many draws miss both
    rare = bootstrap_documents({"a": Cell(values, documents, lonely)}, [mean("m", "a")], resamples=500)["m"]
    assert (rare.low, rare.high) == (-math.inf, math.inf)


def test_equal_seeds_give_equal_numbers_whatever_else_is_asked() -> None:
    documents, values = draw_documents(np.random.default_rng(10), 25)
    cells = {"a": Cell(values, documents), "b": Cell(values**2, documents)}
    asked = [quantile("q", "b", 0.5), mean("m", "a")]
    together = bootstrap_documents(cells, asked, resamples=300, quantile_resamples=50, seed=4)
    alone = bootstrap_documents(cells, asked[1:], resamples=300, quantile_resamples=50, seed=4)
    other = bootstrap_documents(cells, asked[1:], resamples=300, quantile_resamples=50, seed=5)
    assert together["m"] == alone["m"]
    assert other["m"].low != alone["m"].low
    shuffled = np.random.default_rng(0).permutation(len(values))
    again = one(values[shuffled], documents[shuffled], mean("m", "a"), resamples=300, quantile_resamples=50, seed=4)
    assert again.low == pytest.approx(alone["m"].low)


def test_refusals_name_the_cell() -> None:
    a = Cell([1.0, 2.0], [0, 1])
    with pytest.raises(ShapeMismatch, match="cell b"):
        bootstrap_documents({"a": a, "b": Cell([1.0, 2.0], [0, 2])}, [difference("d", "b", "a")])
    with pytest.raises(ShapeMismatch, match="cell a"):
        bootstrap_documents({"a": Cell([1.0, 2.0], [0])}, [mean("m", "a")])
    with pytest.raises(UsageError, match="NaN"):
        bootstrap_documents({"a": Cell([1.0, math.nan], [0, 1])}, [mean("m", "a")])
    with pytest.raises(UsageError, match="no tokens"):
        bootstrap_documents({"a": Cell([1.0, 2.0], [0, 1], [False, False])}, [mean("m", "a")])
    with pytest.raises(UsageError, match="no cell 'c'"):
        bootstrap_documents({"a": a}, [mean("m", "c")])
    with pytest.raises(UsageError, match="same name"):
        bootstrap_documents({"a": a}, [mean("m", "a"), quantile("m", "a", 0.5)])


# ---- the 2 x 2


def test_two_by_two_finds_an_interaction_and_nothing_else() -> None:
    """NLL: QAT costs 0.3 nats (T), NF4 costs 0.20 on vanilla and 0.05 on QAT, so I is -0.15."""
    rng = np.random.default_rng(12)
    documents, start = draw_documents(rng, 80)
    shift = {("vanilla", "bf16"): 0.0, ("vanilla", "NF4"): 0.20, ("QAT", "bf16"): 0.3, ("QAT", "NF4"): 0.35}
    cells = {key: Cell(start + by + rng.normal(0, 0.1, len(start)), documents) for key, by in shift.items()}
    found = two_by_two(cells, resamples=1000)
    truth = {"D(vanilla)": 0.20, "D(QAT)": 0.05, "T": 0.3, "I": -0.15}
    for name, e in found.items():
        assert abs(e.point - truth[name]) < 4 * e.standard_error
        assert e.low < e.point < e.high < e.low + 0.02
    assert [verdict(e.low, e.high, 0.01) for e in found.values()] == ["loss", "loss", "loss", "win"]
    assert found["I"].point == pytest.approx(found["D(QAT)"].point - found["D(vanilla)"].point)


def test_two_by_two_of_a_divergence_takes_bf16_as_zero_and_rows_of_each_base() -> None:
    """Each base wrote its own answers: other rows, the same documents."""
    rng = np.random.default_rng(13)
    vanilla, qat = draw_documents(rng, 50), draw_documents(rng, 50)
    cells = {("vanilla", "NF4"): Cell(vanilla[1], vanilla[0]), ("QAT", "NF4"): Cell(qat[1] / 2, qat[0])}
    found = two_by_two(cells, divergence=True, resamples=500)
    assert found.keys() == {"D(vanilla)", "D(QAT)", "I"}
    assert found["D(vanilla)"].point == pytest.approx(vanilla[1].mean())
    assert found["I"].point == pytest.approx(qat[1].mean() / 2 - vanilla[1].mean())
    with pytest.raises(UsageError, match="0 by definition"):
        two_by_two({**cells, ("QAT", "bf16"): cells["QAT", "NF4"]}, divergence=True)
    tail = two_by_two(
        cells, divergence=True, of=lambda cell: Quantile(cell, 0.9), resamples=200, quantile_resamples=200
    )
    assert tail["I"].method == "percentile"


def test_two_by_two_leaves_out_what_was_not_measured() -> None:
    cell = Cell(np.arange(8.0), np.arange(8))
    found = two_by_two(
        {("QAT", "bf16"): cell, ("QAT", "NF4"): cell, ("vanilla", "NF4"): cell}, resamples=100, quantile_resamples=10
    )
    assert found.keys() == {"D(QAT)"}
    with pytest.raises(UsageError, match="no such cell"):
        two_by_two({("qat", "NF4"): cell})


# ---- right and wrong


@pytest.mark.parametrize(("successes", "n"), [(0, 10), (1, 10), (10, 10), (37, 120), (999, 1000), (0, 1)])
def test_wilson_equals_scipy(successes: int, n: int) -> None:
    theirs = stats.binomtest(successes, n).proportion_ci(method="wilson")
    assert wilson(successes, n) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


@pytest.mark.parametrize(("lost", "gained"), [(0, 0), (1, 0), (3, 9), (9, 3), (25, 25), (40, 75), (900, 1100)])
def test_mcnemar_equals_the_binomial_test(lost: int, gained: int) -> None:
    theirs = stats.binomtest(lost, lost + gained, 0.5).pvalue if lost + gained else 1.0
    assert mcnemar(lost, gained) == pytest.approx(theirs, rel=1e-9)


def score_rejects(delta: float, gained: int, lost: int, n: int) -> bool:
    """Tango's test by brute force: the restricted likelihood is maximised numerically."""
    least = max(0.0, -delta)

    def cost(q: float) -> float:  # q: probability of a loss, q + delta: of a gain
        return -stats.multinomial.logpmf([gained, lost, n - gained - lost], n, [q + delta, q, 1 - delta - 2 * q])

    best = optimize.minimize_scalar(
        cost, bounds=(least + 1e-12, (1 - delta) / 2 - 1e-12), method="bounded", options={"xatol": 1e-12}
    )
    return bool((gained - lost - n * delta) ** 2 > 1.959964**2 * n * (2 * best.x + delta - delta**2))


@pytest.mark.parametrize(("lost", "gained", "n"), [(20, 40, 160), (2, 12, 50), (0, 5, 40), (7, 7, 30)])
def test_paired_difference_inverts_tangos_score_test(lost: int, gained: int, n: int) -> None:
    point, low, high = paired_difference(lost, gained, n)
    assert point == pytest.approx((gained - lost) / n)
    for inside, outside in ((low + 1e-4, low - 1e-4), (high - 1e-4, high + 1e-4)):
        assert not score_rejects(inside, gained, lost, n)
        assert score_rejects(outside, gained, lost, n)


def test_paired_difference_covers_in_every_small_table() -> None:
    """Exact: all outcomes of 30 questions, weighted by their probability. The score interval is close to 95 % everywhere."""
    n = 30
    intervals = {(g, c): paired_difference(c, g, n) for g in range(n + 1) for c in range(n + 1 - g)}
    for gain, loss in [(0.05, 0.05), (0.1, 0.02), (0.3, 0.1), (0.2, 0.2)]:
        held = sum(
            stats.multinomial.pmf([g, c, n - g - c], n, [gain, loss, 1 - gain - loss])
            for (g, c), (_, low, high) in intervals.items() if low <= gain - loss <= high
        )  # fmt: skip
        assert 0.93 < held < 0.99, (gain, loss, held)


def test_no_flips_still_leave_a_width() -> None:
    z2 = stats.norm.ppf(0.975) ** 2
    assert paired_difference(0, 0, 100) == pytest.approx((0.0, -z2 / (100 + z2), z2 / (100 + z2)))
    assert paired_difference(0, 10, 10)[2] == 1.0
    point, low, high = paired_difference(4, 9, 50)
    assert paired_difference(9, 4, 50) == pytest.approx((-point, -high, -low))


@pytest.mark.parametrize(
    ("low", "high", "margin", "lower", "higher"),
    [
        (-0.01, 0.01, 0.02, "tie", "tie"),
        (0.005, 0.01, 0.02, "tie", "tie"),  # real, and too small to matter
        (-0.02, 0.02, 0.02, "tie", "tie"),
        (-0.05, 0.01, 0.02, "undecided", "undecided"),
        (0.01, 0.05, 0.02, "loss", "win"),
        (-0.05, -0.01, 0.02, "win", "loss"),
        (0.0, 0.05, 0.0, "undecided", "undecided"),
        (0.0, 0.0, 0.0, "tie", "tie"),
        (-math.inf, math.inf, 9.0, "undecided", "undecided"),
        (math.nan, math.nan, 9.0, "undecided", "undecided"),
    ],
)  # fmt: skip
def test_verdicts(low: float, high: float, margin: float, lower: str, higher: str) -> None:
    assert verdict(low, high, margin) == lower
    assert verdict(low, high, margin, better="higher") == higher


def test_verdict_and_counts_refuse_the_impossible() -> None:
    for call in (lambda: verdict(1, 0, 1), lambda: verdict(0, 1, -1), lambda: verdict(0, 1, math.nan),
                 lambda: verdict(0, 1, 1, better="bigger"), lambda: wilson(3, 2), lambda: wilson(0, 0),
                 lambda: mcnemar(-1, 2), lambda: paired_difference(6, 5, 10)):  # fmt: skip
        with pytest.raises(UsageError):
            call()


def test_more_questions_narrow_the_interval() -> None:
    widths = [high - low for _, low, high in (paired_difference(2 * k, 3 * k, 50 * k) for k in (1, 2, 4, 8))]
    assert all(a > b for a, b in pairwise(widths))


def test_a_quantile_that_is_the_largest_value_is_unbounded() -> None:
    """Not an interval of width 0: that no document reaches beyond it is ignorance."""
    rng = np.random.default_rng(1)
    documents = np.repeat(np.arange(20), 10)
    cell = Cell(rng.lognormal(size=200), documents)
    found = bootstrap_documents({"kld": cell}, [quantile("p999", "kld", 0.999)], resamples=500)["p999"]
    assert found.point == cell.values.max()
    assert (found.low, found.high) == (-np.inf, np.inf)
    flat = bootstrap_documents({"kld": Cell(np.ones(200), documents)}, [quantile("p999", "kld", 0.999)], resamples=500)
    assert (flat["p999"].low, flat["p999"].high) == (1, 1)
