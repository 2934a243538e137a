"""From vectors to figures with intervals, buckets and verdicts: one joint bootstrap over the documents of a base.

    kld mean, median, p90, p99, p99.9   nats a token, KL(reference || candidate); `max` has no interval, it is what was met
    top-1 agreement                     share of tokens at which both put the same token on top
    rms delta p                         root mean square of the change in the label's probability
    delta nll                           mean NLL, candidate minus reference, nats
    ppl, ppl ratio                      exp of mean NLL; of its difference

Verdicts ask whether the loss is too small to matter, by the margin that was stated: "tie" if the whole 95 % interval lies
within it. A KLD is never negative, so its verdict is tie, loss or undecided. `above_floor` is false where the mean KLD is no
larger than the noise floor's: then nothing is claimed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from halfbyte.evaluator.job.scoring import Scored
from halfbyte.evaluator.job.settings import OF_CHATS, Settings
from halfbyte.evaluator.job.vectors import Stored
from halfbyte.evaluator.scoring.divergence import CONFIDENCE_EDGES
from halfbyte.evaluator.statistics import (
    Cell,
    Estimate,
    Figure,
    bootstrap_documents,
    difference,
    mean,
    perplexity,
    perplexity_ratio,
    quantile,
    verdict,
    wilson,
)

if TYPE_CHECKING:
    import numpy as np

SEED = 0
#: worst tokens kept for a reader, and tokens of context before each
SHOWN, BEFORE = 10, 24
QUANTILES = {"kld median": 0.5, "kld p90": 0.9, "kld p99": 0.99, "kld p99.9": 0.999}
UNITS = {
    "kld": "nats", "top-1 agreement": "share", "rms delta p": "probability", "delta nll": "nats", "ppl": "perplexity",
    "ppl ratio": "ratio",
}  # fmt: skip


def figures_of(scored: Scored, settings: Settings) -> dict[str, Any]:
    """{"reference": [figure], "floor": figure or None, "candidates": {id: {...}}, "comparisons": [...]} as record values."""
    cells, wanted = _cells_and_figures(scored)
    found = bootstrap_documents(cells, wanted, resamples=settings.resamples, seed=SEED)
    floor = _within_range("kld mean", found["floor|kld mean"]) if "floor|kld mean" in found else None
    body: dict[str, Any] = {
        "reference": [_shown("ppl", found["|ppl"])],
        "floor": _shown("kld mean", floor) if floor else None,
        "candidates": {},
        "comparisons": [],
    }
    for key, stored in scored.candidates.items():
        mine = {name.rpartition("|")[2]: e for name, e in found.items() if name.rpartition("|")[0] == key}
        mine = without_false_certainty(mine, stored.arrays)
        body["candidates"][key] = {
            "figures": [_shown(name, e) for name, e in mine.items() if name.startswith(tuple(UNITS))],
            "kld_max": float(stored.arrays["kld"].max()),
            "buckets": _buckets(scored, stored.arrays, mine),
            "verdicts": _verdicts(mine, settings.margin, scored.rows.protocol in OF_CHATS),
            "above_floor": None if floor is None else bool(mine["kld mean"].point > floor.point),
        }
    first, *others = scored.candidates or ("",)
    for key in others:
        e = found[f"{key}|against first"]
        body["comparisons"].append({
            "figure": "kld mean", "candidate": key, "against": first, **_interval(e), "unit": "nats",
            "margin": settings.margin, "verdict": verdict(e.low, e.high, settings.margin),
        })  # fmt: skip
    return body


def frame_of(scored: Scored, settings: Settings) -> dict[str, dict[str, Any]]:
    """Of tokens that are frame, by candidate: {"n", "figures": mean KLD and top-1 agreement}; {} if nothing is set apart."""
    if scored.frame is None:
        return {}
    cells, _ = _cells_and_figures(scored.frame)
    names = {"kld mean": "kld", "top-1 agreement": "agrees"}
    wanted = [mean(f"{key}|{name}", f"{key}|{cell}") for key in scored.candidates for name, cell in names.items()]
    found = bootstrap_documents(cells, wanted, resamples=settings.resamples, seed=SEED)
    body = {}
    for key, stored in scored.frame.candidates.items():
        mine = without_false_certainty({name: found[f"{key}|{name}"] for name in names}, stored.arrays)
        body[key] = {"n": len(stored.arrays["kld"]), "figures": [_shown(name, e) for name, e in mine.items()]}
    return body


def residual_of(stored: Stored, own: Stored) -> dict[str, Any] | None:
    """SQNR of the residual stream by point, pooled and the positions' median (the floor's: the median), for the record; None if it was not measured, or has another shape.

    own  the reference's vectors, which hold the floor's
    """
    signal, noise = (stored.arrays.get(f"residual_{name}") for name in ("signal", "noise"))
    if signal is None or noise is None or not len(signal):
        return None
    floor = own.arrays.get("residual_median", ())
    rows, positions = (int(n) for n in stored.arrays["residual_sample"])
    last = len(signal) - 1
    points = [
        {
            "at": "embedding" if at == 0 else "final norm" if at == last else "layer",
            "layer": at - 1 if 0 < at < last else None,
            "sqnr_db": decibels(signal[at], noise[at]),
            "identical": bool(noise[at] == 0),
            "median_db": decibels(1.0, stored.arrays["residual_median"][at]),
            "floor_db": decibels(1.0, floor[at]) if len(floor) == len(signal) else None,
        }
        for at in range(len(signal))
    ]
    return {"rows": rows, "n": positions, "points": points}


def decibels(signal: float, noise: float) -> float | None:
    """10 log10(signal / noise); None if there is none of either, or one is not finite."""
    return 10 * math.log10(signal / noise) if 0 < signal < math.inf and 0 < noise < math.inf else None


def _cells_and_figures(scored: Scored) -> tuple[dict[str, Cell], list[Figure]]:
    """Cells `ID|vector` and figures `ID|name`; the reference's id is empty."""
    import numpy as np

    own = scored.reference.arrays
    documents = own["document"]
    cells = {"|nll": Cell(own["nll"], documents)}
    wanted = [perplexity("|ppl", "|nll")]
    if "floor_kld" in own:
        cells["floor|kld"] = Cell(own["floor_kld"], documents)
        wanted.append(mean("floor|kld mean", "floor|kld"))
    which = bucket_index(own["top_probability"])
    first = next(iter(scored.candidates), "")
    for key, stored in scored.candidates.items():
        arrays = stored.arrays
        cells[f"{key}|kld"] = Cell(arrays["kld"], documents)
        cells[f"{key}|nll"] = Cell(arrays["nll"], documents)
        cells[f"{key}|agrees"] = Cell(arrays["agrees"].astype(np.float64), documents)
        cells[f"{key}|squared"] = Cell(arrays["delta_p"] ** 2, documents)
        wanted += [
            mean(f"{key}|kld mean", f"{key}|kld"),
            *(quantile(f"{key}|{name}", f"{key}|kld", q) for name, q in QUANTILES.items()),
            mean(f"{key}|top-1 agreement", f"{key}|agrees"),
            replace(mean(f"{key}|rms delta p", f"{key}|squared"), shown=_root),
            difference(f"{key}|delta nll", f"{key}|nll", "|nll"),
            perplexity(f"{key}|ppl", f"{key}|nll"),
            perplexity_ratio(f"{key}|ppl ratio", f"{key}|nll", "|nll"),
        ]
        for bucket in range(len(CONFIDENCE_EDGES) - 1):
            if (which == bucket).any():
                name = f"{key}|bucket {bucket}"
                cells[name] = Cell(arrays["kld"], documents, which == bucket)
                wanted.append(mean(name, name))
        if key != first:
            wanted.append(difference(f"{key}|against first", f"{key}|kld", f"{first}|kld"))
    return cells, wanted


