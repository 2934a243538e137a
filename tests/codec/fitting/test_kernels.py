"""The kernels' own sources, run by Triton's interpreter against plain torch; compiled for a GPU; and on one if there is one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from codec.fitting.interpreted import walks
from codec.fitting.layers import layer
from codec.weights import same

from halfbyte.codec import Fit, fit_error, fit_weight
from halfbyte.codec.fitting import kernels

needs_triton = pytest.mark.skipif(kernels.triton is None, reason="Triton is not installed")
POINTERS = {
    "_search": {**dict.fromkeys(("panel", "importance", "factors", "grid", "out"), "*fp32"), "n": "i32"},
    "_walk": {
        **dict.fromkeys(("panel", "other", "table", "inverse"), "*fp32"),
        "codes": "*u8",
        "grid": "*fp32",
        "n": "i32",
    },
}


def check(shares: dict[str, float]) -> None:
    assert shares.pop("moved") > 0
    assert all(share >= 0.9 for share in shares.values()), shares  # a weight on a midpoint may go either way


def test_machine_code_walks_as_torch_does() -> None:
    check(walks(triton=False))


@needs_triton
@pytest.mark.timeout(120)
def test_in_the_interpreter_the_kernels_do_what_torch_does() -> None:
    """In a process of its own: Triton looks at the variable when it is imported."""
    code = "import json; from codec.fitting.interpreted import *; print(json.dumps(walks(True) | searches()))"
    ended = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-3000:]
    check(json.loads(ended.stdout))


@needs_triton
@pytest.mark.parametrize(
    ("name", "constants"),
    [
        ("_search", {"size": 64, "tile": 32, "wide": 0, "count": 33, "refit": 2}),
        ("_walk", {"size": 64, "tile": 32, "descend": 1}),
        ("_walk", {"size": 32, "tile": 32, "descend": 0}),
    ],
)
def test_the_kernels_compile_for_a_gpu(name: str, constants: dict[str, int]) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Triton 3.9 announces another default for contraction
        signature = POINTERS[name] | dict.fromkeys(constants, "constexpr")
        source = ASTSource(fn=getattr(kernels, name), signature=signature, constexprs=constants)
        assert ".entry" in compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
@pytest.mark.parametrize("method", ["scale", "gptq"])
@pytest.mark.parametrize("blocksize", [64, 32])
def test_a_gpu_fits_as_well_as_a_cpu_and_gives_its_own_bytes_twice(method: str, blocksize: int) -> None:
    fit = Fit(method=method, blocksize=blocksize)  # type: ignore[arg-type]
    weight, hessian = layer(200, 512, tokens=4096)
    here = fit_weight(weight, fit, hessian=hessian).nf4
    there = [fit_weight(weight.cuda(), fit, hessian=hessian.cuda()).nf4 for _ in range(2)]
    assert same(there[0].packed, there[1].packed)
    assert same(there[0].scales.absmax, there[1].scales.absmax)
    assert not there[0].packed.is_cuda
    mine, theirs = (fit_error(weight, nf4, hessian=hessian) for nf4 in (there[0], here))
    assert mine == pytest.approx(theirs, rel=0.02)
