"""Each kernel of a step against its plain torch reference: in Triton's interpreter on a CPU, in earnest on a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from halfbyte.runtime.decode.kernels import append, attention, dense, gate, norm, rotary
from halfbyte.runtime.decode.kernels.norm import Norm
from halfbyte.runtime.decode.kernels.rotary import HeadNorms, Target
from halfbyte.runtime.decode.state import State

needs_triton = pytest.mark.skipif(norm.triton is None, reason="Triton is not installed")
TOLERANCE = {torch.float32: {"rtol": 1e-4, "atol": 1e-5}, torch.bfloat16: {"rtol": 1.6e-2, "atol": 2e-2}}


def drawn(*shape: int, device: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, device=device).to(dtype)


def same(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, **TOLERANCE[expected.dtype])


def check_norms(device: str, dtype: torch.dtype = torch.float32) -> None:
    x, y = drawn(3, 96, device=device, dtype=dtype), drawn(3, 96, device=device, dtype=dtype)
    plain, late = Norm(None, 1e-6), Norm(torch.rand(96, device=device) + 0.5, 1e-5, late=True)
    scaled = Norm(torch.rand(96, device=device) + 0.5, 1e-6)
    for arguments in [
        (x, None, None, 1.0, scaled),
        (x, y, scaled, 0.7, late),
        (x, y, None, 1.0, late),
        (x, y, plain, 1.0, None),
    ]:
        for found, expected in zip(norm.add_norm_kernel(*arguments), norm.add_norm_reference(*arguments), strict=True):
            same(found, expected)


def check_gates(device: str, dtype: torch.dtype = torch.float32) -> None:
    both = 2 * drawn(3, 2 * 1100, device=device, dtype=dtype)
    for activation in gate.ACTIVATIONS:
        parts = both.split(1100, dim=-1)
        same(gate.gated_kernel(*parts, activation), gate.gated_reference(*parts, activation))


def check_dense(device: str, dtype: torch.dtype = torch.float32) -> None:
    x, weight, bias = (drawn(*shape, device=device, dtype=dtype) for shape in [(3, 200), (90, 200), (90,)])
    same(dense.dense_kernel(x, weight / 14, None, 2.0), dense.dense_reference(x, weight / 14, None, 2.0))
    same(dense.dense_kernel(x, weight / 14, bias), dense.dense_reference(x, weight / 14, bias))
    assert torch.equal(dense.dense_kernel(x[1:2], weight), dense.dense_kernel(x, weight)[1:2])


def check_rotary(device: str, dtype: torch.dtype = torch.float32) -> None:
    rows, steps, slots, d = 2, 3, 8, 24
    joined = drawn(rows * steps, (4 + 2 + 2) * d, device=device, dtype=dtype)
    q, k, v = joined.split([4 * d, 2 * d, 2 * d], dim=-1)
    scaled = [Norm(torch.rand(d, device=device) + 0.5, 1e-6) for _ in range(2)]
    turn = drawn(rows * steps, d // 2, device=device)
    angles = (turn.cos().to(dtype), turn.sin().to(dtype))
    position = torch.tensor([0, 7], device=device)
    cases = [((k, v), HeadNorms(*scaled, Norm(None, 1e-6))), ((k, k), HeadNorms()), (None, HeadNorms(scaled[0]))]
    for kv, norms in cases:
        targets = [
            Target(*(torch.zeros(rows, 2, slots, d, device=device, dtype=dtype) for _ in "kv"), position) for _ in "ab"
        ]
        same(
            rotary.rotate_kernel(q, kv, norms, angles, targets[0]),
            rotary.rotate_reference(q, kv, norms, angles, targets[1]),
        )
        same(targets[0].keys, targets[1].keys)
        same(targets[0].values, targets[1].values)


ATTENTION = [  # rows, heads, kv_heads, d, slots, window, positions, steps
    (2, 4, 2, 24, 300, 0, (0, 261), 3),
    (2, 8, 1, 32, 80, 64, (5, 1000), 3),
    (1, 2, 2, 16, 272, 256, (270,), 1),
]


def attention_case(
    case: tuple, device: str, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, float, int]:
    rows, heads, kv_heads, d, slots, window, positions, steps = case
    q = drawn(rows * steps, heads, d, device=device, dtype=dtype)
    keys, values = (drawn(rows, kv_heads, slots, d, device=device, dtype=dtype) for _ in "kv")
    return q, keys, values, torch.tensor(positions, device=device), d**-0.5, window


def check_attention(device: str, dtype: torch.dtype = torch.float32) -> None:
    for case in ATTENTION:
        arguments = attention_case(case, device, dtype)
        same(attention.attend_kernel(*arguments), attention.attend_reference(*arguments))


def check_that_tokens_beside_it_do_not_change_a_query(device: str, dtype: torch.dtype = torch.float32) -> None:
    q, keys, values, position, scale, window = attention_case(ATTENTION[1], device, dtype)
    together = attention.attend_kernel(q, keys, values, position, scale, window)
    for row in range(2):
        for step in (0, 2):
            # a slot that a later token has written already is not seen, and would have been too old before
            alone = attention.attend_kernel(
                q[3 * row + step][None],
                keys[row : row + 1],
                values[row : row + 1],
                position[row : row + 1] + step,
                scale,
                window,
            )
            assert torch.equal(alone[0], together[3 * row + step])


def check_append(device: str) -> None:
    maker = torch.Generator().manual_seed(0)
    for steps in (1, 5):
        length = torch.randint(1, 9, (40,), generator=maker)
        texts = [
            State(*(t.to(device) for t in (
                torch.zeros(40, 20, dtype=torch.int64), length.clone(), length + torch.randint(1, 7, (40,), generator=maker.clone_state()),
                torch.arange(40) % 5 == 0, torch.zeros(40, dtype=torch.int64), torch.tensor([2, *[-1] * 15]), torch.zeros(40, 20),
            )))
            for _ in "ab"
        ]  # fmt: skip
        fed, chosen = (torch.randint(1, 4, (40, steps), generator=maker).to(device) for _ in "fc")
        append.append_kernel(texts[0], fed, chosen)
        append.append_reference(texts[1], fed, chosen)
        for found, expected in zip(texts[0].tensors, texts[1].tensors, strict=True):
            assert torch.equal(found, expected)


def check(device: str, dtype: torch.dtype = torch.float32) -> None:
    torch.manual_seed(0)
    for part in (check_norms, check_gates, check_dense, check_rotary, check_attention):
        part(device, dtype)
    check_append(device)
    check_that_tokens_beside_it_do_not_change_a_query(device, dtype)


@needs_triton
@pytest.mark.timeout(120)
def test_in_the_interpreter_kernels_equal_their_references():
    """In a process of its own: Triton looks at the variable when it is imported."""
    ended = subprocess.run(
        [sys.executable, "-c", "from runtime.decode.test_kernels import check; check('cpu'); print('right')"],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ended.stdout.strip() == "right", ended.stderr[-3000:]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_kernels_equal_their_references(dtype):
    check("cuda", dtype)


@pytest.mark.gpu
@pytest.mark.parametrize(("kv_heads", "d", "slots", "window"), [(16, 256, 1040, 1024), (4, 512, 32768, 0)])
@pytest.mark.parametrize("steps", [1, 8, 16])
def test_on_a_gpu_attention_of_the_31b_is_right_to_bf16(kv_heads, d, slots, window, steps):
    q, keys, values, position, _, _ = attention_case(
        (2, 32, kv_heads, d, slots, window, (3, 17000), steps), "cuda", torch.bfloat16
    )
    found = attention.attend_kernel(q, keys, values, position, d**-0.5, window).double()
    truth = attention.attend_reference(q.double(), keys.double(), values.double(), position, d**-0.5, window)
    assert float((found - truth).norm() / truth.norm()) < 5e-3


def compiled(
    function, pointers: dict[str, str], constants: dict[str, object], floats: tuple[str, ...] = (), turns=1, **options
):
    """The kernel for sm_90, with every argument that is neither as int32; it takes its turn in so many places."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    constants = constants | {"early": True}
    options = options | {"launch_pdl": True}
    kinds = pointers | dict.fromkeys(constants, "constexpr") | dict.fromkeys(floats, "fp32")
    signature = {name: kinds.get(name, "i32") for name in function.arg_names}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Triton 3.9 announces another default for contraction
        source = ASTSource(fn=function, signature=signature, constexprs=constants)
        kernel = compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert kernel.asm["ptx"].count("griddepcontrol") == 2 * turns
    return kernel


