"""The probe says "on a grid" for weights that are, and for no others."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from halfbyte import codec
from halfbyte.codec.grid_fit import fit_scaled
from halfbyte.codec.lattice import probe_lattice
from halfbyte.codec.q4_0 import round_to_q4_0
from halfbyte.errors import ShapeMismatch

COLUMNS = 512


def gaussian(rows: int = 64, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, COLUMNS, generator=torch.Generator().manual_seed(seed)) * 0.02


def probe(weight: torch.Tensor):
    return probe_lattice(weight.reshape(-1), weight.shape[-1])


def gguf_round_trip(weight: torch.Tensor, kind: str) -> torch.Tensor:
    qtype = gguf.GGMLQuantizationType[kind]
    return torch.from_numpy(gguf.dequantize(gguf.quants.quantize(weight.numpy(), qtype), qtype))


def symmetric(weight: torch.Tensor, size: int, largest: int = 7) -> torch.Tensor:
    """Blocks of `size`, codes up to +-largest, float32 scales."""
    blocks = weight.reshape(-1, size)
    scale = blocks.abs().amax(dim=1, keepdim=True) / largest
    return ((blocks / scale).round() * scale).view(weight.shape)


@pytest.mark.parametrize(("scale_dtype", "name"), [("bf16", "bf16"), ("f16", "fp16")])
def test_q4_0_in_bf16_is_found_with_its_block_and_scale_dtype(scale_dtype: str, name: str) -> None:
    found = probe(round_to_q4_0(gaussian(), scale_dtype).bfloat16())
    assert (found.verdict, found.grid, found.blocksize, found.scale_dtype) == ("exactly", "int4", 32, name)
    assert (found.exact_fraction, found.levels, found.blocks) == (1.0, 16, 64 * COLUMNS // 32)
    assert found.worst_error is not None
    assert found.worst_error < 0.032
    assert found.sentence() == f"exactly on an int4 grid (blocks of 32, {name} scales): 1,024 blocks that can tell"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("kind", "grid"), [("Q4_0", "int4"), ("Q4_1", "int4 affine")])
def test_expanded_gguf_weights_are_found_in_every_dtype(kind: str, grid: str, dtype: torch.dtype) -> None:
    found = probe(gguf_round_trip(gaussian(), kind).to(dtype))
    assert (found.verdict, found.grid, found.blocksize, found.scale_dtype) == ("exactly", grid, 32, "fp16")


@pytest.mark.parametrize("size", [16, 32, 64, 128, COLUMNS])
def test_block_size_and_float32_scales_are_told(size: int) -> None:
    found = probe(symmetric(gaussian(), size).bfloat16())
    assert (found.verdict, found.grid, found.scale_dtype, found.levels) == ("exactly", "int4", "fp32", 15)
    assert found.blocksize == ("row" if size == COLUMNS else size)


def test_rows_that_no_block_size_divides_are_looked_at_whole() -> None:
    weight = gaussian()[:, :500].contiguous()
    found = probe(symmetric(weight, 500).bfloat16())
    assert (found.verdict, found.grid, found.blocksize) == ("exactly", "int4", "row")
    assert probe(weight.bfloat16()).verdict == "no"


@pytest.mark.parametrize("blocksize", [32, 64, 128])
def test_nf4_output_with_double_quantized_scales_is_on_the_nf4_grid(blocksize: int) -> None:
    weight = codec.dequantize(codec.quantize(gaussian().bfloat16().view(-1), blocksize))
    found = probe_lattice(weight, COLUMNS)
    assert (found.verdict, found.grid, found.blocksize) == ("exactly", "nf4", blocksize)


@pytest.mark.parametrize(
    "weight",
    [
        gaussian().bfloat16(),
        gaussian().half(),
        gaussian(),
        torch.rand(64, COLUMNS, generator=torch.Generator().manual_seed(1)).bfloat16(),
        torch.distributions.StudentT(3.0).sample((64, COLUMNS)).bfloat16(),
        symmetric(gaussian(), 32, 127).bfloat16(),
        symmetric(gaussian(), 32, 15).bfloat16(),
        gguf_round_trip(gaussian(), "Q8_0"),
        gguf_round_trip(gaussian(), "Q5_1"),
    ],
    ids=["gaussian", "f16", "f32", "uniform", "heavy tails", "int8", "31 levels", "Q8_0", "Q5_1"],
)
def test_other_weights_are_on_no_grid(weight: torch.Tensor) -> None:
    found = probe(weight)
    assert (found.verdict, found.grid, found.scale_dtype) == ("no", None, None)
    assert found.exact_fraction is not None
    assert found.exact_fraction < 0.05
    assert found.sentence().startswith("not on an int4 or NF4 grid")


def test_one_block_in_a_hundred_off_the_grid_is_mostly() -> None:
    weight = round_to_q4_0(gaussian(200), "bf16").bfloat16().view(-1, 32)
    weight[::100] = gaussian(200, seed=5).bfloat16().view(-1, 32)[::100]
    found = probe(weight.view(200, COLUMNS))
    assert (found.verdict, found.grid, found.exact_fraction) == ("mostly", "int4", 0.99)
    assert "mostly (99.0 %) on an int4 grid" in found.sentence()


def test_one_weight_moved_by_one_unit_in_the_last_place_is_seen() -> None:
    weight = round_to_q4_0(gaussian(), "bf16").bfloat16().view(-1)
    weight.view(torch.int16)[7 if weight[7] != 0 else 8] += 1
    found = probe_lattice(weight, COLUMNS)
    assert (found.verdict, found.exact_fraction) == ("mostly", round(1023 / 1024, 6))


@pytest.mark.parametrize(
    "weight",
    [
        torch.zeros(64, COLUMNS),
        gaussian().sign() * 0.01,
        (gaussian() * 50).round().clamp(-1, 1) * 0.01,
        1 + gaussian(),
        gaussian() * 1.5e-38,
        torch.full((64, COLUMNS), float("nan")),
        gaussian()[:1, :64],
    ],
    ids=["zero", "two values", "ternary", "steps of bf16 itself", "subnormal", "nan", "two blocks"],
)
def test_weights_that_fit_any_grid_decide_nothing(weight: torch.Tensor) -> None:
    found = probe(weight.bfloat16())
    assert (found.verdict, found.grid) == ("undecided", None)
    assert found.sentence().startswith("undecided")


def test_sparse_tensors_are_decided_by_their_few_blocks() -> None:
    weight = torch.zeros(2000, COLUMNS, dtype=torch.bfloat16)
    weight[777:780] = round_to_q4_0(gaussian(3), "bf16").bfloat16()
    found = probe(weight)
    assert (found.verdict, found.grid, found.blocks - found.degenerate) == ("exactly", "int4", 48)


def test_blocks_that_cannot_tell_are_counted_apart() -> None:
    weight = round_to_q4_0(gaussian(), "bf16").bfloat16()
    weight[0] = 0.0
    weight[1, 0] = torch.nan
    found = probe(weight)
    assert (found.verdict, found.degenerate) == ("exactly", COLUMNS // 32 + 1)


def test_exact_means_that_some_bf16_scale_reproduces_the_block() -> None:
    """The oracle: try every bf16 scale near the largest weight / 8, and compare bits."""
    weight = round_to_q4_0(gaussian(4), "bf16").bfloat16().view(-1, 32)
    weight[::2] = gaussian(4, seed=3).bfloat16().view(-1, 32)[::2]
    weight[1::4, 3] *= 1.01
    top = weight.gather(1, weight.abs().float().argmax(dim=1, keepdim=True)).float()
    by_trial = torch.zeros(len(weight), dtype=torch.bool)
    for near in np.linspace(0.98, 1.02, 400):
        scale = (top / -8 * float(near)).bfloat16().float()
        again = ((weight.float() / scale).round().clamp(-8, 7) * scale).bfloat16()
        by_trial |= (again == weight).all(dim=1)
    fit = fit_scaled(weight, "int4")
    assert torch.equal(fit.exact & fit.stored[:, 0], by_trial)
    assert 0 < int(by_trial.sum()) < len(weight)


def test_thread_count_is_given_back() -> None:
    before = torch.get_num_threads()
    probe(gaussian(4).bfloat16())
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("columns", [2, COLUMNS])
def test_pieces_that_are_not_whole_rows_are_refused(columns: int) -> None:
    with pytest.raises(ShapeMismatch):
        probe_lattice(torch.zeros(COLUMNS + 1), columns)
