"""Numbers and verdicts as words: one place decides how a figure is printed, so that a page and a card say the same."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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
    return (
        f"{short_name(candidate['candidate'])} against {short_name(reference)}: {name} {interval(said)} nats a token over "
        f"{block['rows']['n']:,} tokens of {block['rows']['documents']} documents ({block['protocol']}{stress}); "
        f"{meaning(said)}.{floor}"
    )
