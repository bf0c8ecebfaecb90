"""Words and tables that several renderers share: figures, places, grids in Markdown."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from m3check.types import OPS, Evidence, Finding, Record, Result, Status

_NOT_TEXT = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")

EVIDENCE_RANK: Mapping[Evidence, int] = {"compiled": 0, "interpreted": 1, "device": 2}
"""How much a kind of evidence says about the hardware."""


def table(headers: Sequence[str], rows: Iterable[Sequence[object]], right: Sequence[str] = ()) -> str:
    """A GitHub table; the columns named in `right` are aligned to the right."""
    from tabulate import tabulate

    align = ["right" if header in right else "left" for header in headers]
    cells = [[cell(value) for value in row] for row in rows]
    return tabulate(cells, headers=list(headers), tablefmt="github", colalign=align, disable_numparse=True)


def clean(text: str) -> str:
    """Text without the characters that XML 1.0 has no place for and that a terminal would obey."""
    return _NOT_TEXT.sub("\N{REPLACEMENT CHARACTER}", text)


def cell(value: object) -> str:
    """A value on one line that neither ends a table's cell nor opens a tag."""
    return " ".join(clean(str(value)).split()).replace("|", "\\|").replace("<", "&lt;")


def code(text: str) -> str:
    """Text as a code span; backticks inside would end it."""
    return f"`{text.replace('`', chr(39))}`" if text else ""


def figure(value: float | None) -> str:
    """A number with three significant digits, or a dash."""
    return "–" if value is None else f"{value:.3g}"


def ratio(finding: Finding) -> float | None:
    """measured/limit: how much of what rounding can explain was used; None where a check is exact or measures nothing."""
    if finding.measured is None or not finding.limit or math.isnan(finding.limit):
        return None
    if math.isnan(finding.measured):
        return math.inf
    return abs(finding.measured) / finding.limit


def worst_ratio(results: Iterable[Result]) -> float | None:
    """The largest measured/limit of all findings, or None."""
    found = [r for result in results for finding in result.findings if (r := ratio(finding)) is not None]
    return max(found, default=None)


def ran(result: Result) -> bool:
    """Whether a result says anything about a kernel."""
    return result.status is not Status.SKIPPED


def computed(result: Result) -> bool:
    """Whether its kind of evidence computes anything: what is cross-compiled beside stands for itself."""
    return result.evidence != "compiled"


def evidence_of(record: Record) -> list[Evidence]:
    """The kinds of evidence of what ran, the weightiest first."""
    kinds = {result.evidence for result in record.results if ran(result)}
    return sorted(kinds, key=lambda kind: -EVIDENCE_RANK[kind])


def machine(record: Record, evidence: Evidence | None = None) -> str:
    """One line for where evidence (the weightiest kind) was made: the GPU only where it ran the kernels, else the CPU."""
    facts = record.environment
    kinds = evidence_of(record)
    if (evidence or (kinds[0] if kinds else None)) == "device" and facts.get("gpu"):
        return str(facts["gpu"])
    cores = f", {facts['cores']} cores" if facts.get("cores") else ""
    return str(facts.get("host") or facts.get("machine") or "an unnamed machine") + cores


def in_op_order(ops: Iterable[str]) -> list[str]:
    """Op names as OPS has them, unknown ones (of a newer m3check) last."""
    order = {name: i for i, name in enumerate(OPS)}
    return sorted(set(ops), key=lambda op: (order.get(op, len(order)), op))


def groups(results: Iterable[Result]) -> list[tuple[str, str, list[Result]]]:
    """(op, provider, results), ops as OPS has them and providers as they came."""
    found: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        found.setdefault((result.op, result.provider), []).append(result)
    providers = list(dict.fromkeys(provider for _, provider in found))
    ops = in_op_order(op for op, _ in found)
    return [(op, p, found[op, p]) for op in ops for p in providers if (op, p) in found]


def flat(facts: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested facts as (name, text) rows, empty ones left out."""
    rows: list[tuple[str, str]] = []
    for name, value in facts.items():
        if isinstance(value, Mapping):
            rows += flat(value, f"{prefix}{name} ")
        elif isinstance(value, (list, tuple)):
            rows += [(prefix + name, ", ".join(str(v) for v in value))] if value else []
        elif value not in (None, ""):
            rows.append((prefix + name, str(value)))
    return rows
