"""What a worker refuses, by the name of the tensor it was working on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import halfbyte
from halfbyte.errors import NonFiniteWeight


def test_scales_whose_mean_overflows_are_refused_by_tensor_and_file(tiny_gemma4: Path, tmp_path: Path) -> None:
    source = shutil.copytree(tiny_gemma4, tmp_path / "source")
    name = "model.language_model.layers.0.mlp.gate_proj.weight"
    shard = json.loads((source / "model.safetensors.index.json").read_text())["weight_map"][name]
    tensors = load_file(source / shard)
    tensors[name].fill_(3e38)
    save_file(tensors, source / shard)
    with pytest.raises(NonFiniteWeight) as caught:
        halfbyte.quantize(source, tmp_path / "out")
    assert caught.value.where == f"{shard}: tensor {name}"
