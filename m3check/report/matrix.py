"""Several records at a glance: what each provider's ops are worth on each target, and by what evidence."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from m3check.report.tables import cell, evidence_of, figure, in_op_order, machine, ran, table, worst_ratio
from m3check.report.tally import red_word, strict
from m3check.types import Record, Result, Status


def render(records: Sequence[Record]) -> str:
    """Op × arch × provider in Markdown: one row for each op and provider, one column for each record."""
    names = columns(records)
    cells = [_by_kernel(record) for record in records]
    keys = [key for found in cells for key in found]
    providers = list(dict.fromkeys(provider for _, provider in keys))
    rows = []
    for op in in_op_order(op for op, _ in keys):
        for provider in providers:
            if any((op, provider) in found for found in cells):
                told = [_told(found.get((op, provider), []), strict(r)) for found, r in zip(cells, records, strict=True)]
                rows.append([op, provider, *told])
    heads = [
        (name, ", ".join(evidence_of(r)) or "–", machine(r), r.exit.code, r.exit.reason, r.environment.get("date", ""))
        for name, r in zip(names, records, strict=True)
    ]
    silent = [cell(n) for n, r in zip(names, records, strict=True) if "device" not in evidence_of(r)]
    hardware = f"Nothing ran on the hardware of: {', '.join(silent)}.\n\n" if silent else ""
    return (
        f"# m3check: {len(records)} records\n\n{hardware}"
        f"{table(['record', 'evidence', 'machine', 'exit', 'reason', 'date'], heads)}\n\n"
        f"## Op × arch × provider\n\nEach cell: verdict, evidence, worst measured/limit.\n\n"
        f"{table(['op', 'provider', *names], rows)}\n"
    )


def as_json(records: Sequence[Record]) -> str:
    """The same as JSON: a list of {record, arch, op, provider, evidence, summary, red, worst}."""
    rows: list[dict[str, Any]] = []
    for name, record in zip(columns(records), records, strict=True):
        for (op, provider), results in _by_kernel(record).items():
            worst = worst_ratio(results)
            rows.append(
                {
                    "record": name,
                    "arch": record.arch,
                    "op": op,
                    "provider": provider,
                    "evidence": sorted({r.evidence for r in results if ran(r)}),
                    "summary": dict(Counter(r.status.value for r in results)),
                    "red": sum(bool(red_word(r, strict(record))) for r in results),
                    "worst": worst if worst is None or math.isfinite(worst) else "inf",
                }
            )
    return json.dumps(rows, indent=1, allow_nan=False) + "\n"


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


def _told(results: Sequence[Result], stern: bool) -> str:
    if not results:
        return "–"
    done = [r for r in results if ran(r)]
    if not done:
        return f"skipped {len(results)}"
    red = sum(bool(red_word(r, stern)) for r in done)
    passed = sum(r.status is Status.PASSED for r in done)
    verdict = f"RED {red} of {len(done)}" if red else f"{passed} of {len(done)} passed"
    worst = worst_ratio(done)
    evidence = "+".join(sorted({r.evidence for r in done}))
    return f"{verdict}, {evidence}" + (f", {figure(worst)}" if worst is not None else "")
