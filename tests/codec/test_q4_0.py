"""q4_0 is llama.cpp's to the bit, and with bf16 scales a bf16 checkpoint on its grid survives a second rounding."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from codec.weights import awkward, make, same
from hypothesis import given, settings
from hypothesis import strategies as st

from halfbyte.codec.q4_0 import quantize_q4_0, round_to_q4_0
from halfbyte.errors import ShapeMismatch, UsageError


def by_gguf(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, scales and expanded weights as the gguf package has them."""
    with np.errstate(all="ignore"):
        packed = gguf.quants.quantize(weight.numpy(), gguf.GGMLQuantizationType.Q4_0)
        expanded = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType.Q4_0)
    rows = packed.reshape(-1, 18)
    scales = rows[:, :2].copy().view(np.float16).astype(np.float32).reshape(-1)
    nibbles = np.concatenate([rows[:, 2:] & 15, rows[:, 2:] >> 4], axis=1).astype(np.int8) - 8
    return torch.from_numpy(nibbles), torch.from_numpy(scales), torch.from_numpy(expanded).reshape(weight.shape)


def whole_blocks(weight: torch.Tensor) -> torch.Tensor:
    """float32, cut to whole blocks, magnitudes within what an fp16 scale can hold."""
    values = weight.float()[: weight.numel() // 32 * 32]
    return torch.where(values.abs() < 5e5, values, values.sign())


def tie_laden(blocks: int, seed: int) -> torch.Tensor:
    """Weights that are halves of the step, so that every rounding is a tie or an integer; both signs of the largest."""
    generator = torch.Generator().manual_seed(seed)
    halves = torch.randint(-16, 17, (blocks, 32), generator=generator).float() / 2
    steps = torch.exp2(torch.randint(-20, 10, (blocks, 1), generator=generator).float())
    return (halves * steps * torch.randint(0, 2, (blocks, 1), generator=generator).mul(2).sub(1)).view(-1)


kinds = st.one_of(
    awkward.map(whole_blocks),
    st.builds(tie_laden, st.integers(1, 50), st.integers(0, 2**31)),
).filter(lambda weight: weight.numel() > 0)


@settings(max_examples=150, deadline=None)
@given(kinds)
def test_codes_scales_and_values_are_those_of_gguf_bit_for_bit(weight: torch.Tensor) -> None:
    codes, scales, expanded = by_gguf(weight)
    ours, our_scales = quantize_q4_0(weight)
    assert same(ours, codes)
    assert same(our_scales, scales)
    assert same(round_to_q4_0(weight), expanded)


@pytest.mark.parametrize("value", [0.0, -0.0, 1e-40, -1e-45, 3e-8, 524000.0])
def test_a_block_of_one_value_is_that_of_gguf(value: float) -> None:
    weight = torch.zeros(64)
    weight[5] = value
    assert same(quantize_q4_0(weight)[0], by_gguf(weight)[0])
    assert same(round_to_q4_0(weight), by_gguf(weight)[2])


@settings(max_examples=150, deadline=None)
@given(kinds)
def test_bf16_weights_with_bf16_scales_survive_a_second_rounding(weight: torch.Tensor) -> None:
    once = round_to_q4_0(weight, "bf16").bfloat16()
    assert torch.equal(round_to_q4_0(once, "bf16").bfloat16(), once)
    assert torch.equal(round_to_q4_0(once, "f16").bfloat16(), once)


def test_with_fp16_scales_they_do_not() -> None:
    once = round_to_q4_0(make("gaussian", 32 * 500, torch.float32)).bfloat16()
    assert not torch.equal(round_to_q4_0(once).bfloat16(), once)


def test_bf16_scales_are_fp16_and_bf16_numbers() -> None:
    weight = make("scales", 32 * 300, torch.float32)
    scale = round_to_q4_0(weight.clamp(-5e5, 5e5), "bf16").view(-1, 32).abs().amax(dim=1) / 8
    assert torch.equal(scale.bfloat16().float(), scale)
    assert torch.equal(scale.half().float(), scale)


def test_the_largest_weight_is_code_minus_8_whatever_its_sign() -> None:
    codes, scales = quantize_q4_0(torch.tensor([[1.0, *[0.0] * 31], [-1.0, *[0.0] * 31]]))
    assert codes[:, 0].tolist() == [-8, -8]
    assert scales.tolist() == [-0.125, 0.125]


def test_shape_is_kept_and_no_gradient_flows() -> None:
    weight = torch.randn(4, 2, 64, dtype=torch.bfloat16, requires_grad=True)
    rounded = round_to_q4_0(weight)
    assert (rounded.shape, rounded.dtype, rounded.requires_grad) == (weight.shape, torch.float32, False)
    turned = weight.detach().float().transpose(0, 1)
    assert torch.equal(round_to_q4_0(turned), round_to_q4_0(turned.contiguous()))


@pytest.mark.parametrize("shape", [(33,), (32, 16), (2, 48), ()])
def test_rows_that_are_not_whole_blocks_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeMismatch, match="not whole blocks of 32"):
        quantize_q4_0(torch.zeros(shape))


def test_an_unknown_scale_dtype_is_refused() -> None:
    with pytest.raises(UsageError, match="scale_dtype 'f8'"):
        round_to_q4_0(torch.zeros(32), "f8")  # type: ignore[arg-type]


@pytest.mark.gpu
def test_cuda_gives_the_bits_of_the_cpu() -> None:
    weight = torch.cat([whole_blocks(make(kind, 32 * 2000, torch.float32)) for kind in ("gaussian", "scales", "bits")])
    weight = torch.cat([weight, tie_laden(2000, 1)])
    for ours, theirs in zip(quantize_q4_0(weight.cuda()), quantize_q4_0(weight), strict=True):
        assert same(ours.cpu(), theirs)
