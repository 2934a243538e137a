"""What finer blocks save, told from luck: each group's measured saving drawn towards what all groups say together.

NF4-32 costs a group some 0.85 of what NF4-64 costs it. Measured on a few hundred tokens that ratio scatters from 0.3 to 1.5, most of
it sampling: a knapsack that believes it buys the lucky ones, and on other text the gain is gone (docs/log.md). So the ratios are
taken as one more measurement of a common value, with a spread tau of their own (random effects; DerSimonian and Laird 1986,
Controlled Clinical Trials 7:177):

    q_i = cost32 / cost64,   s_i = its standard error over documents (of the paired difference, over cost64),   w_i = 1 / s_i^2
    tau^2 = max(0, (sum w (q - q_w)^2 - (k - 1)) / (sum w - sum w^2 / sum w))          q_w: mean weighted by w
    common value r = mean weighted by 1 / (s^2 + tau^2)
    settled q_i' = r + (q_i - r) tau^2 / (tau^2 + s_i^2)

Where groups truly differ (tau large) or were measured well (s small) the measurement stands; where all scatter is noise, every group
is given r. Costs of NF4-64 are left alone: they span two decades, and their noise is a sixth of each. Without standard errors (one
document) nothing is settled.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

#: smallest standard error of a ratio that is believed: a group on which all documents agree by chance must not outweigh all others
_LEAST = 1e-3


@dataclass(frozen=True)
class Settled:
    """costs: group -> {"nf4-64", "nf4-32"} in nats; ratio: the common value, spread: tau (None where nothing could be settled)."""

    costs: Mapping[str, Mapping[str, float]]
    ratio: float | None
    spread: float | None


def settle(costs: Mapping[str, Mapping[str, float]], errors: Mapping[str, float | None]) -> Settled:
    """The costs with those of NF4-32 settled.

    errors  group -> standard error of cost64 - cost32, in nats; None: not known
    """
    known = [g for g in costs if costs[g]["nf4-64"] > 0 and errors.get(g) is not None]
    if len(known) < 3:
        return Settled(costs, None, None)
    coarse = np.array([costs[g]["nf4-64"] for g in known])
    ratio = np.array([costs[g]["nf4-32"] for g in known]) / coarse
    noise = np.maximum(np.array([errors[g] for g in known], np.float64) / coarse, _LEAST) ** 2
    weight = 1 / noise
    scatter = float((weight * (ratio - np.average(ratio, weights=weight)) ** 2).sum()) - (len(known) - 1)
    spread = max(0.0, scatter / float(weight.sum() - (weight**2).sum() / weight.sum()))
    common = float(np.average(ratio, weights=1 / (noise + spread)))
    settled = common + (ratio - common) * spread / (spread + noise)
    found = {g: {**costs[g], "nf4-32": float(c * q)} for g, c, q in zip(known, coarse, settled, strict=True)}
    return Settled({**costs, **found}, common, spread**0.5)
