"""What a run would do, did, and how it ended."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from m3check.types.result import Evidence, Result


@dataclass(frozen=True)
class PlanLine:
    """One thing that a run would do: this case on that provider, by this kind of evidence, or the reason why not."""

    case: str
    op: str
    provider: str
    evidence: Evidence
    skip: str | None = None
    invariants: tuple[str, ...] = ()
    """Names of the invariants (m3check/invariants.py) that this case shows on this kernel."""


@dataclass(frozen=True)
class Exit:
    """The exit code of a run and the sentence that explains it."""

    code: int
    reason: str


@dataclass(frozen=True)
class Breach:
    """What makes a run red although no result is: a floor that was not met, a ledger entry that is wrong."""

    sentence: str
    file: str = ""
    """The file that mends it, where there is one."""
    line: int = 0
    """From 1; 0 where it is not known."""


@dataclass(frozen=True)
class Record:
    """One whole run: what report.json holds and all that the renderers read."""

    schema_version: str
    tool: dict[str, str]
    arch: str
    environment: dict[str, Any]
    command: str
    exit: Exit
    summary: dict[str, int]
    results: tuple[Result, ...]
