"""What is read of a checkpoint, and what is said of it."""

from __future__ import annotations

import json
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from recipe.small_models import llama, skeleton_of

from halfbyte.codec.q4_0 import round_to_q4_0
from halfbyte.format.tensors import TensorInfo
from halfbyte.recipe.decisions import Plan
from halfbyte.recipe.plan import make_plan
from halfbyte.recipe.probe import QUICK_SAMPLE, pieces_of, probe
from halfbyte.recipe.skeleton import tensors_of


class Weights:
    """A Source in memory: weights made by name, reads remembered."""

    def __init__(self, make: Any) -> None:
        self.config = llama(num_hidden_layers=2)
        self.tensors = tensors_of(skeleton_of(self.config)[0])
        self.make = make
        self.reads: list[tuple[str, int, int]] = []

    def read(self, info: TensorInfo, begin: int, end: int) -> torch.Tensor:
        self.reads.append((info.name, begin, end))
        generator = torch.Generator().manual_seed(len(info.name))
        weight = torch.randn(info.shape, generator=generator)
        return self.make(info.name, weight).bfloat16().reshape(-1)[begin:end].clone()

    def probed(self, **options: Any) -> tuple[Plan, dict[str, Any]]:
        plan = make_plan(self.config, self.tensors)
        return plan, probe(self, plan, **options)  # type: ignore[arg-type]


def on_grid(name: str, weight: torch.Tensor) -> torch.Tensor:
    return round_to_q4_0(weight, "bf16")


def test_weights_on_the_grid_are_said_to_be() -> None:
    plan, found = Weights(on_grid).probed()
    assert [t["name"] for t in found["tensors"]] == [d.name for d in plan.decisions if d.action == "nf4"]
    assert found["summary"]["verdicts"] == {"exactly": 14, "mostly": 0, "no": 0, "undecided": 0}
    said = "the source lies exactly on an int4 grid (blocks of 32, bf16 scales) in 14 of 14 quantized tensors"
    assert found["summary"]["sentence"] == said
    assert json.loads(json.dumps(found)) == found


def test_trained_weights_and_a_mixture_are_told_apart() -> None:
    _, none = Weights(lambda name, weight: weight).probed()
    assert none["summary"]["sentence"] == ("the source is not on an int4 or NF4 grid (14 of 14 quantized tensors)")
    _, some = Weights(lambda n, w: on_grid(n, w) if "mlp" in n else w * 0 if "q_proj" in n else w).probed()
    assert some["summary"]["verdicts"] == {"exactly": 6, "mostly": 0, "no": 6, "undecided": 2}
    assert some["summary"]["sentence"].endswith(
        "in 6 of 14 quantized tensors, on none in 6, undecided in 2: too few different weights to tell"
    )


def test_a_sample_stays_in_its_bounds_and_finds_the_same() -> None:
    source = Weights(on_grid)
    _, found = source.probed(sample=2048, at_most=5)
    assert found["summary"]["verdicts"]["exactly"] == len(found["tensors"]) == 5
    assert found["sampled_weights"] == sum(end - begin for _, begin, end in source.reads) <= 5 * 2048
    assert "5 of 5 tensors looked at (14 are quantized)" in found["summary"]["sentence"]


@pytest.mark.parametrize(
    "shape", [(576, 1536), (21504, 5376), (5376, 21504), (100_000, 100), (7, 99_999), (300_001, 1), (10**6,), (33, 33)]
)
@pytest.mark.parametrize("sample", [QUICK_SAMPLE, 1 << 18])
def test_pieces_are_aligned_spread_and_few(shape: tuple[int, ...], sample: int) -> None:
    n = prod(shape)
    pieces, columns = pieces_of(TensorInfo("w", "BF16", shape, "f", 0), sample)
    read = sum(end - begin for begin, end in pieces)
    assert all(0 <= a < b <= n for a, b in pieces)
    assert all(b <= a for (_, b), (a, _) in pairwise(pieces)), "in order, without overlap"
    assert all(begin % 128 == 0 for begin, _ in pieces)
    assert all(end % 128 == 0 or end == n for _, end in pieces)
    assert len(pieces) <= 16
    if columns:
        assert all(begin % columns == end % columns == 0 for begin, end in pieces)
    if n <= sample:
        assert read == n
    else:
        assert sample / 3 <= read <= sample
        assert len(pieces) == 1 or pieces[-1][1] > n - sample, "the last piece is at the end"


def test_records_from_before_the_probe_are_read_and_the_digest_does_not_move() -> None:
    plan, found = Weights(on_grid).probed()
    old = plan.to_dict()
    del old["lattice"]
    assert Plan.from_dict(old) == plan
    probed = Plan.from_dict({**plan.to_dict(), "lattice": found})
    assert (probed.lattice, probed.digest) == (found, plan.digest)


@pytest.mark.real
def test_the_real_gguf_is_affine_in_blocks_of_32_with_fp16_scales(smollm2: Path) -> None:
    from halfbyte.codec.lattice import probe_lattice
    from halfbyte.format.gguf_source import GgufSource
    from halfbyte.recipe.survey import plan_of

    with GgufSource(smollm2) as source:
        found = probe(source, plan_of(source, preset="decoder-only", allow_disagreement=False), sample=4096, at_most=42)
        (embedding,) = [info for info in source.tensors if "embed_tokens" in info.name]
        stored_as_q8_0 = probe_lattice(source.read(embedding, 0, 576 * 64), 576)
    assert found["summary"]["grids"] == {"an affine int4 grid (blocks of 32, fp16 scales)": 42}
    assert found["summary"]["verdicts"]["exactly"] == 42
    assert stored_as_q8_0.verdict == "no"
