"""Bytes against the source, slice by slice: kept tensors as they were, codes derived again, the error of each weight.

    kept   equal bytes; no NaN; without a source, the sha256 that the quantize record states of the source's bytes
    codes  the codec runs again on the source and must give the file's codes and scales (docs/format.md F11, F12, F22)
    error  SQNR = 10 log10( sum w^2 / sum (w - w^)^2 ) dB, w from the source, w^ as a loader will expand the file;
           sums in float64. Round to nearest gives about 20.7 dB on Gaussian weights (0.85 % of their power)

Memory: one slice of each side, and 1/16 byte a weight for the scales of the tensor in hand.

The catch: a file written elsewhere (a GPU, another version) may rightly differ in a few scales. Without a quantize record
the second level is therefore held to docs/format.md section 7; with one, to the byte: halfbyte promises that.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from halfbyte.errors import HalfbyteError
from halfbyte.format.checkpoint import SafetensorsSource
from halfbyte.format.nf4_layout import component_sizes
from halfbyte.format.tensors import Source, TensorInfo
from halfbyte.progress import track
from halfbyte.verifier.checks import Check, Fault, skipped, verdict
from halfbyte.verifier.layout import Weight, nf4_names, read_nested

if TYPE_CHECKING:
    from halfbyte.codec import Nested

#: elements a slice: even, and a multiple of every block size
SLICE = 1 << 22
#: docs/format.md section 7, with room
_SCALES_MAY_DIFFER = 0.01
_RELATIVE = 1e-4


@dataclass
class Difference:
    """How the file differs from what the codec makes of the source: counts, and the first wrong element."""

    codes: int = 0
    first: int | None = None
    scales: int = 0
    largest_step: int = 0
    nested: float = 0.0
    older_map: bool = False
    signal: float = 0.0
    noise: float = 0.0

    @property
    def sqnr_db(self) -> float | None:
        """None where there is no error at all (or no weight but zero)."""
        return 10 * math.log10(self.signal / self.noise) if self.noise and self.signal else None


def check_kept(
    reader: SafetensorsSource, source: Source | None, digests: Mapping[str, Mapping[str, Any]] | None
) -> list[Check]:
    """Checks F18 and F21 on every tensor that is no part of an NF4 weight.

    digests  `tensors` of the quantize record: name -> {"sha256": of the source's bytes, ...}
    """
    packed = nf4_names(info.name for info in reader.tensors)
    parts = {part for name in packed for part in component_sizes(name, (1,))}
    kept = [info for info in reader.tensors if info.name not in parts]
    origin = {info.name: info for info in source.tensors} if source else {}
    different, unsound = [], []
    compared = 0
    with track("kept tensors", sum(info.nbytes for info in kept), "B") as advance:
        for info in kept:
            twin = origin.get(info.name)
            if twin is not None and (twin.dtype, twin.shape) != (info.dtype, info.shape):
                different.append(
                    Fault(f"is {info.dtype} {list(info.shape)}, not {twin.dtype} {list(twin.shape)}", info.name)
                )
                twin = None
            stated = (digests or {}).get(info.name, {}).get("sha256")
            wrong, broken, sha256 = _scan(reader, info, source, twin)
            compared += twin is not None or stated is not None
            if wrong is not None:
                different.append(Fault(f"differs from the source at element {wrong}", info.name))
            if stated is not None and sha256 != stated:
                different.append(
                    Fault("has not the sha256 that the quantize record states of the source's bytes", info.name)
                )
            if broken is not None:
                unsound.append(Fault(f"element {broken} is NaN or infinite", info.name))
            advance(info.nbytes)
    if source is None and not digests:
        same = skipped("F18", "no source, and no quantize record with its digests")
    else:
        same = verdict("F18", different, f"{compared} of {len(kept)} kept tensors compared")
    return [same, verdict("F21", unsound, f"{len(kept)} kept tensors")]


def _scan(
    reader: SafetensorsSource, info: TensorInfo, source: Source | None, twin: TensorInfo | None
) -> tuple[int | None, int | None, str]:
    """First element that differs from `twin`, first one that is not finite, sha256 of all bytes."""
    import torch

    wrong = broken = None
    sha256 = hashlib.sha256()
    for begin in range(0, info.numel, SLICE):
        end = min(begin + SLICE, info.numel)
        piece = reader.read(info, begin, end)
        raw = piece.view(torch.uint8)
        data: Any = raw.numpy()
        sha256.update(data)
        if source is not None and twin is not None and wrong is None:
            other = source.read(twin, begin, end).view(torch.uint8)
            if not torch.equal(raw, other):
                wrong = begin + int((raw != other).to(torch.uint8).argmax()) // piece.element_size()
        if broken is None and piece.dtype.is_floating_point:
            bad = torch.isnan(piece) if info.numel == 1 else ~torch.isfinite(piece.float())
            if bool(bad.any()):
                broken = begin + int(bad.to(torch.uint8).argmax())
    return wrong, broken, sha256.hexdigest()


def check_codes(
    reader: SafetensorsSource, weights: Sequence[Weight], source: Source | None, *, exact: bool
) -> tuple[Check, list[dict[str, Any]]]:
    """Check F11 F12 F22 on every weight, and per weight {"name", "sqnr_db", "scales_differing"}.

    exact  the second level must be equal to the byte too (a file of ours)
    """
    if source is None:
        return skipped("F11 F12 F22", "no source to derive the codes from"), []
    origin = {info.name: info for info in source.tensors}
    faults: list[Fault] = []
    rows: list[dict[str, Any]] = []
    with track("codes against the source", sum(w.numel for w in weights), "weights") as advance:
        for weight in weights:
            info = origin.get(weight.name)
            if info is not None and info.shape == weight.shape:
                try:
                    difference = _derive_again(reader, weight, source, info)
                except HalfbyteError as error:
                    faults.append(Fault(error.what, weight.name))
                else:
                    faults += _judge(weight, difference, exact)
                    sqnr = difference.sqnr_db
                    row = {"name": weight.name, "sqnr_db": None if sqnr is None else round(sqnr, 3)}
                    rows.append({**row, "scales_differing": difference.scales})
            advance(weight.numel)
    if weights and not rows and not faults:
        return skipped("F11 F12 F22", "the source has none of the quantized weights"), []
    differing = sum(row["scales_differing"] for row in rows)
    good = f"{len(rows)} weights, every code equal, {differing or 'no'} scales differ by a step; {_sqnr_range(rows)}"
    return verdict("F11 F12 F22", faults, good), rows


def _sqnr_range(rows: Sequence[Mapping[str, Any]]) -> str:
    known = sorted(row["sqnr_db"] for row in rows if row["sqnr_db"] is not None)
    if not known:
        return "no error to measure"
    return f"SQNR lowest {known[0]:.2f} dB, median {known[len(known) // 2]:.2f} dB"


def _derive_again(reader: SafetensorsSource, weight: Weight, source: Source, info: TensorInfo) -> Difference:
    """Quantize the source's weight again and hold the file against it; one pass over both."""
    import torch

    from halfbyte.codec import dequantize_blocks, nest_absmax, quantize_blocks, unnest_absmax

    stored = read_nested(reader, weight)
    scales = unnest_absmax(stored)
    absmax, result = [], Difference()
    for begin in range(0, weight.numel, SLICE):
        end = min(begin + SLICE, weight.numel)
        original = source.read(info, begin, end)
        packed, peaks = quantize_blocks(original.to(torch.bfloat16), weight.blocksize)
        absmax.append(peaks)
        codes = reader.read(weight.parts[""], begin // 2, -(-end // 2))
        if not torch.equal(packed, codes):
            wrong = torch.stack([(packed ^ codes) >> 4, (packed ^ codes) & 15], dim=1).view(-1) != 0
            result.codes += int(wrong.sum())
            if result.first is None:
                result.first = begin + int(wrong.to(torch.uint8).argmax())
        here = scales[begin // weight.blocksize : -(-end // weight.blocksize)]
        expanded = dequantize_blocks(codes, here, end - begin, weight.blocksize).double()
        exact = original.double()
        result.signal += float(exact.square().sum())
        result.noise += float((exact - expanded).square().sum())
    _compare_scales(stored, nest_absmax(torch.cat(absmax), threads=1), result)
    return result


def _compare_scales(stored: Nested, derived: Nested, result: Difference) -> None:
    """Fill in how the second levels differ: codes in steps, the rest as the largest relative difference."""
    steps = (stored.absmax.int() - derived.absmax.int()).abs()
    result.scales, result.largest_step = int((steps != 0).sum()), int(steps.max())
    pairs = (
        (stored.nested_absmax.double(), derived.nested_absmax.double()),
        (stored.nested_quant_map.double()[1:], derived.nested_quant_map.double()[1:]),
    )
    offset = abs(stored.nested_offset - derived.nested_offset) / max(abs(derived.nested_offset), 1e-30)
    result.nested = max(offset, *(float(((a - b).abs() / b.abs().max().clamp_min(1e-30)).max()) for a, b in pairs))
    # the one entry that changed between versions of bitsandbytes (docs/format.md section 7)
    result.older_map = bool(stored.nested_quant_map[0] != derived.nested_quant_map[0])


def _judge(weight: Weight, difference: Difference, exact: bool) -> list[Fault]:
    faults = []
    if difference.codes:
        what = f"{difference.codes} codes differ from the source's, the first at element {difference.first}"
        faults.append(Fault(what, weight.name))
    blocks = -(-weight.numel // weight.blocksize)
    allowed = 0 if exact else max(1, math.floor(_SCALES_MAY_DIFFER * blocks))
    if difference.scales > allowed or difference.largest_step > 1:
        what = f"{difference.scales} of {blocks} scale codes differ, by up to {difference.largest_step} steps"
        faults.append(Fault(what, f"{weight.name}.absmax"))
    if difference.nested > (0 if exact else _RELATIVE) or (exact and difference.older_map):
        faults.append(
            Fault(f"offset, nested_absmax or map differ by {difference.nested:.2g} of their size", weight.name)
        )
    return faults
