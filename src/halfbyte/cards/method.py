"""How the codes were chosen, in words: the method, the data it saw, and what it was worth against round to nearest.

The gain is in the method's own measure (the error of a layer's output on its calibration inputs), on the very rows it was fitted to. It
says that the fit worked, not that the model is better: that is what `halfbyte evaluate` is for, on other text.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from halfbyte.cards.markdown import Markdown, code, joined, text

_NAMES = {"rtn": "round to nearest", "scale": "searched scales", "gptq": "error compensation (GPTQ)"}


def method_lines(method: Mapping[str, Any] | None) -> list[str]:
    """Sentences for a terminal from the `method` of a quantize record; [] of a record without: round to nearest."""
    if not method:
        return []
    lines = [f"method {method['name']}: {_NAMES.get(method['name'], method['name'])}, {_data(method)}"]
    if (gain := gain_words(method)) is not None:
        lines.append(gain)
    return lines


def method_words(quantize: Mapping[str, Any]) -> Markdown:
    """The same for a card; of a record without `method`, that it is bitsandbytes' own rounding."""
    method = quantize.get("method")
    if not method:
        return Markdown("Codes: round to nearest with the largest magnitude as scale, bit for bit bitsandbytes' own.")
    calibration = method.get("calibration")
    name = str(method["name"])
    parts: list[Any] = [Markdown("Codes: method "), code(name), Markdown(", "), text(_NAMES.get(name, name))]
    if calibration:
        parts += [
            Markdown(", calibrated on "), code(str(calibration["name"])), Markdown(" (sha256 "),
            code(str(calibration["sha256"])[:16]), text(f", {_amount(calibration)})"),
        ]  # fmt: skip
    else:
        parts.append(Markdown(", without data"))
    if (gain := gain_words(method)) is not None:
        parts.append(text(f". {gain}"))
    return joined([*parts, Markdown(".")], "")


def gain_words(method: Mapping[str, Any]) -> str | None:
    """One clause on the weighted error against round to nearest; None if it was not measured."""
    gain = method.get("gain") or {}
    ratio = gain.get("error_ratio")
    if ratio is None:
        return None
    kind = "weight error weighted by those inputs" if method.get("calibration") else "weight error"
    worse = f", larger in {gain['worse']}" if gain.get("worse") else ""
    return f"{kind} {100 * (ratio - 1):+.1f} % against round to nearest (geometric mean of {gain['tensors']} tensors{worse})"


def _data(method: Mapping[str, Any]) -> str:
    calibration = method.get("calibration")
    if not calibration:
        return "without data"
    return f"calibrated on {calibration['name']} (sha256 {str(calibration['sha256'])[:16]}, {_amount(calibration)})"


def _amount(calibration: Mapping[str, Any]) -> str:
    pictures = calibration.get("pictures", 0)
    kind = f"{pictures:,} of them with a picture" if pictures else "text only"
    return f"{calibration['tokens']:,} tokens in {calibration['rows']:,} rows, {kind}, answers {calibration['answers']}"
