"""From llama.cpp's names to transformers': which parameter each GGUF tensor is, and what was done to it on the way.

llama.cpp's converter renames (`blk.0.attn_q.weight` <- `model.layers.0.self_attn.q_proj.weight`), reorders the rows of
Llama's q and k within each head (for its interleaved rotary embedding), and adds 1 to Gemma 2/3 norms. transformers
knows how to take each step back; this module asks it rather than knowing better:

    names    get_gguf_hf_weights_map over the model, built on the meta device (no weights)
    values   the architecture's tensor processor. A vector goes through it at read time, whole. For a matrix it is asked
             once, with the column [0, 1, ... rows-1] in place of weights: what comes back says which row of the file
             each row of the model is. So a slice of a matrix needs only its own rows, and no index formula is copied.
    config   load_gguf_checkpoint(...)["config"], its gaps closed (gguf_config.py), completed by the real config class

The catch: the question shows reordered rows and nothing else, so only processors known to do no more than that to a
matrix are let through. Fused experts (Qwen-MoE, GPT-OSS), transposes (GPT-2) and merged qkv (Bloom) are refused.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from halfbyte.errors import HeaderError, SourceError
from halfbyte.format.gguf_config import complete_config
from halfbyte.format.gguf_header import GgufHeader, GgufTensor

if TYPE_CHECKING:
    import numpy as np

#: transformers' processors that move rows of matrices and change values of vectors, nothing else
PROCESSORS = ("TensorProcessor", "LlamaTensorProcessor", "Gemma2TensorProcessor", "NemotronTensorProcessor")
USE_SOURCE = "give the Hugging Face checkpoint that this GGUF was made from"


@dataclass(frozen=True)
class MappedTensor:
    """One parameter of the transformers model and where the GGUF keeps it.

    name       transformers' name
    stored     the GGUF tensor
    row_order  int64 [rows]: row i of the parameter is row row_order[i] of the stored matrix; None: as stored
    """

    name: str
    stored: GgufTensor
    row_order: np.ndarray | None


@dataclass(frozen=True)
class GgufPicture:
    """The Hugging Face checkpoint that a GGUF stands for.

    config     for config.json
    tensors    by offset in the file
    processor  transformers' tensor processor; vectors go through it when they are read
    skipped    GGUF tensors that the transformers model has no place for
    notes      what of the file's metadata the picture cannot carry, one sentence each
    """

    config: dict[str, Any]
    tensors: tuple[MappedTensor, ...]
    processor: Any
    skipped: list[str]
    notes: list[str] = field(default_factory=list)


def draw_picture(header: GgufHeader) -> GgufPicture:
    """Map a GGUF to the transformers model that it holds. Reads metadata only; builds the model on the meta device.

    raises SourceError if transformers does not know the architecture or it is stored in a way this version cannot
           slice; HeaderError if tensors are missing or have other shapes than the metadata says
    """
    architecture = header.metadata["general.architecture"]
    blocks = header.metadata.get(f"{architecture}.block_count")
    if type(blocks) is not int or not 0 < blocks <= len(header.tensors):
        raise HeaderError(
            f"{architecture}.block_count is {blocks!r} in a file of {len(header.tensors)} tensors",
            where=str(header.path),
            todo=USE_SOURCE,
        )
    parsed, notes = _parse_config(header)
    processor = _processor(header, parsed)
    model, config = _meta_model(header, parsed)
    names = _name_map(header, model, processor)
    tensors = tuple(_map_tensor(header, t, names[t.name], processor) for t in header.tensors if t.name in names)
    _check_complete(header, model, tensors)
    skipped = [t.name for t in header.tensors if t.name not in names]
    return GgufPicture(config, tensors, processor, skipped, notes + _note_skipped(skipped))


def _parse_config(header: GgufHeader) -> tuple[dict[str, Any], list[str]]:
    """Config arguments from the metadata, and notes; the header is checked, so that reader has nothing to trip on."""
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    try:
        parsed, notes = complete_config(header, load_gguf_checkpoint(str(header.path))["config"])
    except Exception as error:  # a third party's parser: KeyError, IndexError, ValueError, ... all mean the same here
        raise _unreadable(header, error) from error
    parsed.pop("_model_name_or_path", None)
    return parsed, notes


def _processor(header: GgufHeader, parsed: dict[str, Any]) -> Any:
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

    kind = TENSOR_PROCESSORS.get(header.metadata["general.architecture"], TensorProcessor)
    if kind.__name__ not in PROCESSORS:
        raise SourceError(
            f"architecture {header.metadata['general.architecture']!r} is stored fused or transposed: not read here",
            where=str(header.path),
            todo=USE_SOURCE,
        )
    return kind(config=parsed)


def _meta_model(header: GgufHeader, parsed: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The model without weights, and its complete config.json."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.for_model(**parsed)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # config classes and models raise what they like on values that do not fit together
        raise _unreadable(header, error) from error
    body = {key: value for key, value in config.to_diff_dict().items() if not key.startswith("_")}
    body |= {"architectures": [type(model).__name__], "model_type": config.model_type, "dtype": "bfloat16"}
    body["tie_word_embeddings"] = bool(parsed["tie_word_embeddings"])
    if "global_head_dim" in parsed:
        # transformers 5.23 saves Gemma 4's full layers as `per_layer_config`, which 5.10 does not read; both read these
        body.pop("per_layer_config", None)
        body |= {key: parsed[key] for key in ("global_head_dim", "num_global_key_value_heads")}
    return model, body


def _name_map(header: GgufHeader, model: Any, processor: Any) -> dict[str, str]:
    import gguf
    from transformers.modeling_gguf_pytorch_utils import get_gguf_hf_weights_map

    # transformers asks for the same table of names once a module (16 ms each, 397 modules in SmolLM2): answer once
    build = gguf.get_tensor_name_map
    gguf.get_tensor_name_map = functools.cache(build)
    try:
        names: dict[str, str] = get_gguf_hf_weights_map(model, processor)
    except Exception as error:  # an architecture that the installed gguf package does not name
        raise _unreadable(header, error) from error
    finally:
        gguf.get_tensor_name_map = build
    # a parameter without a `.weight` of its own (Gemma 4's layer_scalar) gets one from llama.cpp; transformers' map
    # does not, and would leave it at its initial value without a word
    bare = {f"{stored}.weight": name for stored, name in names.items() if not stored.endswith((".weight", ".bias"))}
    return {**bare, **names}


def _map_tensor(header: GgufHeader, stored: GgufTensor, name: str, processor: Any) -> MappedTensor:
    """The parameter a stored tensor becomes, with its rows in the model's order."""
    import numpy as np

    if len(stored.shape) == 1:
        return MappedTensor(name, stored, None)
    rows = np.arange(stored.shape[0], dtype=np.int64).reshape(-1, *[1] * (len(stored.shape) - 1))
    try:
        order = processor.process(rows, stored.name).weights
    except Exception as error:  # heads that do not divide the rows, say: the metadata contradicts the tensor
        raise HeaderError(
            f"cannot undo llama.cpp's layout of shape {list(stored.shape)}: {error}",
            where=f"{header.path}, tensor {stored.name!r}",
            todo=USE_SOURCE,
        ) from error
    flat = order.reshape(-1)
    if order.shape != rows.shape or not np.array_equal(np.sort(flat), rows.reshape(-1)):
        raise SourceError(
            "llama.cpp changed this matrix in a way that is not a reordering of its rows",
            where=f"{header.path}, tensor {stored.name!r}",
            todo=USE_SOURCE,
        )
    return MappedTensor(name, stored, None if np.array_equal(flat, rows.reshape(-1)) else flat)


