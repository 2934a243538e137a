"""The main job on the embedded pair, start to end, in a minute or two on two cores: plan, quantize, verify, evaluate, card.

Two bases and two precisions make the only table that can tell what quantization cost from what training did: vanilla and QAT,
bf16 and NF4, on the same held-out questions, text and pictures, with intervals. What it shows is what was measured here, on a
model of five million weights; a 31B has to be measured by itself.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from halfbyte.cards import card
from halfbyte.cards.report import report
from halfbyte.cards.report.words import interval
from halfbyte.demo.embedded import NAMES, embedded
from halfbyte.demo.exam import write_exam
from halfbyte.errors import CheckFailed
from halfbyte.evaluator.job import evaluate
from halfbyte.evaluator.job.settings import ON_POLICY
from halfbyte.quantizer.job import quantize
from halfbyte.recipe.survey import plan
from halfbyte.texts.protocols import IMAGE
from halfbyte.verifier import sentences, verify

TEXTS, PICTURES = 180, 100


def tour(out: str | Path, *, say: Callable[[str], None] = print) -> dict[str, Any]:
    """The main job for both models under `out`; returns {"models", "table", "evaluation", "card"}.

    say  called with each line a person should read
    raises CheckFailed if verification fails
    """
    out = Path(out)
    sources = {name: out / "source" / name for name in NAMES}
    for name, source in sources.items():
        if not (source / "config.json").is_file():
            shutil.copytree(embedded(name), source, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    models = {name: _main_job(name, source, out / f"{name}-NF4", say) for name, source in sources.items()}
    record = _evaluate(sources, out)
    for model in models.values():
        model["card"] = str(card(model["out"]))  # last: it prints what was measured
    rows = table_of(record)
    say(_lines(rows, record))
    say(f"report: {report(out / 'evaluation')}")
    say(f"card: {models['vanilla']['card']}")
    return {"models": models, "table": rows, "evaluation": str(out / "evaluation"), "card": models["vanilla"]["card"]}


def _main_job(name: str, source: Path, out: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """plan -> quantize -> verify (with sanity prompts) for one model."""
    made = plan(source)
    modules = made.summary["modules"]
    say(f"{name}")
    say(f"  plan      {modules['nf4']} of {modules['linear']} linear modules become NF4")
    record = quantize(source, out)
    sizes = record["sizes"]
    say(
        f"  quantize  {sizes['source_bytes'] / 1e6:.1f} MB bf16 -> {sizes['output_bytes'] / 1e6:.1f} MB "
        f"in {record['run']['seconds']:.1f} s"
    )
    verified = verify(out, source=str(source))
    failures = sentences(verified)
    if failures:
        raise CheckFailed("\n".join(failures), where=str(out))
    passed = sum(check["status"] == "passed" for check in verified["checks"])
    say(f"  verify    {passed} checks passed")
    answers = verified["stock"]["answers"]
    for answer in answers:
        say(f"  ask       {answer['prompt']}\n  answer    {answer['answer'].strip()[:200]!r}")
    return {"out": str(out), "sizes": sizes, "checks_passed": passed, "answers": answers}


def _evaluate(sources: Mapping[str, Path], out: Path) -> dict[str, Any]:
    exam = write_exam(out / "exam", TEXTS, PICTURES)
    vanilla, qat = (str(sources[name]) for name in NAMES)
    return evaluate(
        vanilla, [str(out / "vanilla-NF4"), f"{vanilla}@q4_0", f"qat:{out / 'qat-NF4'}", f"qat:{qat}@q4_0"],
        base=[f"qat={qat}"], data=[exam], task=[f"questions={exam}"], out=out / "evaluation", device="cpu",
        max_new_tokens=32, batch=32,
    )  # fmt: skip


def table_of(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row a model: {"model", "precision", "text", "picture"} (right answers as {"value", "low", "high", "n"}) and, of what
    was rounded, "kld" per protocol (nats: value, low, high) against the bf16 of its own base.
    """
    rows = []
    klds = {
        (block["protocol"], each["candidate"]): next(f for f in each["figures"] if f["figure"] == "kld mean")
        for block in record["protocols"]
        for each in block["candidates"]
    }
    kinds = {each["id"]: each["kind"] for base in record["bases"] for each in base["candidates"]}
    for block in record["tasks"]:
        model = "vanilla" if block["base"] == "reference" else block["base"]
        rows.append({"model": model, "precision": "bf16", **_right(block["reference"]), "kld": {}})
        for each in block["candidates"]:
            kld = {
                name: klds[name, each["candidate"]] for name in (ON_POLICY, IMAGE) if (name, each["candidate"]) in klds
            }
            rows.append({"model": model, "precision": kinds[each["candidate"]], **_right(each), "kld": kld})
    return rows


def _right(found: Mapping[str, Any]) -> dict[str, Any]:
    """Shares of right answers of one model, by kind, with Wilson's intervals."""
    return {each["kind"]: {key: each[key] for key in ("value", "low", "high", "n")} for each in found["kinds"]}


def _lines(rows: list[dict[str, Any]], record: Mapping[str, Any]) -> str:
    n = {kind: rows[0][kind]["n"] for kind in ("text", "picture")}
    head = ("", f"text, n = {n['text']}", f"pictures, n = {n['picture']}", "KLD text, nats", "KLD pictures, nats")
    cells: list[tuple[str, ...]] = [head]
    for row in rows:
        right = [
            f"{row[kind]['value']:.1%} [{row[kind]['low']:.1%}, {row[kind]['high']:.1%}]"
            for kind in ("text", "picture")
        ]
        klds = [interval(row["kld"][name]) if name in row["kld"] else "-" for name in (ON_POLICY, IMAGE)]
        cells.append((f"{row['model']} {row['precision']}", *right, *klds))
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    lines += [
        "right answers to held-out questions; KLD from the bf16 of the same model, on its own answers; 95 % intervals"
    ]
    for effect in record["effects"]:
        if (effect["effect"], effect["metric"], effect["precision"]) == ("I", "kld mean", "NF4"):
            lines.append(
                f"does QAT for q4_0 help NF4? {effect['protocol']}: I = {interval(effect)} nats (below 0: it lost less than "
                f"vanilla); within {effect['margin']:g}: {effect['verdict']}"
            )
    return "\n".join(lines)
