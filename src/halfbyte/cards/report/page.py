"""Record and vectors -> OUT/report.html, in the order in which a sceptic asks.

    1 verdict   2 grid   3 sizes   4 fidelity   5 tasks   6 plots   7 protocol   8 self-tests   9 worst tokens

Nothing is computed here that the record does not hold, except what is drawn: plots are made of the vectors, and vectors whose
mean is not the record's figure belong to another run and are refused.
"""

from __future__ import annotations

import itertools
import re
import shlex
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from halfbyte.cards.report import plots, tasks
from halfbyte.cards.report.frames import frames
from halfbyte.cards.report.section import section
from halfbyte.cards.report.words import (
    ABSENT,
    drift,
    figure_of,
    frame_lines,
    gigabytes,
    interval,
    methods,
    number,
    percent,
    sentence,
    short_name,
    untouched,
)
from halfbyte.errors import SourceError, UsageError
from halfbyte.records import read_record, write_text_atomic

PAGE, SECTION = "report.html", "report.md"
_VECTORS = re.compile(r"vectors/[A-Za-z0-9][A-Za-z0-9._-]*\.npz")
_FIGURES = (
    "kld mean", "kld median", "kld p90", "kld p99", "kld p99.9", "top-1 agreement", "rms delta p", "delta nll", "ppl", "ppl ratio",
)  # fmt: skip
_LAYERS = (
    "Where the loss enters, layer by layer; higher is better. Circles: the weights of the layer. Crosses: the residual stream after it (median of "
    "the positions), under the base's first protocol; in grey the noise floor's."
)
Vectors = Mapping[str, Any]


def report(out: str | Path) -> Path:
    """Write report.html and report.md of the evaluation in `out`; returns the path of the page.

    raises  UsageError (no evaluation there), SourceError (vectors are missing or of another run)
    """
    folder = Path(out)
    record = read_record(folder, "evaluate")
    if record is None:
        raise UsageError("no evaluation in this folder", where=str(folder), todo="halfbyte evaluate --out FOLDER")
    write_text_atomic(folder / PAGE, render(record, folder))
    write_text_atomic(folder / SECTION, section(record))
    return folder / PAGE


def render(record: Mapping[str, Any], folder: Path) -> str:
    """The page as text."""
    references = {base["name"]: base["reference"] for base in record["bases"]}
    verdicts = [
        {"text": sentence(block, candidate, references[block["base"]]), "verdict": candidate["verdicts"][0]["verdict"]}
        for block in record["protocols"]
        for candidate in block["candidates"]
    ] + tasks.verdicts(record)
    values = {
        "title": ", ".join(short_name(base["reference"]) for base in record["bases"]),
        "record": record,
        "verdicts": verdicts,
        "grid": _grid(record),
        "effects": _effects(record),
        "sizes": _sizes(record), "methods": methods(record),
        "frames": frames(record),
        "proofs": [
            {"text": f"{short_name(c['id'])}: {untouched(c.get('areas'))}.", "same": all(a["same"] for a in (c.get("areas") or {}).get("areas", ()))}
            for base in record["bases"] for c in base["candidates"]
        ],
        "fidelity": [_fidelity(block) for block in record["protocols"]],
        "tasks": [tasks.table_of(block) for block in record.get("tasks", ())],
        "task_effects": tasks.effects(record),
        "plots": _plots(record, folder),
        "command": shlex.join(record["command"]),
        "worst": [
            {"name": short_name(c["candidate"]), "protocol": block["protocol"], "base": block["base"], "tokens": c["worst"]}
            for block in record["protocols"] for c in block["candidates"] if c["kld_max"] > 0
        ],
    }  # fmt: skip
    text: str = _template().render(values)
    return text


