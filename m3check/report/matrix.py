"""Several records at a glance: what each provider's ops are worth on each target, and by what evidence."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from m3check.arch import ARCHS
from m3check.report import targets
from m3check.report.tables import (
    EVIDENCE_RANK,
    cell,
    clean,
    evidence_of,
    figure,
    in_op_order,
    machine,
    ran,
    table,
    worst_ratio,
)
from m3check.report.tally import red_word, strict
from m3check.types import Evidence, Finding, Record, Result, Status


def render(records: Sequence[Record]) -> str:
    """Op × arch × provider in Markdown: a row for each op and record, a column for each provider, and what was not run."""
    records = ordered(records)
    names = columns(records)
    cells = [_by_kernel(record) for record in records]
    keys = [key for found in cells for key in found]
    providers = list(dict.fromkeys(provider for _, provider in keys))
    holes = [_holes(record) for record in records]
    rows = []
    for op in in_op_order([op for op, _ in keys] + [op for found in holes for op in found]):
        for name, record, found, missing in zip(names, records, cells, holes, strict=True):
            told = [_told(found.get((op, provider), []), strict(record)) for provider in providers]
            rows.append([op, name, *told, "; ".join(missing.get(op, ()))])
    heads = [
        (name, ", ".join(evidence_of(r)) or "–", machine(r), r.exit.code, r.exit.reason, r.environment.get("date", ""))
        for name, r in zip(names, records, strict=True)
    ]
    made = "\n".join(clean(record.command) for record in records)
    silent = [cell(n) for n, r in zip(names, records, strict=True) if "device" not in evidence_of(r)]
    hardware = f"Nothing ran on the hardware of: {', '.join(silent)}.\n\n" if silent else ""
    return (
        f"# m3check: {len(records)} records\n\n{hardware}"
        f"{table(['record', 'evidence', 'machine', 'exit', 'reason', 'date'], heads)}\n\n"
        f"## Op × arch × provider\n\n{LEGEND}\n\n"
        f"{table(['op', 'record', *providers, 'production runs, and nothing here did'], rows)}\n\n"
        f"## Made by\n\n```\n{made}\n```\n"
    )


LEGEND = (
    "Each cell, for each kind of evidence: verdict, evidence, worst measured/limit (compiled: of shared memory alone). "
    "The last column: implementations that production uses on that target and that no result is about."
)


def as_json(records: Sequence[Record]) -> str:
    """The same as JSON: a list of {record, arch, op, provider, evidence, summary, red, worst, by_evidence}.

    `by_evidence` is {kind: {results, red, worst}}. Implementations of production that no result is about follow, as
    {record, arch, op, provider: "", implementation, when, hole}.
    """
    rows: list[dict[str, Any]] = []
    records = ordered(records)
    for name, record in zip(columns(records), records, strict=True):
        for (op, provider), results in _by_kernel(record).items():
            rows.append(
                {
                    "record": name,
                    "arch": record.arch,
                    "op": op,
                    "provider": provider,
                    "evidence": sorted({r.evidence for r in results if ran(r)}),
                    "summary": dict(Counter(r.status.value for r in results)),
                    "red": _red(results, strict(record)),
                    "worst": _plain(_worst([r for r in results if r.evidence != "compiled"])),
                    "by_evidence": {
                        kind: {"results": len(done), "red": _red(done, strict(record)), "worst": _plain(_worst(done))}
                        for kind, done in _by_evidence(results)
                    },
                }
            )
        rows += [
            {"record": name, "arch": record.arch, "op": entry["op"], "provider": "",
             "implementation": entry["implementation"], "when": entry["when"], "hole": entry["evidence"]}
            for entry in targets.listed(record.environment) if targets.hole(entry)
        ]  # fmt: skip
    return json.dumps(rows, indent=1, allow_nan=False) + "\n"


def ordered(records: Sequence[Record]) -> list[Record]:
    """Records in the order of ARCHS, those of one target as they came."""
    place = {name: i for i, name in enumerate(ARCHS)}
    return sorted(records, key=lambda record: place.get(record.arch, len(place)))


def columns(records: Sequence[Record]) -> list[str]:
    """A name for each record: its arch, numbered where several are of one arch."""
    counts = Counter(record.arch for record in records)
    seen: Counter[str] = Counter()
    names = []
    for record in records:
        seen[record.arch] += 1
        names.append(record.arch if counts[record.arch] == 1 else f"{record.arch} #{seen[record.arch]}")
    return names


def _by_kernel(record: Record) -> dict[tuple[str, str], list[Result]]:
    found: dict[tuple[str, str], list[Result]] = {}
    for result in record.results:
        found.setdefault((result.op, result.provider), []).append(result)
    return found


def _holes(record: Record) -> dict[str, list[str]]:
    """By op, the implementations of production that no result of a record is about."""
    found: dict[str, list[str]] = {}
    for entry in targets.listed(record.environment):
        if targets.hole(entry):
            when = "" if entry["when"] == "always" else f" ({entry['when']})"
            found.setdefault(entry["op"], []).append(f"{entry['implementation']}{when}: {entry['evidence']}")
    return found


def _by_evidence(results: Sequence[Result]) -> list[tuple[Evidence, list[Result]]]:
    """Results that ran, by kind of evidence, the weightiest first."""
    kinds = sorted({r.evidence for r in results if ran(r)}, key=lambda kind: -EVIDENCE_RANK[kind])
    return [(kind, [r for r in results if ran(r) and r.evidence == kind]) for kind in kinds]


def _worst(results: Sequence[Result]) -> float | None:
    """The worst measured/limit of what is promised; of compiled kernels that of shared memory: the rest are no margins."""

    def counts(result: Result, finding: Finding) -> bool:
        promised = finding.status is not Status.NOTED
        return promised and (result.evidence != "compiled" or finding.check == "shared_memory")

    return worst_ratio(replace(r, findings=tuple(f for f in r.findings if counts(r, f))) for r in results)


def _red(results: Sequence[Result], stern: bool) -> int:
    return sum(bool(red_word(r, stern)) for r in results)


def _plain(worst: float | None) -> float | str | None:
    return worst if worst is None or math.isfinite(worst) else "inf"


def _told(results: Sequence[Result], stern: bool) -> str:
    if not results:
        return "–"
    parts = []
    for kind, done in _by_evidence(results):
        red, passed, worst = _red(done, stern), sum(r.status is Status.PASSED for r in done), _worst(done)
        verdict = f"RED {red} of {len(done)}" if red else f"{passed} of {len(done)} passed"
        parts.append(f"{verdict}, {kind}" + (f", {figure(worst)}" if worst is not None else ""))
    return "; ".join(parts) or f"skipped {len(results)}"
