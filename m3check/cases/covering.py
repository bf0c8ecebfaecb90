"""Writes the generated case lists: `python -m m3check.cases.covering` makes m3check/data/{ci,full}.txt anew.

A greedy search in the manner of AETG (Cohen, Dalal, Fredman, Patton 1997): each new case starts from a pair of values
that nothing covers yet and takes, axis by axis, the value that covers most new pairs; the best of some tries is kept. A
value that providers often refuse hides the others of its case, which then count for pairs with that value only. That every
pair is covered is proved by tests/test_cases_coverage.py from the lists alone.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from itertools import combinations
from typing import Any

from m3check.cases import axes
from m3check.cases.cost import cost
from m3check.cases.ident import case_id
from m3check.cases.tiers import DATA, listed_cases
from m3check.cases.validity import complaint
from m3check.types import SPARSE, Case

Pair = tuple[tuple[str, Any], tuple[str, Any]]

TRIES = 40
RESTARTS = {"ci": 4, "full": 1}
"""Whole searches of which the shortest list is kept."""

PASSES = {"ci": 1, "full": 2}
"""How often each pair is covered: again in other company from the second time on, but for values often refused."""

MOST_SECONDS = {"ci": ("interpreted", 5.0), "full": ("device", 0.6)}


def legal_pairs(op: str, tier: str) -> set[Pair]:
    """All pairs of axis values of a tier that go together."""
    tried = axes.values(op, tier)
    return {
        ((a, x), (b, y))
        for a, b in combinations(sorted(tried), 2)
        for x in tried[a]
        for y in tried[b]
        if axes.excluded(op, {a: x, b: y}) is None
    }


def covered(case: Case) -> Iterator[Pair]:
    """The pairs that a case is evidence about; a probe, which asks one question only, is about none."""
    if case.fill not in axes.FILLS:
        return
    items = sorted(axes.point(case).items())
    hiding = {value for axis, value in items if axes.often_refused(case.op, axis, value)}
    for pair in combinations(items, 2):
        if hiding <= {value for _, value in pair}:
            yield pair


def uncovered(op: str, tier: str, cases: Iterable[Case]) -> set[Pair]:
    """The legal pairs of a tier that no case of `op` is evidence about."""
    return legal_pairs(op, tier) - {pair for case in cases if case.op == op for pair in covered(case)}


def cover(op: str, tier: str, known: list[Case], seed: int) -> list[Case]:
    """New cases which, with the known ones, cover every legal pair."""
    chance = random.Random(f"{op}/{tier}/{seed}")
    found: list[Case] = []
    for turn in range(PASSES[tier]):
        missing = uncovered(op, tier, known + found if turn == 0 else ())
        if turn > 0:
            missing = {pair for pair in missing if not any(axes.often_refused(op, *item) for item in pair)}
        while missing:
            case = _best(op, tier, missing, chance, {*known, *found})
            found.append(case)
            missing -= set(covered(case))
    return found


def _best(op: str, tier: str, missing: set[Pair], chance: random.Random, taken: set[Case]) -> Case:
    ordered = sorted(missing, key=repr)
    best: tuple[int, Case] | None = None
    for trial in range(50 * TRIES):
        if trial >= TRIES and best:
            break
        # Values that only three together cannot be had lead the greedy choice into dead ends; then luck alone decides.
        case = _grow(op, tier, chance.choice(ordered), missing if trial < TRIES else set(), chance)
        if case is None or case in taken:
            continue
        gain = sum(pair in missing for pair in covered(case))
        if gain and (best is None or gain > best[0]):
            best = gain, case
    if best is None:
        raise RuntimeError(f"{op}: no case covers any of {len(missing)} pairs, e.g. {ordered[0]}")
    return best[1]


def _grow(op: str, tier: str, start: Pair, missing: set[Pair], chance: random.Random) -> Case | None:
    at = dict(start)
    tried, wanted = axes.values(op, tier), {value for _, value in start}
    rest = [axis for axis in tried if axis not in at]
    chance.shuffle(rest)
    for axis in rest:
        choice: tuple[float, Any] | None = None
        for value in tried[axis]:
            if axes.excluded(op, {**at, axis: value}):
                continue
            if axes.often_refused(op, axis, value) and value not in wanted:
                continue
            gain = sum(tuple(sorted(((axis, value), item))) in missing for item in at.items()) + chance.random()
            if choice is None or gain > choice[0]:
                choice = gain, value
        if choice is None:
            return None
        at[axis] = choice[1]
    case = axes.build(op, at)
    evidence, most = MOST_SECONDS[tier]
    if case is None or complaint(case) or axes.point(case) != at or cost(case, evidence) > most:
        return None
    return case


def main() -> None:
    """Write the lists of all ops, each after what the smaller tiers have already."""
    known = listed_cases("smoke", "real")
    for tier in ("ci", "full"):
        new = []
        for op in SPARSE:
            searches = [cover(op, tier, known, turn) for turn in range(RESTARTS[tier])]
            new += sorted(searches, key=len)[0]
        lines = ["# Written by `python -m m3check.cases.covering`: every pair of axis values (see m3check/cases/axes.py)."]
        (DATA / f"{tier}.txt").write_text("\n".join([*lines, *map(case_id, new)]) + "\n", encoding="utf-8")
        known = known + new


if __name__ == "__main__":
    main()
