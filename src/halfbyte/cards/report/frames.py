"""Figures from outside the model's own frame beside sound ones: what each would have made one believe.

A published card ranked models by perplexity on bare text (`ppl[raw,wikitext-80]` re-runs it). An instruct model takes bare text
for noise: that perplexity says how surprised it is to be outside its turns, and a quantization that makes it less sure of
itself may well lower it. So such a figure never stands alone here: it is printed next to KLD and perplexity from inside the
frame, with both verdicts, and every pair of candidates that the two put in another order is named.

Order is by the points. A pair whose intervals overlap under either protocol is marked: its order may be chance.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import combinations
from typing import Any

from halfbyte.cards.report.words import figure_of, interval, number, short_name

Block = Mapping[str, Any]
WHY = (
    "An instruct model prices text outside its own turns as noise. Perplexity on bare text says how surprised it is to be there, "
    "and moves with that; it says little about the answers the model gives. Use it only to repeat what somebody else published."
)


def frames(record: Mapping[str, Any]) -> dict[str, Any] | None:
    """{"columns", "rows", "flips", "verdicts", "why"}, None unless a base has figures from both outside and inside its frame.

    columns   [{"protocol", "stress"}], sound ones first
    rows      [{"name", "cells"}]: every base's reference and candidates; a cell is "" where nothing was measured
    flips     sentences: pairs of candidates that an out-of-frame protocol orders otherwise than a sound one
    verdicts  sentences: candidates of which the two say different things
    """
    bases = [base["name"] for base in record["bases"]]
    by_base = {name: [b for b in record["protocols"] if b["base"] == name and b["candidates"]] for name in bases}
    if not any(len({bool(block["out_of_frame"]) for block in blocks}) == 2 for blocks in by_base.values()):
        return None
    stress = {b["protocol"]: bool(b["out_of_frame"]) for blocks in by_base.values() for b in blocks}
    columns = sorted(stress, key=lambda protocol: stress[protocol])
    rows = []
    for base in record["bases"]:
        blocks = {block["protocol"]: block for block in by_base[base["name"]]}
        reference = [_reference(blocks.get(protocol)) for protocol in columns]
        rows.append({"name": f"{base['name']}: {short_name(base['reference'])}", "cells": reference})
        for entry in base["candidates"]:
            cells = [_cell(blocks.get(protocol), entry["id"]) for protocol in columns]
            rows.append({"name": short_name(entry["id"]), "cells": cells})
    return {
        "columns": [{"protocol": protocol, "stress": stress[protocol]} for protocol in columns],
        "rows": rows, "why": WHY, "flips": list(_flips(by_base)), "verdicts": list(_verdicts(by_base)),
    }  # fmt: skip


def _of_answers(block: Block) -> bool:
    """Whether the protocol's headline is KLD (its texts are answers) or perplexity (texts that nobody answered with)."""
    return any(c["verdicts"][0]["figure"] == "kld mean" for c in block["candidates"])


def _reference(block: Block | None) -> str:
    if block is None:
        return ""
    return "KLD 0 by definition" if _of_answers(block) else f"PPL {interval(block['reference'][0])}"


def _found(block: Block | None, candidate: str) -> Mapping[str, Any] | None:
    return next((c for c in block["candidates"] if c["candidate"] == candidate), None) if block else None


def _cell(block: Block | None, candidate: str) -> str:
    found = _found(block, candidate)
    if block is None or found is None:
        return ""
    said = found["verdicts"][0]["verdict"]
    if _of_answers(block):
        return f"KLD {interval(figure_of(found, 'kld mean'))}: {said}"
    return f"PPL {number((figure_of(found, 'ppl') or {}).get('value'))}, times {interval(figure_of(found, 'ppl ratio'))}: {said}"


def _pairs(by_base: Mapping[str, list[Block]]) -> Iterator[tuple[Block, Block]]:
    """(out of frame, sound) protocols of the same base."""
    for blocks in by_base.values():
        for raw in (block for block in blocks if block["out_of_frame"]):
            for sound in (block for block in blocks if not block["out_of_frame"]):
                yield raw, sound


def _flips(by_base: Mapping[str, list[Block]]) -> Iterator[str]:
    for raw, sound in _pairs(by_base):
        names = [c["candidate"] for c in raw["candidates"]]
        for pair in combinations(names, 2):
            outside, inside = ([_measure(block, name) for name in pair] for block in (raw, sound))
            if (outside[0]["value"] - outside[1]["value"]) * (inside[0]["value"] - inside[1]["value"]) >= 0:
                continue
            first, second = (0, 1) if outside[0]["value"] < outside[1]["value"] else (1, 0)
            better, worse = short_name(pair[first]), short_name(pair[second])
            chance = " The intervals overlap: the order may be chance." if _overlap(outside) or _overlap(inside) else ""
            yield (
                f"{raw['protocol']} puts {better} before {worse} (PPL times {interval(outside[first])} against "
                f"{interval(outside[second])}); {sound['protocol']} puts {worse} before {better} "
                f"({interval(inside[second])} against {interval(inside[first])}).{chance}"
            )


def _measure(block: Block, candidate: str) -> Mapping[str, Any]:
    """What a protocol ranks by: mean KLD of answers, the ratio of perplexities of texts; smaller is better."""
    found = _found(block, candidate)
    figure = figure_of(found, "kld mean" if _of_answers(block) else "ppl ratio") if found else None
    assert figure is not None, "a base's candidates are scored under each of its protocols"
    return figure


def _overlap(two: list[Mapping[str, Any]]) -> bool:
    ends = [
        (float("-inf") if f["low"] is None else f["low"], float("inf") if f["high"] is None else f["high"]) for f in two
    ]
    return ends[0][0] <= ends[1][1] and ends[1][0] <= ends[0][1]


def _verdicts(by_base: Mapping[str, list[Block]]) -> Iterator[str]:
    for raw, sound in _pairs(by_base):
        for candidate in raw["candidates"]:
            other = _found(sound, candidate["candidate"])
            outside = candidate["verdicts"][0]["verdict"]
            inside = other["verdicts"][0]["verdict"] if other else outside
            if outside != inside:
                name = short_name(candidate["candidate"])
                yield f"{name}: “{outside}” by {raw['protocol']}, “{inside}” by {sound['protocol']}."
