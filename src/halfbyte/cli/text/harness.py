"""A record of `halfbyte lm-eval` as a person reads it on a terminal: a row a metric, flips both ways, the verdict last."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from halfbyte.cards.report import tasks
from halfbyte.cards.report.words import interval, number
from halfbyte.cli.text.evaluation import table


def render(record: Mapping[str, Any]) -> str:
    """Text of an lm-eval record."""
    heading = f"{record['candidate']['label']} against {record['reference']['label']}, lm-eval {record['lm_eval']}"
    rows: list[tuple[str, ...]] = [
        ("task", "metric", "n", "reference", "candidate", "lost", "gained", "p", "difference", "verdict")
    ]
    rows += [_row(task, found) for task in record["tasks"] for found in task["metrics"]]
    margin = f"margin {100 * record['settings']['margin']:g} points; intervals at 95 %"
    return "\n".join([heading, *table(rows), *_left_out(record), margin])


def _row(task: Mapping[str, Any], found: Mapping[str, Any]) -> tuple[str, ...]:
    name = found["metric"] if found["filter"] == "none" else f"{found['metric']}, {found['filter']}"
    flips = found["flips"]
    if flips is None:  # no right or wrong: means
        means = (number(found["reference"]["value"]), number(found["candidate"]["value"]))
        return (task["task"], name, f"{found['n']:,}", *means, "", "", "", interval(found["difference"]), "")
    return (
        task["task"], name, f"{found['n']:,}", tasks.share(found["reference"]), tasks.share(found["candidate"]),
        str(flips["only_reference"]), str(flips["only_candidate"]), number(flips["p"]), tasks.difference(flips), found["verdict"],
    )  # fmt: skip


def _left_out(record: Mapping[str, Any]) -> Iterator[str]:
    for task in record["tasks"]:
        for found in task["left_out"]:
            yield f"  {task['task']}, {found['metric']}: not compared, its values are no numbers"
