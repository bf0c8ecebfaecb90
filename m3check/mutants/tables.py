"""How a measurement is told: scores by provider and kind, what survived, and each mutant as data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from m3check.mutants.forms import Row
from m3check.mutants.mutant import Outcome

ALIVE = ("survived", "accepted", "unreached")
"""Verdicts that count against the score."""


def score(outcomes: Sequence[Outcome]) -> tuple[int, int]:
    """(killed, killed and alive): equivalent, invalid ones and those elsewhere are not counted, accepted ones are."""
    killed = sum(o.verdict == "killed" for o in outcomes)
    return killed, killed + sum(o.verdict in ALIVE for o in outcomes)


def summary(outcomes: Sequence[Outcome]) -> str:
    """A table: a row for each provider and kind, a column for each verdict."""
    from tabulate import tabulate

    rows = []
    words = ("killed", "survived", "accepted", "unreached", "elsewhere", "equivalent", "invalid")
    judged = [o for o in outcomes if o.mutant.kind != "control"]
    for provider in dict.fromkeys(o.mutant.provider for o in judged):
        mine = [o for o in judged if o.mutant.provider == provider]
        for kind in (*dict.fromkeys(o.mutant.kind for o in mine), "all generic"):
            some = [o for o in mine if o.mutant.kind == kind or (kind == "all generic" and o.mutant.kind != "catalogue")]
            if some:
                counts = Counter(o.verdict for o in some)
                rows.append([provider, kind, len(some), *(counts[word] or "" for word in words), percent(some)])
    return tabulate(rows, headers=["provider", "kind", "mutants", *words, "score"], tablefmt="github")


def percent(outcomes: Sequence[Outcome]) -> str:
    """The share of those killed that count, e.g. `97.5 %`."""
    killed, counted = score(outcomes)
    return f"{100 * killed / counted:.1f} %" if counted else ""


def checks(outcomes: Sequence[Outcome]) -> str:
    """Which checks killed how many."""
    counts = Counter(o.check for o in outcomes if o.verdict == "killed")
    return ", ".join(f"{name} {count}" for name, count in counts.most_common())


def line(outcome: Outcome) -> str:
    """One mutant in one line."""
    mutant = outcome.mutant
    by = f" by {outcome.check} on {outcome.case}" if outcome.check else ""
    met = f" after {outcome.cases} cases" if outcome.verdict == "survived" else ""
    name = f"{mutant.name}: " if mutant.kind in ("catalogue", "control") else ""
    return f"{outcome.verdict}{by}{met}: {mutant.provider} {mutant.kind} {mutant.key} {name}{mutant.text}"


def without(row: Row) -> str:
    """A catalogue row that could not be made here, and why."""
    where = {"device": "shows on a device", "elsewhere": "not these ops"}.get(row.where, "a form that these kernels lack")
    return f"{row.name} {row.defect}: {where}" + (f": {row.reason}" if row.reason else "")


def data(outcome: Outcome) -> dict[str, Any]:
    """One mutant as JSON-ready data."""
    mutant = outcome.mutant
    return {
        "provider": mutant.provider,
        "kind": mutant.kind,
        "name": mutant.name,
        "text": mutant.text,
        "key": mutant.key,
        "verdict": outcome.verdict,
        "check": outcome.check,
        "case": outcome.case,
        "detail": outcome.detail,
        "cases": outcome.cases,
    }
