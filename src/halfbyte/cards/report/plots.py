"""Plots as inline SVG that follow the page: its text colour, its series colours, light or dark.

matplotlib writes fixed colours. Text and axes are therefore drawn in one odd colour, and each series in another, which are then
replaced by `currentColor` and CSS variables. Text stays text (`svg.fonttype: none`), so a page of plots weighs some tens of KB
and can be searched. No pyplot: no global state, no display.

The catch: matplotlib numbers its groups from 1 in every file; two inline drawings would share ids. They are removed, except
those that something refers to, which are hashed with a salt of the plot's own.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

INK = "#010203"
#: drawn -> what the page makes of it; five series are told apart by colour and by dash
SERIES = ("#010211", "#010222", "#010233", "#010244", "#010255")
DASHES = ("-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)))
SIZE = (5.4, 3.3)
#: KLD below this is drawn at this on logarithmic axes
LEAST = 1e-9

Series = Sequence[tuple[str, Any]]


def draw(name: str, paint: Callable[[Any], None]) -> str:
    """`<svg>...</svg>` of one pair of axes that `paint` fills."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {
        "svg.fonttype": "none", "svg.hashsalt": name, "font.family": "sans-serif", "font.size": 9,
        "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK, "xtick.color": INK, "ytick.color": INK,
        "axes.spines.top": False, "axes.spines.right": False, "grid.color": INK, "grid.alpha": 0.15,
        "text.parse_math": False, "legend.frameon": False, "legend.fontsize": 8,
    }  # fmt: skip
    with matplotlib.rc_context(style):
        figure = Figure(figsize=SIZE, layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        axes.grid(True)
        paint(axes)
        buffer = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    return _inline(buffer.getvalue(), name)


def _inline(svg: str, name: str) -> str:
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", body, count=1)
    body = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", body, count=1)
    body = body.replace("<svg", f'<svg role="img" aria-label="{name}"', 1)
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', body))
    body = re.sub(r' id="([^"]*)"', lambda match: match[0] if match[1] in used else "", body)
    body = body.replace(INK, "currentColor")
    for place, colour in enumerate(SERIES):
        body = body.replace(colour, f"var(--series-{place})")
    return body.strip()


def numbered(svg: str, number: int) -> str:
    """The same drawing with ids that no other drawing of the page has."""
    return re.sub(r'( id="|href="#|url\(#)', rf"\g<1>plot{number}-", svg)


def histogram(series: Series, floor: Any) -> str:
    """Tokens by KLD, on a logarithmic axis; the floor's tokens as a filled background. Zeros are named in the legend."""

    def paint(axes: Any) -> None:
        everything = [values for _, values in series] + ([floor] if floor is not None else [])
        high = max((float(v.max()) for v in everything if len(v)), default=1.0)
        low = max(min((float(v[v > 0].min()) for v in everything if (v > 0).any()), default=LEAST), LEAST)
        edges = np.geomspace(low, max(high, 10 * low), 41)
        if floor is not None and (floor > 0).any():
            weights = np.full(len(floor), 1 / len(floor))
            axes.hist(np.clip(floor, low, None), edges, weights=weights, color=INK, alpha=0.18, label="noise floor")
        for place, (name, values) in enumerate(series):
            zeros = float((values <= 0).mean())
            label = f"{name} ({zeros:.0%} exactly 0)" if zeros else name
            drawn = np.clip(values[values > 0], low, None)
            counts, _ = np.histogram(drawn, edges)
            axes.stairs(counts / max(len(values), 1), edges, label=label, **_style(place))
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda value, place: f"{value:g}")
        axes.set_xlabel("KL divergence of a token, nats")
        axes.set_ylabel("share of tokens")
        _legend(axes)

    return draw("KL divergence histogram", paint)


def window(series: Series, position: Any, floor: Any) -> str:
    """Mean KLD by place in the row: does the loss grow with context?"""

    def paint(axes: Any) -> None:
        places = np.unique(np.quantile(position, np.linspace(0, 1, min(13, len(position) + 1)), method="nearest"))
        which = np.clip(np.searchsorted(places, position, side="right") - 1, 0, max(len(places) - 2, 0))
        rows = [*series] if floor is None else [*series, ("noise floor", floor)]
        for place, (name, values) in enumerate(rows):
            means = [float(values[which == i].mean()) for i in np.unique(which)]
            middle = [float(position[which == i].mean()) for i in np.unique(which)]
            style = _style(place) if name != "noise floor" else {"color": INK, "alpha": 0.4}
            axes.plot(middle, means, marker="o", markersize=3, label=name, **style)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("position in the row, tokens (twelfths of all tokens)")
        axes.set_ylabel("mean KL divergence, nats")
        _legend(axes)

    return draw("KL divergence along the window", paint)