def _grid(record: Mapping[str, Any]) -> dict[str, Any]:
    """Bases by precision under the first protocol (None: only tasks were asked): reference PPL, then each kind's mean KLD."""
    protocol = record["protocols"][0]["protocol"] if record["protocols"] else None
    kinds = list(dict.fromkeys(["NF4", *(c["kind"] for base in record["bases"] for c in base["candidates"])]))
    rows = []
    for base in record["bases"]:
        block = next((b for b in record["protocols"] if b["base"] == base["name"] and b["protocol"] == protocol), None)
        cells = [f"PPL {interval(block['reference'][0])}" if block else ABSENT]
        for kind in kinds:
            ids = [c["id"] for c in base["candidates"] if c["kind"] == kind]
            found = [c for c in (block["candidates"] if block else []) if c["candidate"] in ids]
            texts = [f"KLD {interval(figure_of(c, 'kld mean'))}" for c in found]
            cells.append("; ".join(texts) or ABSENT)
        rows.append({"name": f"{base['name']}: {short_name(base['reference'])}", "cells": cells})
    if len(rows) == 1:
        rows.append({"name": "a second base (--base NAME=REF)", "cells": [ABSENT] * (len(kinds) + 1)})
    return {"protocol": protocol, "kinds": ["its reference", *kinds], "rows": rows}


