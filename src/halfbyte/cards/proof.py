"""What is known about it: verification, error, answers, and the list of what nobody measured.

The error of a tensor is its signal-to-quantization-noise ratio, SQNR = 10 log10(sum w^2 / sum (w - w')^2) dB: 20 dB
means a relative error of a tenth. NF4 on Gaussian weights gives about 20.7 dB whatever the model, so it is a check of the
arithmetic and says little about answers.
"""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median
from typing import Any

from halfbyte.cards.evidence import Evidence
from halfbyte.cards.markdown import Markdown, code, count, decimal, fence, joined, table, text
from halfbyte.recipe.decisions import AREAS

_MARKS = {"passed": "passed", "failed": "**FAILED**", "skipped": "skipped"}


def verdict(evidence: Evidence) -> Markdown:
    """One sentence that a reader may quote: verified, failed or not verified."""
    if evidence.verify is None:
        return Markdown("**Not verified**: `halfbyte verify` has not been run on these weights.")
    checks = evidence.verify["checks"]
    tally = {status: sum(check["status"] == status for check in checks) for status in _MARKS}
    if tally["failed"]:
        names = joined([check["title"] for check in evidence.failed_checks], "; ")
        return Markdown(
            f"**Verification FAILED** in {tally['failed']} of {len(checks)} checks: {names}. Do not use this checkpoint."
        )
    skipped = f", {tally['skipped']} skipped (named below)" if tally["skipped"] else ""
    against = evidence.verify.get("with_source")
    how = "against the source, tensor by tensor" if against else "without the source at hand, against recorded hashes"
    return Markdown(f"Verified {how}: {tally['passed']} checks passed, none failed{skipped}.")


def check_table(verify: Mapping[str, Any]) -> Markdown:
    """Every check with its verdict."""
    rows = [(c["id"], c["title"], Markdown(_MARKS[c["status"]]), c["detail"]) for c in verify["checks"]]
    return table(["", "Check", "Verdict", "Finding"], rows)


def error_table(evidence: Evidence) -> Markdown | None:
    """SQNR of the NF4 tensors by area: count, min, median, max; None if it was not measured."""
    areas = {decision["name"]: decision["area"] for decision in (evidence.plan or {}).get("decisions", [])}
    found: dict[str, list[float]] = {}
    for row in (evidence.verify or {}).get("tensors", []):
        if row.get("sqnr_db") is not None:
            found.setdefault(areas.get(row["name"], "other"), []).append(row["sqnr_db"])
    rows = [
        (area, count(len(values)), *(decimal(figure(values)) for figure in (min, median, max)))
        for area, values in sorted(
            found.items(), key=lambda item: AREAS.index(item[0]) if item[0] in AREAS else len(AREAS)
        )
    ]
    return table(["Area", "NF4 tensors:", "SQNR min, dB:", "median:", "max:"], rows) if rows else None


def answers(evidence: Evidence) -> list[dict[str, Any]]:
    """Prompts with the answers word for word: {prompt, block, figures}; empty if nobody asked."""
    return [
        {
            "prompt": answer["prompt"],
            "image": bool(answer.get("image")),
            "block": fence(answer["answer"]),
            "tokens": count(answer.get("tokens")),
            "rate": decimal(answer.get("tokens_per_second"), 1),
        }
        for answer in _asked(evidence)
    ]


def _asked(evidence: Evidence) -> list[dict[str, Any]]:
    for record in (evidence.generate or {}, (evidence.verify or {}).get("stock", {})):
        if record.get("answers"):
            found: list[dict[str, Any]] = record["answers"]
            return found
    return []


def answer_setting(evidence: Evidence) -> Markdown | None:
    """Where the answers were made: device and versions."""
    for record in (evidence.generate or {}, evidence.verify or {}):
        report = record if record.get("answers") else record.get("stock", {})
        if report.get("answers"):
            versions = record.get("versions", {})
            parts: list[Any] = [code(report["device"])] if report.get("device") else []
            parts += [
                text(f"{name} {versions[name]}")
                for name in ("transformers", "bitsandbytes", "torch")
                if name in versions
            ]
            return joined(parts) if parts else None
    return None


def fidelity_table(evidence: Evidence) -> Markdown | None:
    """Every figure of the evaluate records with its interval and n; None if there is none."""
    rows = []
    for record in evidence.evaluations.values():
        for result in record["results"]:
            interval = f"{result['low']:g} to {result['high']:g}"
            rows.append(
                (
                    code(result["metric"]),
                    f"{result['value']:g}",
                    interval,
                    count(result["n"]),
                    result["unit"],
                    result["dataset"]["name"],
                )
            )
    return table(["Metric", "Value:", "95 % interval:", "n:", "Unit", "Data"], rows) if rows else None


def not_measured(evidence: Evidence, *, has_images: bool) -> list[Any]:
    """What a reader might take for granted and no record shows."""
    asked = _asked(evidence)
    missing: list[Any] = []
    if not evidence.evaluations:
        missing.append(
            "Quality against the source: no KL divergence, perplexity or task score exists for these weights."
        )
    if evidence.verify is None:
        missing.append("Whether the files are what the plan says: `halfbyte verify` has not been run.")
    elif error_table(evidence) is None:
        missing.append("Error per tensor: the source was not at hand when the checkpoint was verified.")
    for check in (evidence.verify or {}).get("checks", []):
        if check["status"] == "skipped":
            missing.append(joined([Markdown("Check skipped"), check["title"], check["detail"]], ": "))
    if not asked:
        missing.append("Answers: nobody has asked this checkpoint anything.")
    elif has_images and not any(answer.get("image") for answer in asked):
        missing.append("Answers about images.")
    missing.append("GPU memory and speed in use: the figures for the GPU above are computed from shapes, not observed.")
    missing.append("Long contexts, other languages, safety behaviour.")
    return missing
