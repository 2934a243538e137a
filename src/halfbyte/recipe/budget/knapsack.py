"""The multiple-choice knapsack, solved exactly: one option of each group, fewest nats in so many bytes.

    minimise  sum of cost(group, chosen option)    subject to    sum of bytes(group, chosen option) <= capacity

Bytes are integers, costs are integers of 1e-12 nats, so sums are exact and so is the answer: no other choice within the capacity
costs less. How (Nemhauser and Ullmann 1969, with bounds):

    states     one group after the other, every partial choice as (bytes, cost); one that is no cheaper than another of at
               most its size can be forgotten, whatever follows
    lower      the linear relaxation of the groups to come: steps along each group's lower convex hull, best cost per
    bound      byte first, the last step in part. A state that cannot beat the best answer known, even so, is forgotten
    upper      the same steps, whole ones only: an answer. The best of them over all states is the best answer known
    bound
    order      groups far from the relaxation's price of a byte come first: their options but one are cut at once, and the
               few in doubt come last

Cost. A dense table over capacity / gcd of the sizes does not exist here: sizes of one model's weights differ by the digits
in their quant_state texts, the gcd is 1 byte. States do: 240 groups of a 31B's shapes with drawn costs leave at most some thousands at
a time (tests/recipe/budget/test_knapsack.py), well under a second. The catch: no polynomial bound is known; costs made to
be contrary (each proportional to its bytes) could leave millions, and `MOST_STATES` says so instead of filling the memory.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from halfbyte.errors import PlanError

#: integers a nat
NAT = 10**12
#: more partial choices at a time than this are an error (about 1 GB)
MOST_STATES = 20_000_000
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Option:
    """One way to store a group: bytes, and what it costs in units of 1 / NAT nats (not negative)."""

    nbytes: int
    cost: int


@dataclass(frozen=True)
class Choice:
    """The answer: the index of the chosen option in each group, their sums, and how many partial choices were held at most."""

    chosen: tuple[int, ...]
    nbytes: int
    cost: int
    states: int


def solve(groups: Sequence[Sequence[Option]], capacity: int) -> Choice | None:
    """The cheapest choice of one option from each group within `capacity` bytes; None if the smallest is larger.

    raises PlanError if more than MOST_STATES partial choices would have to be compared
    """
    useful = [_useful(options) for options in groups]
    least = sum(options[kept[0]].nbytes for options, kept in zip(groups, useful, strict=True))
    if least > capacity:
        return None
    steps = [_hull(options, kept) for options, kept in zip(groups, useful, strict=True)]
    order = _order(steps, capacity - least)
    search = _Search([_relative(groups[g], useful[g]) for g in order], [steps[g] for g in order], capacity - least)
    picks = search.run()
    chosen = [0] * len(groups)
    for place, g in enumerate(order):
        chosen[g] = useful[g][picks[place]]
    taken = [options[at] for options, at in zip(groups, chosen, strict=True)]
    return Choice(tuple(chosen), sum(o.nbytes for o in taken), sum(o.cost for o in taken), search.most)


def _useful(options: Sequence[Option]) -> list[int]:
    """Indices by ascending bytes, each cheaper than all that are smaller: the others are never needed."""
    found: list[int] = []
    for at in sorted(range(len(options)), key=lambda i: (options[i].nbytes, options[i].cost, i)):
        if not found or options[at].cost < options[found[-1]].cost:
            found.append(at)
    return found


def _relative(options: Sequence[Option], kept: Sequence[int]) -> tuple[Ints, Ints]:
    """(bytes above the smallest, cost) of the useful options."""
    base = options[kept[0]].nbytes
    return np.array([options[i].nbytes - base for i in kept]), np.array([options[i].cost for i in kept])


def _hull(options: Sequence[Option], kept: Sequence[int]) -> list[tuple[int, int]]:
    """Steps (bytes, cost saved) along the lower convex hull, the best saving a byte first."""
    corners: list[Option] = []
    for at in kept:
        new = options[at]
        while len(corners) > 1:
            a, b = corners[-2], corners[-1]
            if (a.cost - b.cost) * (new.nbytes - b.nbytes) > (b.cost - new.cost) * (b.nbytes - a.nbytes):
                break
            corners.pop()
        corners.append(new)
    return [(b.nbytes - a.nbytes, a.cost - b.cost) for a, b in itertools.pairwise(corners)]


def _order(steps: Sequence[Sequence[tuple[int, int]]], room: int) -> list[int]:
    """Groups, those whose steps all lie far from the price at which the relaxation runs out of room first."""
    ranked = sorted((s for group in steps for s in group), key=lambda s: -s[1] / s[0])
    price = 0.0
    for size, saved in ranked:
        if size > room:
            price = saved / size
            break
        room -= size
    if not price:  # everything fits: any order will do
        return list(range(len(steps)))

    def doubt(group: int) -> float:
        return min((abs(float(np.log(saved / size / price))) for size, saved in steps[group]), default=np.inf)

    return sorted(range(len(steps)), key=lambda g: (-doubt(g), g))


class _Search:
    """The states, group after group; sizes are above the smallest choice, so `room` is what may be spent."""

    def __init__(
        self, options: Sequence[tuple[Ints, Ints]], steps: Sequence[Sequence[tuple[int, int]]], room: int
    ) -> None:
        self.options, self.room = options, room
        # by exact ratios: within a group the order of the steps must be the hull's
        ranked = sorted(
            ((size, saved, place) for place, group in enumerate(steps) for size, saved in group),
            key=lambda step: (-Fraction(step[1], step[0]), step[2]),
        )
        self.ranked = np.array(ranked, np.int64).reshape(-1, 3)
        self.base = np.array([int(cost[0]) for _, cost in options], np.int64)
        self.best: int | None = None
        self.answer = (-1, 0)  # how many groups are decided by states, and which state: whole steps do the rest
        self._steps_left = 0
        self.most = 1
        self._from: list[tuple[Ints, NDArray[np.int8]]] = []

    def run(self) -> list[int]:
        """The index of the chosen option of each group."""
        size, cost = np.zeros(1, np.int64), np.zeros(1, np.int64)
        size, cost, _ = self._bounded(0, size, cost)
        for place, (sizes, costs) in enumerate(self.options):
            parents, picks = np.divmod(np.arange(len(size) * len(sizes)), len(sizes))
            more, worth = size[parents] + sizes[picks], cost[parents] + costs[picks]
            kept = _undominated(more, worth, self.room)
            size, cost, inside = self._bounded(place + 1, more[kept], worth[kept])
            kept = kept[inside]
            self._from.append((parents[kept], picks[kept].astype(np.int8)))
            self.most = max(self.most, len(kept))
            if len(kept) > MOST_STATES:
                raise PlanError(
                    f"{len(kept):,} partial choices of {place + 1} groups, none better than another",
                    where="--budget",
                    todo="use a slightly different budget",
                )
            if not len(kept):  # nothing can beat the best answer known
                break
        return self._picks()

    def _bounded(self, decided: int, size: Ints, cost: Ints) -> tuple[Ints, Ints, NDArray[np.bool_]]:
        """Drop what cannot beat the best answer, which this may improve; also which states stay."""
        spent, saved = self._ladder(decided)
        rest = int(self.base[decided:].sum())
        left = self.room - size
        whole = np.searchsorted(spent, left, side="right") - 1
        answers = cost + rest - saved[whole]
        at = int(answers.argmin())
        if self.best is None or int(answers[at]) < self.best:
            self.best, self.answer, self._steps_left = int(answers[at]), (decided, at), int(whole[at])
        lower = cost + rest - np.interp(left, spent, saved)
        # costs are whole numbers: to be better is to be better by one; half a unit is far above rounding here
        inside = lower < self.best - 0.5
        if self.answer[0] == decided:  # its place among the states that stay; it may not be one of them
            inside[self.answer[1]] = True
            self.answer = (decided, int(inside[: self.answer[1]].sum()))
        return size[inside], cost[inside], inside

    def _ladder(self, decided: int) -> tuple[Ints, Ints]:
        """Bytes spent and cost saved after each step of the groups to come, best first."""
        ahead = self.ranked[self.ranked[:, 2] >= decided, :2]
        summed: Ints = np.concatenate([np.zeros((1, 2), np.int64), ahead.cumsum(axis=0)])
        return summed[:, 0], summed[:, 1]

    def _picks(self) -> list[int]:
        decided, state = self.answer
        picks = [0] * len(self.options)
        for place in range(decided - 1, -1, -1):
            parents, picked = self._from[place]
            picks[place] = int(picked[state])
            state = int(parents[state])
        reached = np.zeros(len(self.options), np.int64)
        ahead = self.ranked[self.ranked[:, 2] >= decided][: self._steps_left]
        np.add.at(reached, ahead[:, 2], ahead[:, 0])
        for place in range(decided, len(self.options)):
            picks[place] = int(np.flatnonzero(self.options[place][0] == reached[place])[0])
        return picks


def _undominated(size: Ints, cost: Ints, room: int) -> Ints:
    """Indices, by ascending size, of states within `room` that are cheaper than every smaller one."""
    fits = np.flatnonzero(size <= room)
    order = fits[np.lexsort((cost[fits], size[fits]))]
    ordered = cost[order]
    before = np.concatenate([[np.iinfo(np.int64).max], np.minimum.accumulate(ordered)[:-1]])
    found: Ints = order[ordered < before]
    return found
