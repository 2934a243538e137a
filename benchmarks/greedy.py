"""Does our decode loop give the tokens of stock transformers and bitsandbytes, greedily?

    python benchmarks/greedy.py CHECKPOINT --prompts prompts.jsonl            a GPU; minutes for 20 prompts of 256 tokens
    python benchmarks/greedy.py SRC.gguf --prompts prompts.jsonl --limit 2 --max-new-tokens 8 --device cpu

CHECKPOINT is one in NF4, or a source that is quantized first. Each prompt (a line {"prompt"}) goes through the chat template and is answered three
times: by stock `generate` (bitsandbytes' linears, transformers' own attention and cache), by ours (`halfbyte.load`, `halfbyte.runtime.decode`), and by
ours with 7 drafts a step from prompt lookup. One prompt at a time, no stop but the model's own.

bf16 logits tie: at one position in sixteen the two largest are equal to the last bit, and who sums in another order picks the other. So where texts part,
the gap is shown that each of the two sees between the two tokens, behind the same prefix, and in units of the last place of bf16 at that size:
a part at a gap of a few units is a tie, anything else is a fault. Drafts must change nothing at all. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

import halfbyte
from halfbyte.errors import HalfbyteError
from halfbyte.format.checkpoint import read_config
from halfbyte.records import versions
from halfbyte.runtime.decode.loop import Decoder
from halfbyte.runtime.generate import Chat

DRAFTS = 7


def checkpoint_of(source: Path, scratch: Path) -> Path:
    """The NF4 checkpoint, written first if `source` is none."""
    if source.is_dir() and read_config(source).get("quantization_config"):
        return source
    halfbyte.quantize(source, scratch / "nf4")
    return scratch / "nf4"


def by_stock(chat: Chat, inputs: Any, count: int) -> list[int]:
    with torch.inference_mode():
        out = chat.model.generate(
            **inputs, max_new_tokens=count, do_sample=False, temperature=None, top_p=None, top_k=None
        )
    return list(out[0, inputs["input_ids"].shape[1] :].tolist())


def by_loop(decoder: Decoder, inputs: Any, count: int, drafts: int) -> list[int]:
    return [token for new in decoder.tokens(dict(inputs), count, speculate=drafts) for token in new[0]]


def gap_of(chat: Chat, inputs: Any, prefix: list[int], pair: tuple[int, int]) -> tuple[float, float]:
    """Logit of the first of the pair minus that of the second behind prompt and prefix, and the unit of the last place there."""
    ids = torch.cat(
        [inputs["input_ids"], torch.tensor([prefix], dtype=torch.int64, device=inputs["input_ids"].device)], dim=1
    )
    with torch.inference_mode():
        logits = chat.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -1].float()
    size = float(logits[list(pair)].abs().max())
    return float(logits[pair[0]] - logits[pair[1]]), 2.0 ** (math.floor(math.log2(max(size, 1e-9))) - 7)


def run(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    folder = checkpoint_of(options.checkpoint, scratch)
    prompts = [
        json.loads(line)["prompt"] for line in options.prompts.read_text(encoding="utf-8").splitlines() if line.strip()
    ]
    stock, ours = Chat(folder, options.device, fast=False), Chat(folder, options.device, fast=True)
    print(f"ours: {ours.model.halfbyte.summary()}")
    rows, seconds = [], {"stock": 0.0, "ours": 0.0, "ours, drafts": 0.0}
    decoder, accepted, drafted = None, 0, 0
    for number, prompt in enumerate(prompts[: options.limit]):
        inputs = stock.inputs(prompt, ())
        room = inputs["input_ids"].shape[1] + options.max_new_tokens
        if decoder is None or decoder.capacity < room:
            decoder = Decoder(ours.model, 1, max(1024, room))
            decoder.prepare()
            decoder.prepare(DRAFTS)
        found: dict[str, list[int]] = {}
        ways = {
            "stock": partial(by_stock, stock),
            "ours": partial(by_loop, decoder, drafts=0),
            "ours, drafts": partial(by_loop, decoder, drafts=DRAFTS),
        }
        for name, answer in ways.items():
            start = time.perf_counter()
            found[name] = answer(inputs, options.max_new_tokens)
            seconds[name] += time.perf_counter() - start
        accepted, drafted = accepted + decoder.report["accepted"], drafted + decoder.report["drafted"]
        a, b = found["stock"], found["ours"]
        same = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
        row: dict[str, Any] = {
            "prompt": number,
            "stock": len(a),
            "ours": len(b),
            "equal_to": same,
            "equal": a == b,
            "drafts_equal": b == found["ours, drafts"],
        }
        if a != b and same < min(len(a), len(b)):
            pair = (a[same], b[same])
            for who, chat in (("stock", stock), ("ours", ours)):
                gap, unit = gap_of(chat, inputs, a[:same], pair)
                row |= {f"gap_{who}": round(gap, 5), f"units_{who}": round(gap / unit, 2)}
        rows.append(row)
        print(row)
    tokens = sum(row["ours"] for row in rows)
    gaps = [abs(row["units_stock"]) for row in rows if "units_stock" in row]
    return {
        "benchmark": "greedy", "checkpoint": str(options.checkpoint), "device": torch.cuda.get_device_name() if ours.device != "cpu" else "CPU",
        "prompts": len(rows), "tokens": tokens, "equal": sum(row["equal"] for row in rows), "drafts_equal": sum(row["drafts_equal"] for row in rows),
        "parted": len(gaps), "largest_gap_in_units_of_bf16": max(gaps, default=None), "acceptance": round(accepted / drafted, 4) if drafted else None,
        "tokens_per_s": {name: round(tokens / spent, 1) for name, spent in seconds.items() if spent}, "versions": versions(), "rows": rows,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", type=Path, help="an NF4 folder, or a source to be quantized first")
    parser.add_argument("--prompts", type=Path, required=True, help="JSON lines with a prompt each")
    parser.add_argument("--limit", type=int, default=20)
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda[:N]")
    with tempfile.TemporaryDirectory() as scratch:
        print(json.dumps(run(parser.parse_args(), Path(scratch))))


if __name__ == "__main__":
    try:
        main()
    except HalfbyteError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
