"""How often a verdict is right: 200 synthetic experiments with a truth that is known."""

from __future__ import annotations

import numpy as np
from evaluator.test_statistics import draw_documents
from scipy import stats

from halfbyte.evaluator.statistics import Cell, bootstrap_documents, difference, verdict


def test_verdicts_of_200_experiments_are_wrong_as_seldom_as_the_level_says() -> None:
    """Without an effect at most 5 % may claim one, whatever the margin; a tenth more loss is found, a hair's breadth ties."""
    rng, said = np.random.default_rng(14), {name: [] for name in ("nothing", "hair", "tenth")}  # type: dict[str, list[str]]
    for seed in range(200):
        documents, values = draw_documents(rng, 40)
        noise = rng.normal(0, 0.1, documents[-1] + 1)[documents] + rng.normal(0, 0.1, len(values))
        cells = {
            "reference": Cell(values, documents), "nothing": Cell(values + noise, documents),
            "hair": Cell(values + noise / 100, documents), "tenth": Cell(values + noise + 0.1, documents),
        }  # fmt: skip
        found = bootstrap_documents(cells, [difference(c, c, "reference") for c in said], resamples=300, seed=seed)
        for name, margin in (("nothing", 0.001), ("hair", 0.01), ("tenth", 0.01)):
            said[name].append(verdict(found[name].low, found[name].high, margin))
    most = int(stats.binom.ppf(0.99, 200, 0.05))
    assert said["nothing"].count("loss") + said["nothing"].count("win") <= most
    assert said["hair"].count("tie") == 200
    assert said["tenth"].count("loss") >= 200 - most
    assert said["tenth"].count("win") == 0
