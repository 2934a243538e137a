"""What may be chosen of a fit, and what a fit says of itself."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from halfbyte.errors import UsageError

if TYPE_CHECKING:
    from halfbyte.codec.tensors import NF4Tensor

Method = Literal["rtn", "scale", "gptq"]
Order = Literal["natural", "activation"]
#: block sizes a fit knows: the default of bitsandbytes, and the smallest it reads (since 0.49.2)
FITTED_BLOCKSIZES = (64, 32)


@dataclass(frozen=True)
class Fit:
    """How codes and scales are chosen. The defaults are the recipe that measured best (docs/method.md).

    method      `rtn`: round to nearest, scale = largest magnitude, bit for bit bitsandbytes; nothing below plays a part but
                `blocksize`. `scale`: the scale of each block is searched, codes are nearest. `gptq`: errors are compensated
                by later columns under the Hessian, scales chosen in the loop
    blocksize   weights that share a scale: 64 or 32
    signed      scales may be negative (the levels are not symmetric, so a block may fit better upside down)
    weighted    `scale`: weigh each column's error by its input's mean square, if those are given
    candidates  scales tried per block and sign
    refit       rounds of least squares after the search: best scale for these codes, nearest codes for that scale
    damping     `gptq`: this share of the Hessian's mean diagonal is added to its diagonal, 0.01 as in the paper
    order       `gptq`: columns left to right (`natural`), or blocks, and columns within them, of the largest inputs first
    sweeps      `gptq`: rounds of coordinate descent on codes and scales after compensation
    """

    method: Method = "gptq"
    blocksize: int = 64
    signed: bool = True
    weighted: bool = True
    candidates: int = 16
    refit: int = 2
    damping: float = 0.01
    order: Order = "activation"
    sweeps: int = 4

    def __post_init__(self) -> None:
        if self.method not in get_args(Method):
            raise UsageError(
                f"method {self.method!r}", where="method", todo=f"use one of {', '.join(get_args(Method))}"
            )
        if self.blocksize not in FITTED_BLOCKSIZES:
            raise UsageError(f"blocksize {self.blocksize}", where="blocksize", todo="use 64 or 32")
        if self.order not in get_args(Order):
            raise UsageError(f"order {self.order!r}", where="order", todo=f"use one of {', '.join(get_args(Order))}")
        if not 1 <= self.candidates <= 1024:
            raise UsageError(f"candidates {self.candidates}", where="candidates", todo="use 1 to 1024")
        if not (math.isfinite(self.damping) and 0 <= self.damping <= 1):
            raise UsageError(f"damping {self.damping}", where="damping", todo="use 0 to 1; 0.01 is usual")
        for name in ("refit", "sweeps"):
            if not 0 <= getattr(self, name) <= 100:
                raise UsageError(f"{name} {getattr(self, name)}", where=name, todo="use 0 to 100")


@dataclass(frozen=True, eq=False)
class Fitted:
    """What came of it.

    nf4      the codes and scales, on the CPU
    method   the method that ran: `scale` where `gptq` could not
    damping  the damping that `gptq` took; larger than asked where the Hessian was singular; None for other methods
    notes    a sentence for everything that was not done as asked
    """

    nf4: NF4Tensor
    method: Method
    damping: float | None = None
    notes: tuple[str, ...] = ()
