"""docs/format.md sections 3 and 4: the six tensors of a weight, and what their bytes mean."""

# ruff: noqa: N802  (the number of a rule is spelled as in the document)
from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
from verifier import surgery

W = "model.language_model.layers.1.mlp.up_proj.weight"
STATE = f"{W}.quant_state.bitsandbytes__nf4"


def test_F9_a_lost_quant_state_is_named(good: Path, examine: Any) -> None:
    surgery.drop(good, STATE)
    checks = examine(good)
    assert checks["F9"]["where"] == W
    assert "quant_state" in checks["F9"]["detail"]


def test_F9_codes_that_lost_all_five_companions_are_named(good: Path, examine: Any) -> None:
    parts = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", "quant_state.bitsandbytes__nf4")
    surgery.drop(good, *(f"{W}.{part}" for part in parts))
    assert examine(good)["F9"]["where"] == W


def test_F9_scales_of_another_dtype_are_named(good: Path, examine: Any) -> None:
    surgery.replace(good, f"{W}.absmax", lambda t: ("F32", t[1], bytes(4 * t[1][0])))
    assert "F32" in examine(good)["F9"]["detail"]


def test_F10_other_levels_than_nf4_are_refused(good: Path, examine: Any) -> None:
    surgery.replace(good, f"{W}.quant_map", lambda t: (t[0], t[1], t[2][:-4] + struct.pack("<f", 1.0000001)))
    assert examine(good)["F10"]["where"] == f"{W}.quant_map"


def test_F10_the_levels_in_the_document_are_those_of_bitsandbytes(format_document: str) -> None:
    import bitsandbytes.functional as bnb

    block = format_document.split("**F10**")[1].split("```")[1]
    assert [float(word) for word in block.split()] == bnb.get_4bit_type("nf4", device="cpu").tolist()


def test_F11_swapped_nibbles_are_caught(good: Path, source: Any, examine: Any) -> None:
    swapped = bytes((byte >> 4 | byte << 4) & 255 for byte in range(256))
    surgery.replace(good, W, lambda t: (t[0], t[1], t[2].translate(swapped)))
    check = examine(good, source=source)["F11 F12 F22"]
    assert check["where"] == W
    assert "codes differ" in check["detail"]


