"""The worst places of a chart, and a heat map in text: request × token × head × block, only what is off."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from m3check.explain.pattern import rows_of
from m3check.explain.stages import Stand
from m3check.types import BLOCK, SHADES, Case, Kernel, shade

if TYPE_CHECKING:
    from torch import Tensor

WORST = 5
LINES = 16
"""Rows of a heat map at most; what is left out is counted."""

COLOURS = (0, 33, 33, 33, 31, 31, 31, 31, 35, 35, 35)


def coloured(text: str) -> str:
    """The shades of a line in colours, for a terminal."""
    found = []
    for character in text:
        place = 8 if character == "N" else SHADES.find(character)
        found.append(f"\x1b[{COLOURS[place]}m{character}\x1b[0m" if place > 0 else character)
    return "".join(found)


def worst(stand: Stand, table: Tensor | None) -> list[str]:
    """The worst elements: where, which page, what was measured beside the bound, what was given and wanted."""
    chart, actual = stand.wrong, stand.scene.actual
    stage = stand.scene.stage
    expected = stand.expected[stand.scene.name]
    if stage == "select":
        return _lists(stand)
    from m3check.checks import charts

    limits = charts.limits(stand.view(stand.scene.problem, stand.expected))[stand.scene.name]
    lines = []
    flat = chart.nan_to_num(nan=math.inf, posinf=math.inf).flatten()
    for place in flat.topk(min(WORST, flat.numel())).indices.tolist():
        ratio = float(flat[place])
        if ratio <= 1:
            break
        index = unravel(place, chart.shape)
        given, wanted = float(actual[index]), float(expected[index])
        off = abs(given - wanted)
        limit = float(limits[index])
        known = limit > 0 and math.isfinite(off) and math.isfinite(limit)
        bound = f", off by {off:.4g}, bound {limit:.4g}, {off / limit:.3g} times" if known else ""
        lines.append(f"{_name(stand, index, table)}: {given:.6g} instead of {wanted:.6g}{bound}")
    return lines


def unravel(place: int, shape: Sequence[int]) -> tuple[int, ...]:
    """The indices of a place in a flattened tensor."""
    index = []
    for size in reversed(shape):
        place, inner = divmod(place, size)
        index.append(inner)
    return tuple(reversed(index))


def _name(stand: Stand, index: tuple[int, ...], table: Tensor | None) -> str:
    case = stand.scene.problem.case
    rows = rows_of(stand.scene.given.case)
    if stand.scene.stage == "score":
        head, t, block = index
        row = rows[t]
        return (
            f"request {row.request.index}, token {row.position}, index head {head}, block {block}"
            f"{page(table, row.request.index, block)}"
        )
    t, head, channel = index
    row = rows[t]
    where = f"request {row.request.index}, token {row.position}, query head {head} (kv head {head // case.gqa})"
    return f"{where}, channel {channel}"


def page(table: Tensor | None, request: int, block: int) -> str:
    """` (page 17)`, where the table of the call is known."""
    if table is None or not 0 <= block < table.shape[1]:
        return ""
    return f" (page {int(table[request, block])})"


def _lists(stand: Stand) -> list[str]:
    chart, rows = stand.wrong, rows_of(stand.scene.given.case)
    right = stand.expected["ids"]
    lines = []
    for head, t in (chart > 1).nonzero().tolist()[:WORST]:
        given, wanted = stand.scene.actual[head, t].tolist(), right[head, t].tolist()
        lost = [b for b in wanted if b not in given]
        extra = [b for b in given if b not in wanted]
        row = rows[t]
        lines.append(
            f"request {row.request.index}, token {row.position}, index head {head}: "
            f"left out {_few(lost)}, took {_few(extra)}; given {_few(given)}, wanted {_few(wanted)}"
        )
    return lines


def _few(ids: list[int]) -> str:
    shown = ", ".join(map(str, ids[:12]))
    return f"[{shown}{', …' if len(ids) > 12 else ''}]" if ids else "nothing"


def heat(stand: Stand, width: int) -> list[str]:
    """Lines of a map: one for each request and token that is off, a character for each head; then the worst row's blocks"""
    chart = stand.wrong.nan_to_num(nan=math.inf, posinf=math.inf)
    stage, case = stand.scene.stage, stand.scene.given.case
    by_head = {"score": lambda: chart.amax(-1).T, "select": lambda: chart.T, "attend": lambda: chart.amax(-1)}[stage]()
    lines = by_row(case, by_head, "query heads" if stage == "attend" else "index heads", columns := max(8, width - 28))
    return lines + _blocks(stand, chart, columns) if lines else []


