"""A model small enough to train in a second, and something to train it on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from halfbyte.demo import write_tiny_gemma4


@pytest.fixture(scope="session")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gemma4(tmp_path_factory.mktemp("student") / "tiny", layers=2)


@pytest.fixture(scope="session")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    lines = [{"prompt": f"What is {n} and one?", "response": f"It is {n + 1}, of course."} for n in range(12)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path
