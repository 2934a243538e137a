"""The fast CPU path is the reference, bit for bit: any device, any slice, any number of threads."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import numba
import pytest
import torch
from codec.weights import DTYPES, KINDS, awkward, make, same
from hypothesis import given, settings
from hypothesis import strategies as st

from halfbyte import codec
from halfbyte.codec import cpu, loops, reference, tables, workers
from halfbyte.codec.codebook import SMALLEST_SCALE, nf4_levels, nf4_midpoints


@settings(max_examples=150, deadline=None)
@given(awkward, st.sampled_from(codec.BLOCKSIZES), st.sampled_from(DTYPES))
def test_cpu_path_is_the_reference(weight, blocksize, dtype):
    packed, absmax = codec.quantize_blocks(weight, blocksize)
    expected_packed, expected_absmax = reference.quantize_blocks(weight, blocksize)
    assert same(packed, expected_packed)
    assert same(absmax, expected_absmax)
    nested, expected = codec.nest_absmax(absmax), reference.nest_absmax(absmax)
    assert same(nested.absmax, expected.absmax)
    assert same(nested.nested_absmax, expected.nested_absmax)
    n = weight.numel()
    values = codec.dequantize_blocks(packed, absmax, n, blocksize, dtype)
    assert same(values, reference.dequantize_blocks(packed, absmax, n, blocksize, dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_weight_gets_the_code_of_the_definition(dtype):
    table = tables.thresholds(dtype)
    generator = torch.Generator().manual_seed(1)
    for magnitude in [0, 1, 2, 127, 128, table.limit - 1, *torch.randint(0, table.limit, (60,), generator=generator)]:
        bits = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16)
        bits = bits[(bits.to(torch.int32) & 0x7FFF) <= magnitude]
        inverse = 1.0 / table.values[magnitude].clamp(min=SMALLEST_SCALE)
        expected = torch.bucketize(bits.view(dtype).float() * inverse, nf4_midpoints())
        keys = bits ^ ((bits >> 15) & 0x7FFF)
        assert torch.equal((keys[:, None] > table.keys[magnitude]).sum(dim=1), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_code_dequantizes_to_level_times_scale_rounded_once(dtype):
    ties = [1 + odd * 2.0**-bit for bit in (8, 11) for odd in (1, 3)]  # half-way between two bf16, two f16
    edges = [0.0, -0.0, -1.5, 1e-45, 3.4e38, torch.inf, 65504.0, 65520.0, 6e-8, 3e-8]
    scales = torch.cat([make("scales", 64 * 40, torch.float32)[::64], torch.tensor(edges + ties)])
    packed = torch.arange(256, dtype=torch.uint8).repeat(len(scales))
    found = codec.dequantize_blocks(packed, scales, packed.numel() * 2, 512, dtype).view(-1, 256, 2)
    byte = torch.arange(256)
    codes = torch.stack([byte >> 4, byte & 15], dim=1)
    expected = (nf4_levels()[codes] * scales[:, None, None]).to(dtype)
    number = ~expected.isnan()
    assert torch.equal(found.isnan(), ~number)
    assert same(found[number], expected[number])


def test_nan_scale_dequantizes_to_nan():
    packed, bits = torch.zeros(64, dtype=torch.uint8), torch.tensor([0x7FC00000, 0x7FFFFFFF], dtype=torch.int32)
    for dtype in DTYPES:
        assert bool(codec.dequantize_blocks(packed, bits.view(torch.float32), 128, 64, dtype).isnan().all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_slices_of_whole_blocks_concatenate_to_the_whole(kind, dtype):
    weight = make(kind, 64 * 50 + 17, dtype, seed=3)
    packed, absmax = codec.quantize_blocks(weight)
    parts = [codec.quantize_blocks(part) for part in (weight[: 64 * 7], weight[64 * 7 : 64 * 30], weight[64 * 30 :])]
    assert same(torch.cat([part[0] for part in parts]), packed)
    assert same(torch.cat([part[1] for part in parts]), absmax)


@pytest.mark.parametrize("dtype", DTYPES)
def test_number_of_threads_does_not_change_a_bit(dtype, monkeypatch):
    monkeypatch.setattr(cpu, "STEP", 4096)
    weight = make("scales", 4096 * 9 + 31, dtype)
    alone = codec.quantize_blocks(weight, threads=1)
    for threads in (2, 5):
        assert all(map(same, codec.quantize_blocks(weight, threads=threads), alone))
        values = codec.dequantize_blocks(*alone, weight.numel(), dtype=dtype, threads=threads)
        assert same(values, reference.dequantize_blocks(*alone, weight.numel(), 64, dtype))


def test_several_threads_may_call_at_once(monkeypatch):
    monkeypatch.setattr(cpu, "STEP", 4096)
    weights = [make("gaussian", 4096 * 8 + seed, DTYPES[seed % 3], seed) for seed in range(12)]
    with ThreadPoolExecutor(6) as pool:
        results = list(pool.map(lambda weight: codec.quantize(weight, threads=2), weights))
    for weight, result in zip(weights, results, strict=True):
        packed, absmax = reference.quantize_blocks(weight, 64)
        assert same(result.packed, packed)
        assert same(result.scales.absmax, reference.nest_absmax(absmax).absmax)


def test_thread_setting_of_torch_is_put_back_and_decides_the_offset():
    absmax = make("gaussian", 200_000, torch.float32).abs()
    before = torch.get_num_threads()
    offsets = {threads: codec.nest_absmax(absmax, threads=threads).nested_offset for threads in (1, 2, 3)}
    assert torch.get_num_threads() == before
    torch.set_num_threads(1)
    try:
        assert offsets[1] == absmax.mean().item()
    finally:
        torch.set_num_threads(before)
    assert len(set(offsets.values())) > 1  # the reason the option exists


def test_loops_compile_without_a_cache_folder(monkeypatch):
    made = numba.njit

    def no_folder(*args, **options):
        if options["cache"]:
            raise RuntimeError("cannot cache function: no locator available")
        return made(*args, **options)

    monkeypatch.setattr(numba, "njit", no_folder)
    nest = loops._compile(loops.nest, loops.SIGNATURES[loops.nest])
    assert nest.__name__ == "nest"


def test_dequantizing_without_the_shuffle_instruction_gives_the_same(monkeypatch):
    monkeypatch.setattr(loops, "HAS_PSHUFB", False)
    plain = numba.njit(loops.SIGNATURES[loops.dequantize], error_model="numpy")(loops.dequantize)
    packed, absmax = codec.quantize_blocks(make("gaussian", 640, torch.bfloat16))
    out = torch.empty(640, dtype=torch.bfloat16)
    plain(packed.numpy(), absmax.numpy(), nf4_levels().numpy(), out.view(torch.int16).numpy(), 64)
    assert not any("pshufb" in code for code in plain.inspect_asm().values())
    assert same(out, codec.dequantize_blocks(packed, absmax, 640))


def test_unaligned_memory_is_accepted():
    weight = make("gaussian", 128, torch.bfloat16)
    raw = bytearray(b"\0" + weight.view(torch.uint8).numpy().tobytes())
    shifted = torch.frombuffer(raw, dtype=torch.bfloat16, offset=1, count=128)
    assert shifted.data_ptr() % 2 == 1
    assert all(map(same, codec.quantize_blocks(shifted), codec.quantize_blocks(weight)))


def test_a_failing_step_stops_the_rest_and_is_raised():
    done = []

    def job(begin, end):
        if begin == 2:
            raise ValueError("step 2")
        time.sleep(0.001)
        done.append(begin)

    with pytest.raises(ValueError, match="step 2"):
        workers.for_each_step(job, 1000, 1, threads=1)
    assert done == [0, 1]
    with pytest.raises(ValueError, match="step 2"):
        workers.for_each_step(job, 1000, 1, threads=2)
    assert len(done) < 900


def test_steps_cover_the_range_once():
    seen = []
    workers.for_each_step(lambda begin, end: seen.append((begin, end)), 1003, 10, threads=3)
    assert sorted(seen) == [(begin, min(begin + 10, 1003)) for begin in range(0, 1003, 10)]
