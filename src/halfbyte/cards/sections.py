"""What was made: the values behind the first half of the card, one function a section.

Each takes the evidence and returns plain values, tables already as Markdown; the template holds the words around them. A
value that no record holds is None and is printed as "not measured". Two kinds of figure are kept apart in the words:
*measured* (file sizes, hashes, error, seconds) and *computed* from the plan (GPU bytes, cache, what fits).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from halfbyte.cards.evidence import Evidence
from halfbyte.cards.inventory import Area, Inventory
from halfbyte.cards.markdown import Markdown, code, count, decimal, gigabytes, joined, table

#: reasons spelled out per area and action; the rest is counted and named by file
_REASONS_SHOWN = 6


def modules_by_area(plan: Mapping[str, Any]) -> dict[str, dict[str, int]]:
    """area -> {linear, nf4}, as the plan counted the model's linear modules; empty if it did not."""
    found: dict[str, dict[str, int]] = plan.get("summary", {}).get("modules", {}).get("by_area", {})
    return found


def area_table(inventory: Inventory, plan: Mapping[str, Any]) -> Markdown:
    """Area by area: tensors, 4-bit modules of all linear modules, bytes before and after, and the reasons."""
    modules = modules_by_area(plan)
    known = {area.name: area for area in inventory.areas}
    # an area may have modules and no tensor of its own (a tied head)
    names = [*known, *(name for name in modules if name not in known)]
    rows = []
    for name in names:
        area = known.get(name, Area(name))
        linear = modules.get(name, {}).get("linear", area.nf4)
        four_bit = f"**{area.nf4}** of {linear}" if area.nf4 else f"0 of {linear}" if linear else "none"
        why = _reasons(area) if area.tensors else Markdown("no tensor of its own")
        cells = (name, count(area.tensors), Markdown(four_bit), count(area.source_bytes), count(area.output_bytes), why)
        rows.append(cells)
    total = [
        sum(getattr(area, key) for area in inventory.areas)
        for key in ("tensors", "nf4", "source_bytes", "output_bytes")
    ]
    linear = sum(row["linear"] for row in modules.values()) or total[1]
    bold = [
        Markdown(f"**{text}**")
        for text in ("all", f"{total[0]:,}", f"{total[1]} of {linear}", f"{total[2]:,}", f"{total[3]:,}")
    ]
    return table(
        ["Area", "Tensors:", "4-bit linears:", "Bytes before:", "Bytes after:", "What was done, and why"],
        [*rows, [*bold, ""]],
    )


def _reasons(area: Area) -> Markdown:
    ordered = sorted(area.reasons.items(), key=lambda item: (item[0][0] != "nf4", -item[1], item[0]))
    parts: list[Any] = []
    for (action, reason), number in ordered[:_REASONS_SHOWN]:
        label = "NF4" if action == "nf4" else "kept"
        parts.append(joined([Markdown(f"{number:,} {label}: "), reason], ""))
    if len(ordered) > _REASONS_SHOWN:
        parts.append(Markdown(f"{len(ordered) - _REASONS_SHOWN} more reasons in `halfbyte/plan.json`"))
    return joined(parts, "; ")


def balance(inventory: Inventory, plan: Mapping[str, Any]) -> dict[str, Any]:
    """The account in words: what the headers add, and how far the plan's one estimate was off."""
    foreseen = plan.get("summary", {}).get("bytes", {}).get("file")
    return {
        "data": count(inventory.data_bytes),
        "headers": count(inventory.header_bytes),
        "files": count(inventory.file_bytes),
        "states": count(inventory.state_bytes),
        "foreseen": count(foreseen),
        "off": f"{inventory.data_bytes - foreseen:+,}" if isinstance(foreseen, int) else None,
    }


def sizes_table(evidence: Evidence, inventory: Inventory) -> Markdown:
    """Sizes: measured ones from the files, computed ones from the plan's summary."""
    summary = (evidence.plan or {}).get("summary", {})
    sizes, cache, fit = evidence.quantize["sizes"], summary.get("kv_cache", {}), summary.get("fit", {})
    rows: list[tuple[str, Any, str]] = [
        ("Source tensors", gigabytes(sizes.get("source_bytes")), "measured"),
        (f"Weight files ({len(evidence.quantize['files'])})", gigabytes(inventory.file_bytes), "measured"),
        ("Bits per weight, all parameters", decimal(sizes.get("bits_per_weight"), 3), "measured"),
        ("Bits per weight, NF4 tensors only", decimal(summary.get("bits_per_weight_nf4"), 3), "computed"),
        ("Weights on the GPU", gigabytes(summary.get("bytes", {}).get("gpu")), "computed"),
    ]
    for tokens, size in cache.get("at", {}).items():
        rows.append((f"Key/value cache at {int(tokens):,} tokens", gigabytes(size), "computed"))
    if fit:
        longest = count(fit.get("max_context_tokens"))
        verdict = f"yes, with up to {longest} tokens of context" if fit.get("fits") else "no"
        rows.append((f"Fits a {fit.get('card_gb'):g} GB card", verdict, "computed"))
    return table(["", "Size:", "How known"], rows)


def loader_table(plan: Mapping[str, Any]) -> Markdown | None:
    """What each loader makes of the skip list; None if the plan has no matrix."""
    matrix = plan.get("loaders") or {}
    rows = []
    for name, row in matrix.items():
        by_area = ", ".join(f"{area} {number}" for area, number in row.get("by_area", {}).items()) or "none"
        agrees = "yes" if row["agrees"] else Markdown("**no**")
        rows.append((row.get("label", name), count(row["modules"]), by_area, agrees))
    return table(["Loader", "4-bit modules:", "By area", "As planned"], rows) if rows else None


def blocksizes(plan: Mapping[str, Any] | None) -> list[int]:
    """Every block size of the plan's NF4 tensors, largest first; [] without a plan."""
    if plan is None:
        return []
    own = {d.get("blocksize") or plan["blocksize"] for d in plan["decisions"] if d["action"] == "nf4"}
    return sorted(own or {plan["blocksize"]}, reverse=True)


def budget(plan: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """What a budget chose, and from what; None if there was none."""
    found = (plan or {}).get("budget")
    if not found:
        return None
    measured = found["sensitivity"]
    return {
        "asked": code(found["asked"]),
        "bytes": gigabytes(found["bytes"]),
        "tally": ", ".join(f"{number} {choice}" for choice, number in found["tally"].items()),
        "nats": decimal(found["nats"], 4),
        "uniform": decimal(found["uniform"].get("nf4-64"), 4),
        "n": count(measured["n"]),
        "documents": count(measured["documents"]),
        "protocol": code(measured["protocol"]),
        "weights": code(str((measured.get("weights") or {}).get("method", "rtn"))),
        "data": joined([joined([code(each["name"]), each["sha256"][:12]], " sha256 ") for each in measured["data"]]),
        "digest": code(measured["digest"]),
    }


def skip_list(plan: Mapping[str, Any]) -> Markdown:
    """`llm_int8_skip_modules` as written in config.json."""
    return joined([code(name) for name in plan["skip_modules"]]) if plan["skip_modules"] else Markdown("none")
