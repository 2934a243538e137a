"""On a GPU: every variant of the kernel against exact weights in float64, with fresh inputs and poisoned memory."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from runtime.stored_weights import dense, drawn

from halfbyte.runtime.kernels import driver, launch, variants
from halfbyte.runtime.kernels.variants import Variant
from halfbyte.runtime.linear import op, reference
from halfbyte.runtime.linear.module import Nf4Linear
from halfbyte.runtime.linear.weight import Nf4Weight

pytestmark = pytest.mark.gpu

SMALL = [((32,), 64, 64), ((64, 32), 192, 64), ((48, 16), 320, 64), ((96,), 704, 32), ((512, 256, 256), 2560, 64)]
LARGE = [((21504, 21504), 5376, 64), ((5376,), 21504, 64), ((8192, 4096, 4096), 5376, 64), ((5376,), 8192, 64)]
VARIANTS = [
    Variant(), Variant(table_stride=128), Variant(alu_words=1), Variant(alu_words=2), Variant(alu_words=4), Variant(stage_units=1, depth=5),
    Variant(stage_units=4, depth=2), Variant(warps=8), Variant(warps=12, x_stages=2), Variant(early=True), Variant(early=True, ahead=2),
]  # fmt: skip
#: rounding of y to bf16 alone is 1.7e-3, of the levels 0.8e-3
BOUND = 2.5e-3


@cache
def weight_of(parts: tuple[int, ...], columns: int, blocksize: int) -> tuple[Nf4Weight, torch.Tensor]:
    """A weight and its exact values; the cache holds the last few."""
    weight = drawn(parts, columns, blocksize, "cuda", seed=len(parts))
    return weight, dense(weight.to_stored())


@pytest.fixture(autouse=True)
def few_weights():
    yield
    if weight_of.cache_info().currsize > 2:
        weight_of.cache_clear()
        torch.cuda.empty_cache()


def run(x: torch.Tensor, weight: Nf4Weight, variant: Variant | None) -> torch.Tensor:
    """A launch into NaN, with NaN where parts wait."""
    for space in launch._workspaces.values():
        space.partial.fill_(torch.nan)
    out = torch.full((x.shape[0], weight.rows), torch.nan, dtype=torch.bfloat16, device="cuda")
    launch.linear(x, weight.tensors, variant, out)
    assert all(int(space.counters.abs().sum()) == 0 for space in launch._workspaces.values())
    return out


def inputs(m: int, columns: int) -> torch.Tensor:
    return torch.randn(m, columns, device="cuda").to(torch.bfloat16)


def error(y: torch.Tensor, x: torch.Tensor, exact: torch.Tensor) -> float:
    truth = x.double() @ exact.T
    return float((y.double() - truth).norm() / truth.norm())


@pytest.mark.parametrize("m", [*range(1, 17), 17, 24, 32, 33, 61, 64])
@pytest.mark.parametrize("shape", SMALL + LARGE)
def test_the_kernel_multiplies_for_1_to_64_rows(shape, m):
    weight, exact = weight_of(*shape)
    x = inputs(m, shape[1])
    assert error(run(x, weight, None), x, exact) < BOUND


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("shape", [SMALL[1], SMALL[4], LARGE[1]])
def test_every_variant_multiplies(shape, variant):
    weight, exact = weight_of(*shape)
    for groups, m in ((1, 1), (1, 7), (2, 16)):
        chosen = variants.fitting(replace(variant, groups=groups), m, driver.device_of(0))
        x = inputs(m, shape[1])
        assert error(run(x, weight, chosen), x, exact) < BOUND


@pytest.mark.parametrize("m", [17, 33, 64, 65, 128, 256])
@pytest.mark.parametrize("shape", [SMALL[2], SMALL[3], LARGE[0], LARGE[1]])
def test_the_op_multiplies_for_any_batch(shape, m):
    weight, exact = weight_of(*shape)
    x = inputs(m, shape[1])
    assert error(Nf4Linear(weight)(x), x, exact) < 2 * BOUND  # beyond 64 rows the weights are bf16


@pytest.mark.parametrize("shape", [SMALL[1], *LARGE])
def test_a_row_has_the_same_bits_in_any_batch_of_1_to_16_and_in_any_run(shape):
    weight, _ = weight_of(*shape)
    x = inputs(16, shape[1])
    whole = run(x, weight, None)
    for _ in range(3):
        assert torch.equal(run(x, weight, None), whole)
    for m in (1, 2, 5, 8, 9, 15):
        assert torch.equal(run(x[:m].contiguous(), weight, None), whole[:m])
    assert torch.equal(run(x[11:12].contiguous(), weight, None), whole[11:12])


def test_look_up_and_permutes_give_the_same_bits():
    weight, _ = weight_of(*LARGE[1])
    x = inputs(4, LARGE[1][1])
    found = [run(x, weight, replace(Variant(table_stride=128), alu_words=n)) for n in (0, 1, 2)]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("shape", [*SMALL, LARGE[0]])
def test_dequantizing_gives_the_codecs_bits(shape):
    weight, _ = weight_of(*shape)
    out = torch.full((weight.rows, weight.columns), torch.nan, dtype=torch.bfloat16, device="cuda")
    launch.dequantize(weight.tensors, out)
    expected = reference.dequantize(weight.tensors)
    assert torch.equal(out.view(torch.int16), expected.view(torch.int16))


def test_a_captured_graph_gives_the_same_bits():
    layers = [Nf4Linear(weight_of(*shape)[0]) for shape in (SMALL[4], SMALL[4])]
    x = inputs(3, SMALL[4][1])
    expected = [layer(x) for layer in layers]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = [layer(x) for layer in layers]
    x.copy_(inputs(3, SMALL[4][1]))
    again = [layer(x) for layer in layers]
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    assert not torch.equal(found[0], expected[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("m", [1, 16, 17])
def test_the_op_takes_other_dtypes(m, dtype):
    weight, exact = weight_of(*SMALL[4])
    x = torch.randn(2, m, SMALL[4][1], device="cuda").to(dtype)[:1]
    y = Nf4Linear(weight)(x)
    assert (y.dtype, y.shape) == (dtype, (1, m, weight.rows))
    assert error(y[0], x[0], exact) < 1e-3


def test_the_kernels_are_on_here():
    assert op.why_no_kernel(torch.device("cuda", 0)) is None
