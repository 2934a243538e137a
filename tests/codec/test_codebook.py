"""The constants of the format are those bitsandbytes writes."""

from __future__ import annotations

import torch
from codec.weights import oracle, same

from halfbyte import codec
from halfbyte.codec import codebook


def test_levels_equal_bitsandbytes():
    assert same(codebook.nf4_levels(), oracle().get_4bit_type("nf4", device="cpu"))


def test_levels_written_down_are_exact_float32():
    assert codebook.nf4_levels().tolist() == list(codebook.NF4_LEVELS)


def test_midpoints_lie_half_way_and_ties_go_to_the_lower_level():
    levels, midpoints = codebook.nf4_levels(), codebook.nf4_midpoints()
    assert bool(((levels[:-1] < midpoints) & (midpoints < levels[1:])).all())
    tie = torch.cat([midpoints, torch.ones(1)])  # the 1 makes the scale 1, so nothing is rounded on the way
    packed, _ = codec.quantize_blocks(tie.repeat(4))
    assert [code for byte in packed.tolist() for code in (byte >> 4, byte & 15)] == [*range(15), 15] * 4


def test_just_above_a_midpoint_is_the_upper_level():
    above = torch.nextafter(codebook.nf4_midpoints(), torch.ones(15))
    packed, _ = codec.quantize_blocks(torch.cat([above, torch.ones(1)]).repeat(4))
    assert [code for byte in packed.tolist() for code in (byte >> 4, byte & 15)] == [*range(1, 16), 15] * 4


def test_nested_map_equals_bitsandbytes():
    assert same(codebook.nested_quant_map(), oracle().create_dynamic_map())


def test_nested_map_is_not_symmetric():
    entries = codebook.nested_quant_map()
    assert entries[-1].item() == 1.0
    assert -0.993 < entries[0].item() < -0.992
