"""From logits to tokens on the device, by a rule whose every step can be checked: transformers' order, our own draw.

    1 repetition penalty   a token seen before: score / r if positive, score * r if negative (greedy too)
    2 temperature          scores / t
    3 top-k                the k largest; of equals at the edge, those that the sort leaves in front (transformers keeps all of them)
    4 top-p                tokens, largest first, while the probability *before* them is below p
    5 min-p                tokens at least min_p times as probable as the most probable
    6 draw                 the first token whose cumulative probability exceeds u times the kept total

u comes from a table made before the first step, one number for each row and *position in the text*. So a token does not depend on how it
was come by: a step that verifies drafts draws for position p what a plain step would have drawn, and speculation
is exact for sampled text as for greedy. The same seed gives the same text; another draw than transformers' multinomial, though.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from halfbyte.errors import UsageError

#: what transformers' generate takes where neither the caller nor the model says
TRANSFORMERS_TOP_K = 50


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. Greedy unless `do_sample`. Names and meanings are transformers'.

    raises  UsageError for values that cannot be
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        allowed = {
            "temperature": self.temperature > 0, "top_k": self.top_k >= 0, "top_p": 0 < self.top_p <= 1,
            "min_p": 0 <= self.min_p <= 1, "repetition_penalty": self.repetition_penalty > 0,
        }  # fmt: skip
        for name, fine in allowed.items():
            if not fine:
                raise UsageError(f"{name} cannot be {getattr(self, name)}", where="sampling")


def sampling_of(options: Mapping[str, Any], generation_config: Any = None) -> Sampling:
    """Sampling as transformers' `generate` would take the same options: what is absent or None comes from the model's generation config.

    options  any of Sampling's names, others are ignored; greedy unless do_sample or a sampling option is given
    """
    given = {name: options.get(name) for name in Sampling.__dataclass_fields__}
    samples = any(given[name] is not None for name in ("temperature", "top_k", "top_p", "min_p"))
    given["do_sample"] = samples if given["do_sample"] is None else given["do_sample"]
    if given["do_sample"]:
        for name in ("temperature", "top_k", "top_p", "min_p"):
            if given[name] is None:
                given[name] = getattr(generation_config, name, None)
        if given["top_k"] is None:
            given["top_k"] = TRANSFORMERS_TOP_K
    else:
        given |= dict.fromkeys(("temperature", "top_k", "top_p", "min_p"))
    if given["repetition_penalty"] is None:
        given["repetition_penalty"] = getattr(generation_config, "repetition_penalty", None)
    return Sampling(**{name: value for name, value in given.items() if value is not None})


def uniforms(rows: int, width: int, seed: int) -> torch.Tensor:
    """The table of u, float64 [rows, width]: row b from the generator seeded seed + b, the same on every device."""
    made = [
        torch.rand(width, generator=torch.Generator().manual_seed(seed + row), dtype=torch.float64)
        for row in range(rows)
    ]
    return torch.stack(made)


def choose(logits: torch.Tensor, sampling: Sampling, u: torch.Tensor | None, seen: torch.Tensor | None) -> torch.Tensor:
    """int64 [n]: the token for each row of logits [n, vocabulary].

    u     float64 [n]; None when greedy
    seen  bool [n, vocabulary], which tokens are penalized; None: none
    """
    scores = logits.float()
    if seen is not None:
        factor = sampling.repetition_penalty
        scores = torch.where(seen, torch.where(scores < 0, scores * factor, scores / factor), scores)
    if not sampling.do_sample:
        return scores.argmax(-1)
    assert u is not None
    scores = scores / sampling.temperature
    most = min(sampling.top_k, scores.shape[-1])
    values, ids = scores.topk(most) if most else scores.sort(dim=-1, descending=True, stable=True)
    p = values.double().softmax(-1)
    if sampling.top_p < 1:
        p = p.masked_fill(p.cumsum(-1) - p >= sampling.top_p, 0.0)
    if sampling.min_p > 0:
        p = p.masked_fill(p < sampling.min_p * p[:, :1], 0.0)
    cumulative = p.cumsum(-1)
    drawn = (cumulative <= u[:, None] * cumulative[:, -1:]).sum(-1)
    drawn = torch.minimum(drawn, (p > 0).sum(-1) - 1)  # u so near 1 that rounding reaches the end
    return ids.gather(1, drawn[:, None])[:, 0]


def seen_before(history: torch.Tensor, length: torch.Tensor, fed: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """bool [rows * T, vocabulary]: tokens in each row's text up to and with each fed token.

    history  int64 [rows, width], valid up to length int64 [rows]
    fed      int64 [rows, T], the first of them history's last
    """
    known = torch.arange(history.shape[1], device=history.device) < length[:, None]
    # tokens that are not valid go to a column of their own: a scatter of False could undo a True
    seen = torch.zeros(history.shape[0], vocabulary + 1, dtype=torch.bool, device=history.device)
    seen = seen.scatter(1, torch.where(known, history, vocabulary), True)
    steps = [seen]
    for step in range(1, fed.shape[1]):
        steps.append(steps[-1].scatter(1, fed[:, step : step + 1], True))
    return torch.stack(steps, dim=1).flatten(0, 1)[:, :vocabulary]
