"""Fitted weights against the source: what can be held against it where codes are not a function of the weight alone.

    derived again   without data (`fit.inputs` is "none") a fit is deterministic: the codec runs again and must give the file's bytes,
                    on the kind of device and by the version of halfbyte that wrote them (sums differ between kinds)
    nearest         a tensor fitted by `scale`: whatever the scales, every code is the nearest to its weight
    bound           every method: the error is at most BOUND of the weight's power. Round to nearest makes about 0.0085, error
                    compensation more (it trades error nobody reads for error that is read); another tensor's codes would make 2

That scales are finite and states well formed is `layout`'s, that stock transformers loads them `stock`'s. How bitsandbytes itself would
have quantized the weight does not apply: codes and scales are meant to differ.

The catch: with data, only the bound holds the codes of `gptq`; that they are the ones written, the digests say.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from halfbyte.errors import HalfbyteError
from halfbyte.format.checkpoint import SafetensorsSource
from halfbyte.format.tensors import Source, TensorInfo
from halfbyte.progress import track
from halfbyte.records import versions
from halfbyte.verifier.checks import Check, Fault, skipped, verdict
from halfbyte.verifier.layout import Weight, read_nested

if TYPE_CHECKING:
    import torch

CHECK = "F11 F12 F22"
#: of a fitted checkpoint: the check's usual title promises that everything is derived again
TITLE = "fitted codes and scales stand for the source's weights"
#: largest error, as a share of the weight's power
BOUND = 0.1
SLICE = 1 << 22
#: a code counts as nearest if no other is nearer by more than this share (the scale was computed in another order)
_TIE = 1e-4


def check_fitted(
    reader: SafetensorsSource, weights: Sequence[Weight], source: Source | None, record: Mapping[str, Any], device: str
) -> tuple[Check, list[dict[str, Any]]]:
    """Check F11 F12 F22 of a checkpoint whose quantize record names a method, and per weight {"name", "sqnr_db", "scales_differing"}.

    device  `cpu` or `cuda[:N]`: where data-free fits are derived again, if that is the kind of device they were made on
    """
    if source is None:
        return skipped(CHECK, "no source to hold the codes against"), []
    method, origin = record["method"], {info.name: info for info in source.tensors}
    same_code = record.get("versions", {}).get("halfbyte") == versions()["halfbyte"]
    again = device if same_code and device.partition(":")[0] == method["device"] else None
    faults: list[Fault] = []
    rows: list[dict[str, Any]] = []
    derived = 0
    with track("codes against the source", sum(w.numel for w in weights), "weights") as advance:
        for weight in weights:
            info = origin.get(weight.name)
            if info is not None and info.shape == weight.shape:
                stated = record["tensors"].get(weight.name, {}).get("fit")
                free = stated is not None and stated["inputs"] == "none"
                nearest = free or (stated or method).get("method", method["name"]) == "scale"
                try:
                    found, wrong = _compare(reader, weight, source, info, nearest)
                    if free and again is not None:
                        wrong += _derive_again(reader, weight, source, info, method, again)
                        derived += 1
                except HalfbyteError as error:
                    wrong, found = [Fault(error.what, weight.name)], None
                faults += wrong
                rows.append({"name": weight.name, "sqnr_db": found, "scales_differing": 0})
            advance(weight.numel)
    if weights and not rows:
        return skipped(CHECK, "the source has none of the quantized weights"), []
    return replace(verdict(CHECK, faults, _good(rows, method, derived)), title=TITLE), rows


def _good(rows: Sequence[Mapping[str, Any]], method: Mapping[str, Any], derived: int) -> str:
    known = sorted(row["sqnr_db"] for row in rows if row["sqnr_db"] is not None)
    errors = (
        f"SQNR lowest {known[0]:.2f} dB, median {known[len(known) // 2]:.2f} dB" if known else "no error to measure"
    )
    close = ", every code the nearest" if method["name"] == "scale" else ""
    same = f", {derived} derived again to the same bytes" if derived else ""
    return (
        f"{len(rows)} weights fitted by {method['name']}{same}{close}, errors below {100 * BOUND:.0f} % of the power; {errors}; "
        "equality with bitsandbytes' own rounding does not apply"
    )


def _compare(
    reader: SafetensorsSource, weight: Weight, source: Source, info: TensorInfo, nearest: bool
) -> tuple[float | None, list[Fault]]:
    """(SQNR in dB, faults) of one weight, slice by slice."""
    import torch

    from halfbyte.codec import dequantize_blocks, unnest_absmax

    scales = unnest_absmax(read_nested(reader, weight))
    signal = noise = 0.0
    far, first = 0, 0
    for begin in range(0, weight.numel, SLICE):
        end = min(begin + SLICE, weight.numel)
        original = source.read(info, begin, end).to(torch.bfloat16)
        codes = reader.read(weight.parts[""], begin // 2, -(-end // 2))
        here = scales[begin // weight.blocksize : -(-end // weight.blocksize)]
        expanded = dequantize_blocks(codes, here, end - begin, weight.blocksize, torch.float32)
        exact = original.double()
        signal += float(exact.square().sum())
        noise += float((exact - expanded.double()).square().sum())
        if nearest:
            wrong = _not_nearest(original.float(), expanded, here, weight.blocksize)
            if far == 0 and wrong.any():
                first = begin + int(wrong.to(torch.uint8).argmax())
            far += int(wrong.sum())
    faults = []
    if far:
        faults.append(
            Fault(f"{far} codes are not the nearest to their weight, the first at element {first}", weight.name)
        )
    if not noise <= BOUND * signal and noise > 0:
        share = noise / signal if signal else math.inf
        faults.append(
            Fault(f"its error is {100 * share:.1f} % of its power, more than {100 * BOUND:.0f} %", weight.name)
        )
    sqnr = 10 * math.log10(signal / noise) if noise and signal else None
    return None if sqnr is None else round(sqnr, 3), faults


def _not_nearest(original: torch.Tensor, expanded: torch.Tensor, scales: torch.Tensor, blocksize: int) -> torch.Tensor:
    """bool [n]: a level of the weight's block is nearer to it than the one it was given."""
    import torch

    from halfbyte.codec import nf4_levels, nf4_midpoints

    scale = scales.repeat_interleave(blocksize)[: len(original)]
    ratio = torch.where(scale == 0, torch.zeros_like(original), original / scale)
    best = nf4_levels()[torch.bucketize(ratio, nf4_midpoints())] * scale
    return (original - expanded).abs() > (original - best).abs() * (1 + _TIE) + 1e-30


def _derive_again(
    reader: SafetensorsSource, weight: Weight, source: Source, info: TensorInfo, method: Mapping[str, Any], device: str
) -> list[Fault]:
    """Fit the weight again and hold all its bytes against the file's."""
    import torch

    from halfbyte.codec.fitting import Fit, fit_weight

    how = Fit(**{**method["fit"], "method": "scale", "blocksize": weight.blocksize})
    original = source.read(info, 0, info.numel).view(info.shape).to(device).to(torch.bfloat16)
    derived = fit_weight(original, how, threads=1).nf4
    stored = read_nested(reader, weight)
    codes = reader.read(weight.parts[""], 0, -(-weight.numel // 2)).view(-1)
    faults = []
    if (different := int((codes != derived.packed.cpu()).sum())) > 0:
        faults.append(Fault(f"{different} bytes of codes differ from those derived again", weight.name))
    for part in ("absmax", "nested_absmax", "nested_quant_map"):
        if not torch.equal(getattr(stored, part), getattr(derived.scales, part)):
            faults.append(Fault("differs from what is derived again", f"{weight.name}.{part}"))
    if stored.nested_offset != derived.scales.nested_offset:
        faults.append(Fault("nested_offset differs from what is derived again", weight.name))
    return faults
