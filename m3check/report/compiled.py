"""What compiling showed of each kernel: the most that any variant needs, and the matrix instructions that were emitted."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from m3check.report.tables import table
from m3check.types import Finding, Record

FIGURES = ("shared_memory", "tensor_memory", "registers", "spills", "occupancy")


def kernels(record: Record) -> str:
    """A row for each kernel function of a provider; nothing where nothing was compiled."""
    found: dict[tuple[str, str], list[Finding]] = {}
    for result in record.results:
        for finding in result.findings if result.evidence == "compiled" else ():
            if finding.check in (*FIGURES, "matrix"):
                found.setdefault((result.provider, finding.where.partition(" ")[0]), []).append(finding)
    if not found:
        return ""
    rows = [(*key, *_row(findings)) for key, findings in found.items()]
    text = (
        f"Cross-compiled for {record.arch} by Triton {record.environment.get('triton', '')}, each variant once. Of all of "
        "them the most shared memory (bytes of a block), registers and spilled bytes (of a thread), and the least occupancy"
        " (warps at once, of those that a multiprocessor can hold)."
    )
    headers = [
        "provider",
        "kernel",
        "variants",
        "shared memory",
        "registers",
        "spilled",
        "occupancy",
        "matrix instructions",
    ]
    return f"## Compiled\n\n{text}\n\n{table(headers, rows, right=headers[2:7])}"


def _row(findings: list[Finding]) -> tuple[object, ...]:
    variants = len({f.where for f in findings})
    most = (_figure(findings, check, max) for check in ("shared_memory", "registers", "spills"))
    limit = next((f.limit for f in findings if f.check == "occupancy"), None)
    least = _figure(findings, "occupancy", min)
    told = dict.fromkeys(f.hint for f in findings if f.check == "matrix" and f.hint)
    return variants, *most, f"{least} of {limit:,.0f}" if limit else "", "; ".join(_merged(told))


def _figure(findings: Iterable[Finding], check: str, pick: Callable[[Iterable[float]], float]) -> str:
    values = [f.measured for f in findings if f.check == check and f.measured is not None]
    return f"{pick(values):,.0f}" if values else ""


def _merged(hints: Iterable[str]) -> list[str]:
    """Each instruction once, with what became of fp8 where it was used for it."""
    found: dict[str, set[str]] = {}
    for hint in hints:
        names, _, aside = hint.partition(" (")
        for name in names.split():
            found.setdefault(name, set()).update({aside.rstrip(")")} if aside else set())
    return [name + (f" ({', '.join(sorted(aside))})" if aside else "") for name, aside in sorted(found.items())]
