"""Non-finite values, compared exactly by position: NaN where a number belongs, dead rows, scores that were not written."""

from __future__ import annotations

import torch
from torch import Tensor

from m3check.checks.bounds import FORMATS
from m3check.checks.rowkinds import dead_rows, promised_rows
from m3check.checks.scores import visible_cells
from m3check.checks.view import View
from m3check.types import Finding, Status


def check_scores(view: View) -> list[Finding]:
    """Every visible score is a number where the reference's is, and the same infinity where it is not."""
    actual, expected = view.actual("score"), view.expected["score"].to(view.device)
    seen = visible_cells(view)
    wrong = seen & expected.isfinite() & ~actual.isfinite()
    wrong |= seen & expected.isinf() & (actual != expected.float())
    count = int(wrong.sum())
    if not count:
        return [Finding("finite_score", Status.PASSED, 0.0, 0.0)]
    first = int(wrong.flatten().int().argmax())
    columns, rows = view.case.block_columns, view.case.total_queries
    head, row, block = first // (rows * columns), first // columns % rows, first % columns
    value = actual.flatten()[first].item()
    hint = f"{count} visible cells hold {value} where {expected.flatten()[first].item():.6g} belongs"
    if value != value:
        hint += "; never written, or a NaN from a key that the query does not see"
    where = f"{view.rows.name(row)}, index head {head}, block {block}"
    return [Finding("finite_score", Status.FAILED, float(count), 0.0, where, hint)]


def check_output(view: View) -> list[Finding]:
    """Live rows have numbers where the reference has them; only a value past the dtype's largest may be infinite."""
    actual, expected = view.actual("out"), view.expected_out
    largest = FORMATS[actual.dtype].largest
    live = ~dead_rows(view)
    overflow = (
        actual.isinf()
        & (expected.abs() >= largest * (1 - 2 * FORMATS[actual.dtype].u))
        & (actual.sign() == expected.sign())
    )
    wrong = expected.isfinite() & ~actual.isfinite() & ~overflow
    rows = wrong.any(-1).unflatten(1, (view.case.kv_heads, -1)).any(-1) & live  # [T, Hkv]
    promised = promised_rows(view)
    findings = []
    broken, noted = torch.stack([(rows & promised).any(), (rows & ~promised).any()]).tolist()
    if noted:
        hint = "on an id list that this kernel does not accept"
        findings.append(_rows(view, "finite", rows & ~promised, wrong, Status.NOTED, f"NaN or infinity {hint}"))
    if broken:
        hint = "not finite: never written, or NaN read from memory that no live token owns, or 0/0 in the softmax"
        findings.append(_rows(view, "finite", rows & promised, wrong, Status.FAILED, hint))
    return findings or [Finding("finite", Status.PASSED, 0.0, 0.0)]


def _rows(view: View, check: str, rows: Tensor, wrong: Tensor, status: Status, hint: str) -> Finding:
    count, first = int(rows.sum()), int(rows.flatten().int().argmax())
    row, head = divmod(first, view.case.kv_heads)
    elements = int(wrong[row].unflatten(0, (view.case.kv_heads, -1))[head].sum())
    where = f"{view.rows.name(row)}, kv head {head}"
    return Finding(
        check, status, float(count), 0.0, where, f"{count} rows of a kv head {hint}; {elements} elements in this one"
    )


def check_dead(view: View) -> list[Finding]:
    """A row that sees no valid block gives zeros; noted, not failed, where the profile promises nothing."""
    dead, profile = dead_rows(view), view.setting.profile
    actual = view.actual("out").unflatten(1, (view.case.kv_heads, -1))  # [T, Hkv, G, D]
    wrong = dead & (actual != 0).flatten(2).any(-1)
    count = int(wrong.sum())
    if not count:
        return [Finding("dead_row", Status.PASSED, 0.0, 0.0)]
    broken = wrong & promised_rows(view) if profile.dead_rows == "zero" else torch.zeros_like(wrong)
    status = Status.FAILED if broken.any() else Status.NOTED
    wrong = broken if status is Status.FAILED else wrong
    row, head = divmod(int(wrong.flatten().int().argmax()), view.case.kv_heads)
    value = actual[row, head].flatten()
    value = value[value != 0][0].item()
    hint = f"{count} rows without a valid block hold {value:.4g} and the like, wanted 0"
    if status is Status.NOTED:
        hint += "; this kernel promises nothing there"
    return [Finding("dead_row", status, float(count), 0.0, f"{view.rows.name(row)}, kv head {head}", hint)]
