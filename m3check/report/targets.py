"""What a record says of its target: which implementations production runs there, and how precisely kernels add up."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from m3check.arch import ARCHS, Accumulator, Mma, operands_of
from m3check.report.tables import groups, ran, table
from m3check.types import OPS, Record, Result

DISPATCH = "dispatch"
"""Name in a record's environment of what production runs: version, op, implementation, file, when, evidence."""


def production(record: Record) -> str:
    """Each implementation that production uses on the target, with its evidence here or the sentence why there is none."""
    entries = listed(record.environment)
    if not entries:
        return ""
    versions = list(dict.fromkeys(str(entry["version"]) for entry in entries))
    parts = [f"## What production runs on {record.arch}"]
    parts.append("An implementation that was not run here is a hole in this report: nothing in it is about that code.")
    for version in versions:
        rows = [(e["op"], e["implementation"], e["when"], e["evidence"]) for e in entries if str(e["version"]) == version]
        parts.append(f"vLLM {version}:\n\n{table(['op', 'implementation', 'when', 'evidence'], rows)}")
    return "\n\n".join(parts)


def listed(environment: Mapping[str, Any]) -> list[Mapping[str, str]]:
    """The entries of a record's environment; none where an older m3check wrote it."""
    entries = environment.get(DISPATCH)
    return [entry for entry in entries if isinstance(entry, Mapping)] if isinstance(entries, (list, tuple)) else []


def hole(entry: Mapping[str, str]) -> bool:
    """Whether nothing was run of an entry."""
    return str(entry["evidence"]).startswith("not run")


def sums(record: Record) -> str:
    """How many bits each kernel's accumulator keeps: measured on a device, else what the target's table has."""
    parts = [text for text in (_measured(record), _by_table(record)) if text]
    return "\n\n".join(["## Accumulators", *parts]) if parts else ""


def _measured(record: Record) -> str:
    found: dict[tuple[str, str, str], list[Result]] = {}
    for op, provider, results in groups(record.results):
        for result in results:
            if result.sums is not None:
                found.setdefault((op, provider, result.sums.by), []).append(result)
    rows = []
    for (op, provider, by), results in found.items():
        bits = [r.sums.bits for r in results if r.sums is not None and r.sums.bits is not None]
        told = f"2^-{min(bits):.1f}" if bits else "no scores to measure"
        rows.append((op, provider, _dtypes(results), by, told, len(bits) or ""))
    if not rows:
        return ""
    text = (
        "Measured on the device: the largest |score − s| / Σ|q·k| that was seen (docs/numerics.md). Bounds are worked out "
        "by the matrix instruction that was emitted."
    )
    headers = ["op", "provider", "caches", "summed by", "largest error", "cases"]
    return f"{text}\n\n{table(headers, rows, right=['cases'])}"


def _dtypes(results: Iterable[Result]) -> str:
    return ", ".join(dict.fromkeys(str(r.axes.get("cache_dtype", "")) for r in results))


def _by_table(record: Record) -> str:
    """Ops that nothing was measured of: the target's rows for the instructions that were compiled, else for the dtypes."""
    arch = ARCHS.get(record.arch)
    if arch is None:
        return ""
    rows: list[tuple[str, str, str, str]] = []
    used: dict[Mma, None] = {}
    for op, provider, results in groups(r for r in record.results if ran(r)):
        if (op in OPS and OPS[op].chain) or op == "index_topk" or any(r.sums for r in results):
            continue
        emitted = _emitted(results)
        if emitted:
            found = [row for name in emitted for row in arch.rows(operands_of(name), name)]
            known = "compiled for it"
        elif any(r.evidence == "compiled" and any(f.check == "matrix" for f in r.findings) for r in results):
            rows.append((op, provider, "compiled for it", "no matrix instruction: fp32"))
            continue
        else:
            found = [row for kind in dict.fromkeys(_kind(r) for r in results) for row in arch.rows(arch.kind(kind))]
            known = "could be used"
        used |= dict.fromkeys(found)
        told = "; ".join(dict.fromkeys(f"{row.instruction} {row.operands}: {bits(row.accumulator)}" for row in found))
        rows.append((op, provider, known, told))
    if not rows:
        return ""
    text = (
        f"Not measured, since no device ran it: what {record.arch}'s matrix instructions keep, by the table of targets. "
        "Interpreted kernels add up in fp32, and their bounds are those of fp32."
    )
    sources = [f"- {row.instruction} {row.operands}: {row.source}" for row in used]
    grid = table(["op", "provider", "instructions that", "fraction bits"], rows)
    return "\n\n".join([text, grid, *(["Sources:\n\n" + "\n".join(sources)] if sources else [])])


def _emitted(results: Iterable[Result]) -> list[str]:
    """Matrix instructions that compiled results tell, each once."""
    told = [f.hint for r in results if r.evidence == "compiled" for f in r.findings if f.check == "matrix"]
    names = (word for hint in told for word in hint.partition(" (")[0].split())
    return list(dict.fromkeys(names))


def _kind(result: Result) -> str:
    """The dtype that decides which instruction multiplies: fp8 only where both operands are."""
    queries, cache = str(result.axes.get("dtype", "bf16")), str(result.axes.get("cache_dtype", "bf16"))
    return cache if queries.startswith("fp8") and cache.startswith("fp8") else queries if queries == "fp32" else "bf16"


def bits(sums: Accumulator) -> str:
    """What an accumulator keeps, in few words."""
    return "fp32" if sums.fraction_bits is None else str(sums.fraction_bits)
