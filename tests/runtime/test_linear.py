"""Nf4Linear computes what the codec says and gives back the bytes it took; on a CPU by the same calls as on a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import torch
from runtime.stored_weights import dense, draw, drawn

from halfbyte import codec
from halfbyte.errors import ShapeMismatch, SourceError, UsageError
from halfbyte.runtime.linear.module import Nf4Linear
from halfbyte.runtime.linear.op import nf4_linear
from halfbyte.runtime.linear.tensors import NAMES, read_stored
from halfbyte.runtime.linear.weight import weight_from

PARTS = [((32,), 64), ((64, 32, 32), 128), ((48, 16), 192), ((96,), 576)]


def arguments(layer: Nf4Linear) -> tuple[torch.Tensor, ...]:
    return layer.tiles, layer.codes, layer.nested, layer.groups, layer.maps


@pytest.mark.parametrize("blocksize", [64, 32])
@pytest.mark.parametrize(("parts", "columns"), PARTS)
def test_every_part_comes_back_as_the_bytes_it_was_made_from(parts, columns, blocksize):
    stored = [draw(rows, columns, seed, blocksize) for seed, rows in enumerate(parts)]
    layer = Nf4Linear.of_tensors([part.to_dict() for part in stored])
    for part, back in zip(stored, layer.to_bitsandbytes(), strict=True):
        assert list(back) == list(NAMES)
        assert all(torch.equal(back[name], tensor) for name, tensor in part.to_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize(("parts", "columns"), PARTS)
def test_on_a_cpu_the_product_is_that_of_the_codecs_weights(parts, columns, dtype):
    stored = [draw(rows, columns, seed) for seed, rows in enumerate(parts)]
    nested = [codec.Nested(s.absmax, s.nested_absmax, s.offset, s.nested_quant_map) for s in stored]
    weights = [
        codec.dequantize(codec.NF4Tensor(s.packed, scales, s.rows * columns, 64), dtype).view(s.rows, columns)
        for s, scales in zip(stored, nested, strict=True)
    ]
    x = torch.randn(2, 3, columns).to(dtype)
    layer = Nf4Linear(weight_from(stored))
    assert torch.equal(layer(x), torch.nn.functional.linear(x, torch.cat(weights)))
    assert [piece.shape[-1] for piece in layer(x).split(layer.splits, dim=-1)] == list(parts)


def test_against_exact_weights_the_error_is_that_of_float32():
    stored = [draw(64, 128, 3)]
    x = torch.randn(5, 128)
    torch.testing.assert_close(
        Nf4Linear(weight_from(stored))(x).double(), x.double() @ dense(stored).T, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("shape", [(128,), (1, 128), (2, 3, 128), (0, 128)])
def test_the_op_passes_torchs_own_checks(shape):
    layer = Nf4Linear(drawn((64, 32), 128))
    torch.library.opcheck(nf4_linear, (torch.randn(shape), *arguments(layer)))


def test_the_op_is_one_node_of_a_compiled_graph():
    layer = Nf4Linear(drawn((32,), 64))
    graph = torch.export.export(layer, (torch.randn(2, 64),)).graph
    assert [str(node.target) for node in graph.nodes if node.op == "call_function"] == ["halfbyte.nf4_linear.default"]


@pytest.mark.parametrize("columns", [64, 127, 256, 0])
def test_x_of_another_width_is_refused(columns):
    with pytest.raises(ShapeMismatch, match="does not fit"):
        Nf4Linear(drawn((32,), 128))(torch.zeros(1, columns))


def test_changing_the_models_dtype_leaves_the_scales_alone():
    layer = Nf4Linear(drawn((32,), 64), torch.ones(32))
    before = layer.nested.clone()
    layer.to(torch.bfloat16)
    assert torch.equal(layer.nested, before)
    assert (layer.maps.dtype, layer.bias.dtype) == (torch.float32, torch.bfloat16)


def test_bias_is_added():
    weight = drawn((32,), 64)
    x, bias = torch.randn(2, 64), torch.randn(32)
    assert torch.equal(Nf4Linear(weight, bias)(x), Nf4Linear(weight)(x) + bias)


def live_linear(rows: int = 32, columns: int = 64, nested: bool = True, bias: bool = False) -> Any:
    from bitsandbytes.nn import Linear4bit

    layer = Linear4bit(
        columns, rows, bias=bias, compute_dtype=torch.float32, compress_statistics=nested, quant_type="nf4"
    )
    return layer.to("cpu")


def test_a_live_bitsandbytes_layer_is_taken_and_given_back():
    layer = live_linear(bias=True)
    ours = Nf4Linear.of_linear4bit(layer)
    x = torch.randn(3, 64)
    torch.testing.assert_close(ours(x), layer(x), rtol=1e-4, atol=1e-5)
    state = layer.weight.quant_state.as_dict(packed=True)
    (back,) = ours.to_bitsandbytes()
    assert torch.equal(back["weight"].view(-1), layer.weight.data.view(-1))
    assert all(torch.equal(back[name], state[name]) for name in NAMES[1:])


def test_layers_with_and_without_bias_are_not_stacked():
    with pytest.raises(UsageError, match="bias"):
        Nf4Linear.of_linear4bit(live_linear(), live_linear(bias=True))


def test_single_scales_are_refused_with_a_reason():
    with pytest.raises(SourceError, match="not double-quantized"):
        Nf4Linear.of_linear4bit(live_linear(nested=False))


def test_a_layer_in_bitsandbytes_own_cpu_order_is_refused():
    layer = live_linear()
    layer.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(SourceError, match="CPU order"):
        Nf4Linear.of_linear4bit(layer)


def test_importing_the_layer_loads_neither_a_compiler_nor_bitsandbytes():
    code = (
        "import sys, halfbyte.runtime.linear.module, halfbyte.runtime.kernels.launch as launch;"
        "print({'cuda.bindings.nvrtc', 'bitsandbytes', 'transformers'} & set(sys.modules))"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "set()"


@pytest.mark.parametrize("change", ["quant_type", "shape", "nested_blocksize", "not json", "levels", "missing", "size"])
def test_tensors_that_lie_are_refused(change):
    tensors = draw(32, 64).to_dict()
    state = json.loads(bytes(tensors[NAMES[5]].tolist()))
    if change == "levels":
        tensors["quant_map"] = tensors["quant_map"] * 0.5
    elif change == "missing":
        del tensors["absmax"]
    elif change == "size":
        tensors["absmax"] = tensors["absmax"][1:]
    else:
        state |= {"quant_type": "fp4"} if change == "quant_type" else {}
        state |= {"shape": [32, -64]} if change == "shape" else {}
        state |= {"nested_blocksize": 128} if change == "nested_blocksize" else {}
        text = b"\x80{" if change == "not json" else json.dumps(state).encode()
        tensors[NAMES[5]] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    with pytest.raises((SourceError, ShapeMismatch)):
        read_stored(tensors)


def test_weights_that_cannot_be_stacked_are_refused():
    with pytest.raises(ShapeMismatch, match="differ"):
        weight_from([draw(32, 64), draw(32, 128)])
    with pytest.raises(UsageError, match="24 rows"):
        weight_from([draw(24, 64)])
    with pytest.raises(UsageError, match="0 weights"):
        weight_from([])