def buckets(series: Sequence[tuple[str, Sequence[Mapping[str, Any]]]]) -> str:
    """Mean KLD with interval by how sure the reference was."""

    def paint(axes: Any) -> None:
        rows = series[0][1]
        for place, (name, found) in enumerate(series):
            kept = [(at, row["kld"]) for at, row in enumerate(found) if row["kld"] is not None]
            x = [at + (place - (len(series) - 1) / 2) * 0.14 for at, _ in kept]
            y = [kld["value"] for _, kld in kept]
            down = [0.0 if kld["low"] is None else kld["value"] - kld["low"] for _, kld in kept]
            up = [0.0 if kld["high"] is None else kld["high"] - kld["value"] for _, kld in kept]
            style = {"color": SERIES[place % len(SERIES)], "fmt": "os^Dv"[place % 5], "capsize": 3, "markersize": 4}
            axes.errorbar(x, y, [down, up], label=name, **style)
        labels = [f"{row['from']:g} to {row['to']:g}\nn = {row['n']:,}" for row in rows]
        axes.set_xticks(range(len(rows)), labels)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("reference's top probability")
        axes.set_ylabel("mean KL divergence, nats")
        _legend(axes)

    return draw("KL divergence by confidence", paint)


Rows = Sequence[Mapping[str, Any]]


def layers(series: Sequence[tuple[str, int, Rows, Rows]]) -> str:
    """SQNR in dB, up is better: of each layer's changed weights, and of the residual stream after it.

    (name, place among the candidates, layers of weights, points of the residual, each perhaps empty). Of the residual the median
    over positions is drawn: the pooled figure follows a few huge activations (halfbyte.evaluator.scoring.residuals).
    """

    def paint(axes: Any) -> None:
        for name, place, weights, residual in series:
            for what, marker, found, key in (
                ("weights", "o", weights, "sqnr_db"),
                ("residual", "x", residual, "median_db"),
            ):
                kept = [row for row in found if row["layer"] is not None and row[key] is not None]
                x, y = [row["layer"] for row in kept], [row[key] for row in kept]
                if kept:
                    axes.plot(x, y, marker=marker, markersize=3, label=f"{name}, {what}", **_style(place))
        floor = [row for _, _, _, points in series[:1] for row in points if row["floor_db"] is not None]
        if floor:
            x, y = [row["layer"] for row in floor], [row["floor_db"] for row in floor]
            axes.plot(x, y, marker="x", markersize=3, label="noise floor, residual", color=INK, alpha=0.4)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_xlabel("layer")
        axes.set_ylabel("SQNR, dB")
        _legend(axes)

    return draw("Error of weights and residual by layer", paint)


def pareto(points: Sequence[tuple[str, int, int, Mapping[str, Any]]]) -> str:
    """Mean KLD over bytes, (name, place among the candidates, bytes, figure); down and left is better."""

    def paint(axes: Any) -> None:
        for name, place, size, kld in points:
            value = max(kld["value"], LEAST)
            down = 0.0 if kld["low"] is None else max(value - max(kld["low"], LEAST), 0.0)
            up = 0.0 if kld["high"] is None else max(kld["high"] - value, 0.0)
            style = {"color": SERIES[place % len(SERIES)], "fmt": "os^Dv"[place % 5], "capsize": 3}
            label = f"{name} (exactly 0)" if kld["value"] == 0 else name
            axes.errorbar([size / 2**30], [kld["value"]], [[down], [up]], label=label, **style)
        axes.set_ylim(bottom=0)
        axes.set_xlim(0, 1.08 * max(size for _, _, size, _ in points) / 2**30)
        axes.set_xlabel("weight files, GiB")
        axes.set_ylabel("mean KL divergence, nats")
        _legend(axes)

    return draw("KL divergence over size", paint)


def interaction(lines: Sequence[tuple[str, float, float]], metric: str) -> str:
    """(base, full precision, quantized): parallel lines mean that training changed nothing about quantization."""

    def paint(axes: Any) -> None:
        for place, (name, before, after) in enumerate(lines):
            axes.plot([0, 1], [before, after], marker="o", label=name, **_style(place))
        axes.set_xticks([0, 1], ["full precision", "quantized"])
        axes.set_xlim(-0.25, 1.25)
        axes.set_ylabel(metric)
        _legend(axes)

    return draw("Interaction of base and precision", paint)


def _legend(axes: Any) -> None:
    """Above the axes, where no line can run through it."""
    axes.figure.legend(loc="outside upper left", ncols=2)


def _style(place: int) -> dict[str, Any]:
    return {"color": SERIES[place % len(SERIES)], "linestyle": DASHES[place % len(DASHES)]}
