"""Run by test_kernels in a process of its own with TRITON_INTERPRET=1: the kernels' sources, on a CPU, against plain torch."""

from __future__ import annotations

import torch
from codec.fitting.layers import layer

from halfbyte.codec import Fit, nf4_levels
from halfbyte.codec.fitting import kernels
from halfbyte.codec.fitting.compensation import round_panel
from halfbyte.codec.fitting.descent import _choose_codes
from halfbyte.codec.fitting.hessian import prepare
from halfbyte.codec.fitting.search import factors, search_plainly


def main() -> None:
    weight, hessian = layer(40, 32)  # 40 rows: the second tile is ragged
    geometry = prepare(hessian, Fit(blocksize=32))
    panel = weight.float().T[geometry.order].contiguous()
    importance = geometry.inverse.diagonal().square().reciprocal().view(-1, 1)
    for wide in (importance, importance.expand(-1, 40).contiguous()):
        tried = [1.0, *factors(True, 2)]
        mine, plain = kernels.search(panel, wide, tried, 1), search_plainly(panel, wide, tried, 1)
        print("scales", float(((mine - plain).abs() <= 1e-5 * plain.abs()).float().mean()))
    results = []
    for on in (False, True):
        kernels.available = lambda _, on=on: on  # type: ignore[assignment]
        codes = torch.zeros(panel.shape, dtype=torch.uint8)
        errors = round_panel(panel.clone(), geometry.inverse, plain, codes)
        chosen = nf4_levels()[codes.int()]
        gradient = geometry.matrix @ (panel - chosen * plain)
        better = torch.zeros_like(codes)
        _choose_codes(gradient, chosen, geometry.matrix, plain, better)
        results.append((codes, errors, better))
    (codes, errors, better), (codes2, errors2, better2) = results
    print("codes", float((codes == codes2).all(dim=0).float().mean()))
    print("errors", float(torch.isclose(errors, errors2, rtol=1e-3, atol=1e-4).all(dim=0).float().mean()))
    print("descent", float((better == better2).all(dim=0).float().mean()), "moved", int((better != codes).sum()))


if __name__ == "__main__":
    main()
