"""Records of one target made into one: the shards of a run, or the ops that ran on different machines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from m3check.report.tables import ran
from m3check.report.tally import strict, summarise
from m3check.types import Exit, M3CheckError, Record, Result

Key = tuple[str, str, str, str]
"""case, op, provider, evidence."""


def results_of(records: Sequence[Record]) -> tuple[Result, ...]:
    """All results, each (case, op, provider, evidence) once.

    A result that ran replaces a skip of the same case and provider; of two with the same verdict the later stays; two
    verdicts that differ raise M3CheckError, because a merge does not choose between them.
    """
    if len({record.arch for record in records}) > 1:
        names = ", ".join(dict.fromkeys(record.arch for record in records))
        raise M3CheckError(f"the records are of different targets ({names}); merge takes one target, show makes the matrix")
    found: dict[Key, Result] = {}
    for result in (result for record in records for result in record.results):
        key = (result.case, result.op, result.provider, result.evidence)
        earlier = found.get(key)
        if earlier is None or not ran(earlier):
            found[key] = result
        elif ran(result):
            if result.status is not earlier.status:
                raise M3CheckError(
                    f"{result.case} on {result.provider} is {earlier.status} in one record and {result.status} in another; "
                    "a merge does not choose between verdicts: leave one of the records out"
                )
            found[key] = result
    done = {key[:3] for key, result in found.items() if ran(result)}
    return tuple(result for key, result in found.items() if ran(result) or key[:3] not in done)


def merge(records: Sequence[Record], results: tuple[Result, ...], exit: Exit, command: str) -> Record:
    """The record of the merged results; facts on which the records differ are kept side by side."""
    last = records[-1]
    facts = _environments([record.environment for record in records])
    if any(strict(record) for record in records):
        facts["strict"] = True  # the command no longer says so
    return Record(
        schema_version=last.schema_version,
        tool=last.tool,
        arch=last.arch,
        environment=facts,
        command=command,
        exit=exit,
        summary=summarise(results),
        results=results,
    )


def _environments(facts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    names = dict.fromkeys(name for each in facts for name in each)
    together: dict[str, Any] = {}
    for name in names:
        values = [each[name] for each in facts if name in each]
        if name == "power":
            continue  # it counts cases, which records may share
        if all(isinstance(value, Mapping) for value in values):
            together[name] = _environments(values)
        elif all(value == values[0] for value in values):
            together[name] = values[0]
        elif name == "seconds":
            together[name] = round(sum(values), 1)
        elif name == "date":
            together[name] = min(values)
        else:
            together[name] = " / ".join(dict.fromkeys(str(value) for value in values))
    return together
