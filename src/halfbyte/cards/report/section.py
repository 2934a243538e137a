"""The figures of an evaluation as a Markdown section, for a model card or an issue."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from halfbyte.cards.markdown import Markdown, code, fence, joined, table, text
from halfbyte.cards.report import tasks
from halfbyte.cards.report.frames import frames
from halfbyte.cards.report.words import (
    ABSENT,
    figure_of,
    frame_lines,
    interval,
    number,
    percent,
    sentence,
    short_name,
    untouched,
)


def section(record: Mapping[str, Any]) -> str:
    """Markdown of an evaluate record: verdicts, a table a protocol and a task, effects, how it was measured."""
    references = {base["name"]: base["reference"] for base in record["bases"]}
    parts: list[str] = ["## What it cost, measured"]
    for block in record["protocols"]:
        for candidate in block["candidates"]:
            parts.append(f"- {text(sentence(block, candidate, references[block['base']]))}")
    parts += [f"- {text(said['text'])}" for said in tasks.verdicts(record)]
    for candidate in (each for base in record["bases"] for each in base["candidates"]):
        parts.append(f"- {text(short_name(candidate['id']))}, {text(untouched(candidate.get('areas')))}.")
    parts += _frames(record)
    for block in record["protocols"]:
        parts += ["", _heading(block), "", str(_table(block))]
        if lines := frame_lines(block):
            parts += ["", *(f"- {text(line)}" for line in lines)]
    for block in record.get("tasks", ()):
        parts += ["", _task_heading(block), "", str(_task_table(block))]
        if lines := tasks.comparisons(block):
            parts += ["", *(f"- {text(line)}" for line in lines)]
    if record["effects"]:
        parts += ["", "Two bases: D is what quantization cost each, T what training did, I = D(QAT) - D(vanilla).", ""]
        rows = [(e["effect"], code(e["protocol"]), e["metric"], e["precision"], interval(e), e["verdict"]) for e in record["effects"]]  # fmt: skip
        parts.append(str(table(["Effect", "Protocol", "Metric", "Precision", "Nats:", "Verdict"], rows)))
    if record.get("task_effects"):
        found = [(e["effect"], e["where"], e["value"], e["verdict"]) for e in tasks.effects(record)]
        parts += ["", str(table(["Effect", "Task, precision", "Accuracy:", "Verdict"], found))]
    margin = number(record["settings"]["margin"])
    parts += [
        "",
        f"Intervals at 95 %, joint paired bootstrap over documents. The margin of {margin} nats was stated beforehand. Again:",
        "",
        fence(_shell(record["command"]), "sh"),
    ]
    return "\n".join(parts) + "\n"


def _frames(record: Mapping[str, Any]) -> list[str]:
    """Out-of-frame figures beside sound ones, [] if there are not both."""
    found = frames(record)
    if found is None:
        return []
    heads = ["Model", *(f"{c['protocol']}{' (out of frame)' if c['stress'] else ''}" for c in found["columns"])]
    rows = [(code(row["name"]), *(cell or ABSENT for cell in row["cells"])) for row in found["rows"]]
    lines = [f"- {text(line)}" for line in (*found["verdicts"], *found["flips"])]
    return ["", found["why"], "", str(table(heads, rows)), *(["", *lines] if lines else [])]


def _heading(block: Mapping[str, Any]) -> str:
    facts: list[Any] = [code(block["protocol"]), f"version {block['version']}", f"{block['rows']['n']:,} tokens"]
    facts += [f"{block['rows']['documents']} documents", joined([file["name"] for file in block["data"]])]
    if block["out_of_frame"]:
        facts.append(Markdown("**out of frame**: an instruct model on bare text"))
    facts.append(f"floor KLD {number(block['floor'] and block['floor']['value'])}")
    return str(joined(facts))


def _task_heading(block: Mapping[str, Any]) -> str:
    facts: list[Any] = [code(block["metric"]), f"version {block['version']}", f"{block['n']:,} items"]
    facts += [joined([file["name"] for file in block["data"]]), tasks.answers(block)]
    return str(joined(facts))


def _task_table(block: Mapping[str, Any]) -> Markdown:
    own = block["reference"]
    rows: list[tuple[Any, ...]] = [("its reference", tasks.share(own), "", "", "", "", "")]
    for c in block["candidates"]:
        flips = c["flips"]
        rows.append((
            code(short_name(c["candidate"])), tasks.share(c), str(flips["only_reference"]), str(flips["only_candidate"]),
            number(flips["p"]), tasks.difference(flips), c["verdict"],
        ))  # fmt: skip
    return table(["Model", "Accuracy:", "lost:", "gained:", "p:", "Difference:", "Verdict"], rows)


def _table(block: Mapping[str, Any]) -> Markdown:
    rows = []
    for candidate in block["candidates"]:
        agreement = figure_of(candidate, "top-1 agreement")
        rows.append(
            (
                code(short_name(candidate["candidate"])),
                interval(figure_of(candidate, "kld mean")),
                interval(figure_of(candidate, "kld median")),
                interval(figure_of(candidate, "kld p99")),
                percent(agreement["value"] if agreement else None),
                interval(figure_of(candidate, "ppl ratio")),
                candidate["verdicts"][0]["verdict"],
            )
        )
    return table(["Candidate", "KLD, nats:", "median:", "p99:", "top-1:", "PPL ratio:", "Verdict"], rows)


def _shell(command: list[str]) -> str:
    import shlex

    return shlex.join(command)