def _check_complete(header: GgufHeader, model: Any, tensors: tuple[MappedTensor, ...]) -> None:
    """Every parameter and persistent buffer has its tensor, once and of its shape; tied ones may share one.

    transformers itself only warns here and goes on with random weights.
    """
    expected = model.state_dict(keep_vars=True)
    found: dict[str, MappedTensor] = {}
    for tensor in tensors:
        where = f"{header.path}, tensor {tensor.stored.name!r}"
        if tensor.name in found:
            raise SourceError(
                f"{found[tensor.name].stored.name!r} is part of {tensor.name!r} too: parts are not joined here",
                where=where,
                todo=USE_SOURCE,
            )
        found[tensor.name] = tensor
        shape = tuple(expected[tensor.name].shape)
        if shape != tensor.stored.shape:
            raise HeaderError(
                f"shape {list(tensor.stored.shape)}; the metadata makes it {list(shape)} ({tensor.name})",
                where=where,
                todo=USE_SOURCE,
            )
    present = {id(expected[name]) for name in found}
    missing = [name for name, value in expected.items() if id(value) not in present]
    if missing:
        raise HeaderError(
            f"{len(missing)} of the model's {len(expected)} tensors are not in the file, first {missing[0]!r}",
            where=str(header.path),
            todo=f"is it a mixture of experts or a part of a model? If so {USE_SOURCE}",
        )


def _note_skipped(skipped: list[str]) -> list[str]:
    if not skipped:
        return []
    listed = ", ".join(skipped[:8]) + (", ..." if len(skipped) > 8 else "")
    return [f"{len(skipped)} GGUF tensors have no place in the transformers model: {listed}"]


def _unreadable(header: GgufHeader, error: Exception) -> SourceError:
    return SourceError(
        f"transformers cannot read this GGUF of architecture {header.metadata['general.architecture']!r}: "
        f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}".rstrip(": "),
        where=str(header.path),
        todo=USE_SOURCE,
    )
