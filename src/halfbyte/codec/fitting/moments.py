"""What calibration leaves behind of the inputs x of a linear layer: E[x x^T], or only its diagonal E[x^2].

A layer computes y = W x. If Q stands in for W, the error of its output over the calibration tokens is, exactly,

    E |(W - Q) x|^2  =  trace((W - Q) H (W - Q)^T),   H = E[x x^T]                                  (float32 [columns, columns])

so H holds everything that a least-squares quantizer can know of the data. Its diagonal is what is left when the inputs are
taken as uncorrelated. Both are means over tokens, so their size does not depend on how much was seen.

Memory: columns^2 * 4 bytes. 21504 inputs: 1.85 GB; 5376: 116 MB. The sum is kept in place, nothing of that size is made beside it.
"""

from __future__ import annotations

import torch

from halfbyte.codec.tensors import NF4Tensor
from halfbyte.errors import NonFiniteWeight, ShapeMismatch, UsageError

#: rows of a weight, and columns of a Hessian, in hand at a time where an error is measured (float64)
_ROWS, _COLUMNS = 1024, 2048


class Moments:
    """A running mean of x x^T (`full`) or x^2 over tokens.

    The sums are float32, of batches that are divided by nothing: a sum of 1e6 terms of one size keeps 4 digits at worst and, being
    added batch by batch (each a matrix product), about 6.
    """

    def __init__(self, columns: int, full: bool = True, device: torch.device | str = "cpu") -> None:
        if columns < 1:
            raise UsageError(f"columns {columns}", where="columns", todo="use 1 or more")
        self.columns = columns
        self.full = full
        self.tokens = 0
        self._sum = torch.zeros((columns, columns) if full else (columns,), dtype=torch.float32, device=device)

    def add(self, x: torch.Tensor) -> None:
        """Count inputs in: x [..., columns] of any floating dtype, moved to the sum's device.

        raises   ShapeMismatch for another last dimension, NonFiniteWeight if an input is NaN or infinite (nothing is counted then)
        """
        if x.shape[-1:] != (self.columns,):
            raise ShapeMismatch(f"inputs {list(x.shape)} for {self.columns} columns", where="calibration inputs")
        rows = x.detach().reshape(-1, self.columns).to(self._sum.device, torch.float32)
        if not torch.isfinite(rows).all():
            raise NonFiniteWeight(
                "an input of this layer is NaN or infinite", where="calibration inputs", todo="check the source in bf16"
            )
        self.tokens += len(rows)
        if self.full:
            self._sum.addmm_(rows.T, rows)
        else:
            self._sum += rows.square().sum(dim=0)

    @property
    def hessian(self) -> torch.Tensor | None:
        """E[x x^T], float32 [columns, columns]; None if only the diagonal was asked for. A copy."""
        return self._sum / max(self.tokens, 1) if self.full else None

    @property
    def mean_squares(self) -> torch.Tensor:
        """E[x^2], float32 [columns]."""
        return (self._sum.diagonal() if self.full else self._sum) / max(self.tokens, 1)


def fit_error(
    weight: torch.Tensor,
    nf4: NF4Tensor,
    *,
    hessian: torch.Tensor | None = None,
    mean_squares: torch.Tensor | None = None,
) -> float:
    """trace((W - Q) H (W - Q)^T) / trace(W H W^T): the share of the layer's output (mean square) that is error.

    weight        [rows, columns] of any floating dtype;  nf4  a quantization of it, in row-major order
    hessian       [columns, columns]; else mean_squares [columns] stands for a diagonal H; else H = 1 (plain weight error)
    returns       summed in float64; 0 for a weight that gives no output. Q is float32 here: a loader rounds it to bf16 on top
    raises        ShapeMismatch
    """
    from halfbyte.codec import dequantize

    rows, columns = weight.shape
    if nf4.n != rows * columns:
        raise ShapeMismatch(f"{nf4.n} quantized weights for {rows} x {columns}", where="nf4")
    restored = dequantize(nf4, torch.float32).view(rows, columns)
    lost = total = 0.0
    for begin in range(0, rows, _ROWS):
        part = weight[begin : begin + _ROWS].detach().double()
        error = part - restored[begin : begin + _ROWS].to(part.device)
        energies = _energies(torch.stack([error, part]), hessian, mean_squares)
        lost, total = lost + energies[0], total + energies[1]
    return lost / total if total else 0.0


def _energies(pair: torch.Tensor, hessian: torch.Tensor | None, mean_squares: torch.Tensor | None) -> list[float]:
    """sum of r H r^T over the rows of each of two matrices, float64 [2, rows, columns]; H is widened a slice at a time."""
    if hessian is None:
        squares = pair.square()
        if mean_squares is not None:
            squares *= mean_squares.to(pair.device, torch.float64)
        return squares.sum(dim=(1, 2)).tolist()  # type: ignore[no-any-return]
    sums = torch.zeros(2, dtype=torch.float64, device=pair.device)
    for begin in range(0, pair.shape[2], _COLUMNS):
        here = slice(begin, begin + _COLUMNS)
        sums += ((pair @ hessian[:, here].to(pair.device, torch.float64)) * pair[:, :, here]).sum(dim=(1, 2))
    return sums.tolist()  # type: ignore[no-any-return]