def _effects(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for every effect; those of the design that the record lacks are printed too."""
    rows = [
        {"effect": e["effect"], "where": f"{e['protocol']}, {e['metric']}, {e['precision']}", "value": interval(e), "verdict": e["verdict"]}
        for e in record["effects"]
    ]  # fmt: skip
    there = {e["effect"] for e in record["effects"]}
    missing = [name for name in ("D(vanilla)", "D(QAT)", "T", "I") if name not in there]
    return rows + [{"effect": name, "where": "", "value": ABSENT, "verdict": ""} for name in missing]


def _sizes(record: Mapping[str, Any]) -> list[dict[str, str]]:
    rows = []
    for base in record["bases"]:
        rows.append(_size(base["reference"], base["kind"], base["size"], None))
        rows += [_size(c["id"], c["kind"], c["size"], c["weights"]) for c in base["candidates"]]
    return rows


def _size(name: str, kind: str, size: Mapping[str, Any], weights: Mapping[str, Any] | None) -> dict[str, str]:
    tensors = ABSENT if weights is None else f"{weights['changed']:,} changed, {weights['identical']:,} identical"
    if weights is not None and weights["missing"]:
        tensors += f", {weights['missing']:,} not in both"
    return {
        "name": short_name(name), "kind": kind, "bytes": ABSENT if size["file_bytes"] is None else f"{size['file_bytes']:,}",
        "both": gigabytes(size["file_bytes"]), "bits": number(size["bits_per_weight"]),
        "how": "" if size["file_bytes"] is None else ("files" if size["counted"] else "computed from shapes"),
        "tensors": tensors, "sqnr": ABSENT if weights is None or weights["sqnr_db"] is None else f"{weights['sqnr_db']:.2f} dB",
    }  # fmt: skip


def _fidelity(block: Mapping[str, Any]) -> dict[str, Any]:
    """One protocol's table: a row a figure, a column a candidate."""
    candidates = block["candidates"]
    rows = []
    for name in _FIGURES:
        found = [figure_of(c, name) for c in candidates]
        rows.append((name, [interval(f) for f in found]))
        if name == "kld p99.9":
            rows.append(("kld max (no interval)", [number(c["kld_max"]) for c in candidates]))
    for which, figure in enumerate(("kld mean", "delta nll")):
        said = [next(v for v in c["verdicts"] if v["figure"] == figure) for c in candidates]
        rows.append((f"verdict on {figure}", [v["verdict"] for v in said]))
        if which == 0:
            floor = ["" if c["above_floor"] is None else ("yes" if c["above_floor"] else "no") for c in candidates]
            rows.append(("above the noise floor", [text or ABSENT for text in floor]))
    rows.append(("residual stream against the reference's", [drift(c.get("residual")) for c in candidates]))
    sure = [f"kld, p {b['from']:g} to {b['to']:g}" for b in candidates[0]["buckets"]] if candidates else []
    buckets = [(name, [_bucket(c["buckets"][at]) for c in candidates]) for at, name in enumerate(sure)]
    return {
        "block": block, "names": [short_name(c["candidate"]) for c in candidates], "rows": rows, "buckets": buckets,
        "frame": frame_lines(block), "floor": interval(block["floor"]), "ppl": interval(block["reference"][0]),
        "files": ", ".join(f"{file['name']} (sha256 {file['sha256'][:16]})" for file in block["data"]),
        "comparisons": [
            f"{short_name(c['candidate'])} minus {short_name(c['against'])}: mean KLD {interval(c)} nats, {c['verdict']}"
            for c in block["comparisons"]
        ],
    }  # fmt: skip


def _bucket(found: Mapping[str, Any]) -> str:
    if not found["n"]:
        return "no tokens"
    return f"{interval(found['kld'])}; top-1 {percent(found['agreement'])}; n = {found['n']:,}"


def _plots(record: Mapping[str, Any], folder: Path) -> list[dict[str, Any]]:
    """Sections of drawings: {"title", "drawings": [{"caption", "svg"}]}."""
    from markupsafe import Markup

    found: list[dict[str, Any]] = []
    # a model that knows nothing tests the harness; on a linear axis it would press all others flat
    harness = {c["id"] for base in record["bases"] for c in base["candidates"] if c["kind"] == "uniform"}
    for block in record["protocols"]:
        if not block["candidates"]:
            continue
        own, candidates = _vectors(folder, block["vectors"]["file"]), _ordered(block["candidates"], harness)
        content = ~own["frame"] if "frame" in own else np.ones(len(own["nll"]), bool)
        series = [(_label(c["candidate"]), _checked(folder, c, content)) for c in candidates]
        floor = own["floor_kld"][content] if "floor_kld" in own else None
        told = sum(c["candidate"] not in harness for c in candidates) or len(candidates)
        bars = [(_label(c["candidate"]), c["buckets"]) for c in candidates[:told]]
        drawn = [
            ("Tokens by KL divergence. In the grey area and left of it nothing can be told from noise.", plots.histogram(series, floor)),
            ("Along the window: a loss that grows with context rises to the right.", plots.window(series[:told], own["position"][content], floor)),
            ("By how sure the reference was, with 95 % intervals. Where a cap is missing, the documents bound nothing.", plots.buckets(bars)),
        ]  # fmt: skip
        found.append({"title": f"{block['protocol']}, base {block['base']}", "drawings": drawn})
    for base in record["bases"]:
        layered = _layered(record, base, harness)
        drawn = [(_LAYERS, plots.layers(layered))] if layered else []
        points = _points(record, base, harness)
        if points:
            drawn.append(("Loss over size; nearer to the corner is better.", plots.pareto(points)))
        found.append({"title": f"base {base['name']}", "drawings": drawn})
    found += [{"title": "2 x 2", "drawings": [drawn]} for drawn in _interactions(record)]
    number = itertools.count()
    for part in found:
        part["drawings"] = [
            {"caption": caption, "svg": Markup(plots.numbered(svg, next(number)))} for caption, svg in part["drawings"]
        ]
    return found


def _ordered(candidates: Sequence[Mapping[str, Any]], harness: Collection[str]) -> list[Mapping[str, Any]]:
    """Models that test the harness last: a colour then means the same candidate in every drawing, with or without them."""
    return sorted(candidates, key=lambda c: c.get("candidate", c.get("id")) in harness)


def _layered(
    record: Mapping[str, Any], base: Mapping[str, Any], harness: Collection[str]
) -> list[tuple[str, int, Any, Any]]:
    """(name, place, layers of weights, points of the residual under the base's first protocol) of what has either."""
    block = next((b for b in record["protocols"] if b["base"] == base["name"]), None)
    found = []
    for place, c in enumerate(_ordered(base["candidates"], harness)):
        if c["id"] in harness:
            continue
        weights = [row for row in c["weights"]["layers"] if row["layer"] is not None] if c["weights"] else []
        residual = [m.get("residual") for m in (block["candidates"] if block else []) if m["candidate"] == c["id"]]
        points = [p for p in residual[0]["points"] if p["layer"] is not None] if residual and residual[0] else []
        if weights or any(not point["identical"] for point in points):
            found.append((_label(c["id"]), place, weights, points))
    return found


def _label(spec: str) -> str:
    """Name of a series."""
    name = short_name(spec)
    return f" {name}" if name.startswith("_") else name  # matplotlib leaves out labels that begin so


def _points(
    record: Mapping[str, Any], base: Mapping[str, Any], harness: Collection[str]
) -> list[tuple[str, int, int, Mapping[str, Any]]]:
    """(name, place, bytes, mean KLD under the base's first protocol)."""
    block = next((b for b in record["protocols"] if b["base"] == base["name"]), None)
    points: list[tuple[str, int, int, Mapping[str, Any]]] = []
    for place, candidate in enumerate(_ordered(base["candidates"], harness)):
        size = candidate["size"]["file_bytes"]
        found = [c for c in (block["candidates"] if block else []) if c["candidate"] == candidate["id"]]
        if size is not None and found and (kld := figure_of(found[0], "kld mean")):
            points.append((_label(candidate["id"]), place, size, kld))
    return points


def _interactions(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """One drawing for each protocol and precision that has both D: NLL's if there is one, else KLD's from 0."""
    cells: dict[tuple[str, str, str], dict[str, Mapping[str, Any]]] = {}
    for e in record["effects"]:
        cells.setdefault((e["protocol"], e["precision"], e["metric"]), {})[e["effect"]] = e
    drawn = []
    for (protocol, precision, metric), found in cells.items():
        if metric != "kld mean" or not {"D(vanilla)", "D(QAT)"} <= found.keys():
            continue
        lines = [
            (_label(found[f"D({role})"]["bases"][role]), 0.0, found[f"D({role})"]["value"])
            for role in ("vanilla", "QAT")
        ]
        svg = plots.interaction(lines, "mean KL divergence, nats")
        drawn.append(
            (f"{protocol}, {precision}: parallel lines would mean I = 0. I = {interval(found.get('I'))}.", svg)
        )
    return drawn


def _checked(folder: Path, candidate: Mapping[str, Any], content: Any) -> Any:
    """The candidate's KLD vector, of `content` alone; raises SourceError unless its mean is the record's figure."""
    kld = _vectors(folder, candidate["vectors"]["file"])["kld"]
    kld = kld[content] if kld.shape == content.shape else kld
    figure = figure_of(candidate, "kld mean")
    if figure is None or len(kld) != figure["n"] or not np.isclose(kld.mean(), figure["value"], rtol=1e-9, atol=1e-12):
        raise SourceError(
            "its vectors are not those that the record speaks of",
            where=f"{folder / candidate['vectors']['file']}",
            todo="run halfbyte evaluate again",
        )
    return kld


def _vectors(folder: Path, name: str) -> Vectors:
    """Arrays of a vectors file; raises SourceError if there is none, or its name leads elsewhere."""
    import zipfile

    if not _VECTORS.fullmatch(name):
        raise SourceError(
            f"{name[:120]!r} is not the name of a vectors file", where=str(folder), todo="do not trust it"
        )
    try:
        with np.load(folder / name, allow_pickle=False) as file:
            return {key: file[key] for key in file.files}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise SourceError(
            f"cannot be read ({error})", where=str(folder / name), todo="run halfbyte evaluate again"
        ) from None


def _template() -> Any:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("halfbyte.cards", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    from halfbyte.cards.markdown import visible

    environment.filters |= {"number": number, "visible": visible, "short": short_name}
    return environment.get_template("report.html.j2")
