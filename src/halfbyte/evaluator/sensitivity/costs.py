"""From hidden states to nats: each variant's mean KL divergence from the model, with its uncertainty over documents.

    kld = mean over scored positions of KL(model || variant)
    standard error, documents d with c_d positions and sums s_d:   sqrt( n/(n-1) sum (s_d - kld c_d)^2 ) / sum c_d

The reference's log-probabilities are computed once a slice of positions, then every variant's against them, so the head
multiplies once for the model and once for each variant.

The cheap guess beside it is the drift of the residual where the change was made. How well it would have ranked the groups is a rank
correlation (Spearman), and it is in the record because it is free.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from halfbyte.evaluator.scoring.divergence import kl_divergence, predict
from halfbyte.evaluator.scoring.scorer import POSITIONS
from halfbyte.evaluator.sensitivity.carrying import Variant
from halfbyte.layers.head import Head
from halfbyte.layers.model import exact_float32
from halfbyte.layers.rows import Batch, Rows
from halfbyte.progress import track

if TYPE_CHECKING:
    import numpy as np
    import torch


def klds_of(
    head: Head, batches: Sequence[Batch], states: Sequence[torch.Tensor], variants: Sequence[Variant]
) -> list[np.ndarray]:
    """Of each variant float64 [scored], batch by batch; `states` are the model's own."""
    import numpy as np
    import torch

    # one array from the start: small results kept between large temporaries would pin the heap, 25 MB a variant
    found = np.empty((len(variants), sum(len(batch.labels) for batch in batches)))
    done = 0
    with (
        torch.inference_mode(),
        exact_float32(),
        track("divergence", len(batches) * len(variants), "variants") as advance,
    ):
        for at, batch in enumerate(batches):
            labels = torch.from_numpy(batch.labels)
            for begin in range(0, len(labels), POSITIONS):
                part, some = slice(begin, begin + POSITIONS), labels[begin : begin + POSITIONS]
                reference = predict(head.logits(states[at][part]), some)
                for kept, variant in zip(found, variants, strict=True):
                    kld = kl_divergence(reference, predict(head.logits(variant.states[at][part]), some))
                    kept[done : done + len(some)] = kld.cpu().numpy()
                done += len(some)
            advance(len(variants))
    return list(found)


def cost_of(kld: np.ndarray, document: np.ndarray) -> dict[str, float | None]:
    """{"kld", "standard_error"}; the latter None with one document.

    document  int64 [scored]: number of the document of each position, from 0
    """
    # a mean below 0 is the head's rounding alone
    return {"kld": max(float(kld.mean()), 0.0), "standard_error": standard_error(kld, document)}


def standard_error(values: np.ndarray, document: np.ndarray) -> float | None:
    """Of the mean of `values`, documents being what is drawn; None with one document."""
    import numpy as np

    sums, counts = np.bincount(document, values), np.bincount(document)
    n = len(counts)
    if n < 2:
        return None
    return float(np.sqrt(n / (n - 1) * ((sums - values.mean() * counts) ** 2).sum()) / counts.sum())


def documents_of(batches: Sequence[Batch], rows: Rows) -> np.ndarray:
    """The document's number at each scored position, in the batches' order."""
    import numpy as np

    numbers = {name: number for number, name in enumerate(dict.fromkeys(rows.documents))}
    of_row = np.array([numbers[name] for name in rows.documents])
    found: np.ndarray = of_row[np.concatenate([batch.rows for batch in batches])]
    return found


def rank_correlation(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Spearman's, ties at their mean rank; None for fewer than three, or if one of them does not vary."""
    import numpy as np

    if len(one) < 3 or len(set(one)) < 2 or len(set(other)) < 2:
        return None
    found: Any = np.corrcoef(_ranks(one), _ranks(other))[0, 1]
    return float(found)


def _ranks(values: Sequence[float]) -> np.ndarray:
    import numpy as np

    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = counts.cumsum()
    ranks: np.ndarray = (ends - (counts - 1) / 2)[place]
    return ranks
