"""Where an output is wrong, cell by cell: |error| in units of its limit. A check tells the worst place, a chart all."""

from __future__ import annotations

import torch
from torch import Tensor

from m3check.checks import attention, inserted, logits, logsumexp, pages, selection
from m3check.checks.rowkinds import dead_rows
from m3check.checks.scores import plain_scores, slack, visible_cells
from m3check.checks.view import View


def score_chart(view: View) -> Tensor:
    """[H, T, K] of |error| / limit; infinite where a number is missing or invented, or a forced cell is not exact."""
    actual, expected = view.actual("score").double(), view.expected["score"].to(view.device)
    plain, seen = plain_scores(view), visible_cells(view).expand(actual.shape)
    error = (actual - plain).abs()
    limit = slack(view).double()
    ratio = torch.where(error > 0, error / limit, 0)
    forced = (expected != plain) & ~(expected.isnan() & plain.isnan())
    if view.setting.profile.forced_scores:
        exact = torch.where(actual == expected.float().double(), 0.0, torch.inf)
        ratio = torch.where(forced, exact, ratio)
    finite = expected.isfinite() & plain.isfinite()
    alike = (actual == expected) | expected.isnan()
    ratio = torch.where(finite, ratio.where(actual.isfinite(), torch.inf), torch.where(alike, 0.0, torch.inf))
    invented = ~(actual.isnan() | (actual == -torch.inf))
    return torch.where(seen, ratio, torch.where(invented, torch.inf, 0.0))


def ids_chart(view: View, *, promised: bool = True) -> Tensor:
    """[H, T]: infinite where a list is broken or not the best, else 0."""
    return torch.where(selection.wrong_rows(view, promised=promised), torch.inf, 0.0)


def out_chart(view: View) -> Tensor:
    """[T, Hq, D] of |error| / limit, 0 in dead rows that are zero; a row off as a whole shows at its worst element."""
    chart, rows, _ = _attention(view)
    own_row = torch.where(rows > 1, rows, 0)[..., None]
    return torch.maximum(chart, own_row.expand(chart.shape) * (chart == chart.amax(-1, keepdim=True)))


def by_output(view: View) -> dict[str, Tensor]:
    """The chart of every output of an op beside block-sparse attention that is held to a limit: [T, ...] each."""
    others = {"out": out_chart, "logits": logits.chart, "lse": logsumexp.chart, "pages": pages.chart}
    found = {name: others[name](view) for name in view.run.outputs if name in others}
    if "ids" in view.run.outputs:
        found["ids"] = ids_chart(view).T[..., None]  # [T, H, 1]
    for name in view.run.outputs:
        if view.op.family == "insert":
            found[name] = inserted.chart(view, name)
        elif name in ("context", "index_keys", "slots"):
            found[name] = pages.exact_chart(view, name)
    return found


def limits(view: View) -> dict[str, Tensor]:
    """The largest |error| of correct arithmetic in each cell of `score` and `out`, fp64; ids have none."""
    found = {}
    if "score" in view.run.outputs:
        found["score"] = slack(view).double()
    if "out" in view.run.outputs:
        found["out"] = _attention(view)[2]
    return found


def _attention(view: View) -> tuple[Tensor, Tensor, Tensor]:
    """(|error| / limit [T, Hq, D], rms / its limit [T, Hq], limit [T, Hq, D]); dead rows must be zero."""
    actual = view.actual("out")
    view.memo.pop("attention", None)
    for name, shape in (("chart", actual.shape), ("rows", actual.shape[:2]), ("limit", actual.shape)):
        view.memo[name] = torch.zeros(shape, dtype=torch.float64, device=actual.device)
    attention.analyse(view)
    chart, rows, limit = (view.memo.pop(name) for name in ("chart", "rows", "limit"))
    dead = dead_rows(view).repeat_interleave(view.case.gqa, 1)[..., None]  # [T, Hq, 1]
    return torch.where(dead & (actual != 0), torch.inf, chart), rows, limit
