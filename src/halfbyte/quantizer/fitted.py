"""Tensors whose codes and scales are fitted rather than rounded: a whole tensor from the source, through the codec, into its shard.

A fit looks at rows as wholes, so there are no slices here: one tensor at a time, in float32, with all cores (or the GPU) on it.
What `halfbyte.quantizer.tensor_work` does for the rest, hashes and a journal entry once the bytes are written, is done here too,
and a tensor can be read back from an unfinished shard: a resumed job computes with what is there, not with what it remembers.

Beside the hashes stands what the fit was worth: its error and that of round to nearest, both weighed by what the linear reads:

    sum over rows of (w - w^) H (w - w^)^T / sum of w H w^T      H: mean of x x^T over calibration's inputs x; without any: 1
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halfbyte.format.shards import Shard, ShardFile, read_tensor
from halfbyte.format.tensors import Source, TensorInfo
from halfbyte.progress import Advance
from halfbyte.quantizer.journal import Journal
from halfbyte.quantizer.tensor_work import as_bytes, check_finite, write_scales

if TYPE_CHECKING:
    import torch

    from halfbyte.codec import NF4Tensor
    from halfbyte.codec.fitting import Fit
    from halfbyte.layers.fitting.layerwise import Inputs


#: rows of a weight in hand at a time where errors are measured
_ROWS = 1024


@dataclass(frozen=True, eq=False)
class Place:
    """Where a tensor's results lie: the shard, its path now, the open file (None: the shard is finished), and whether they are due."""

    shard: Shard
    path: Path
    file: ShardFile | None
    due: bool


@dataclass(eq=False)
class FittedTensors:
    """Implements `layerwise.Store`.

    infos      the tensors to be fitted, by name
    places     where each lies, by name
    fit_of     (name, whether there are inputs) -> how: method and block size
    todo       names still to be written; `fit` takes them out
    """

    source: Source
    infos: Mapping[str, TensorInfo]
    places: Mapping[str, Place]
    journal: Journal
    fit_of: Callable[[str, bool], Fit]
    device: str
    advance: Advance
    todo: set[str] = field(default_factory=set)

    def is_done(self, name: str) -> bool:
        return name not in self.todo

    def load(self, name: str) -> torch.Tensor:
        from halfbyte import codec

        info = self.infos[name]
        return codec.dequantize(self._stored(name)).view(info.shape).to(self.device)

    def fit(self, name: str, inputs: Inputs | None) -> torch.Tensor:
        """See `Store`; raises NonFiniteWeight, OutputError (disk full)"""
        import torch

        from halfbyte import codec
        from halfbyte.codec.fitting import fit_weight

        info, how = self.infos[name], self.fit_of(name, inputs is not None)
        piece = self.source.read(info, 0, info.numel)
        check_finite(piece, info)
        source_sha256 = hashlib.sha256(memoryview(as_bytes(piece))).hexdigest()
        weight = piece.view(info.shape).to(self.device).to(torch.bfloat16)
        seen: dict[str, Any] = (
            {} if inputs is None else {"mean_squares": inputs.mean_squares, "hessian": inputs.hessian}
        )
        made = fit_weight(weight, how, threads=1, **seen)
        nf4 = made.nf4
        rounded = codec.quantize(weight.reshape(-1), how.blocksize, threads=1)
        error, rtn_error = output_errors(weight, (nf4, rounded), inputs)
        about = {
            "method": made.method,
            "inputs": "none" if inputs is None else inputs.tokens,
            "error": error,
            "rtn_error": rtn_error,
            "damping": made.damping,
            "notes": list(made.notes),
        }
        entry = self._write(info, nf4)
        self.journal.append({"tensor": name, "source_sha256": source_sha256, **entry, "fit": about})
        self.todo.discard(name)
        self.advance(info.nbytes)
        return codec.dequantize(nf4).view(info.shape).to(self.device)

    def _write(self, info: TensorInfo, nf4: NF4Tensor) -> dict[str, str]:
        target = self.places[info.name].file
        assert target is not None, "a finished shard holds nothing that is still to be written"
        codes = memoryview(as_bytes(nf4.packed.cpu()))
        output_hash = hashlib.sha256(codes)
        target.write(info.name, 0, codes)
        state = write_scales(info, nf4.blocksize, nf4.scales, target, output_hash)
        return {"output_sha256": output_hash.hexdigest(), "quant_state": state}

    def _stored(self, name: str) -> NF4Tensor:
        import json

        import torch

        from halfbyte.codec import Nested, NF4Tensor

        place = self.places[name]
        state = json.loads(self.journal.tensors[name]["quant_state"])

        def part(component: str, dtype: torch.dtype) -> torch.Tensor:
            data = bytearray(read_tensor(place.path, place.shard, f"{name}{component}"))
            return torch.frombuffer(data, dtype=dtype)

        scales = Nested(
            part(".absmax", torch.uint8), part(".nested_absmax", torch.float32), state["nested_offset"],
            part(".nested_quant_map", torch.float32),
        )  # fmt: skip
        return NF4Tensor(part("", torch.uint8), scales, self.infos[name].numel, state["blocksize"])


def output_errors(weight: torch.Tensor, candidates: Sequence[NF4Tensor], inputs: Inputs | None) -> list[float]:
    """The share of the layer's output (mean square) that is error, of each candidate for `weight` [rows, columns].

    As halfbyte.codec.fit_error, of several at once and in float32: it is said to four digits, and the Hessian's copy in float64 would be
    the largest tensor of the job. Sums in float64.
    """
    import torch

    from halfbyte import codec

    def energy(rows: torch.Tensor) -> float:
        pushed = rows
        if inputs is not None and inputs.hessian is not None:
            pushed = rows @ inputs.hessian
        elif inputs is not None and inputs.mean_squares is not None:
            pushed = rows * inputs.mean_squares
        return float((pushed * rows).sum(dtype=torch.float64))

    restored = [codec.dequantize(nf4, torch.float32).view(weight.shape) for nf4 in candidates]
    total, lost = 0.0, [0.0] * len(candidates)
    for begin in range(0, len(weight), _ROWS):
        rows = weight[begin : begin + _ROWS].float()
        total += energy(rows)
        for at, each in enumerate(restored):
            lost[at] += energy(rows - each[begin : begin + _ROWS].to(rows.device))
    return [each / total if total > 0 else 0.0 for each in lost]


def gain_of(entries: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What fitting was worth over all tensors: {"tensors", "worse", "error_ratio"}.

    error_ratio  geometric mean of error over round to nearest's; None if no tensor had an error to begin with
    """
    ratios = [e["error"] / e["rtn_error"] for e in entries.values() if e["rtn_error"] > 0]
    positive = [ratio for ratio in ratios if ratio > 0]
    mean = math.exp(math.fsum(map(math.log, positive)) / len(positive)) if positive else None
    return {"tensors": len(entries), "worse": sum(ratio > 1 for ratio in ratios), "error_ratio": mean}
