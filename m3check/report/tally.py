"""What the renderers and the exit code count alike: which results are red, and how many of each status there are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from m3check.types import RED, STRICTLY_RED, Breach, Record, Result, Status

GATE = "gate"
"""Name in a record's environment of what ledger and floors said: ledger, known, floors, breaches, waiting."""

SUFFICES: Mapping[str, tuple[str, ...]] = {  # what ran on the hardware was also compiled for it, and computed
    "device": ("device",),
    "interpreted": ("interpreted", "device"),
    "compiled": ("compiled", "device"),
}
"""Which kinds of evidence do where one is asked for. Interpreting and compiling show different things: neither replaces the
other."""


def red_word(result: Result, strict: bool) -> str:
    """The status that makes a result red, or an empty string."""
    if result.status in RED:
        return result.status.value
    if strict and result.status in STRICTLY_RED:
        return result.status.value
    if result.status is Status.KNOWN:
        return ""  # whatever its findings say, the ledger has excused it
    if strict and any(f.status in STRICTLY_RED for f in result.findings):
        return Status.NOTED.value
    return ""


def verdict(record: Record) -> str:
    """The exit code in a word or two."""
    return {0: "green", 1: "RED", 2: "interrupted", 5: "nothing ran"}.get(record.exit.code, "broken off")


def strict(record: Record) -> bool:
    """Whether the run was asked to be strict, so that reports call red what made its exit code."""
    return "--strict" in record.command.split() or bool(record.environment.get("strict"))


def summarise(results: Iterable[Result]) -> dict[str, int]:
    """{status: count} in the order of Status, without zeros; `noted` counts results that have notes beside their status."""
    counts: Counter[Status] = Counter()
    for result in results:
        counts[result.status] += 1
        counts[Status.NOTED] += any(f.status is Status.NOTED for f in result.findings)
    return {status.value: counts[status] for status in Status if counts[status]}


def gate(record: Record) -> Mapping[str, Any]:
    """What a record says of its gate; empty where none was asked for."""
    facts = record.environment.get(GATE)
    return facts if isinstance(facts, Mapping) else {}


def breaches(record: Record) -> tuple[Breach, ...]:
    """What makes a record red although no result is."""
    told = gate(record).get("breaches")
    found = []
    for each in told if isinstance(told, list) else ():
        if isinstance(each, Mapping):  # a record is a file that anyone may have written
            line = each.get("line")
            found.append(Breach(str(each.get("sentence")), str(each.get("file", "")), line if isinstance(line, int) else 0))
    return tuple(found)
