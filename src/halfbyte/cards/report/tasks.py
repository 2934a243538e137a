"""Tasks of a record as a page and a card print them: right answers, flips both ways, a verdict, and examples of what flipped.

The difference is candidate minus reference, so below 0 is worse. A verdict is about the difference; p says only whether flips go
both ways alike, and "p above 0.05" is never printed as "no difference": that is what the margin is for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from halfbyte.cards.report.words import interval, number, short_name


def verdicts(record: Mapping[str, Any]) -> list[dict[str, str]]:
    """One sentence a task and candidate."""
    references = {base["name"]: base["reference"] for base in record["bases"]}
    return [
        {"text": sentence(block, candidate, references[block["base"]]), "verdict": candidate["verdict"]}
        for block in record.get("tasks", ())
        for candidate in block["candidates"]
    ]


def sentence(block: Mapping[str, Any], candidate: Mapping[str, Any], reference: str) -> str:
    """The verdict in one sentence, with interval, n and flips."""
    flips = candidate["flips"]
    return (
        f"{short_name(candidate['candidate'])} against {short_name(reference)}: {block['metric']} accuracy "
        f"{candidate['value']:.1%} after {block['reference']['value']:.1%}, difference {difference(flips)} over {block['n']:,} "
        f"items, {flips['only_reference']} lost and {flips['only_candidate']} gained (p {number(flips['p'])}); {meaning(candidate)}."
    )


def meaning(candidate: Mapping[str, Any]) -> str:
    """What the verdict allows one to say."""
    margin, flips = f"{100 * candidate['margin']:g} points", candidate["flips"]
    if candidate["verdict"] == "tie":
        return f"tie: whatever the difference is, it is within {margin}"
    if candidate["verdict"] == "loss":
        return f"loss: it costs {'more than' if flips['high'] < -candidate['margin'] else 'something, perhaps more than'} {margin}"
    if candidate["verdict"] == "win":
        return "win: more right answers than its reference, by more than chance"
    return f"undecided: too few items to say whether the difference is within {margin}"


def difference(flips: Mapping[str, Any]) -> str:
    """`-1.2 points [-3.1, +0.7]`."""
    low, high = (f"{100 * flips[end]:+.1f}" for end in ("low", "high"))
    return f"{100 * flips['difference']:+.1f} points [{low}, {high}]"


def answers(block: Mapping[str, Any]) -> str:
    """How long answers could be; a task that generates none says so."""
    longest = block["max_new_tokens"]
    return f"answers of at most {longest} tokens, greedy" if longest else "no answers, one forward pass an item"


def comparisons(block: Mapping[str, Any]) -> list[str]:
    """A sentence for every later candidate against the first."""
    return [
        f"{short_name(c['candidate'])} against {short_name(c['against'])}: difference {difference(c['flips'])}, {c['flips']['only_reference']} "
        f"lost and {c['flips']['only_candidate']} gained (p {number(c['flips']['p'])}), {c['verdict']}"
        for c in block.get("comparisons", ())
    ]


def share(found: Mapping[str, Any]) -> str:
    """`61.3 % [58.6, 63.9]`."""
    return f"{100 * found['value']:.1f} % [{100 * found['low']:.1f}, {100 * found['high']:.1f}]"


def table_of(block: Mapping[str, Any]) -> dict[str, Any]:
    """Rows, kinds and flips of one task and base, for the page."""
    candidates, own = block["candidates"], block["reference"]
    rows = [
        {
            "name": "reference",
            "verdict": "",
            "cells": [f"{own['right']:,}", share(own), "", "", "", "", "", f"{own['cut_off']:,}"],
        }
    ]
    for c in candidates:
        flips = c["flips"]
        cells = [
            f"{c['right']:,}", share(c), f"{flips['only_reference']:,}", f"{flips['only_candidate']:,}", number(flips["p"]),
            difference(flips), f"{c['same_text']:,}", f"{c['cut_off']:,}",
        ]  # fmt: skip
        rows.append({"name": short_name(c["candidate"]), "verdict": c["verdict"], "cells": cells})
    facts = [f"{name}: {', '.join(f'{k} {v}' for k, v in each.items()) if isinstance(each, dict) else each}" for name, each in block["facts"].items()]  # fmt: skip
    margin = f"The margin of {100 * candidates[0]['margin']:g} points was stated beforehand." if candidates else ""
    return {
        "block": block, "rows": rows, "answers": answers(block), "comparisons": comparisons(block), "names": [short_name(c["candidate"]) for c in candidates], "margin": margin,
        "files": ", ".join(f"{file['name']} (sha256 {file['sha256'][:16]})" for file in block["data"]),
        "frame": ", inside the chat template" if block["template"] else ", bare prompts (no chat template)",
        "facts": f" {'; '.join(facts)}." if facts else "",
        "kinds": [_kind(place, kind, candidates) for place, kind in enumerate(own["kinds"])],
        "flips": [
            {"title": f"Flips of {short_name(c['candidate'])}, the first {len(c['examples'])}", "examples": c["examples"]}
            for c in candidates if c["examples"]
        ],
    }  # fmt: skip


def _kind(place: int, kind: Mapping[str, Any], candidates: list[Mapping[str, Any]]) -> dict[str, Any]:
    cells = []
    for candidate in candidates:
        found = candidate["kinds"][place]
        flips = found["flips"]
        cells.append(f"{share(found)}; {flips['only_reference']}, {flips['only_candidate']}; {number(flips['p'])}")
    return {"name": kind["kind"], "n": kind["n"], "reference": share(kind), "cells": cells}


def effects(record: Mapping[str, Any]) -> list[dict[str, str]]:
    """A row for every effect of two bases on accuracy."""
    return [
        {
            "effect": e["effect"],
            "where": f"{e['task']}, {e['precision']}",
            "value": interval(e),
            "verdict": e["verdict"],
        }
        for e in record.get("task_effects", ())
    ]
