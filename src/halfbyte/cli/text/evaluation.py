"""An evaluation as a person reads it on a terminal: a table a protocol, every figure with its interval, the verdict last."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from halfbyte.cards.report import tasks
from halfbyte.cards.report.words import ABSENT, drift, frame_lines, interval, methods, number, untouched


def render(record: Mapping[str, Any]) -> str:
    """Text of an evaluate record."""
    sections = [_protocol(block) for block in record["protocols"]]
    sections += [_task(block) for block in record.get("tasks", ())]
    if record["effects"]:
        sections.append(_effects(record["effects"]))
    if record.get("task_effects"):
        rows = [("effect", "of", "accuracy", "verdict"), *((e["effect"], e["where"], e["value"], e["verdict"]) for e in tasks.effects(record))]  # fmt: skip
        sections.append(["2 x 2 of the tasks", *table(rows)])
    sections.append([_sizes_line(base) for base in record["bases"]])
    sections.append([f"{c['id']}: {untouched(c.get('areas'))}" for base in record["bases"] for c in base["candidates"]])
    if fitted := methods(record):
        sections.append(fitted)
    failed = [test for test in record["self_tests"] if not test["passed"]]
    tests = f"self-KLD exactly 0 in {len(record['self_tests']) - len(failed)} of {len(record['self_tests'])}"
    margin = record["settings"]["margin"]
    closing = (
        [f"{tests}; margin {margin:g} nats; intervals at 95 %, bootstrap over documents"] if record["protocols"] else []
    )
    if record.get("tasks"):
        points = f"{100 * record['settings']['task_margin']:g} points"
        closing.append(f"tasks: margin {points}; intervals at 95 %, Wilson's of accuracies, Tango's of differences")
    sections.append(closing)
    return "\n\n".join("\n".join(section) for section in sections)


def _protocol(block: Mapping[str, Any]) -> list[str]:
    stress = " (out of frame: an instruct model on bare text)" if block["out_of_frame"] else ""
    files = ", ".join(file["name"] for file in block["data"])
    base = "" if block["base"] == "reference" else f", base {block['base']}"
    lines = [
        f"{block['protocol']} v{block['version']}{stress}{base}",
        f"  {block['rows']['n']:,} tokens of {block['rows']['documents']} documents from {files}; "
        f"reference PPL {interval(block['reference'][0])}; floor KLD {point(block['floor'])}",
    ]
    rows = [("candidate", "KLD, nats", "median", "p99", "top-1", "PPL ratio", "verdict")]
    for found in block["candidates"]:
        by_name = {figure["figure"]: figure for figure in found["figures"]}
        rows.append(
            (
                found["candidate"],
                interval(by_name["kld mean"]),
                point(by_name["kld median"]),
                point(by_name["kld p99"]),
                f"{by_name['top-1 agreement']['value']:.1%}",
                interval(by_name["ppl ratio"]),
                said(found),
            )
        )
    lines += [*table(rows), *(f"  {line}" for line in frame_lines(block))]
    return [
        *lines,
        *(f"  {c['candidate']}: residual {drift(c.get('residual'))}" for c in block["candidates"] if c.get("residual")),
    ]


def _task(block: Mapping[str, Any]) -> list[str]:
    own = block["reference"]
    base = "" if block["base"] == "reference" else f", base {block['base']}"
    cut = f"{own['cut_off']} answers cut off at {block['max_new_tokens']} tokens" if block["max_new_tokens"] else tasks.answers(block)  # fmt: skip
    lines = [
        f"{block['metric']} v{block['version']}{base}",
        f"  {block['n']:,} items from {', '.join(file['name'] for file in block['data'])}; reference {tasks.share(own)}, {cut}",
    ]
    rows = [("candidate", "accuracy", "lost", "gained", "p", "difference", "same text", "verdict")]
    for c in block["candidates"]:
        flips = c["flips"]
        rows.append((
            c["candidate"], tasks.share(c), str(flips["only_reference"]), str(flips["only_candidate"]), number(flips["p"]),
            tasks.difference(flips), str(c["same_text"]), c["verdict"],
        ))  # fmt: skip
    return [*lines, *table(rows), *(f"  {line}" for line in tasks.comparisons(block))]


def said(found: Mapping[str, Any]) -> str:
    """The verdict of a candidate's headline figure, with why nothing is claimed if nothing is."""
    first = found["verdicts"][0]
    if first["verdict"] == "undecided" and first["low"] is None:
        return "undecided (too few documents)"
    if found["above_floor"] is False and first["verdict"] == "loss":
        return "loss, not above the floor"
    return f"{first['verdict']} ({first['figure']})"


def _effects(effects: Sequence[Mapping[str, Any]]) -> list[str]:
    bases = effects[0]["bases"]
    rows = [("effect", "protocol", "metric", "precision", "nats", "verdict")]
    for e in effects:
        rows.append((e["effect"], e["protocol"], e["metric"], e["precision"], interval(e), e["verdict"]))
    return [f"2 x 2: vanilla is base {bases['vanilla']!r}, QAT is base {bases['QAT']!r}", *table(rows)]


def _sizes_line(base: Mapping[str, Any]) -> str:
    parts = [f"{base['reference']}: {size(base['size'])}"]
    parts += [f"{each['label']}: {size(each['size'])}" for each in base["candidates"]]
    return "sizes: " + "; ".join(parts)


def size(found: Mapping[str, Any]) -> str:
    """Bytes and bits per weight; computed ones say so."""
    if found["file_bytes"] is None:
        return ABSENT
    bits = f", {found['bits_per_weight']:.2f} bits" if found["bits_per_weight"] else ""
    computed = "" if found["counted"] else ", computed"
    return f"{found['file_bytes'] / 1e6:,.1f} MB{bits}{computed}"


def point(figure: Mapping[str, Any] | None) -> str:
    return ABSENT if figure is None else number(figure["value"])


def table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Aligned columns, two spaces apart and indented."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        yield "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