def bucket_index(top_probability: np.ndarray) -> np.ndarray:
    """int64 [n]: which bucket between CONFIDENCE_EDGES each token falls into."""
    import numpy as np

    return np.searchsorted(np.array(CONFIDENCE_EDGES[1:-1]), top_probability.astype(np.float64), side="right")


def _root(value: Any) -> Any:
    """Root of a mean square; the lower limit of one may lie below 0, where nothing is."""
    import numpy as np

    return np.sqrt(np.maximum(value, 0.0))


def without_false_certainty(mine: Mapping[str, Estimate], arrays: Mapping[str, Any]) -> dict[str, Estimate]:
    """Where the resamples cannot vary, an interval of width 0 would claim what nobody knows.

    If all tokens agree, or none, Wilson's interval stands in, with documents as its trials. Not for a candidate equal in every
    token: that is no sample.
    """
    most, found = float(arrays["kld"].max()), {name: _within_range(name, e) for name, e in mine.items()}
    if most == 0:
        return found
    e = found["top-1 agreement"]
    if e.point in (0.0, 1.0):
        low, high = wilson(round(e.point * e.documents), e.documents, e.level)
        found[e.name.rpartition("|")[2]] = replace(e, low=low, high=high, method="wilson over documents")
    return found


def _within_range(name: str, e: Estimate) -> Estimate:
    """Limits no wider than the figure's own range: no KLD is negative, no share lies outside 0 to 1."""
    if name.startswith(("kld", "bucket", "rms")):
        return replace(e, low=max(e.low, 0.0))
    return replace(e, low=max(e.low, 0.0), high=min(e.high, 1.0)) if name == "top-1 agreement" else e


