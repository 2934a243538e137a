"""How codes and scales are chosen: the options of `halfbyte quantize` (and `sensitivity`) that ask for more than rounding.

    rtn     round to nearest with absmax scales: bitsandbytes' own, bit for bit; the default
    scale   codes to nearest, scales searched, of either sign; weighted by the inputs' mean squares if there is calibration
    gptq    codes one column at a time, each error made up for in the columns that follow (docs/method.md)

Data-free `scale` takes a tensor at a time. With calibration a model is walked decoder layer by decoder layer (`layerwise`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halfbyte.errors import UsageError
from halfbyte.recipe.decisions import METHODS

if TYPE_CHECKING:
    from halfbyte.codec.fitting import Fit

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
    fit                 KEY=VALUE each: fields of halfbyte.codec.Fit but method and blocksize (docs/method.md says what they do)
    sequential          inside a layer, measure what a linear reads after those before it have been quantized
    seed                which texts are drawn
    """

    method: str = "rtn"
    calibration: str | Path | None = None
    calibration_tokens: int = 65_536
    max_new_tokens: int = 256
    dtype: str = "auto"
    batch: int = 8
    fit: Sequence[str] = ()
    sequential: bool = True
    seed: int = 0

    @property
    def calibrated(self) -> bool:
        return self.calibration is not None

    def fit_of(self, blocksize: int, *, measured: bool) -> Fit:
        """How one tensor is fitted; one whose inputs were not measured by `scale`, which needs none."""
        from halfbyte.codec.fitting import Fit

        method: Any = self.method if measured else "scale"
        return Fit(method=method, blocksize=blocksize, **_settings(self.fit))

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
    fit = options.get("fit", ())
    made = Method(**{**options, "fit": (fit,) if isinstance(fit, str) else tuple(fit or ())})
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
        made = replace(made, calibration="builtin")
    if made.fit:
        made.fit_of(64, measured=True)  # raises, in the codec's own words
    return made


def _settings(given: Sequence[str]) -> dict[str, Any]:
    """KEY=VALUE to values of the field's own type; raises UsageError for a name that is none or a value of another type."""
    if not given:
        return {}
    from halfbyte.codec.fitting import Fit

    kinds: dict[str, Any] = {
        each.name: type(each.default) for each in fields(Fit) if each.name not in ("method", "blocksize")
    }
    words = {"true": True, "false": False}
    found: dict[str, Any] = {}
    for each in given:
        key, _, value = each.partition("=")
        if key not in kinds:
            raise UsageError(f"unknown setting {key!r}", where="--fit", todo=f"known: {', '.join(kinds)}")
        try:
            found[key] = words[value] if kinds[key] is bool else kinds[key](value)
        except (KeyError, ValueError):
            raise UsageError(f"{each!r}", where="--fit", todo=f"{key} is a {kinds[key].__name__}") from None
    return found
