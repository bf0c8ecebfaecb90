"""What a record keeps of compiled results: each variant once, at the first case of each op that asks for it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from m3check.types import Finding, Result, Status


def told_once(results: Iterable[Result]) -> tuple[Result, ...]:
    """The results, those of evidence `compiled` without passed findings that an earlier one of the op has told."""
    told: set[tuple[str, str, str, str]] = set()

    def new(result: Result, finding: Finding) -> bool:
        key = (result.provider, result.op, finding.check, finding.where)
        known = key in told
        told.add(key)
        return not known or finding.status is not Status.PASSED or finding.check == "compiles"

    return tuple(
        replace(r, findings=tuple(f for f in r.findings if new(r, f))) if r.evidence == "compiled" else r for r in results
    )
