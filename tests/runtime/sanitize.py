"""Every kernel of the NF4 linear once, on small weights: what to run under compute-sanitizer.

    PYTHONPATH=src:tests compute-sanitizer --tool memcheck  python tests/runtime/sanitize.py       also racecheck, synccheck, initcheck

Needs a GPU. Products are compared with exact weights in float64, so that nothing is checked that does not happen. The last line says
how many launches there were; the sanitizer's own last line says what it found.
"""

from __future__ import annotations

import sys

import torch
from runtime.stored_weights import dense, drawn

from halfbyte.runtime.kernels import launch

SHAPES = [((64, 32), 192, 64), ((48, 16), 320, 64), ((96,), 704, 32), ((512, 256), 1088, 64)]
ROWS = (1, 7, 16, 29, 61)


def main() -> None:
    if not torch.cuda.is_available():
        sys.exit("sanitize.py: torch sees no CUDA device; nothing is checked")
    launches, worst = 0, 0.0
    for parts, columns, blocksize in SHAPES:
        weight = drawn(parts, columns, blocksize, "cuda", seed=3)
        exact = dense(weight.to_stored())
        for m in ROWS:
            x = torch.randn(m, columns, device="cuda").to(torch.bfloat16)
            y, truth = launch.linear(x, weight.tensors), x.double() @ exact.T
            worst = max(worst, float((y.double() - truth).norm() / truth.norm()))
            launches += 1
        launch.dequantize(weight.tensors, torch.empty(weight.rows, columns, dtype=torch.bfloat16, device="cuda"))
        launches += 1
    torch.cuda.synchronize()
    print(f"{launches} launches, worst relative error {worst:.2e}")
    if not worst < 2.5e-3:
        sys.exit(1)


if __name__ == "__main__":
    main()
