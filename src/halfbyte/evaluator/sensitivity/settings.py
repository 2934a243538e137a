"""The options of `halfbyte sensitivity`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halfbyte.errors import UsageError
from halfbyte.evaluator.job.settings import Settings, settings_of
from halfbyte.layers.fitting.method import Method, method_of
from halfbyte.texts.protocols import IMAGE


@dataclass(frozen=True)
class Probing:
    """By the names of the command line; as in `evaluate`, with smaller numbers: each row is read by hundreds of variants.

    protocol        one of halfbyte.texts.protocols, not about pictures; None: what fits the data and the model
    limit           the first so many chats or documents
    window          text tokens a row
    windows         rows of a document
    max_new_tokens  longest answer that the source writes, where it writes them
    dtype           of the forward pass. float32: one group's cost (1e-4 nats) is less than what rounding the residual to bf16 adds
    batch           rows at a time

    method              as `quantize` will be told: costs are of weights made so (`fits`). rtn: rounded to nearest, nothing below plays a part
    calibration         `builtin`, or a file; gptq needs one: `builtin`
    calibration_tokens, answer_tokens, fit, seed    as in `quantize`; there, answer_tokens is its max_new_tokens
    """

    protocol: str | None = None
    limit: int = 16
    window: int = 64
    windows: int = 1
    max_new_tokens: int = 64
    dtype: str = "float32"
    batch: int = 8
    method: str = "rtn"
    calibration: str | Path | None = None
    calibration_tokens: int = 65_536
    answer_tokens: int = 256
    fit: Sequence[str] = ()
    seed: int = 0


SENSITIVITY_OPTIONS = tuple(Probing.__dataclass_fields__)


_OF_METHOD = ("method", "calibration", "calibration_tokens", "answer_tokens", "fit", "seed")


def probing_of(options: dict[str, Any]) -> tuple[Probing, Settings]:
    """Checked options, and what the evaluation calls them; raises UsageError, naming the option."""
    if unknown := options.keys() - set(SENSITIVITY_OPTIONS):
        known = ", ".join(SENSITIVITY_OPTIONS)
        raise UsageError(f"unknown option {min(unknown)!r}", where="sensitivity", todo=f"known: {known}")
    made = Probing(**options)
    if made.protocol == IMAGE:
        raise UsageError("pictures are not read layer by layer", where="--protocol", todo="measure on text or chats")
    shared = {name: value for name, value in vars(made).items() if name not in _OF_METHOD}
    return made, settings_of({**shared, "protocol": made.protocol or ()})


def method_of_costs(made: Probing) -> Method:
    """How weights are fitted before their costs are measured; raises UsageError, naming the option."""
    chosen = {name: getattr(made, name) for name in _OF_METHOD if name != "answer_tokens"}
    return method_of({**chosen, "max_new_tokens": made.answer_tokens, "batch": made.batch})
