"""How sure we are: a joint bootstrap over documents for figures over tokens, and paired tests for right and wrong."""

from halfbyte.evaluator.statistics.bootstrap import bootstrap_documents, two_by_two
from halfbyte.evaluator.statistics.draws import Cell
from halfbyte.evaluator.statistics.figures import (
    Figure,
    Mean,
    Quantile,
    difference,
    mean,
    perplexity,
    perplexity_ratio,
    quantile,
)
from halfbyte.evaluator.statistics.intervals import Estimate
from halfbyte.evaluator.statistics.paired_tests import mcnemar, paired_difference, verdict, wilson

__all__ = [
    "Cell",
    "Estimate",
    "Figure",
    "Mean",
    "Quantile",
    "bootstrap_documents",
    "difference",
    "mcnemar",
    "mean",
    "paired_difference",
    "perplexity",
    "perplexity_ratio",
    "quantile",
    "two_by_two",
    "verdict",
    "wilson",
]
