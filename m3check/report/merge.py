"""Records of one target made into one: the shards of a run, or the ops that ran on different machines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from m3check.report.tables import computed, ran
from m3check.report.tally import strict, summarise
from m3check.types import Exit, M3CheckError, Record, Result

Key = tuple[str, str, str, str]
"""case, op, provider, evidence."""


def one_target(records: Sequence[Record]) -> None:
    """Raise M3CheckError where the records are of several targets."""
    if len({record.arch for record in records}) > 1:
        names = ", ".join(dict.fromkeys(record.arch for record in records))
        raise M3CheckError(f"the records are of different targets ({names}); merge takes one target, show makes the matrix")


def one_code(records: Sequence[Record]) -> None:
    """Raise M3CheckError where another m3check or other kernels made some of the records: parts of different runs.

    Tiers differ between versions of m3check, so that shards of two of them may leave out cases; kernels are told apart by
    the hashes and versions that providers give of themselves.
    """
    tools = dict.fromkeys(f"{record.tool.get('name')} {record.tool.get('version')}" for record in records)
    if len(tools) > 1:
        raise M3CheckError(f"the records were made by {' and '.join(tools)}; make all parts of a run with one version")
    known: dict[tuple[str, str], Any] = {}
    for record in records:
        providers = record.environment.get("providers")
        for provider, facts in providers.items() if isinstance(providers, Mapping) else ():
            for name, value in facts.items() if isinstance(facts, Mapping) else ():
                told = name == "version" or name.startswith("sha256")
                if told and known.setdefault((provider, name), value) != value:
                    raise M3CheckError(f"{provider} is not the same code in all records: its {name} differs")


def results_of(records: Sequence[Record]) -> tuple[Result, ...]:
    """All results, each (case, op, provider, evidence) once.

    A result that ran replaces a skip of the same case and provider (compiled ones among themselves); of two with the same
    verdict the later stays; two verdicts that differ raise M3CheckError, because a merge does not choose between them.
    """
    one_target(records)
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
    done = {(*key[:3], computed(result)) for key, result in found.items() if ran(result)}
    return tuple(r for key, r in found.items() if ran(r) or (*key[:3], computed(r)) not in done)


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
        if name in ("power", "dispatch"):
            continue  # they count cases, which records may share
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
