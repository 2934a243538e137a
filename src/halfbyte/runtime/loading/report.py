"""What became of every NF4 linear of a model, and why: `model.halfbyte` after `halfbyte.load`.

A fallback that nobody sees is a figure that nobody can explain, so each linear has an entry, whichever way it went.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

OURS, THEIRS = "halfbyte", "bitsandbytes"


@dataclass(frozen=True)
class Place:
    """One linear: its name in the model, whose code runs, the reason, the names it is stacked with, the paths by rows of x."""

    name: str
    path: str
    reason: str
    stacked: tuple[str, ...] = ()
    paths: str | None = None


@dataclass(frozen=True)
class Report:
    """All linears of a model, in its order.

    measuring_s  seconds spent on timing paths (0 when all were known from the disk)
    """

    places: tuple[Place, ...]
    device: str
    measuring_s: float = 0.0

    def of(self, path: str) -> tuple[Place, ...]:
        """Those that OURS or THEIRS runs."""
        return tuple(place for place in self.places if place.path == path)

    def summary(self) -> str:
        """One line for people."""
        if not self.places:
            return "no bitsandbytes 4-bit linears in this model"
        ours, theirs = self.of(OURS), self.of(THEIRS)
        stacks = sum(1 / (1 + len(place.stacked)) for place in ours)
        parts = [f"{len(ours)} by halfbyte in {round(stacks)} weights"] if ours else []
        if theirs:
            reasons = "; ".join(f"{count}: {why}" for why, count in Counter(p.reason for p in theirs).most_common())
            parts.append(f"{len(theirs)} by bitsandbytes ({reasons})")
        return "NF4 linears: " + ", ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """For JSON: counts, and the names under each reason."""
        groups: dict[tuple[str, str, str | None], list[str]] = {}
        for place in self.places:
            groups.setdefault((place.path, place.reason, place.paths), []).append(place.name)
        return {
            OURS: len(self.of(OURS)),
            THEIRS: len(self.of(THEIRS)),
            "stacked": sum(bool(place.stacked) for place in self.places),
            "measuring_s": round(self.measuring_s, 3),
            "reasons": [
                {"path": path, "reason": reason, "paths": paths, "modules": names}
                for (path, reason, paths), names in groups.items()
            ],
        }