def bf16(*names: str, **others: str) -> dict[str, str]:
    return dict.fromkeys(names, "*bf16") | others


@needs_triton
@pytest.mark.parametrize(("kv_heads", "d", "warps"), [(16, 256, 4), (4, 512, 8)])
def test_attention_compiles_for_a_gpu_and_leaves_room_for_two_programs(kv_heads, d, warps):
    constants = {
        "groups": 32 // kv_heads, "kv_heads": kv_heads, "window": 1024, "d": d, "wide": d, "rows": 16, "chunk": 128, "block": 32,
    }  # fmt: skip
    pointers = bf16("q", "keys", "values", position="*i64", parts="*fp32", sums="*fp32")
    kernel = compiled(attention._attend, pointers, constants, ("scale",), num_warps=warps, num_stages=2)
    assert kernel.metadata.shared <= 110_000
    constants = {"heads": 32, "chunk": 128, "d": d, "wide": d, "many": 8}
    assert compiled(attention._join, bf16("out", position="*i64", parts="*fp32", sums="*fp32"), constants)


@needs_triton
def test_the_other_kernels_compile_for_a_gpu():
    weights = dict.fromkeys(("q_weight", "k_weight", "v_weight"), "*fp32")
    places = bf16("q", "k", "v", "cosines", "sines", "keys", "values", "out", position="*i64", **weights)
    constants = {
        "heads": 32, "kv_heads": 16, "d": 256, "half": 128, "late": False, "q_kind": 2, "k_kind": 2, "v_kind": 1,
    }  # fmt: skip
    assert compiled(rotary._rotate, places, constants, ("eps",), turns=2)
    constants = {
        "has_y": True, "has_post": True, "post_scaled": True, "post_late": False, "scaled": True, "has_next": True,
        "next_scaled": True, "next_late": True, "block": 8192,
    }  # fmt: skip
    pointers = bf16("x", "y", "out", "h", post="*fp32", following="*fp32")
    kernel = compiled(norm._add_norm, pointers, constants, ("scalar", "post_eps", "next_eps"), num_warps=16)
    before, after = kernel.asm["ptx"].split("griddepcontrol.wait")  # two weights; x and y
    assert before.count("ld.global") == after.count("ld.global") > 0
    assert compiled(gate._gated, bf16("gate", "up", "out"), {"which": 0, "block": 1024})
    buffers = dict.fromkeys(("fed", "chosen", "history", "length", "limit", "counted", "stops"), "*i64") | {
        "done": "*i1"
    }
    assert compiled(append._append, buffers, {"steps": 8, "wide": 8, "stops_n": 16}, num_warps=1)
    constants = {"has_bias": False, "capped": True, "block_m": 16, "block_n": 64, "block_k": 128}
    assert compiled(dense._dense, bf16("x", "weight", "bias", "y"), constants, ("cap",), num_stages=4)
