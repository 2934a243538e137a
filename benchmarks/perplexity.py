"""Perplexity of SmolLM2-135M-Instruct before and after NF4, side by side, in one arithmetic.

Protocol: WikiText-2 test, detokenized by the rules lm-eval uses, tokenized as one text without special tokens, cut into
consecutive windows of 512 tokens; every window is scored alone, from --first on: 256 (llama.cpp's habit, the default: every scored
token has at least 256 tokens before it) or 1 (everything but the first). All
candidates run in float32 through the same model object, only the weights are exchanged: the GGUF dequantized, the same
rounded to bf16 (what NF4 is made from), and NF4 dequantized by bitsandbytes itself. The interval is paired by window.

This is raw text through an instruct model: a check of the arithmetic against a known figure (19.9 and 24.8), not a
verdict on quality.

    uv run python benchmarks/perplexity.py --text wiki.test.raw [--windows 10]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import re
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

import halfbyte
from halfbyte.demo.smollm2 import smollm2_gguf
from halfbyte.records import versions

WINDOW = 512


def detokenize(text: str) -> str:
    """WikiText's tokenized text as it was written (rules in the order lm-eval applies them)."""
    text = text.replace("s '", "s'")
    text = re.sub(r"/' [0-9]/", r"/'[0-9]/", text)
    for joined, plain in ((" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", ".")):
        text = text.replace(joined, plain)
    for mark in ":;.!?,":
        text = text.replace(f" {mark} ", f"{mark} ")
    for begin, end in (("(", ")"), ("[", "]"), ("{", "}"), ('"', '"'), ("'", "'")):
        text = re.sub(
            rf"{re.escape(begin)}\s*([^{re.escape(begin + end)}]*?)\s*{re.escape(end)}", rf"{begin}\1{end}", text
        )
    for spaced, close in (("= = = =", "===="), ("= = =", "==="), ("= =", "=="), (f" {chr(176)} ", chr(176))):
        text = text.replace(spaced, close)
    return text.replace(" \n", "\n").replace("\n ", "\n").replace(" N ", " 1 ").replace(" 's", "'s")


@torch.inference_mode()
def window_losses(model: Any, ids: torch.Tensor, windows: int, first: int) -> list[float]:
    """Mean negative log-likelihood (nats) of each window's tokens from position `first` on."""
    losses = []
    for index in range(windows):
        row = ids[index * WINDOW : (index + 1) * WINDOW][None]
        logits = model(input_ids=row).logits[0, first - 1 : -1].double()
        losses.append(torch.nn.functional.cross_entropy(logits, row[0, first:]).item())
    return losses


def load_nf4_weights(model: Any, folder: Path) -> int:
    """Put the checkpoint's NF4 weights, dequantized by bitsandbytes, into `model`; returns how many."""
    import bitsandbytes
    from transformers import AutoModelForCausalLM

    stock = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    count = 0
    for name, module in stock.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            state = module.weight.quant_state
            state.dtype = torch.float32
            weight = bitsandbytes.functional.dequantize_4bit(module.weight.data, state)
            model.get_submodule(name).weight.copy_(weight)
            count += 1
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=10)
    parser.add_argument("--first", type=int, default=WINDOW // 2, help="first scored position in a window")
    options = parser.parse_args()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    gguf = smollm2_gguf()
    assert gguf is not None, "install the dependency group `real`"
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32).eval()
    with tempfile.TemporaryDirectory() as folder:
        halfbyte.quantize(gguf, folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        text = detokenize(options.text.read_text(encoding="utf-8"))
        ids = torch.tensor(tokenizer(text[:200_000], add_special_tokens=False)["input_ids"])
        rows = {"source, GGUF in fp32": window_losses(model, ids, options.windows, options.first)}
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(parameter.to(torch.bfloat16))
            rows["source rounded to bf16"] = window_losses(model, ids, options.windows, options.first)
            replaced = load_nf4_weights(model, Path(folder))
        rows["NF4"] = window_losses(model, ids, options.windows, options.first)
    base = rows["source, GGUF in fp32"]
    report: dict[str, Any] = {}
    for name, losses in rows.items():
        deltas = [a - b for a, b in zip(losses, base, strict=True)]
        error = statistics.stdev(deltas) / math.sqrt(len(deltas)) if len(deltas) > 1 else None
        perplexity = math.exp(statistics.mean(losses))
        report[name] = {"perplexity": perplexity, "delta_nll": statistics.mean(deltas), "standard_error": error}
        print(
            f"{name:24} {perplexity:8.3f}   delta NLL {statistics.mean(deltas):+.4f} (paired s.e. {error or 0:.4f} over {len(deltas)} windows)"
        )
    print(
        json.dumps(
            {
                "benchmark": "perplexity", "protocol": f"ppl[raw,512,first={options.first}]", "tokens_scored": options.windows * (WINDOW - options.first),
                "tokens": options.windows * WINDOW, "nf4_weights": replaced, "rows": report,
                "text_sha256": hashlib.sha256(options.text.read_bytes()).hexdigest(), "versions": versions(),
            }
        )
    )  # fmt: skip


if __name__ == "__main__":
    main()
