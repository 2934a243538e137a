"""How one NF4 weight lies in a file: six tensors, named and typed as bitsandbytes names and types them (docs/format.md).

    NAME                                      uint8    [ceil(n/2), 1]      two codes a byte, high nibble = even element
    NAME.absmax                               uint8    [ceil(n/blocksize)] codes of the scales (second level)
    NAME.quant_map                            float32  [16]                the NF4 levels
    NAME.nested_absmax                        float32  [ceil(blocks/256)]  scales of the scales
    NAME.nested_quant_map                     float32  [256]               levels of the second level
    NAME.quant_state.bitsandbytes__nf4        uint8    [len(JSON)]         everything that is not a tensor

The catch: the JSON holds `nested_offset` in decimal, so its length is known only once the weight has been quantized.
`component_sizes` therefore counts a typical one; a file's exact size is known when it is closed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from math import prod

#: second level: scales are quantized in blocks of 256 (bitsandbytes.functional.quantize_4bit)
NESTED_BLOCKSIZE = 256
QUANT_STATE_SUFFIX = "quant_state.bitsandbytes__nf4"
#: in the order in which they are listed; sizes are fixed except the last
COMPONENTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", QUANT_STATE_SUFFIX)
#: characters of a typical offset (a float32 read back as a double; at most 24)
_TYPICAL_OFFSET = 20
#: bytes by which one weight's JSON may be longer than `component_sizes` counts it
STATE_MAY_ADD = 24 - _TYPICAL_OFFSET


def quant_state_json(shape: Sequence[int], blocksize: int, nested_offset: float, dtype: str = "bfloat16") -> bytes:
    """The JSON of `quant_state.bitsandbytes__nf4`, byte for byte as bitsandbytes 0.50 packs it.

    shape          of the weight before quantization
    nested_offset  mean of the scales, a float32 value
    dtype          what dequantizing yields
    """
    body = {
        "quant_type": "nf4",
        "blocksize": blocksize,
        "dtype": dtype,
        "shape": list(shape),
        "nested_blocksize": NESTED_BLOCKSIZE,
        "nested_dtype": "float32",
        "nested_offset": nested_offset,
    }
    return json.dumps(body).encode()


def component_sizes(name: str, shape: Sequence[int], blocksize: int = 64) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Tensor name -> (safetensors dtype, shape) of the six tensors of the weight `name`.

    The JSON is counted at 20 characters of offset, what a mean of scales usually prints as: the one estimate in a plan's
    sizes (off by at most a few bytes a weight).
    """
    numel = prod(shape)
    blocks = -(-numel // blocksize)
    json_length = len(quant_state_json(shape, blocksize, 0.5)) - len("0.5") + _TYPICAL_OFFSET
    return {
        name: ("U8", (-(-numel // 2), 1)),
        f"{name}.absmax": ("U8", (blocks,)),
        f"{name}.quant_map": ("F32", (16,)),
        f"{name}.nested_absmax": ("F32", (-(-blocks // NESTED_BLOCKSIZE),)),
        f"{name}.nested_quant_map": ("F32", (256,)),
        f"{name}.{QUANT_STATE_SUFFIX}": ("U8", (json_length,)),
    }


def weight_of(tensor_name: str) -> str | None:
    """The NF4 weight that a component belongs to (`x.weight.absmax` -> `x.weight`), None if it is no component."""
    for component in COMPONENTS:
        if tensor_name.endswith("." + component):
            return tensor_name[: -len(component) - 1]
    return None