def test_F12_the_formula_written_out_equals_bitsandbytes(stock_checkpoint: Path) -> None:
    import numpy as np
    import torch
    from bitsandbytes.functional import QuantState, dequantize_4bit
    from safetensors.torch import load_file

    tensors = load_file(stock_checkpoint / "model.safetensors")
    part = {key: tensors[f"{W}.{key}"] for key in ("absmax", "quant_map", "nested_absmax", "nested_quant_map")}
    state = json.loads(bytes(tensors[STATE].tolist()))
    codes = np.stack([tensors[W].numpy().ravel() >> 4, tensors[W].numpy().ravel() & 15], axis=1).ravel()
    block = np.arange(codes.size) // state["blocksize"]
    absmax, outer, levels = (part[k].numpy() for k in ("absmax", "nested_absmax", "nested_quant_map"))
    scale = levels[absmax[block]] * outer[block // 256] + np.float32(state["nested_offset"])
    by_hand = torch.from_numpy(part["quant_map"].numpy()[codes] * scale).bfloat16().view(state["shape"])

    components = {k.removeprefix(f"{W}."): v for k, v in tensors.items() if k.startswith(f"{W}.")}
    theirs = dequantize_4bit(tensors[W], QuantState.from_dict(components, device=torch.device("cpu")))
    assert torch.equal(by_hand, theirs)


def test_F12_a_wrong_scale_is_caught(good: Path, source: Any, examine: Any) -> None:
    surgery.replace(good, f"{W}.nested_absmax", lambda t: (t[0], t[1], struct.pack("<f", 9.0) + t[2][4:]))
    assert "nested_absmax" in examine(good, source=source)["F11 F12 F22"]["detail"]


def test_F13_a_block_size_that_no_loader_reads_is_refused(good: Path, examine: Any) -> None:
    surgery.edit_state(good, W, lambda state: state.update(blocksize=48))
    assert "48" in examine(good)["F13"]["detail"]


def test_F13_ragged_last_blocks_verify_against_their_source(tmp_path: Path, examine: Any) -> None:
    from verifier.conftest import SKIP, adopt, save_stock

    from halfbyte.demo import write_tiny_gemma4
    from halfbyte.format.checkpoint import SafetensorsSource

    ragged = write_tiny_gemma4(tmp_path / "ragged", layers=1, ragged=True)
    out = adopt(ragged, save_stock(ragged, tmp_path / "stock", SKIP), tmp_path / "out")
    source = SafetensorsSource(ragged)
    assert any(info.numel % 64 for info in source.tensors if "mlp" in info.name)
    checks = examine(out, source=source)
    source.close()
    assert {key for key, check in checks.items() if check["status"] == "failed"} == set()


@pytest.mark.parametrize(("nibble", "status"), [(7, "passed"), (0, "failed")])
def test_F14_the_spare_nibble_of_an_odd_weight_is_seven(tmp_path: Path, nibble: int, status: str) -> None:
    from halfbyte.format.checkpoint import SafetensorsSource
    from halfbyte.verifier.layout import check_layout

    parts = odd_weight()
    dtype, shape, codes = parts["w.weight"]
    assert codes[-1] & 15 == 7, "bitsandbytes itself writes 7"
    parts["w.weight"] = (dtype, shape, codes[:-1] + bytes([codes[-1] & 0xF0 | nibble]))
    surgery.write_checkpoint(tmp_path, [parts])
    (tmp_path / "config.json").write_text("{}")
    reader = SafetensorsSource(tmp_path)
    checks, _ = check_layout(reader)
    reader.close()
    assert {check.id: check.status for check in checks} == {
        **dict.fromkeys(("F9", "F10", "F13", "F15", "F16", "F17"), "passed"),
        "F14": status,
    }


def odd_weight() -> dict[str, tuple[str, list[int], bytes]]:
    """A 5 x 13 weight as bitsandbytes packs it."""
    import torch
    from bitsandbytes.functional import quantize_4bit

    weight = torch.randn(5, 13, generator=torch.Generator().manual_seed(0)).bfloat16()
    codes, state = quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    spelling = {torch.uint8: "U8", torch.float32: "F32"}
    tensors = {"w.weight": codes} | {f"w.weight.{k}": v for k, v in state.as_dict(packed=True).items()}
    return {n: (spelling[t.dtype], list(t.shape), t.numpy().tobytes()) for n, t in tensors.items()}


@pytest.mark.parametrize(
    "spell",
    [
        lambda state: json.dumps(state, separators=(",", ":")),
        lambda state: json.dumps(state) + " ",
        lambda state: json.dumps(dict(reversed(state.items()))),
        lambda state: json.dumps({**state, "extra": 1}),
        lambda state: json.dumps({k: v for k, v in state.items() if k != "shape"}),
        lambda state: json.dumps(state)[:-1],
    ],
    ids=["no spaces", "padded", "other order", "one key more", "one key less", "not JSON"],
)
def test_F15_a_quant_state_spelled_otherwise_is_refused(good: Path, examine: Any, spell: Any) -> None:
    def edit(tensor: tuple[str, list[int], bytes]) -> tuple[str, list[int], bytes]:
        raw = spell(json.loads(tensor[2])).encode()
        return tensor[0], [len(raw)], raw

    surgery.replace(good, STATE, edit)
    assert STATE in examine(good)["F15"]["detail"]


@pytest.mark.parametrize(
    "change",
    [
        {"quant_type": "fp4"},
        {"dtype": "float16"},
        {"nested_dtype": "float16"},
        {"nested_blocksize": 128},
        {"shape": [256, -128]},
        {"nested_offset": 0.1},
        {"nested_offset": float("nan")},
    ],
    ids=str,
)
def test_F16_a_quant_state_with_another_value_is_refused(good: Path, examine: Any, change: dict[str, Any]) -> None:
    surgery.edit_state(good, W, lambda state: state.update(change))
    assert examine(good)["F16"]["where"] == W


def test_F16_a_transposed_shape_is_refused(good: Path, source: Any, examine: Any) -> None:
    surgery.edit_state(good, W, lambda state: state.update(shape=state["shape"][::-1]))
    assert examine(good, source=source)["F19"]["where"] == W


def test_F17_an_infinite_scale_is_refused(good: Path, examine: Any) -> None:
    surgery.replace(good, f"{W}.nested_absmax", lambda t: (t[0], t[1], struct.pack("<f", float("inf")) + t[2][4:]))
    assert W in examine(good)["F17"]["where"]


def test_F17_scales_that_overflow_although_their_parts_are_finite_are_refused(good: Path, examine: Any) -> None:
    huge = struct.pack("<f", 3e38)
    surgery.replace(good, f"{W}.nested_absmax", lambda t: (t[0], t[1], huge * t[1][0]))
    surgery.edit_state(good, W, lambda state: state.update(nested_offset=struct.unpack("<f", huge)[0]))
    check = examine(good)["F17"]
    assert check["where"] == W
    assert "scales are not finite" in check["detail"]


def test_F22_one_flipped_code_is_caught_and_located(good: Path, source: Any, examine: Any) -> None:
    surgery.flip(good, W, at=1000, mask=0x01)
    assert (
        "1 codes differ from the source's, the first at element 2001"
        in examine(good, source=source)["F11 F12 F22"]["detail"]
    )


def test_F22_codes_follow_the_weight_rounded_to_bfloat16(good: Path, tiny_gemma4: Path, tmp_path: Path) -> None:
    import shutil

    import torch

    from halfbyte.codec import quantize_blocks
    from halfbyte.format.checkpoint import SafetensorsSource
    from halfbyte.verifier.against_source import check_codes
    from halfbyte.verifier.layout import check_layout

    wide = Path(shutil.copytree(tiny_gemma4, tmp_path / "wide"))
    generator = torch.Generator().manual_seed(1)

    def widen(tensor: tuple[str, list[int], bytes]) -> tuple[str, list[int], bytes]:
        exact = torch.frombuffer(bytearray(tensor[2]), dtype=torch.bfloat16).float()
        nudged = exact * (1 + (torch.rand(exact.shape, generator=generator) - 0.5) * 2**-9)
        assert torch.equal(nudged.bfloat16().float(), exact)
        assert not torch.equal(quantize_blocks(nudged)[0], quantize_blocks(exact)[0])
        return "F32", tensor[1], nudged.numpy().tobytes()

    surgery.replace(wide, W, widen)
    reader, source = SafetensorsSource(good), SafetensorsSource(wide)
    check, _ = check_codes(reader, [w for w in check_layout(reader)[1] if w.name == W], source, exact=True)
    assert check.status == "passed", check.detail


@pytest.fixture(scope="module")
def format_document() -> str:
    return (Path(__file__).parents[2] / "docs" / "format.md").read_text()
