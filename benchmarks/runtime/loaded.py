"""What the loaders' benchmarks share: a checkpoint's quantized weights from the file's bytes, models that are made of it, texts compared.

Nothing of halfbyte's runtime stands between file and reference: `expand` is the codec's plain torch on the CPU, `exact_model` transformers' own class
in float32 with those weights in plain linears. It needs torch, transformers, bitsandbytes and no numba, so it runs in another engine's environment.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from halfbyte.codec import Nested, reference
from halfbyte.format.checkpoint import SafetensorsSource, read_config
from halfbyte.recipe.skeleton import auto_class_of, build_skeleton, model_names
from halfbyte.runtime.linear.tensors import NAMES, StoredWeight, read_stored
from halfbyte.verifier.layout import nf4_names

PROMPTS = (
    "Name three primary colors.",
    "What does a bee do all day? Answer in two sentences.",
    "Write a Python function that returns the n-th Fibonacci number.",
    "Why is the sky blue?",
)
#: units of the last place of bf16 by which the exact model may prefer another token: a tie
TIE = 8


@dataclass
class Checkpoint:
    """The folder, its quantized weights from the file's bytes, and the module each belongs to."""

    folder: Path
    stored: dict[str, StoredWeight]


def read_checkpoint(folder: Path) -> Checkpoint:
    """Module path -> its six tensors, by our own reader alone."""
    source = SafetensorsSource(folder)
    infos = {info.name: info for info in source.tensors}
    skeleton = build_skeleton({k: v for k, v in read_config(folder).items() if k != "quantization_config"})
    stored = {}
    for name, (key, _) in model_names(skeleton, sorted(nf4_names(infos))).items():
        found = {part: infos[name if part == "weight" else f"{name}.{part}"] for part in NAMES}
        tensors = {part: source.read(info, 0, info.numel) for part, info in found.items()}
        stored[(key or name).removesuffix(".weight")] = read_stored(tensors, name)
    source.close()
    return Checkpoint(folder, stored)


def load_stock(folder: Path, device: str) -> tuple[Any, dict[str, int]]:
    """As a stranger would, and how many names it missed, did not expect or found in another shape."""
    import transformers

    auto_class = getattr(transformers, auto_class_of(read_config(folder)))
    model, told = auto_class.from_pretrained(
        folder, dtype="auto", device_map={"": device}, local_files_only=True, output_loading_info=True
    )
    return model.eval(), {
        key: len(told.get(key) or ()) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")
    }


def load_plain(folder: Path, device: str) -> Any:
    """Stock, held back from the CPU's AVX512-BF16 path."""
    model, _ = load_stock(folder, device)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def count_packed(model: Any, names: Iterable[str]) -> int:
    """Linears that bitsandbytes has rewritten for the CPU."""
    states = (model.get_submodule(name).weight.quant_state for name in names)
    return sum(bool(getattr(state, "packing_format_for_cpu", False)) for state in states)


def checkpoint_of(source: Path, scratch: Path, **how: Any) -> Path:
    """The NF4 checkpoint itself, or one that is written first; how: what `halfbyte.quantize` takes."""
    if source.is_dir() and read_config(source).get("quantization_config"):
        return source
    import halfbyte

    halfbyte.quantize(source, scratch / "nf4", **how)
    return scratch / "nf4"


def equal_to(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two texts begin with alike."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def unit_at(size: float) -> float:
    """The unit of bf16's last place at a number of this size."""
    return 2.0 ** (math.floor(math.log2(max(size, 1e-9))) - 7)


def scales_of(stored: StoredWeight) -> torch.Tensor:
    return reference.unnest_absmax(Nested(stored.absmax, stored.nested_absmax, stored.offset, stored.nested_quant_map))


def expand(stored: StoredWeight, dtype: torch.dtype) -> torch.Tensor:
    """The reference: plain torch, on the CPU, [rows, columns]."""
    flat = reference.dequantize_blocks(
        stored.packed, scales_of(stored), stored.rows * stored.columns, stored.blocksize, dtype
    )
    return flat.view(stored.rows, stored.columns)


def exact_model(checkpoint: Checkpoint, device: str) -> Any:
    """The stock class in float32, each quantized linear a plain one with the reference's weights."""
    model, _ = load_stock(checkpoint.folder, device)
    for name, stored in checkpoint.stored.items():
        old = model.get_submodule(name)
        new = torch.nn.Linear(stored.columns, stored.rows, bias=old.bias is not None, device="meta")
        new.weight = torch.nn.Parameter(expand(stored, torch.float32).to(device), requires_grad=False)
        new.bias = old.bias
        owner, _, child = name.rpartition(".")
        setattr(model.get_submodule(owner), child, new)
    return torch.nn.Module.float(model)  # transformers' own refuses: it still believes in 4 bits
