"""What became of one case on one kernel."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal

from m3check.types.heat import Heat


class Status(StrEnum):
    """What became of a finding or of a result."""

    PASSED = "passed"
    FAILED = "failed"
    KNOWN = "known"  # failed, and the ledger says so
    NOTED = "noted"  # a finding only: breaks the contract where the provider promises nothing
    MISTRUSTED = "mistrusted"  # agreed, but could not have failed
    INCONCLUSIVE = "inconclusive"  # what the case claims to see cannot be told from rounding
    SKIPPED = "skipped"
    ERROR = "error"
    CRASHED = "crashed"
    TIMEOUT = "timeout"


RED = frozenset({Status.FAILED, Status.ERROR, Status.CRASHED, Status.TIMEOUT})
"""Statuses that make the exit code 1."""

STRICTLY_RED = frozenset({Status.NOTED, Status.MISTRUSTED, Status.INCONCLUSIVE})
"""Statuses that `--strict` makes red as well."""

Evidence = Literal["device", "interpreted", "compiled"]


@dataclass(frozen=True)
class Finding:
    """One judgement of one check, in words that need no knowledge of the check.

    `measured` and `limit` are in the check's own unit (docs/bounds.md): that of the output, standard deviations, or how
    many cells are wrong; None where there is no number.
    """

    check: str
    status: Status
    measured: float | None = None
    limit: float | None = None
    where: str = ""
    hint: str = ""


@dataclass(frozen=True)
class Sums:
    """How a kernel added up products on a device."""

    by: str
    """The least precise of the matrix instructions that ran, by operands and fraction bits, or `fp32`."""
    bits: float | None = None
    """Effective bits: -log2 of the largest |score - s| / Σ|q·k| that was seen; None where no scores tell."""


@dataclass(frozen=True)
class Result:
    """One case on one kernel by one kind of evidence."""

    case: str
    op: str
    provider: str
    kernel: str
    evidence: Evidence
    axes: dict[str, Any]
    status: Status
    reason: str = ""
    findings: tuple[Finding, ...] = ()
    seconds: float = 0.0
    repro: str = ""
    sums: Sums | None = None
    """On a device, of an op that is not a chain."""
    heat: Heat | None = None
    """Where a comparison that failed was wrong."""

    def check(self, strict: bool = False) -> None:
        """Raise Mismatch where the result is red, and unittest.SkipTest (which pytest knows) where nothing ran.

        `strict` makes noted, mistrusted and inconclusive red, as `--strict` does.
        """
        __tracebackhide__ = True  # a failing test ends at the line that called this
        if self.status is Status.SKIPPED:
            import unittest

            raise unittest.SkipTest(self.reason)
        red = RED | STRICTLY_RED if strict else RED
        if self.status in red or (strict and any(f.status in red for f in self.findings)):
            raise Mismatch(self)


class Mismatch(AssertionError):
    """A red result; its message says what is wrong, how far off, where, and which line shows it again."""

    def __init__(self, result: Result) -> None:
        self.result = result
        worst = [f for f in result.findings if f.status is Status.FAILED]
        worst = worst or [f for f in result.findings if f.status in STRICTLY_RED]
        told = [f"{f.check}: {_figure(f.measured)} > {_figure(f.limit)} at {f.where} ({f.hint})" for f in worst]
        head = f"{result.status} {result.case} [{result.provider}]"
        super().__init__("\n".join([head, *(told or [result.reason]), result.repro]).strip())


def _figure(value: float | None) -> str:
    return "?" if value is None else f"{value:.3g}"
