"""Numbers and verdicts as words: one place decides how a figure is printed, so that a page and a card say the same."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from halfbyte.cards.markdown import visible
from halfbyte.cards.method import method_lines

_AREAS = {
    "vision": "vision tower", "audio": "audio tower", "projector": "projector", "embeddings": "embeddings", "head": "head",
    "other": "other tensors outside the decoder",
}  # fmt: skip
ABSENT = "not measured"


def number(value: Any) -> str:
    """Four significant digits; None is not measured."""
    if value is None:
        return ABSENT
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


def interval(figure: Mapping[str, Any] | None) -> str:
    """`0.189 [0.180, 0.199]`; an end that the documents do not bound is infinite."""
    if figure is None:
        return ABSENT
    low = "−∞" if figure["low"] is None else number(figure["low"])
    high = "∞" if figure["high"] is None else number(figure["high"])
    return f"{number(figure['value'])} [{low}, {high}]"


def percent(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.1%}"


def gigabytes(value: int | None) -> str:
    """Bytes with both units, so that nobody has to guess which one is meant."""
    if value is None:
        return ABSENT
    if value < 10**9:
        return f"{value / 1e6:,.2f} MB ({value / 2**20:,.2f} MiB)"
    return f"{value / 1e9:,.2f} GB ({value / 2**30:,.2f} GiB)"


def figure_of(candidate: Mapping[str, Any], name: str) -> dict[str, Any] | None:
    """The figure `name` of a candidate under a protocol, None if the record has none."""
    found: list[dict[str, Any]] = [f for f in candidate["figures"] if f["figure"] == name]
    return found[0] if found else None


def short_name(spec: str) -> str:
    """A spec without its folders: the record keeps the whole, a table has no room for it."""
    base, mark, rest = spec.partition(":")
    if mark and "/" not in base:
        return f"{base}:{short_name(rest)}"
    return spec.rstrip("/").rpartition("/")[2] or spec


def meaning(said: Mapping[str, Any]) -> str:
    """What a verdict allows one to say."""
    margin = number(said["margin"])
    if said["verdict"] == "tie":
        return f"tie: whatever the loss is, it is within {margin} nats"
    if said["verdict"] == "loss" and said["low"] > said["margin"]:
        return f"loss: it costs more than {margin} nats"
    if said["verdict"] == "loss":
        return f"loss: it costs something, and it may be more than {margin} nats"
    if said["verdict"] == "win":
        return f"win: better than its reference, by more than chance and not surely within {margin} nats"
    return "undecided: too few documents to tell"


def sentence(block: Mapping[str, Any], candidate: Mapping[str, Any], reference: str) -> str:
    """The verdict in one sentence, with interval and n."""
    said = candidate["verdicts"][0]
    name = {"kld mean": "mean KL divergence", "delta nll": "mean change of NLL"}[said["figure"]]
    stress = ", outside the model's own frame" if block["out_of_frame"] else ""
    floor = ""
    if block["floor"] is not None:
        above = "above" if candidate["above_floor"] else "not above"
        floor = f" Its mean KLD is {above} the noise floor ({number(block['floor']['value'])})."
    tokens = "content tokens" if "frame_tokens" in block["rows"]["facts"] else "tokens"
    return (
        f"{short_name(candidate['candidate'])} against {short_name(reference)}: {name} {interval(said)} nats a token over "
        f"{block['rows']['n']:,} {tokens} of {block['rows']['documents']} documents ({block['protocol']}{stress}); "
        f"{meaning(said)}.{floor}"
    )


def untouched(found: Mapping[str, Any] | None) -> str:
    """What of a candidate is the reference's, value by value, and loudly what is not."""
    if found is None:
        return f"areas outside the decoder: {ABSENT}"
    same = [row for row in found["areas"] if row["same"]]
    parts = []
    if same:
        names = [_area(row["area"], found) for row in same]
        listed = " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
        tensors = sum(row["tensors"] for row in same)
        parts.append(f"{listed}: {tensors:,} of {tensors:,} tensors identical to the reference's")
    for row in (row for row in found["areas"] if not row["same"]):
        missing = f", {row['missing']:,} not in both" if row["missing"] else ""
        parts.append(
            f"{_AREAS.get(row['area'], row['area']).upper()} NOT THE REFERENCE'S: only {row['identical']:,} of {row['tensors']:,} tensors "
            f"identical{missing}, first {visible(str(row['first']))[:200]}"
        )
    return "; ".join(parts)


def _area(name: str, found: Mapping[str, Any]) -> str:
    tied = " (with the head, which is tied to them)" if name == "embeddings" and found["head_tied"] else ""
    return f"{_AREAS.get(name, name)}{tied}"


def frame_lines(block: Mapping[str, Any]) -> list[str]:
    """A line a candidate on the tokens that are frame; [] under a protocol that sets none apart."""
    if "frame_tokens" not in block["rows"]["facts"]:
        return []
    lines = []
    for candidate in block["candidates"]:
        frame = candidate["frame"]
        if frame is None:
            lines.append(f"{short_name(candidate['candidate'])}: frame tokens, none was written")
            continue
        kld, agreement = (figure_of(frame, name) for name in ("kld mean", "top-1 agreement"))
        lines.append(
            f"{short_name(candidate['candidate'])}: frame tokens apart (n = {frame['n']:,}), KLD {interval(kld)} nats, "
            f"top-1 {percent(agreement['value'] if agreement else None)}"
        )
    return lines


def drift(found: Mapping[str, Any] | None) -> str:
    """The residual stream in one line: where it first differs, how far it gets, where it drops most."""
    if found is None:
        return ABSENT
    over = f"over {found['n']:,} positions of {found['rows']:,} rows"
    points = found["points"]
    if all(point["identical"] for point in points):
        return f"identical to the reference's after every layer, {over}"
    first = next(point for point in points if not point["identical"])
    if broken := [point for point in points if point["sqnr_db"] is None and not point["identical"]]:
        return f"not finite, or zero in the reference, {_place(broken[0])}, {over}"
    known = [point for point in points if point["median_db"] is not None]
    if not known:
        return f"first differs {_place(first)}, and at fewer than half of the positions; {over}"
    worst = min(known, key=lambda point: point["median_db"])
    text = f"first differs {_place(first)}; median {known[0]['median_db']:.1f} dB {_place(known[0])}, "
    text += f"lowest {worst['median_db']:.1f} dB {_place(worst)}"
    falls = [(a["median_db"] - b["median_db"], b) for a, b in itertools.pairwise(known)]
    if falls and (fall := max(falls, key=lambda pair: pair[0]))[0] > 0:
        text += f"; worst drop {fall[0]:.1f} dB {_place(fall[1])}"
    return f"{text}; {over}"


def _place(point: Mapping[str, Any]) -> str:
    return f"after layer {point['layer']}" if point["at"] == "layer" else f"after the {point['at']}"


def methods(record: Mapping[str, Any]) -> list[str]:
    """A sentence for every candidate whose codes were fitted: how, on what, and what that was worth."""
    found = ((c["id"], method_lines(c.get("method"))) for base in record["bases"] for c in base["candidates"])
    return [f"{short_name(name)}: {'; '.join(lines)}" for name, lines in found if lines]