def by_row(case: Case, cells: Tensor, name: str, columns: int) -> list[str]:
    """A line for each row of `cells` [T, n] that is off, in at most so many columns; nothing where none is."""
    rows = rows_of(case)
    bad = (cells > 1).any(1).nonzero().flatten().tolist()
    if not bad:
        return []
    step = max(1, -(-cells.shape[1] // columns))
    lines = [f"{'request token':>20}  {name} 0 … {cells.shape[1] - 1}" + (f", {step} a column" if step > 1 else "")]
    for t in bad[:LINES]:
        parts = [float(cells[t, i : i + step].max()) for i in range(0, cells.shape[1], step)]
        lines.append(f"{rows[t].request.index:>10} {rows[t].position:>9}  {''.join(shade(x) for x in parts)}")
    if len(bad) > LINES:
        lines.append(f"{'':>20}  … and {len(bad) - LINES} further rows of {len(rows)}")
    return lines


def _blocks(stand: Stand, chart: Tensor, columns: int) -> list[str]:
    """head × block of the worst row."""
    stage, rows = stand.scene.stage, rows_of(stand.scene.given.case)
    if stage == "score":
        t = int(chart.amax((0, 2)).argmax())
        cells = chart[:, t, : rows[t].visible]
        per = [[float(x) for x in head] for head in cells]
    elif stage == "select":
        t = int(chart.amax(0).argmax())
        return _chosen(stand, t, columns)
    else:
        t = int(chart.amax((1, 2)).argmax())
        per = _shares(stand, t)
        if not per:
            return []
    step = max(1, -(-max(len(head) for head in per) // columns))
    what = "score" if stage == "score" else "leaving the block out would mend"
    lines = [
        f"{'head':>20}  blocks 0 … {len(per[0]) - 1} of request {rows[t].request.index}, token {rows[t].position} ({what})"
    ]
    for head, line in enumerate(per):
        text = "".join(shade(max(line[i : i + step])) for i in range(0, len(line), step))
        if set(text) - set(SHADES[0]) and len(lines) <= LINES:
            lines.append(f"{head:>20}  {text}")
    return lines if len(lines) > 1 else []


def _chosen(stand: Stand, t: int, columns: int) -> list[str]:
    rows, right = rows_of(stand.scene.given.case), stand.expected["ids"]
    visible = rows[t].visible
    lines = [
        f"{'head':>20}  blocks 0 … {visible - 1} of request {rows[t].request.index}, token {rows[t].position} "
        "(= chosen rightly, - left out, + taken instead)"
    ]
    for head in range(right.shape[0]):
        if float(stand.wrong[head, t]) <= 1:
            continue
        given, wanted = set(stand.scene.actual[head, t].tolist()), set(right[head, t].tolist())
        mark = {(True, True): "=", (True, False): "+", (False, True): "-", (False, False): "·"}
        text = "".join(mark[b in given, b in wanted] for b in range(visible))
        lines.append(f"{head:>20}  {text[:columns]}{'…' if len(text) > columns else ''}")
        if len(lines) > LINES:
            break
    return lines


def _shares(stand: Stand, t: int) -> list[list[float]]:
    """Per KV head and listed block: how much of the row's error goes when the block is left out; over 1: over half."""
    import torch

    from m3check.hypotheses.merging import _slots

    problem = stand.scene.problem
    ids = problem.topk_idx
    if ids is None or stand.scene.actual[t].isnan().any():
        return []
    case = problem.case
    slots = _slots(stand.scene)
    total = stand.expected["lse"][t]  # [Hq]
    weight = (slots.lse[:, t] - total.masked_fill(total == -math.inf, 0)).exp2()  # [slots, Hq]
    error = stand.scene.actual[t].double() - stand.expected["out"][t]
    visible = rows_of(stand.scene.given.case)[t].visible
    found = [[0.0] * visible for _ in range(case.kv_heads)]
    for slot in range(ids.shape[-1]):
        w = weight[slot][:, None]
        lost = -(w * (slots.out[slot, t] - stand.expected["out"][t])) / (1 - w).clamp(min=1e-9)  # what losing it would do
        for head in range(case.kv_heads):
            block = int(ids[head, t, slot])
            if not 0 <= block < visible:
                continue
            lanes = slice(head * case.gqa, (head + 1) * case.gqa)
            before = float(error[lanes].square().sum())
            after = float((error[lanes] - lost[lanes]).square().sum())
            if before > 0 and torch.isfinite(lost[lanes]).all():
                found[head][block] = before / max(after, before * 1e-6) / 2
    return found


def share_of(kernel: Kernel, rows: int, topk: int) -> int:
    """How many slots of a list one split takes, for our own decode kernel; 0 where nobody says."""
    function: Any = kernel.function
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    if getattr(function, "__module__", "") != "m3check.kernels.triton.sparse_attn_decode":
        return 0
    from m3check.kernels.triton import tiles

    return -(-topk // tiles.splits(rows, topk))


def blocks_of(stand: Stand, table: Tensor | None, share: int = 0) -> list[str]:
    """Which block, page, slot, split and token the matched filters name; a split takes `share` slots."""
    from m3check.checks import attention

    if stand.scene.stage != "attend":
        return []
    view = stand.view(stand.scene.problem, stand.expected)
    if stand.scene.actual.isnan().any():
        return []
    match = attention.analyse(view).token
    ids = stand.scene.problem.topk_idx
    if match is None or not match.red or ids is None:
        return []
    block = match.token if match.kind == "block" else match.token // BLOCK
    row = rows_of(stand.scene.given.case)[match.row]
    slots = (ids[match.kv_head, match.row] == block).nonzero().flatten().tolist()
    slot = f"slot {slots[0]} of {ids.shape[-1]}" if slots else "in no slot"
    if slots and share:
        slot += f", split {slots[0] // share} of {-(-ids.shape[-1] // share)}"
    where = f"request {row.request.index}, token {row.position}, kv head {match.kv_head}"
    return [f"{match.hint(row.position)}: {where}; block {block}{page(table, row.request.index, block)}, {slot}"]
