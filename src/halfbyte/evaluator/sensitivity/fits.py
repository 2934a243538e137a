"""Weights as the chosen method will write them, so that a budget is spent by what will be lost and not by what rounding would lose.

Rounding to nearest makes an NF4 weight from the weight alone. `scale` and `gptq` look at what the linear reads, so the decoder is walked
once before costs are measured (halfbyte.layers.fitting), with the same calibration rows that `quantize` draws from the same options:

    source layer 0 -> moments of what each linear reads -> its weight fitted in NF4-64 and in NF4-32, from the same moments -> two files
                   -> rows through layer 0 *as it is* -> source layer 1 ...

The walk goes on with the source's weights, where `quantize` goes on with quantized ones: a cost is of one group alone, with everything
else as it is, so its inputs are too. That is the one difference to the weights that will be written. What it leaves out is what all
figures here leave out, how errors of groups meet; the joint ones in the record say how much that is.

Files and resuming. A fit is dear and its result small (about half a byte a weight in each size), so each is written as soon as it is
made, in a folder named after all it depends on; a killed job begins with those that are there. They are deleted once the record is.

Memory: that of `quantize --method`: one layer, one group's Hessian, one weight a few times. Nothing grows with the number of layers.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halfbyte.errors import UsageError
from halfbyte.evaluator.sensitivity.carrying import Coarse, rounded_to_nearest
from halfbyte.layers.fitting.layerwise import Inputs, fit_layers
from halfbyte.layers.fitting.method import Method
from halfbyte.layers.streaming import StreamedModel
from halfbyte.layers.weights import PlainWeights
from halfbyte.progress import note, track
from halfbyte.recipe.budget.sensitivity import MEASURED
from halfbyte.records import digest, versions, write_bytes_atomic
from halfbyte.texts.calibration import Calibration, Writing, calibration_rows, read_calibration, shared_documents

if TYPE_CHECKING:
    import torch

    from halfbyte.codec import NF4Tensor
    from halfbyte.layers.rows import Rows

_NAMED = 3


@dataclass(frozen=True)
class Place:
    """Where and how is computed: device, dtype of forward passes, rows at a time, the folder of the job."""

    device: str
    dtype: str
    batch: int
    out: Path


@contextmanager
def fitted(
    method: Method, weights: PlainWeights, names: set[str], measured: Sequence[tuple[str, set[str]]], place: Place
) -> Iterator[tuple[Coarse, dict[str, Any]]]:
    """How the weights `names` (in the files) look in NF4, and what the record says of it.

    measured  (name, hashes) of every document that costs will be measured on
    raises UsageError if a document to be measured on is among the calibration's; SourceError (calibration), PlanError (streaming)
    """
    if method.method == "rtn":
        yield rounded_to_nearest, {"method": "rtn", "calibration": None}
        return
    rows, facts = None, None
    if method.calibration is not None:
        writing = Writing(method.max_new_tokens, place.device, place.dtype, place.batch, place.out / "traces")
        texts = read_calibration(method.calibration)
        rows, facts = calibration_rows(
            texts, weights, tokens=method.calibration_tokens, seed=method.seed, writing=writing
        )
        _refuse_shared(measured, facts["hashes"], texts)
    options = {**asdict(method), "calibration": None, "dtype": place.dtype, "sequential": None}
    key = {
        "weights": weights.digest, "options": options, "batch": place.batch, "rows": rows and rows.digest,
        "device": place.device.partition(":")[0], "version": versions()["halfbyte"],
    }  # fmt: skip
    folder = place.out / "fits" / digest(key).partition(":")[2][:24]
    store = Fits(weights, folder, method, place.device)
    store.fit_all(names, rows, place)
    about = {
        "method": method.method,
        "fit": {k: v for k, v in asdict(method.fit_of(64, measured=True)).items() if k not in ("method", "blocksize")},
        "calibration": facts and {k: v for k, v in facts.items() if k != "hashes"},
        **{k: getattr(method, k) for k in ("calibration_tokens", "max_new_tokens", "seed")},
    }
    yield store.weight, about
    shutil.rmtree(folder, ignore_errors=True)


@dataclass(eq=False)
class Fits:
    """Implements `layerwise.Store`: each weight in both block sizes, a file each; the walk goes on with the source's."""

    weights: PlainWeights
    folder: Path
    method: Method
    device: str
    advance: Callable[[int], None] = lambda amount: None

    def is_done(self, name: str) -> bool:
        return all(self._path(name, size).is_file() for size in MEASURED.values())

    def load(self, name: str) -> torch.Tensor:
        import torch

        return self.weights.load(name, self.device).to(torch.bfloat16)

    def fit(self, name: str, inputs: Inputs | None) -> torch.Tensor:
        from safetensors.torch import save

        from halfbyte.codec.fitting import fit_weight

        weight = self.load(name)
        seen: dict[str, Any] = (
            {} if inputs is None else {"mean_squares": inputs.mean_squares, "hessian": inputs.hessian}
        )
        for size in MEASURED.values():
            how = self.method.fit_of(size, measured=inputs is not None)
            made = fit_weight(weight, how, threads=1, **seen).nf4
            write_bytes_atomic(self._path(name, size), save(_parts(made)))
            self.advance(1)
        return weight

    def fit_all(self, names: set[str], rows: Rows | None, place: Place) -> None:
        """Every weight of `names`: those that the walk reaches by what they read, without rows each by itself."""
        from halfbyte.codec.fitting import Moments

        todo = [name for name in sorted(names) if not self.is_done(name)]
        if len(todo) < len(names):
            note(f"fits: {len(names) - len(todo)} of {len(names)} are there from before")
        with track(f"fit ({self.method.method})", len(MEASURED) * len(names), "weights") as self.advance:
            self.advance(len(MEASURED) * (len(names) - len(todo)))
            if rows is not None and todo:
                model = StreamedModel(self.weights, place.device, place.dtype)
                try:
                    moments = partial(Moments, full=self.method.method == "gptq", device=place.device)
                    fit_layers(model, rows, names, self, moments, batch=place.batch, sequential=True)
                finally:
                    model.close()
            for name in todo:
                if not self.is_done(name):
                    self.fit(name, None)

    def weight(self, name: str, like: torch.Tensor, blocksize: int) -> torch.Tensor:
        """The fitted weight as a loader will expand it: bfloat16, shaped and placed `like` the source's."""
        from safetensors.torch import load_file

        from halfbyte import codec

        parts = load_file(self._path(name, blocksize))
        scales = codec.Nested(parts["absmax"], parts["nested_absmax"], float(parts["nested_offset"]), parts["map"])
        nf4 = codec.NF4Tensor(parts["packed"], scales, like.numel(), blocksize)
        return codec.dequantize(nf4).view(like.shape).to(like.device)

    def _path(self, name: str, blocksize: int) -> Path:
        # a tensor's name comes from a file of others: its hash is a safe file name
        return self.folder / f"{digest(name).partition(':')[2][:32]}-{blocksize}.safetensors"


def _parts(nf4: NF4Tensor) -> dict[str, torch.Tensor]:
    import torch

    scales = nf4.scales
    return {
        "packed": nf4.packed, "absmax": scales.absmax, "nested_absmax": scales.nested_absmax,
        "nested_offset": torch.tensor(scales.nested_offset, dtype=torch.float64), "map": scales.nested_quant_map.clone(),
    }  # fmt: skip


def _refuse_shared(measured: Sequence[tuple[str, set[str]]], hashes: Sequence[str], texts: Calibration) -> None:
    """What a fit has seen it loses less on: such text would make every cost look smaller than it is."""
    if there := shared_documents(measured, hashes):
        more = f" and {len(there) - _NAMED} more" if len(there) > _NAMED else ""
        raise UsageError(
            f"{len(there)} of its documents are in the calibration {texts.name} too: {', '.join(there[:_NAMED])}{more}",
            where="--data", todo="measure on other text, or calibrate on other text",
        )  # fmt: skip