def _buckets(scored: Scored, arrays: Mapping[str, Any], mine: Mapping[str, Estimate]) -> list[dict[str, Any]]:
    which = bucket_index(scored.reference.arrays["top_probability"])
    rows = []
    for bucket in range(len(CONFIDENCE_EDGES) - 1):
        inside = which == bucket
        e = mine.get(f"bucket {bucket}")
        rows.append({
            "from": CONFIDENCE_EDGES[bucket], "to": CONFIDENCE_EDGES[bucket + 1], "n": int(inside.sum()),
            "kld": None if e is None else _interval(e),
            "agreement": None if e is None else float(arrays["agrees"][inside].mean()),
        })  # fmt: skip
    return rows


def _verdicts(mine: Mapping[str, Estimate], margin: float, of_chats: bool) -> list[dict[str, Any]]:
    """On the mean KLD, and on the difference of NLL; the protocol's headline comes first."""
    names = ("kld mean", "delta nll") if of_chats else ("delta nll", "kld mean")
    return [
        {"figure": name, **_interval(mine[name]), "unit": "nats", "margin": margin,
         "verdict": verdict(mine[name].low, mine[name].high, margin)}
        for name in names
    ]  # fmt: skip


def _interval(e: Estimate) -> dict[str, Any]:
    record = e.as_record()
    return {"value": record["point"], "low": record["low"], "high": record["high"]}


def _shown(name: str, e: Estimate) -> dict[str, Any]:
    """A figure as the record holds it; low and high are None where the documents bound nothing."""
    record = e.as_record()
    unit = UNITS.get(name) or UNITS[name.split()[0]]
    return {
        "figure": name, "value": record["point"], "low": record["low"], "high": record["high"], "unit": unit,
        "n": e.tokens, "documents": e.documents, "level": e.level, "method": e.method,
    }  # fmt: skip


def worst_tokens(scored: Scored, candidate: str, tokenizer: Any) -> list[dict[str, Any]]:
    """The SHOWN tokens of the largest KLD, largest first: {document, position, kld, before, token, p_reference, p_candidate}.

    before     the BEFORE tokens that precede it, decoded with special tokens visible
    tokenizer  None: there is none (a reference pack), and token ids stand for the text
    """
    import numpy as np

    own, arrays = scored.reference.arrays, scored.candidates[candidate].arrays
    found = []
    for at in np.argsort(-arrays["kld"], kind="stable")[:SHOWN]:
        row, position = int(own["row"][at]), int(own["position"][at])
        ids = scored.rows.tokens[row].tolist()
        found.append({
            "document": str(scored.rows.documents[row]),
            "position": position,
            "kld": float(arrays["kld"][at]),
            "before": _decoded(tokenizer, ids[max(0, position + 1 - BEFORE) : position + 1]),
            "token": _decoded(tokenizer, [int(own["label"][at])]),
            "p_reference": float(np.exp(-own["nll"][at])),
            "p_candidate": float(np.exp(-arrays["nll"][at])),
        })  # fmt: skip
    return found


def _decoded(tokenizer: Any | None, ids: list[int]) -> str:
    return "".join(f"<{one}>" for one in ids) if tokenizer is None else str(tokenizer.decode(ids))
