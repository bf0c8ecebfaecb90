"""A mixed batch between its kernels: the buffers that ids and scores are handed over in, and the host's waits."""

from __future__ import annotations

import torch
from torch import Tensor

from m3check.checks.scores import plain_scores, slack, visible_cells
from m3check.checks.selection import forced_blocks
from m3check.checks.view import View
from m3check.types import Finding, Status


def check_handover(view: View) -> list[Finding]:
    """What the indexer returned are the rows of the id buffer that attention reads: decoded ones first, others behind."""
    served = view.run.served
    if served is None:
        return []
    rows = int(view.expected["num_decode_tokens"])
    spans = {"decode": slice(0, rows), "prefill": slice(rows, view.case.total_queries)}
    for (part, span), told in zip(spans.items(), served.returned, strict=False):
        where = f"rows [:, {span.start}:{span.stop}] of the id buffer, {part} part"
        if told is None:
            if span.start < span.stop and any(served.returned):  # who returns nothing at all writes into the buffer only
                hint = f"the indexer returned no list for a part of {span.stop - span.start} rows"
                return [Finding("handover", Status.FAILED, 1.0, 0.0, where, hint)]
            continue
        shape, inside, at, same = told
        if not inside:
            hint = "the indexer returned a tensor of its own; a captured graph hands ids over in the persistent buffer only"
            return [Finding("handover", Status.FAILED, 1.0, 0.0, where, hint)]
        if not same and _wrong(view, span):
            hint = (
                f"the indexer returned ids of shape {shape} that are not these rows [H, rows, topk]: another layout than "
                "the buffer was allocated with, other rows, or rows that the other part wrote over"
            )
            return [Finding("handover", Status.FAILED, 1.0, 0.0, where, hint)]
        if at not in (None, span.start):
            hint = f"the indexer returned ids that begin in row {at} of the buffer; who reads them takes another part's"
            return [Finding("handover", Status.FAILED, 1.0, 0.0, where, hint)]
    place = _elsewhere(view, rows)
    if place:
        hint = "attention reads the rows of its own queries: decoded ones first, prefilled ones behind"
        return [Finding("handover", Status.FAILED, 1.0, 0.0, "the id buffer", f"{place}; {hint}")]
    read = _read_elsewhere(view, rows)
    if read:
        return [Finding("handover", Status.FAILED, 1.0, 0.0, "the id buffer", read)]
    row = _misplaced_scores(view)
    if row:
        hint = "these rows belong to this query alone: decoded ones first, prefilled ones behind"
        return [Finding("handover", Status.FAILED, 1.0, 0.0, "the score buffer", f"{row}; {hint}")]
    return [Finding("handover", Status.PASSED, 0.0, 0.0)]


def _wrong(view: View, span: slice) -> bool:
    """Whether some row of the id buffer lists other blocks than the reference; of one head both layouts are the same."""
    actual = view.actual("ids")[:, span].long().sort(-1).values
    return bool((actual != view.expected["ids"].to(actual.device)[:, span].long().sort(-1).values).any())


def _elsewhere(view: View, rows: int) -> str:
    """Whether one part's ids, as the reference selects them, stand in other rows than its own."""
    total = view.case.total_queries
    actual = view.actual("ids").sort(-1).values
    wanted = view.expected["ids"].to(actual.device).sort(-1).values
    for first, last in ((0, rows), (rows, total)):
        part = wanted[:, first:last]
        if first == last or (actual[:, first:last] == part).all():
            continue
        for at in range(total - (last - first) + 1):
            if at != first and (actual[:, at : at + last - first] == part).all():
                return f"ids of rows [:, {first}:{last}] stand in rows [:, {at}:{at + last - first}]"
    return ""


def check_waits(view: View) -> list[Finding]:
    """A batch of decoded requests alone, which a graph runs, is built and launched without waiting for the device."""
    served = view.run.served
    if served is None or int(view.expected["num_prefills"]):
        return []
    if served.waits:
        hint = (
            f"host code reads device memory, which a captured graph cannot do and every step waits for: {served.waits[0]}"
        )
        return [Finding("waits", Status.FAILED, float(len(served.waits)), 0.0, served.waits[0], hint)]
    return [Finding("waits", Status.PASSED, 0.0, 0.0)]


def _read_elsewhere(view: View, rows: int) -> str:
    """Whether attention that is wrong on its own rows' lists is right on those of other rows, or of other heads.

    It names a mistake that is gross: rows off by a twentieth of themselves, where right ones are off by roundings.
    """
    case, attend = view.case, view.expected_on
    if attend is None or case.total_queries > 256:
        return ""
    ids, actual = view.actual("ids"), view.actual("out").double().unflatten(1, (case.kv_heads, -1)).flatten(2)

    def off(lists: Tensor) -> Tensor:
        wanted = attend(lists)["out"].to(actual).unflatten(1, (case.kv_heads, -1)).flatten(2)
        near: Tensor = (actual - wanted).norm(dim=-1) <= wanted.norm(dim=-1) / 20
        return ~near

    wrong = off(ids) & (view.rows.visible > 0)[:, None]
    if not wrong.any():
        return ""
    row = torch.arange(case.total_queries, device=view.device)
    for shift in dict.fromkeys((1, -1, rows, -rows)):
        judged = wrong & ((row + shift >= 0) & (row + shift < len(row)))[:, None]
        if judged.any() and not (off(ids.roll(-shift, 1)) & judged).any():
            return f"attention of row {int(judged.any(1).nonzero()[0])} is that on the list {shift:+d} rows away"
    for other in range(1, case.kv_heads):
        if not (off(ids.roll(-other, 0)) & wrong).any():
            return f"attention of kv head 0 is that on the lists of head {other}"
    return ""


def _misplaced_scores(view: View) -> str:
    """Where a row of the score buffer holds other scores than its query has; empty where none does, or none are kept."""
    assert view.run.served is not None
    held = view.run.served.scores
    if held is None:
        return ""
    right, columns = plain_scores(view), view.case.block_columns
    forced = forced_blocks(view)
    judged = visible_cells(view) & ~(forced[1] | forced[2])
    error = (held[..., :columns].to(right) - right).abs()
    off = judged & ~(error <= slack(view))
    if not off.any():
        return ""
    head, row, block = off.nonzero()[0].tolist()
    return (
        f"row {row}, of {view.rows.name(row)}, holds {float(held[head, row, block]):.7g} for index head {head} and block "
        f"{block}, whose score is {float(right[head, row, block]):.7g}"
    )
