"""The walks and the search, fast against plain torch. Run by test_kernels for machine code on CPUs, and, in a process of its own
with TRITON_INTERPRET=1, for the sources of the GPU's kernels.
"""

from __future__ import annotations

import torch
from codec.fitting.layers import layer

from halfbyte.codec import Fit, nf4_levels
from halfbyte.codec.fitting import kernels, loops
from halfbyte.codec.fitting.compensation import compensate_plainly
from halfbyte.codec.fitting.descent import choose_plainly
from halfbyte.codec.fitting.hessian import prepare
from halfbyte.codec.fitting.search import factors, search_plainly

ROWS = 40  # the second tile and the third sixteen are ragged


def walks(triton: bool) -> dict[str, float]:
    """The share of rows that come out the same by plain torch and by the kernels (or the compiled loops)."""
    weight, hessian = layer(ROWS, 32)
    geometry = prepare(hessian, Fit(blocksize=32))
    scales = weight.float().abs().amax(dim=1)
    panel = (weight.float().T[geometry.order] / scales).contiguous()
    table = (geometry.inverse / geometry.inverse.diagonal()[:, None]).contiguous()
    plain, fast = (torch.zeros(panel.shape, dtype=torch.uint8) for _ in range(2))
    errors, fast_errors = torch.empty_like(panel), torch.empty_like(panel)
    compensate_plainly(panel.clone(), table, plain, errors)
    if triton:
        kernels.compensate(panel, table, fast, fast_errors)
    else:
        loops.walk(panel, fast_errors, table, None, fast)
    chosen = nf4_levels()[plain.int()]
    gradient = geometry.matrix @ (panel - chosen)
    inverse = geometry.matrix.diagonal().reciprocal()
    better, fast_better = torch.zeros_like(plain), torch.zeros_like(plain)
    choose_plainly(gradient.clone(), chosen, geometry.matrix.contiguous(), inverse, better)
    (kernels.walk if triton else loops.walk)(gradient, chosen, geometry.matrix.contiguous(), inverse, fast_better)
    return {
        "codes": float((plain == fast).all(dim=0).float().mean()),
        "errors": float(torch.isclose(errors, fast_errors, rtol=1e-3, atol=1e-4).all(dim=0).float().mean()),
        "descent": float((better == fast_better).all(dim=0).float().mean()),
        "moved": float((better != plain).sum()),
    }


def searches() -> dict[str, float]:
    """The share of scales that the kernel finds as plain torch does, with importances alike and different from block to block."""
    panel = layer(ROWS, 32)[0].float().T.contiguous()
    tried = [1.0, *factors(True, 2)]
    shares = {}
    for name, importance in (("alike", torch.rand(32, 1)), ("each", torch.rand(32, ROWS))):
        mine, plain = kernels.search(panel, importance, tried, 1), search_plainly(panel, importance, tried, 1)
        shares[name] = float(((mine - plain).abs() <= 1e-5 * plain.abs()).float().mean())
    return shares
