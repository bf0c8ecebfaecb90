"""Addresses that an interpreted kernel read or wrote though it may not: what they add up to.

A read of what nothing wrote is a mistake only where the result depends on it: `weigh` compares with a second call in which
fresh memory held other values. Everything else is one whatever becomes of it, since on a device it may fault.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from m3check.checks.view import View
from m3check.paging import Access, Run
from m3check.types import Finding, Status

WORDS = {  # in the order of gravity
    "outside": "{does} memory outside every tensor of the call",
    "input": "writes into an input",
    "race": "two programs of one launch write different values to one address",
    "unordered": "reads what another program of the same launch writes",
    "early": "reads what the kernel before it writes, before it has waited for that kernel (programmatic dependent launch)",
    "unowned": "reads a page that no request owns",
    "unwritten": "reads what nothing has written",
}
DOES = {"load": "reads", "store": "writes", "atomic": "updates"}


def check_memory(view: View) -> list[Finding]:
    """Every address of an interpreted run stays within the tensors of the call, and every value read was written."""
    accesses = view.run.accesses
    if accesses is None:
        return []
    noted = [reason for reason in (_excuse(view, access) for access in accesses) if reason]
    red = [access for access in accesses if not _excuse(view, access)]
    findings = []
    if red:
        findings.append(_finding(Status.FAILED, red, ""))
    if noted:
        excused = [access for access in accesses if _excuse(view, access)]
        findings.append(_finding(Status.NOTED, excused, noted[0]))
    return findings or [Finding("memory", Status.PASSED, 0.0, 0.0)]


def misuse(view: View) -> Finding | None:
    """What a further call of a kernel did to memory that is red; None where nothing is.

    What it read though nothing wrote it is left to the first call of a case, which knows whether the result depends on it.
    """
    accesses = view.run.accesses or ()
    red = [access for access in accesses if access.misuse != "unwritten" and not _excuse(view, access)]
    return _finding(Status.FAILED, red, "") if red else None


def weigh(view: View, again: Run) -> None:
    """Mark the unwritten cells that the run read as harmless if `again`, with other values in them, came to the same."""
    from m3check.checks.invariants.trial import difference

    if view.run.accesses and difference(view, view.run.outputs, again.outputs) is None:
        view.run.accesses = [replace(access, harmless=access.misuse == "unwritten") for access in view.run.accesses]


def _excuse(view: View, access: Access) -> str:
    """Why a misuse breaks no promise; empty where it does."""
    ids, profile = view.case.ids, view.setting.profile
    if view.problem.topk_idx is not None and ids not in profile.id_lists:
        return f"the kernel does not promise anything for ids={ids}"
    if access.misuse == "unowned" and ids == "future":
        return "the list names a block that its request does not have"
    return "the result does not depend on it" if access.harmless else ""


def _finding(status: Status, accesses: Sequence[Access], reason: str) -> Finding:
    worst = min(accesses, key=lambda access: list(WORDS).index(access.misuse))
    x, y, z = worst.program
    hint = WORDS[worst.misuse].format(does=DOES[worst.kind])
    hint += f": {worst.line}, {worst.kernel}, program ({x}, {y}, {z}); {worst.count} times in all"
    if len(accesses) > 1:
        hint += f"; {len(accesses) - 1} further such accesses"
    return Finding(
        "memory",
        status,
        float(worst.count),
        0.0,
        f"{worst.tensor}, {worst.where}",
        hint + (f" ({reason})" if reason else ""),
    )
