"""What training minimises, over the scored positions only: cross-entropy, or the divergence from a teacher.

    cross-entropy   -log P(label)                      teach something new
    distillation    KL(P_teacher || P_student)         stay what you were, on a coarser grid (Gemma's QAT does this)

A batch names the scored positions: `scored` are places in the flattened [batch * length] from which a token is predicted,
`targets` the tokens. Only they pass the head: with a vocabulary of 262,144 the logits are by far the largest tensor of a
step. Both are made where the batch is made, on the CPU; a mask would make a GPU wait for its own count. A target of IGNORE
does not count: it fills batches up to one size where sizes must not change.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

#: one forward pass: the model's own keyword arguments, and `scored`, `targets` (int64 [n])
Batch = dict[str, Any]
IGNORE = -100


def scored_logits(model: Any, batch: Batch) -> torch.Tensor:
    """float32 [n, vocab]: logits at the positions that predict a scored token, soft-capped where the model does so."""
    inputs = {name: value for name, value in batch.items() if name not in ("scored", "targets")}
    hidden = model.base_model(**inputs, use_cache=False).last_hidden_state
    logits: torch.Tensor = model.get_output_embeddings()(hidden.flatten(0, 1)[batch["scored"]]).float()
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    return torch.tanh(logits / cap) * cap if cap else logits


def cross_entropy(model: Any, batch: Batch) -> torch.Tensor:
    """Mean negative log-likelihood of the scored tokens, in nats per token."""
    return F.cross_entropy(scored_logits(model, batch), batch["targets"], ignore_index=IGNORE)


def distillation(student: Any, teacher: Any, batch: Batch) -> torch.Tensor:
    """Mean KL(P_teacher || P_student) over the scored positions, full vocabulary, in nats per token."""
    with torch.no_grad():
        target = F.log_softmax(scored_logits(teacher, batch), dim=-1)
    own = F.log_softmax(scored_logits(student, batch), dim=-1)
    counts: torch.Tensor = (batch["targets"] != IGNORE).float()
    each: torch.Tensor = F.kl_div(own, target, reduction="none", log_target=True).sum(-1)
    return (each * counts).sum() / counts.sum()
