"""Where a red output is wrong, as characters that fit into a record: rows × heads, and the worst row in detail."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

from torch import Tensor

from m3check.checks import charts
from m3check.checks.setting import Setting
from m3check.checks.view import View
from m3check.paging import Run
from m3check.types import OPS, SHADES, Heat, HeatMap, Inputs, Outputs, shade

LINES, DETAIL, COLUMNS = 24, 8, 64
"""Lines of the map of all rows, of the map of the worst row, and characters of a line, at most."""

LARGEST = 2**25
"""Elements of an output that is still drawn: charts hold a few fp64 numbers for each."""


def drawn(
    problem: Inputs, run: Run, expected: Outputs, setting: Setting, expected_on: Callable[[Tensor], Outputs] | None
) -> Heat | None:
    """The maps of the first output that has a cell beyond its limit; the arguments are those of `compare`.

    None where no cell is (filters name a token whose error each element hides), or where the output is too large to draw.
    """
    view = View(OPS[problem.case.op], problem, run, expected, setting, expected_on)
    own = {name for op in (view.op.name, *view.op.chain) for name in OPS[op].outputs}
    for name in ("score", "ids", "out"):
        if name not in own or name not in run.outputs or not 0 < run.outputs[name].numel() <= LARGEST:
            continue
        heat = _CHARTED[name](view)
        if heat is not None:
            return heat
    return None


def _scores(view: View) -> Heat | None:
    chart = _finite(charts.score_chart(view))  # [H, T, K]
    by_head = chart.amax(-1).T
    if not (by_head > 1).any():
        return None
    worst = int(by_head.amax(1).argmax())
    cells = chart[:, worst, : max(1, int(view.rows.visible[worst]))]
    return Heat("score", (_rows(view, by_head, "index head"), _detail(view, worst, cells, "index head", "block")))


def _ids(view: View) -> Heat | None:
    by_head = _finite(charts.ids_chart(view)).T
    if not (by_head > 1).any():
        return None
    every = _rows(view, by_head, "index head")
    worst = int(by_head.amax(1).argmax())
    if "ids" not in view.expected:
        return Heat("ids", (every,))
    return Heat("ids", (every, _lists(view, worst, by_head[worst])))


def _out(view: View) -> Heat | None:
    chart = _finite(charts.out_chart(view))  # [T, Hq, D]
    by_head = chart.amax(-1)
    if not (by_head > 1).any():
        return None
    worst = int(by_head.amax(1).argmax())
    return Heat("out", (_rows(view, by_head, "query head"), _detail(view, worst, chart[worst], "query head", "channel")))


_CHARTED: dict[str, Callable[[View], Heat | None]] = {"score": _scores, "ids": _ids, "out": _out}


def _finite(chart: Tensor) -> Tensor:
    return chart.nan_to_num(nan=math.inf, posinf=math.inf).cpu()


def _rows(view: View, by_head: Tensor, columns: str) -> HeatMap:
    """All rows [T, heads], as many neighbours a line as it takes."""
    count = -(-len(by_head) // LINES)
    lines = by_head.split(count)
    labels = tuple(_place(view, i * count) for i in range(len(lines)))
    cells, step = _shaded((part.amax(0) for part in lines), by_head.shape[1])
    return HeatMap("request, token", columns, labels, cells, step, count)


def _detail(view: View, row: int, chart: Tensor, rows: str, columns: str) -> HeatMap:
    """The heads [heads, n] of one row that are off."""
    heads = (chart > 1).any(1).nonzero().flatten().tolist()[:DETAIL]
    cells, step = _shaded((chart[head] for head in heads), chart.shape[1])
    return HeatMap(rows, columns, tuple(map(str, heads)), cells, step, of=_place(view, row))


def _lists(view: View, row: int, wrong: Tensor) -> HeatMap:
    """What one row's wrong lists have: `=` chosen rightly, `-` left out, `+` taken instead, `±` both, `²` listed twice."""
    visible = max(1, int(view.rows.visible[row]))
    step = -(-visible // COLUMNS)
    heads = (wrong > 1).nonzero().flatten().tolist()[:DETAIL]
    lines = []
    for head in heads:
        given, wanted = (ids[head, row].tolist() for ids in (view.actual("ids"), view.expected["ids"]))
        lines.append("".join(_mark(range(at, min(at + step, visible)), given, wanted) for at in range(0, visible, step)))
    return HeatMap("index head", "block", tuple(map(str, heads)), tuple(lines), step, of=_place(view, row))


def _mark(blocks: Sequence[int], given: list[int], wanted: list[int]) -> str:
    if any(given.count(b) > 1 for b in blocks):
        return "²"
    extra, lost = any(b in given and b not in wanted for b in blocks), any(b in wanted and b not in given for b in blocks)
    if extra or lost:
        return "±" if extra and lost else "+" if extra else "-"
    return "=" if any(b in given for b in blocks) else SHADES[0]


def _shaded(lines: Iterable[Tensor], columns: int) -> tuple[tuple[str, ...], int]:
    """Each line [columns] in at most COLUMNS characters, and how many columns one stands for."""
    step = -(-columns // COLUMNS)
    return tuple("".join(shade(float(part.max())) for part in line.split(step)) for line in lines), step


def _place(view: View, row: int) -> str:
    return f"{int(view.rows.request[row])}, {int(view.rows.position[row])}"
