"""KLD and NLL against float64 by hand; exactly 0 for equal logits; small values without float32's floor."""

from __future__ import annotations

import pytest
import torch

from halfbyte.errors import ShapeMismatch
from halfbyte.evaluator.scoring.divergence import confidence_bucket, delta_p, kl_divergence, predict


def by_hand(logits: torch.Tensor) -> torch.Tensor:
    """Log-probabilities in float64, from the definition."""
    wide = logits.double()
    wide = wide - wide.max(dim=1, keepdim=True).values
    return wide - wide.exp().sum(dim=1, keepdim=True).log()


def draw(n: int = 32, vocabulary: int = 5000, spread: float = 4.0, seed: int = 0) -> torch.Tensor:
    return spread * torch.randn(n, vocabulary, generator=torch.Generator().manual_seed(seed))


LABELS = torch.arange(32)


@pytest.mark.parametrize("noise", [3.0, 0.1, 1e-2, 1e-3])
def test_kld_equals_float64_by_hand(noise: float) -> None:
    ours = draw()
    theirs = ours + noise * draw(seed=1, spread=1.0)
    p, q = by_hand(ours), by_hand(theirs)
    exact = (p.exp() * (p - q)).sum(dim=1)
    found = kl_divergence(predict(ours, LABELS), predict(theirs, LABELS))
    assert found.dtype == torch.float64
    # at noise 1e-3 the plain float32 sum is off by more than the KLD itself (6e-7 of 4e-7); this one by 3e-4 of it
    assert ((found - exact).abs() <= 1e-5 * exact + 1e-6 * exact.sqrt()).all(), (found - exact).abs().max()


def test_kld_where_the_candidate_is_sure_of_something_else() -> None:
    ours, theirs = torch.zeros(1, 8), torch.zeros(1, 8)
    ours[0, 0], theirs[0, 1] = 80.0, 120.0
    p, q = by_hand(ours), by_hand(theirs)
    found = kl_divergence(predict(ours, LABELS[:1]), predict(theirs, LABELS[:1]))
    assert found.item() == pytest.approx((p.exp() * (p - q)).sum().item(), rel=1e-6)


def test_kld_of_equal_logits_is_exactly_zero() -> None:
    found = kl_divergence(predict(draw(), LABELS), predict(draw(), LABELS))
    assert torch.equal(found, torch.zeros(32, dtype=torch.float64))


def test_kld_is_directed() -> None:
    one, other = predict(draw(spread=4), LABELS), predict(draw(spread=1), LABELS)
    assert not torch.allclose(kl_divergence(one, other), kl_divergence(other, one), rtol=0.1)


def test_nll_delta_p_and_top_probability_equal_float64_by_hand() -> None:
    ours, theirs = draw(), draw(seed=2)
    p, q = by_hand(ours), by_hand(theirs)
    one, other = predict(ours, LABELS), predict(theirs, LABELS)
    mine, yours = (table.gather(1, LABELS[:, None]).squeeze(1) for table in (p, q))
    assert torch.allclose(one.nll, -mine, rtol=1e-6)
    assert torch.allclose(delta_p(one, other), yours.exp() - mine.exp(), atol=1e-7)
    assert torch.allclose(one.top_probability.double(), p.exp().max(dim=1).values, rtol=1e-5)
    assert torch.equal(one.top, ours.argmax(dim=1))


def test_another_vocabulary_is_refused() -> None:
    with pytest.raises(ShapeMismatch, match="5000"):
        kl_divergence(predict(draw(), LABELS), predict(draw(vocabulary=4999), LABELS))


def test_confidence_buckets_include_certainty() -> None:
    assert [confidence_bucket(p) for p in (0.0, 0.24, 0.25, 0.6, 0.94, 0.95, 1.0)] == [0, 0, 1, 2, 3, 4, 4]
