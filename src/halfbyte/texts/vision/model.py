"""A whole image-text model as the scorer wants it: hidden states of the decoder, with the picture in front of it.

The text scorer runs the decoder alone. Here the model's own forward runs, towers and all, so that nothing about how a
picture enters the residual is written down here (where soft tokens go, which of them see each other, deep features). What
leaves the decoder behind its final norm is caught by a hook; head and figures are those of the text protocols.

The catch: whole only. Calibration streams rows with pictures (halfbyte.layers.streaming), scoring does not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from halfbyte.errors import PlanError
from halfbyte.layers.model import WholeModel, build_module
from halfbyte.layers.places import Places
from halfbyte.layers.recording import as_arguments, run_base
from halfbyte.layers.rows import Batch, PictureBatch
from halfbyte.layers.streaming import available_bytes
from halfbyte.layers.weights import Weights
from halfbyte.recipe.skeleton import build_skeleton

if TYPE_CHECKING:
    import torch

#: a model must leave a tenth of the free memory to its activations
ROOM = 1.1


class SeeingModel(WholeModel):
    """Decoder, head and towers on one device. Implements HiddenStates for batches of PictureRows.

    raises as WholeModel; PlanError also if it does not fit
    """

    def __init__(self, weights: Weights, device: str = "cpu", dtype: str = "float32", attention: str = "sdpa") -> None:
        check_fits(weights, device, dtype)
        super().__init__(weights, device, dtype, attention, towers=True)

    def run(self, batch: Batch) -> torch.Tensor:
        assert isinstance(batch, PictureBatch), "rows without pictures are scored by the text scorer"
        return run_base(self.model, batch, self.device)

    def arguments(self, inputs: Any) -> dict[str, torch.Tensor]:
        """Arrays as tensors on the device, floats in the compute dtype."""
        return as_arguments(self.model, inputs, self.device)


def check_fits(weights: Weights, device: str, dtype: str) -> None:
    """Raises PlanError unless decoder, head and towers in `dtype` fit into the free memory of `device`."""
    skeleton = build_skeleton(weights.config)
    places = Places(weights, skeleton, build_module(skeleton, dtype, "sdpa"), towers=True)
    needed, free = ROOM * sum(places.nbytes(key) for key in places.keys), available_bytes(device)
    if needed > free:
        raise PlanError(
            f"rows with pictures are scored with the whole model in memory: {needed / 2**30:.1f} GiB, {free / 2**30:.1f} are free",
            where=weights.label,
            todo="use a larger device, --dtype bfloat16, or name the other protocols with --protocol",
        )
