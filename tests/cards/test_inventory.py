"""The account balances to the byte, or there is no card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from cards.paper_checkpoint import edit, on_disk, small_plan, write_checkpoint, write_shard

from halfbyte.cards.evidence import gather
from halfbyte.cards.inventory import Inventory, take_inventory
from halfbyte.errors import HeaderError, SourceError


def account(folder: Path) -> Inventory:
    evidence = gather(folder)
    return take_inventory(folder, evidence.quantize, evidence.plan)


def rewrite(folder: Path, sizes: dict[str, int]) -> None:
    """Replace the weights and let the record agree about the file's size, as a careless tool would."""
    write_shard(folder / "model.safetensors", sizes)
    size = (folder / "model.safetensors").stat().st_size
    edit(folder, "quantize", lambda body: body["files"]["model.safetensors"].update(bytes=size))


def test_areas_and_headers_add_up_to_the_files(checkpoint: Path) -> None:
    found = account(checkpoint)
    assert sum(area.output_bytes for area in found.areas) == 46_448
    assert (
        found.data_bytes + found.header_bytes == (checkpoint / "model.safetensors").stat().st_size == found.file_bytes
    )
    assert [(area.name, area.tensors, area.nf4) for area in found.areas] == [
        ("decoder", 2, 1),
        ("vision", 1, 0),
        ("embeddings", 1, 0),
    ]


def grown(name: str, by: int) -> dict[str, int]:
    sizes = on_disk(small_plan())
    sizes[name] += by
    return sizes


@pytest.mark.parametrize(
    ("sizes", "complaint"),
    [
        (grown("model.layers.0.mlp.up_proj.weight.absmax", 1), "by its plan"),
        (grown("model.embed_tokens.weight", -2), "by its plan"),
        ({**on_disk(small_plan()), "stray": 8}, "not in the plan"),
        ({k: v for k, v in on_disk(small_plan()).items() if "nested_absmax" not in k}, "planned, but not on disk"),
        (grown("model.layers.0.mlp.up_proj.weight.quant_state.bitsandbytes__nf4", 9), "the quantize record says"),
    ],
)
def test_what_the_plan_does_not_explain_is_an_error(checkpoint: Path, sizes: dict[str, int], complaint: str) -> None:
    rewrite(checkpoint, sizes)
    with pytest.raises(SourceError, match=complaint):
        account(checkpoint)


def test_bytes_behind_the_last_tensor_are_an_error(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m")
    with (folder / "model.safetensors").open("ab") as file:
        file.write(b"hidden")
    edit(
        folder,
        "quantize",
        lambda body: body["files"]["model.safetensors"].update(bytes=body["files"]["model.safetensors"]["bytes"] + 6),
    )
    with pytest.raises(SourceError, match="longer than its header says"):
        account(folder)


def test_summary_that_says_another_total_is_an_error(checkpoint: Path) -> None:
    edit(checkpoint, "plan", lambda body: body["summary"]["bytes"].update(file=46_448 + 25))
    with pytest.raises(SourceError, match="the plan's summary says"):
        account(checkpoint)


@pytest.mark.parametrize(
    "header", [b"\xff" * 8, (10).to_bytes(8, "little") + b"[1, 2, 3] ", (2).to_bytes(8, "little") + b"{]"]
)
def test_file_that_is_no_safetensors_is_an_error_not_a_traceback(checkpoint: Path, header: bytes) -> None:
    path = checkpoint / "model.safetensors"
    path.write_bytes(header)
    body: dict[str, Any] = {"files": {path.name: {}}, "sizes": {"output_bytes": 0}}
    with pytest.raises(HeaderError):
        take_inventory(checkpoint, body, None)
