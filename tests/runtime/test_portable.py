"""The Triton kernel multiplies: on a CPU by Triton's interpreter, on a GPU in earnest; and it compiles without either."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from runtime.stored_weights import dense, drawn

from halfbyte.runtime.linear import portable

pytestmark = pytest.mark.skipif(portable.triton is None, reason="Triton is not installed")

CASES = [((64, 32), 192, 64, 3), ((48, 16), 128, 64, 16), ((64,), 192, 32, 1)]


def check(device: str) -> None:
    for parts, columns, blocksize, m in CASES:
        weight = drawn(parts, columns, blocksize, device)
        x = torch.randn(m, columns, device=device)
        expected = x.double() @ dense(weight.to_stored()).T
        torch.testing.assert_close(portable.linear(x, weight.tensors).double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.timeout(120)
def test_in_the_interpreter_it_multiplies():
    """In a process of its own: Triton looks at the variable when it is imported."""
    ended = subprocess.run(
        [sys.executable, "-c", "from runtime.test_portable import check; check('cpu'); print('right')"],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ended.stdout.strip() == "right", ended.stderr[-3000:]


def test_it_compiles_for_a_gpu():
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    pointers = {
        "x": "*bf16",
        "tiles": "*u8",
        "codes": "*u8",
        "nested": "*fp32",
        "groups": "*i32",
        "tables": "*fp32",
        "y": "*bf16",
    }
    constants = {"m": 3, "n": 96, "k_blocks": 3, "row_tiles": 2, "subs": 1, "levels_at": 512}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Triton 3.9 announces another default for contraction
        source = ASTSource(
            fn=portable._multiply, signature=pointers | dict.fromkeys(constants, "constexpr"), constexprs=constants
        )
        assert compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]


@pytest.mark.gpu
def test_on_a_gpu_it_multiplies():
    check("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_on_a_gpu_it_multiplies_a_large_weight_in_every_dtype(dtype):
    weight = drawn((5376,), 2560, device="cuda")
    x = torch.randn(7, 2560, device="cuda").to(dtype)
    truth = x.double() @ dense(weight.to_stored()).T
    found = portable.linear(x, weight.tensors).double()
    assert float((found - truth).norm() / truth.norm()) < {torch.float32: 1e-5, torch.float16: 4e-4}.get(dtype, 2.5e-3)
