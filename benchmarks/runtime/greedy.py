"""Does our decode loop give the tokens of stock transformers and bitsandbytes, greedily?

    python benchmarks/runtime/greedy.py CHECKPOINT --prompts prompts.jsonl --results greedy.jsonl      a GPU; 20 prompts of 256 tokens: 2 to 5 minutes
    the same again                                                                             goes on where it was cut off
    python benchmarks/runtime/greedy.py SRC.gguf --prompts prompts.jsonl --limit 2 --max-new-tokens 8 --device cpu

CHECKPOINT is one in NF4, or a source that is quantized first. Each prompt (a line {"prompt"}) goes through the chat template and is answered three
times: by ours (`halfbyte.load`, `halfbyte.runtime.decode`), by ours with 7 drafts a step from prompt lookup, and by stock `generate` (bitsandbytes'
linears, transformers' own attention and cache). One prompt at a time, no stop but the model's own; only stock is stopped at the first token that is not
ours, because nothing behind it is compared, and it is the slow one (20 tokens/s on SmolLM2, whatever the GPU). No batches: padding changes the sums.

Prompts --first to --first + --limit are asked. With --results each answer is a line of that file as soon as it is there, and prompts that are in it are not
asked again; the figures at the end are of all lines in it that belong to this checkpoint, device and length. --seconds ends a call in time.

bf16 logits tie: at one position in sixteen the two largest are equal to the last bit, and who sums in another order picks the other. So where texts part,
the gap is shown that each of the two sees between the two tokens, behind the same prefix, and in units of the last place of bf16 at that size:
a part at a gap of a few units is a tie, anything else is a fault. Drafts must change nothing at all. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from loaded import checkpoint_of, equal_to, unit_at

from halfbyte.errors import run_script
from halfbyte.records import versions
from halfbyte.runtime.decode.loop import Decoder
from halfbyte.runtime.generate import Chat
from halfbyte.runtime.loading.checkpoint import pick_device

DRAFTS = 7


def by_stock(chat: Chat, inputs: Any, count: int, ours: list[int]) -> list[int]:
    """Stock's tokens, up to the first that is not ours."""
    start = inputs["input_ids"].shape[1]

    def parted(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        place = ids.shape[1] - start - 1
        stop = place >= len(ours) or int(ids[0, -1]) != ours[place]
        return torch.tensor([stop], device=ids.device)

    with torch.inference_mode():
        out = chat.model.generate(
            **inputs, max_new_tokens=count, do_sample=False, temperature=None, top_p=None, top_k=None, stopping_criteria=[parted],
        )  # fmt: skip
    return list(out[0, start:].tolist())


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
    return float(logits[pair[0]] - logits[pair[1]]), unit_at(size)


class Asker:
    """Stock and ours, with a decoder that is long enough."""

    def __init__(self, folder: Path, device: str) -> None:
        self.stock, self.ours = Chat(folder, device, fast=False), Chat(folder, device, fast=True)
        self.decoder: Decoder | None = None

    def row(self, prompt: str, count: int) -> dict[str, Any]:
        """One prompt, answered three times and compared."""
        inputs = self.stock.inputs(prompt, ())
        decoder = self.decoder_for(inputs["input_ids"].shape[1] + count)
        seconds = {}

        def timed(name: str, answer: Callable[[], list[int]]) -> list[int]:
            begin = time.perf_counter()
            tokens = answer()
            seconds[name] = round(time.perf_counter() - begin, 3)
            return tokens

        b = timed("ours", lambda: by_loop(decoder, inputs, count, 0))
        c = timed("ours, drafts", lambda: by_loop(decoder, inputs, count, DRAFTS))
        accepted, drafted = decoder.report["accepted"], decoder.report["drafted"]
        a = timed("stock", lambda: by_stock(self.stock, inputs, count, b))
        same = equal_to(a, b)
        row: dict[str, Any] = {
            "stock": len(a), "ours": len(b), "equal_to": same, "equal": a == b, "drafts_equal": b == c, "accepted": accepted, "drafted": drafted,
            "seconds": seconds,
        }  # fmt: skip
        if a != b and same < min(len(a), len(b)):
            for who, chat in (("stock", self.stock), ("ours", self.ours)):
                gap, unit = gap_of(chat, inputs, a[:same], (a[same], b[same]))
                row |= {f"gap_{who}": round(gap, 5), f"units_{who}": round(gap / unit, 2)}
        return row

    def decoder_for(self, room: int) -> Decoder:
        """The last one, or a longer one."""
        if self.decoder is None or self.decoder.capacity < room:
            self.decoder = Decoder(self.ours.model, 1, max(1024, room))
            self.decoder.prepare()
            self.decoder.prepare(DRAFTS)
        return self.decoder


def kept_rows(file: Path | None, belongs: dict[str, Any]) -> list[dict[str, Any]]:
    """Lines of the results that belong to this run; a last line that was cut off is none."""
    found = []
    for line in file.read_text(encoding="utf-8").splitlines() if file is not None and file.is_file() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if row.items() >= belongs.items():
            found.append(row)
    return found


def keep(file: Path, row: dict[str, Any]) -> None:
    """Add a line, behind one that was cut off too."""
    with file.open("ab+") as lines:
        if lines.tell():
            lines.seek(-1, 2)
            lines.write(b"" if lines.read() == b"\n" else b"\n")
        lines.write(json.dumps(row).encode() + b"\n")


def run(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    begin, count = time.perf_counter(), options.max_new_tokens
    device = pick_device(options.device)
    name = torch.cuda.get_device_name() if device != "cpu" else "CPU"
    belongs = {"checkpoint": str(options.checkpoint), "device": name, "max_new_tokens": count, "versions": versions()}
    lines = [line for line in options.prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
    prompts = {i: json.loads(line)["prompt"] for i, line in enumerate(lines)}
    rows = kept_rows(options.results, belongs)
    done = {row["prompt"] for row in rows}
    asked = [i for i in range(options.first, min(options.first + options.limit, len(prompts))) if i not in done]
    print(f"{len(asked)} prompts to ask, {len(rows)} in the results already", flush=True)
    asker, longest = Asker(checkpoint_of(options.checkpoint, scratch), device) if asked else None, 0.0
    for i in asked if asker is not None else []:
        start = time.perf_counter()
        if start - begin + 1.2 * longest > options.seconds:
            print(f"stopped before prompt {i}: --seconds {options.seconds:g}", flush=True)
            break
        row = {"prompt": i, **asker.row(prompts[i], count)}
        longest = max(longest, time.perf_counter() - start)
        rows.append(row | belongs)
        print(f"{time.perf_counter() - begin:6.0f} s {row}", flush=True)
        if options.results is not None:
            keep(options.results, rows[-1])
    return summary(rows) | belongs


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures of all rows."""
    gaps = [abs(row["units_stock"]) for row in rows if "units_stock" in row]
    drafted = sum(row["drafted"] for row in rows)
    rates = {}
    for name, tokens in (("stock", "stock"), ("ours", "ours"), ("ours, drafts", "ours")):
        spent = sum(row["seconds"][name] for row in rows)
        rates[name] = round(sum(row[tokens] for row in rows) / spent, 1) if spent else None
    return {
        "benchmark": "greedy", "prompts": len(rows), "tokens": sum(row["ours"] for row in rows), "tokens_compared": sum(row["equal_to"] for row in rows),
        "equal": sum(row["equal"] for row in rows), "drafts_equal": sum(row["drafts_equal"] for row in rows), "parted": len(gaps),
        "largest_gap_in_units_of_bf16": max(gaps, default=None), "acceptance": round(sum(row["accepted"] for row in rows) / drafted, 4) if drafted else None,
        "tokens_per_s": rates,
        "rows": [{key: value for key, value in row.items() if key not in ("checkpoint", "device", "versions")} for row in rows],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", type=Path, help="an NF4 folder, or a source to be quantized first")
    parser.add_argument("--prompts", type=Path, required=True, help="JSON lines with a prompt each")
    parser.add_argument("--first", type=int, default=0, help="number of the first prompt")
    parser.add_argument("--limit", type=int, default=20, help="how many prompts")
    parser.add_argument(
        "--results", type=Path, help="JSON lines: what is in it is not asked again, what is new is added"
    )
    parser.add_argument("--seconds", type=float, default=280.0, help="start no prompt that may end later than this")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda[:N]")
    with tempfile.TemporaryDirectory() as scratch:
        print(json.dumps(run(parser.parse_args(), Path(scratch))))


if __name__ == "__main__":
    run_script(main)
