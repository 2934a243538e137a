"""Licence and origin reach the record from both kinds of source, and a hostile card says nothing."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from halfbyte.format.checkpoint import open_source


@pytest.mark.parametrize(
    ("card", "says"),
    [
        (
            "---\nlicense: gemma\nbase_model: google/x\nevil: 1\n---\n# t",
            {"license": "gemma", "base_model": "google/x"},
        ),
        ("no front matter", {}),
        ("---\n!!python/object/apply:os.system ['true']\n---\n", {}),
        ("---\n- a\n- b\n---\n", {}),
    ],
)
def test_a_model_card_s_yaml_is_read_as_data(
    tiny_gemma4: Path, tmp_path: Path, card: str, says: dict[str, str]
) -> None:
    folder = shutil.copytree(tiny_gemma4, tmp_path / "source")
    (folder / "README.md").write_text(card)
    source = open_source(folder)
    assert source.lineage() == says
    assert source.left_behind() == ["README.md"]


@pytest.mark.real
def test_a_gguf_names_its_licence(smollm2: Path) -> None:
    assert open_source(smollm2).lineage()["license"] == "apache-2.0"
