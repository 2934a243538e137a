"""How codes and scales are chosen: the options of `halfbyte quantize` that ask for more than rounding.

    rtn     round to nearest with absmax scales: bitsandbytes' own, bit for bit; the default
    scale   codes to nearest, scales searched, of either sign; weighted by the inputs' mean squares if there is calibration
    gptq    codes one column at a time, each error made up for in the columns that follow (docs/method.md)

Data-free `scale` takes a tensor at a time. With calibration a model is walked decoder layer by decoder layer (`layerwise`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halfbyte.errors import UsageError

METHODS = ("rtn", "scale", "gptq")
DTYPES = ("auto", "float32", "bfloat16")


@dataclass(frozen=True)
class Method:
    """By the names of the command line; all but `method` mean something only for another method than rtn.

    method              one of METHODS
    calibration         `builtin`, or a file of chats or texts (halfbyte.texts.calibration); None: none, `builtin` for gptq
    calibration_tokens  at most so many tokens of it
    max_new_tokens      longest answer that the source writes to a prompt without one
    dtype               of the forward passes: `float32`, `bfloat16`, or `auto`: float32 on the CPU, bfloat16 on a GPU
    batch               rows at a time
    sequential          inside a layer, measure what a linear reads after those before it have been quantized
    seed                which texts are drawn
    """

    method: str = "rtn"
    calibration: str | Path | None = None
    calibration_tokens: int = 65_536
    max_new_tokens: int = 256
    dtype: str = "auto"
    batch: int = 8
    sequential: bool = True
    seed: int = 0

    @property
    def calibrated(self) -> bool:
        return self.calibration is not None

    def compute_dtype(self, device: str) -> str:
        if self.dtype != "auto":
            return self.dtype
        return "float32" if device == "cpu" else "bfloat16"


METHOD_OPTIONS = tuple(Method.__dataclass_fields__)


def method_of(options: Mapping[str, Any]) -> Method:
    """Checked options, `calibration` filled in for gptq; raises UsageError, naming the option."""
    if unknown := options.keys() - set(METHOD_OPTIONS):
        raise UsageError(
            f"unknown option {min(unknown)!r}", where="quantize", todo=f"known: {', '.join(METHOD_OPTIONS)}"
        )
    made = Method(**options)
    if made.method not in METHODS:
        raise UsageError(f"unknown method {made.method!r}", where="--method", todo=f"known: {', '.join(METHODS)}")
    if made.dtype not in DTYPES:
        raise UsageError(f"unknown dtype {made.dtype!r}", where="--dtype", todo=f"known: {', '.join(DTYPES)}")
    for name in ("calibration_tokens", "max_new_tokens", "batch"):
        if getattr(made, name) < 1:
            raise UsageError(
                f"{getattr(made, name)} is too small", where=f"--{name.replace('_', '-')}", todo="give 1 or more"
            )
    if made.method == "rtn" and made.calibrated:
        raise UsageError(
            "rounding to nearest reads no calibration",
            where="--calibration",
            todo="add --method scale or --method gptq",
        )
    if made.method == "gptq" and not made.calibrated:
        return Method(**{**options, "calibration": "builtin"})
    return made
