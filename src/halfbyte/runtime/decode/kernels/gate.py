"""act(gate) * up, the middle of an MLP (and of Gemma's per-layer inputs), in one launch.

gelu (tanh):  g/2 * (1 + tanh(sqrt(2/pi) (g + 0.044715 g^3)))      silu:  g * sigmoid(g)      gelu:  g/2 * (1 + erf(g / sqrt 2))

act(gate) is rounded before it is multiplied, as transformers does. tanh(z) is taken as 2 sigmoid(2 z) - 1, which float32 knows to 1e-7.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

import torch

from halfbyte.runtime.decode.kernels.where import by_kernel, launch_options, take_turn

try:
    import triton
    import triton.language as tl
except ImportError:  # Windows, CPU-only builds of torch
    triton = None  # type: ignore[assignment]

#: transformers' names of the activations that are known here, and the kernel's number for each
ACTIVATIONS = {"gelu_pytorch_tanh": 0, "silu": 1, "gelu": 2}
BLOCK = 1024


def gated(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """act(gate) * up for [rows, n]; both may be column ranges of a wider tensor."""
    if not by_kernel(gate):
        return gated_reference(gate, up, activation)
    return gated_kernel(gate, up, activation)


def gated_reference(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """The same in plain torch."""
    if activation == "silu":
        return torch.nn.functional.silu(gate) * up
    return torch.nn.functional.gelu(gate, approximate="tanh" if activation == "gelu_pytorch_tanh" else "none") * up


def gated_kernel(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """The same by the kernel; rows may be strided, columns not."""
    assert gate.stride(1) == up.stride(1) == 1
    rows, width = gate.shape
    out = torch.empty(rows, width, dtype=gate.dtype, device=gate.device)
    _gated[(triton.cdiv(width, BLOCK), rows)](
        gate,
        up,
        out,
        width,
        gate.stride(0),
        up.stride(0),
        which=ACTIVATIONS[activation],
        block=BLOCK,
        **launch_options(gate),
    )
    return out


if triton is not None:

    @triton.jit
    def _gated(
        gate, up, out, width, gate_stride, up_stride, which: tl.constexpr, block: tl.constexpr, early: tl.constexpr
    ):
        take_turn(early)
        row = tl.program_id(1).to(tl.int64)
        at = tl.program_id(0) * block + tl.arange(0, block)
        mask = at < width
        g = tl.load(gate + row * gate_stride + at, mask=mask, other=0.0).to(tl.float32)
        u = tl.load(up + row * up_stride + at, mask=mask, other=0.0).to(tl.float32)
        if which == 0:
            g = g * tl.sigmoid(1.5957691216057308 * (g + 0.044715 * g * g * g))
        elif which == 1:
            g = g * tl.sigmoid(g)
        else:
            g = 0.5 * g * (1.0 + tl.erf(g * 0.7071067811865476))
        dtype: tl.constexpr = out.dtype.element_ty
        tl.store(out + row * width + at, (g.to(dtype).to(tl.float32) * u).to(dtype), mask=mask)
