"""A finished, verified checkpoint on paper for every test of this room."""

from __future__ import annotations

from pathlib import Path

import pytest
from cards.paper_checkpoint import write_checkpoint


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "tiny-nf4")
