"""Block scores: each visible cell within its bound, forced cells as the profile says, invisible cells not invented."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from m3check.arch import Accumulator
from m3check.checks.bounds import dot_error, whole
from m3check.checks.setting import Setting
from m3check.checks.view import View, chunks
from m3check.types import BLOCK, Finding, Inputs, Status


def margins(problem: Inputs, how: Accumulator, setting: Setting, device: torch.device) -> Tensor:
    """How far each block score [H, T, K] (fp32) of correct arithmetic may be off; 0 for a block without visible keys.

    A block's score is a maximum, so only keys that could be the largest count.
    """
    case, queries, keys = problem.case, problem.idx_q, problem.idx_k
    assert queries is not None
    assert keys is not None
    heads, rows = queries.shape[1], queries.shape[0]
    deviations = setting.deviations(heads * rows * max(case.context, 1))
    result = torch.zeros(heads, rows, case.block_columns, dtype=torch.float32, device=device)
    integers = whole(queries, keys)
    cells = 2**26 if device.type == "cuda" else 2**21
    for request in case.requests():
        if not request.query_len or not request.kv_len:
            continue
        k = keys[request.tokens].to(device).float()
        for part in chunks(request.query_len, max(1, cells // (heads * min(request.kv_len, 2**16)))):
            row = slice(request.query_start + part.start, request.query_start + part.stop)
            q = queries[row].to(device).float().transpose(0, 1)  # [H, c, D]
            position = request.prefix + torch.arange(part.start, part.stop, device=device)
            for span in chunks(request.kv_len, 2**16):
                sums = dot_error(q, k[span], how, integers)
                token = torch.arange(span.start, span.stop, device=device)
                unseen = token > position[:, None]  # [c, span]
                error = sums.limit(deviations)
                blocks = (span.start // BLOCK, -(-span.stop // BLOCK))
                result[:, row, blocks[0] : blocks[1]] = _contending(sums.value, error, unseen)
    return result


def _contending(score: Tensor, error: Tensor, unseen: Tensor) -> Tensor:
    """The largest error [..., blocks] among keys of each block that could be its maximum, from [..., keys]."""
    pad = -score.shape[-1] % BLOCK
    low = torch.nan_to_num(score - 2 * error, nan=-math.inf).masked_fill(unseen, -math.inf)
    high = torch.nan_to_num(score + 2 * error, nan=-math.inf).masked_fill(unseen, -math.inf)
    low, high, error = (torch.nn.functional.pad(x, (0, pad), value=-math.inf) for x in (low, high, error))
    low, high, error = (x.unflatten(-1, (-1, BLOCK)) for x in (low, high, error))
    could = (high >= low.amax(-1, keepdim=True)) & (high > -math.inf)
    return error.where(could, 0).amax(-1)


def plain_scores(view: View) -> Tensor:
    """The scores [H, T, K] before forcing, fp64, as the reference has them."""
    expected = view.expected.get("plain_score", view.expected.get("score"))
    assert expected is not None
    return expected.to(view.device)


def slack(view: View) -> Tensor:
    """`margins` of this result, made once."""
    if "slack" not in view.memo:
        view.memo["slack"] = margins(view.problem, view.setting.scoring or view.setting.dot, view.setting, view.device)
    result: Tensor = view.memo["slack"]
    return result


def visible_cells(view: View) -> Tensor:
    """Which cells [T, K] a row sees."""
    block = torch.arange(view.case.block_columns, device=view.device)
    return block < view.rows.visible[:, None]


def _place(view: View, flat: int) -> tuple[int, int, int]:
    rows, columns = view.case.total_queries, view.case.block_columns
    return flat // (rows * columns), flat // columns % rows, flat % columns


def _where(view: View, flat: int) -> str:
    head, row, block = _place(view, flat)
    return f"{view.rows.name(row)}, index head {head}, block {block}"


def check_values(view: View) -> list[Finding]:
    """Every finite visible score lies within its bound; a forced cell is exact, or plain where the profile says so."""
    actual, plain = view.actual("score").double(), plain_scores(view)
    expected, bound = view.expected["score"].to(view.device), slack(view).double()
    forced = expected != plain
    forced &= ~(expected.isnan() & plain.isnan())
    findings = []
    if view.op.phase == "decode" and view.case.init_blocks + view.case.local_blocks > 0:
        findings.append(_forced(view, actual, expected, forced))
    judge = visible_cells(view) & expected.isfinite() & plain.isfinite()
    if view.setting.profile.forced_scores:
        judge = judge & ~forced
    error = (actual - plain).abs().where(judge & actual.isfinite(), 0)
    ratio = torch.where(error > bound, error / bound, error / bound.clamp(min=1e-300))
    worst = int(ratio.argmax()) if ratio.numel() else 0
    if not ratio.numel():
        return [*findings, Finding("score", Status.PASSED, 0.0, 0.0)]
    measured, limit = error.flatten()[worst].item(), bound.flatten()[worst].item()
    if measured <= limit:
        return [*findings, Finding("score", Status.PASSED, measured, limit, _where(view, worst))]
    count, of = int((error > bound).sum()), int(judge.sum())
    hint = f"{count} of {of} visible scores are off; {_looks_like(view, actual, plain, bound, worst)}"
    return [*findings, Finding("score", Status.FAILED, measured, limit, _where(view, worst), hint)]


def _looks_like(view: View, actual: Tensor, plain: Tensor, bound: Tensor, flat: int) -> str:
    """What the wrong scores resemble, from the worst cell."""
    head, row, block = _place(view, flat)
    value, limit = actual[head, row, block], bound[head, row, block]
    seen = int(view.rows.visible[row])
    for other in range(plain.shape[0]):
        if other != head and (actual[head, row, :seen] - plain[other, row, :seen]).abs().le(limit).all():
            return f"the row holds the scores of index head {other}"
    for other in (block - 1, block + 1):
        if 0 <= other < seen and (value - plain[head, row, other]).abs() <= limit:
            return f"this cell holds the score of block {other}"
    good = (plain[head, row, :seen].abs() > 100 * bound[head, row, :seen]) & actual[head, row, :seen].isfinite()
    factor = (actual[head, row, :seen] / plain[head, row, :seen])[good]
    if len(factor) > 2 and (factor - factor.median()).abs().max() < 0.01 * factor.median().abs():
        return f"the row is the right one times {factor.median().item():.6g} (a scale applied or lost)"
    if value < plain[head, row, block]:
        return "too small: a key is missing from the maximum, or read wrongly"
    return "too large: a key that the query does not see, or of another page, is in the maximum"


def _forced(view: View, actual: Tensor, expected: Tensor, forced: Tensor) -> Finding:
    """Forced cells hold exactly INIT_SCORE or LOCAL_SCORE, where the profile promises forcing inside the scores."""
    if not view.setting.profile.forced_scores:
        return Finding("forced_score", Status.PASSED, 0.0, 0.0, hint="this kernel promises plain scores in forced cells")
    wrong = forced & visible_cells(view) & (actual != expected.float().double())
    count = int(wrong.sum())
    if not count:
        return Finding("forced_score", Status.PASSED, 0.0, 0.0)
    first = int(wrong.flatten().int().argmax())
    value, wanted = actual.flatten()[first].item(), expected.flatten()[first].item()
    hint = f"{count} forced cells are wrong; this one holds {value:.6g}, wanted {wanted:.6g} (local wins over init)"
    return Finding("forced_score", Status.FAILED, float(count), 0.0, _where(view, first), hint)


def check_invisible(view: View) -> list[Finding]:
    """Cells of blocks that a row does not see hold -inf or were not touched."""
    if not view.setting.filled and "score_out" not in {guard.name for guard in view.run.guards}:
        return [Finding("invisible_score", Status.PASSED, 0.0, 0.0, hint="not judged: fresh memory was not filled")]
    actual = view.actual("score")
    wrong = ~visible_cells(view) & ~(actual.isnan() | (actual == -math.inf))
    count = int(wrong.sum())
    if not count:
        return [Finding("invisible_score", Status.PASSED, 0.0, 0.0)]
    first = int(wrong.flatten().int().argmax())
    hint = (
        f"{count} cells of blocks that their query does not see hold a number, here {actual.flatten()[first].item():.6g}; "
        "wanted -inf or untouched (causal mask, or a row of another request)"
    )
    return [Finding("invisible_score", Status.FAILED, float(count), 0.0, _where(view, first), hint)]
