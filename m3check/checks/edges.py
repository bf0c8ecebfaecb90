"""The edge fills, read out: which token gave a block its score. Exact in every accumulator."""

from __future__ import annotations

from torch import Tensor

from m3check.checks.scores import plain_scores, visible_cells
from m3check.checks.view import View
from m3check.types import BLOCK, Finding, Status


def check_edges(view: View) -> list[Finding]:
    """Each block's score is exactly that of its last (edge_up) or first (edge_down) visible token."""
    if view.case.fill not in ("edge_up", "edge_down"):
        return []
    actual, plain = view.actual("score").double(), plain_scores(view)
    judged = visible_cells(view) & plain.isfinite() & actual.isfinite()
    if view.setting.profile.forced_scores:
        judged = judged & (view.expected["score"].to(view.device) == plain)
    wrong = judged & (actual != plain)
    count = int(wrong.sum())
    if not count:
        return [Finding("edges", Status.PASSED, 0.0, 0.0)]
    line, block = divmod(int(wrong.flatten().int().argmax()), plain.shape[-1])
    head, row = divmod(line, plain.shape[1])
    where = f"{view.rows.name(row)}, index head {head}, block {block}"
    named = _other_head(view, actual, plain, head, row) or _token(view, head, row, block, actual[head, row, block].item())
    hint = f"{named}; {count} of {int(judged.sum())} scores are off"
    error = (actual[head, row, block] - plain[head, row, block]).abs().item()
    return [Finding("edges", Status.FAILED, error, 0.0, where, hint)]


def _other_head(view: View, actual: Tensor, plain: Tensor, head: int, row: int) -> str:
    """Whether a row holds the scores of another index head."""
    seen = int(view.rows.visible[row])
    same = [h for h in range(plain.shape[0]) if bool((actual[head, row, :seen] == plain[h, row, :seen]).all())]
    return f"the row holds the scores of index head {same[0]}" if same else ""


def _token(view: View, head: int, row: int, block: int, value: float) -> str:
    """The token that scores `value`, and the one that should have been the block's maximum."""
    q, k = view.problem.idx_q, view.problem.idx_k
    assert q is not None
    assert k is not None
    start, length, position = (int(x[row]) for x in (view.rows.kv_start, view.rows.kv_len, view.rows.position))
    score = k[start : start + length].double() @ q[row, head].double()
    low, seen = block * BLOCK, min((block + 1) * BLOCK, position + 1)
    wanted = low + int(score[low:seen].argmax())
    which = "last visible" if view.case.fill == "edge_up" else "first"
    text = f"block {block}'s maximum is {{}}, wanted {wanted} (its {which} token)"
    same = (score == value).nonzero().flatten()
    if len(same):
        found = int(same[(same - wanted).abs().argmin()])
        far = f", {found - position} past the query" if found > position else ""
        return text.format(f"token {found}{far}")
    if value == 0:
        return text.format("0, which no token scores (a masked key counts as 0 instead of -inf)")
    return text.format(f"{value:.6g}, which no token of the request scores")
