"""What the page needs of records, packed: each text once, each result a row, what passed without a word as one number."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from m3check.report import targets
from m3check.report.tables import clean, evidence_of, flat, in_op_order, machine, ratio
from m3check.report.tally import GATE, breaches, gate, red_word, strict, summarise, verdict
from m3check.types import SHADES, Finding, Heat, Record, Result, Status

MAPS = 500
"""Maps on a page: with the 2,000 of a run in which all is red it would pass five megabytes, and nobody looks at them."""

LEFT_OUT = 0
"""In place of a further map."""


class Words:
    """Texts by number, in the order in which they were met."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}

    def __call__(self, text: object) -> int:
        """The number of a text, without the characters that nothing should obey."""
        return self.numbers.setdefault(clean(str(text)), len(self.numbers))


def data(records: Sequence[Record], names: Sequence[str]) -> dict[str, Any]:
    """All that the scripts read, JSON-ready; `names` tells records of one target apart."""
    words = Words()
    axes = list(dict.fromkeys(name for record in records for result in record.results for name in result.axes))
    results = [_result(result, i, record, axes, words) for i, record in enumerate(records) for result in record.results]
    place = FIELDS.index("heat")
    for row in [row for row in results if row[place] is not None][MAPS:]:
        row[place] = LEFT_OUT
    return {
        "records": [_record(record, name) for record, name in zip(records, names, strict=True)],
        "ops": in_op_order(clean(result.op) for record in records for result in record.results),
        "statuses": [status.value for status in Status],
        "shades": SHADES,
        "axes": [clean(name) for name in axes],
        "fields": FIELDS,
        "results": results,
        "words": list(words.numbers),
    }


FIELDS = (
    *("record", "op", "provider", "kernel", "evidence", "status", "case", "reason", "red"),
    *("seconds", "repro", "axes", "findings", "sums", "heat"),
)
"""Places of a result's row; those from op to red are numbers of words."""


def _result(result: Result, record: int, of: Record, axes: Sequence[str], words: Words) -> list[Any]:
    told = {f"{finding.check}: {finding.hint or finding.where}" for finding in result.findings}
    usual = f"m3check run --arch {of.arch} --kernels {result.provider} --case {result.case}"
    return [
        record,
        words(result.op),
        words(result.provider),
        words(result.kernel),
        words(result.evidence),
        words(result.status.value),
        words(result.case),
        words("" if result.reason in told else result.reason),
        words(red_word(result, strict(of))),
        _figure(result.seconds),
        "" if result.repro == usual else clean(result.repro),
        [_axis(result.axes.get(name)) for name in axes],
        [_finding(finding, result, words) for finding in result.findings],
        None if result.sums is None else [clean(result.sums.by), _figure(result.sums.bits)],
        None if result.heat is None else _heat(result.heat),
    ]


def _finding(finding: Finding, result: Result, words: Words) -> int | list[Any]:
    """[check, status, ratio, measured, limit, where, hint], without what is empty at the end; alone the check that passed.

    `ratio` is measured/limit where it says how near a promise is to breaking: not of notes, and of compiled kernels only
    of shared memory (report/matrix.py).
    """
    counts = finding.status is not Status.NOTED and (result.evidence != "compiled" or finding.check == "shared_memory")
    passed = finding.status is Status.PASSED
    row = [
        words(finding.check),
        words(finding.status.value),
        _figure(ratio(finding), 3) if counts else None,
        _figure(finding.measured) if finding.measured or not passed else None,
        _figure(finding.limit) if finding.limit or not passed else None,
        words(finding.where) if finding.where else None,
        words(finding.hint) if finding.hint else None,
    ]
    while row[-1] is None:
        row.pop()
    number: int = row[0]  # type: ignore[assignment]
    return number if passed and len(row) == 2 else row


def _heat(heat: Heat) -> list[Any]:
    """[output, [{rows, columns, labels, cells, step, count, of}]]."""
    maps = [{field.name: _plain(getattr(each, field.name)) for field in fields(each)} for each in heat.maps]
    return [clean(heat.output), maps]


def _plain(value: Any) -> Any:
    return [clean(text) for text in value] if isinstance(value, (list, tuple)) else _axis(value)


def _axis(value: Any) -> Any:
    return value if value is None or isinstance(value, int) else clean(str(value))


def _figure(value: float | None, digits: int = 4) -> float | int | str | None:
    if value is None:
        return None
    short = float(f"{value:.{digits}g}")  # which makes the largest numbers infinite
    if not math.isfinite(short):
        return "nan" if math.isnan(short) else "inf" if short > 0 else "-inf"
    return int(short) if short.is_integer() and abs(short) < 1e15 else short


def _record(record: Record, name: str) -> dict[str, Any]:
    """What a record says beside its results, as text and rows of text."""
    facts, told = record.environment, gate(record)
    aside = {name: value for name, value in facts.items() if name not in ("power", GATE, targets.DISPATCH)}
    return {
        "name": clean(name),
        "arch": clean(record.arch),
        "verdict": verdict(record),
        "code": record.exit.code,
        "reason": clean(record.exit.reason),
        "date": clean(str(facts.get("date", ""))),
        "evidence": [[kind, clean(machine(record, kind))] for kind in evidence_of(record)],
        "why": clean(str(facts.get("evidence_reason", ""))),
        "command": clean(record.command),
        "summary": summarise(record.results),
        "breaches": [clean(breach.sentence) for breach in breaches(record)],
        "gate": [[clean(key), clean(value)] for key, value in flat({k: v for k, v in told.items() if k != "breaches"})],
        "environment": [
            ["m3check", clean(str(record.tool.get("version", "")))],
            *([clean(key), clean(value)] for key, value in flat(aside)),
        ],
        "power": _power(facts.get("power")),
        "production": [
            [*(clean(str(entry.get(word, ""))) for word in PRODUCTION), targets.hole(entry)]
            for entry in targets.listed(facts)
        ],
    }


PRODUCTION = ("version", "op", "implementation", "when", "evidence")


def _power(facts: Any) -> dict[str, Any] | None:
    if not isinstance(facts, Mapping) or not facts.get("defects"):
        return None
    defects = [[clean(str(stage)), clean(str(words)), seen, changed] for stage, words, seen, changed in facts["defects"]]
    return {"cases": facts.get("cases", 0), "unlisted": facts.get("unlisted", 0), "defects": defects}
