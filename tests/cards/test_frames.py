"""Out-of-frame figures beside sound ones: what each ranks, where they part, and nothing if there are not both."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from halfbyte.cards.report.frames import WHY, frames

RAW, KLD, FRAME = "ppl[raw,wikitext-80]", "kld[assistant,on-policy]", "ppl[assistant-frame]"


def figure(name: str, value: float, width: float = 0.01) -> dict[str, Any]:
    return {"figure": name, "value": value, "low": value - width, "high": value + width}


def block(protocol: str, values: dict[str, tuple[float, str]], base: str = "reference") -> dict[str, Any]:
    """values: candidate -> (mean KLD or ratio of perplexities, verdict)."""
    answers = protocol == KLD
    candidates = []
    for name, (value, verdict) in values.items():
        figures = [
            figure("kld mean", value if answers else 9.0),
            figure("ppl", 100 * value),
            figure("ppl ratio", value),
        ]
        said = {"figure": "kld mean" if answers else "delta nll", "verdict": verdict}
        candidates.append({"candidate": name, "figures": figures, "verdicts": [said]})
    return {
        "protocol": protocol, "base": base, "out_of_frame": protocol == RAW, "reference": [figure("ppl", 100.0)],
        "candidates": candidates,
    }  # fmt: skip


def record(*blocks: dict[str, Any]) -> dict[str, Any]:
    ids = list(dict.fromkeys(c["candidate"] for b in blocks for c in b["candidates"]))
    base = {"name": "reference", "reference": "a/bf16", "candidates": [{"id": name} for name in ids]}
    return {"bases": [base], "protocols": list(blocks)}


WRONG = record(
    block(RAW, {"a/one": (0.95, "win"), "a/two": (1.10, "loss")}),
    block(KLD, {"a/one": (0.40, "loss"), "a/two": (0.05, "loss")}),
)


def test_a_pair_that_changes_places_is_named_with_both_figures() -> None:
    found = frames(WRONG)
    assert found is not None
    assert found["flips"] == [
        "ppl[raw,wikitext-80] puts one before two (PPL times 0.95 [0.94, 0.96] against 1.1 [1.09, 1.11]); "
        "kld[assistant,on-policy] puts two before one (0.05 [0.04, 0.06] against 0.4 [0.39, 0.41])."
    ]
    assert found["verdicts"] == ["one: “win” by ppl[raw,wikitext-80], “loss” by kld[assistant,on-policy]."]
    assert found["columns"] == [{"protocol": KLD, "stress": False}, {"protocol": RAW, "stress": True}]
    assert found["rows"][1] == {
        "name": "one", "cells": ["KLD 0.4 [0.39, 0.41]: loss", "PPL 95, times 0.95 [0.94, 0.96]: win"]
    }  # fmt: skip
    assert found["rows"][0]["cells"] == ["KLD 0 by definition", "PPL 100 [99.99, 100]"]
    assert found["why"] == WHY


def test_where_intervals_overlap_the_order_may_be_chance() -> None:
    close = deepcopy(WRONG)
    for candidate in close["protocols"][0]["candidates"]:
        candidate["figures"][2].update(low=0.5, high=None)
    found = frames(close)
    assert found is not None
    assert found["flips"][0].endswith("The intervals overlap: the order may be chance.")


def test_the_same_order_is_no_flip() -> None:
    same = record(
        block(RAW, {"one": (1.1, "loss"), "two": (1.2, "loss")}),
        block(FRAME, {"one": (1.01, "tie"), "two": (1.3, "loss")}),
    )
    found = frames(same)
    assert found is not None
    assert found["flips"] == []
    assert found["verdicts"] == ["one: “loss” by ppl[raw,wikitext-80], “tie” by ppl[assistant-frame]."]
    equal = record(
        block(RAW, {"one": (1.0, "tie"), "two": (1.0, "tie")}), block(KLD, {"one": (0.0, "tie"), "two": (0.3, "loss")})
    )
    assert frames(equal)["flips"] == []  # type: ignore[index]


def test_without_both_kinds_there_is_no_table() -> None:
    assert frames(record(block(RAW, {"one": (1.1, "loss")}))) is None
    assert frames(record(block(KLD, {"one": (1.1, "loss")}), block(FRAME, {"one": (1.1, "loss")}))) is None
    elsewhere = record(block(KLD, {"one": (1.1, "loss")}))
    elsewhere["protocols"].append(block(RAW, {}, base="other"))
    assert frames(elsewhere) is None, "a base without candidates compares nothing"
