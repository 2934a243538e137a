"""Which token a model would have chosen at every scored position of some rows: one forward pass a row, nothing generated.

Models are opened, batched and headed exactly as for the divergences (`scorer`): whole, or layer by layer where they do not fit, the head
in float32. So a choice has no bf16 tie at the top to break, and a 31B can be asked on any machine that can score it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from halfbyte.device import check_device
from halfbyte.evaluator.scoring.scorer import in_row_order, opener, predictions, prepare, streams
from halfbyte.layers.model import exact_float32
from halfbyte.layers.rows import Rows
from halfbyte.layers.weights import Weights
from halfbyte.progress import track

if TYPE_CHECKING:
    import numpy as np


def greedy_choices(
    weights: Weights, rows: Rows, *, device: str, dtype: str, batch: int, streaming: bool | Literal["auto"] = "auto",
) -> list[np.ndarray]:  # fmt: skip
    """Row by row the likeliest token at each scored position, int64 [scored in that row]; what was there is `rows.tokens`.

    raises  SourceError, PlanError (the model cannot be built), UsageError (device)
    """
    import numpy as np
    import torch

    check_device(device)
    batches = rows.batches(batch)
    model = opener(rows, device, dtype, streams(weights, rows, (device, dtype), streaming))(weights)
    found: list[torch.Tensor] = []
    try:
        prepare(model, [(batches, None)])
        with torch.inference_mode(), exact_float32(), track(f"force {weights.label}", rows.n, "tokens") as advance:
            for one, states in zip(batches, model.hidden_states(batches), strict=True):
                found += [prediction.top for prediction, _ in predictions(one, states, model.head)]
                advance(len(one.labels))
            chosen = torch.cat(found).cpu().numpy()
    finally:
        model.close()
    row, _, _, order = in_row_order(batches)
    cuts = np.searchsorted(row, np.arange(1, len(rows.tokens)))
    return np.split(chosen[order], cuts)
