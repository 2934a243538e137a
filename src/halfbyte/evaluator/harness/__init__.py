"""Tasks of EleutherAI's lm-eval on a reference and a candidate, paired: what `evaluator.tasks` has no reader for.

job        `halfbyte lm-eval`: run both, pair, write the record
running    the only place that imports lm-eval (the extra `lm-eval`)
pairing    samples of two models -> the same documents side by side -> flips, tests, verdicts; knows no lm-eval

lm-eval prints an accuracy with a standard error for each model, as if they had been asked different questions. Its samples say more:
the same documents were put to both, so the difference is paired, and its interval is several times narrower.
"""

from halfbyte.evaluator.harness.job import HARNESS_OPTIONS, HarnessSettings, lm_eval

__all__ = ["HARNESS_OPTIONS", "HarnessSettings", "lm_eval"]
