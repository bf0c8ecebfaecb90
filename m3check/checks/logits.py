"""Indexer logits: every visible one within its bound, and -inf wherever a row sees no token. docs/bounds.md derives it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from m3check.checks.bounds import U32, dot_error, whole
from m3check.checks.view import View, chunks
from m3check.types import Finding, Status


def visible(view: View) -> Tensor:
    """[T, context] bool: tokens at or before the row's position."""
    return torch.arange(view.case.context, device=view.device) <= view.rows.position[:, None]


def limits(view: View) -> Tensor:
    """[T, context] fp64: the largest error of correct arithmetic; 0 where a row sees nothing."""
    if "logits" in view.memo:
        known: Tensor = view.memo["logits"]
        return known
    problem, case = view.problem, view.case
    assert problem.idx_q is not None
    assert problem.idx_k is not None
    how = view.setting.scoring or view.setting.dot
    deviations = view.setting.deviations(case.total_queries * case.context * case.heads)
    integers = whole(problem.idx_q, problem.idx_k)
    result = torch.zeros(case.total_queries, case.context, dtype=torch.float64, device=view.device)
    for request in case.requests():
        keys = problem.idx_k[request.tokens].float()
        scale = problem.more["key_scale"][request.tokens]
        for part in chunks(request.query_len, max(1, 2**22 // (case.heads * max(request.kv_len, 1)))):
            rows = slice(request.query_start + part.start, request.query_start + part.stop)
            sums = dot_error(problem.idx_q[rows].float(), keys, how, integers)  # [c, H, n]
            weight = problem.more["weights"][rows].abs()[..., None] * scale
            counts = sums.value > -sums.limit(deviations)  # a head that is surely below zero gives 0, whatever its error
            weight = weight * counts
            size = (weight * sums.value.clamp(min=0)).sum(1)
            roundings = case.heads + 4  # scale, weight, the additions of heads and two that a kernel may place elsewhere
            variance = (weight * sums.deviation).square().sum(1) + roundings / 3 * (U32 * size).square()
            worst = (weight * sums.worst).sum(1) + roundings * U32 * size
            limit = torch.minimum(deviations * variance.sqrt(), worst)
            if sums.bias is not None:
                limit = limit + (weight * sums.bias).sum(1)
            result[rows, : request.kv_len] = limit.double() * (1 + 2.0**-10)
    result = result.masked_fill(~visible(view), 0)
    view.memo["logits"] = result
    return result


def _errors(view: View) -> tuple[Tensor, Tensor]:
    """([T, context] |error| of visible logits, the same by its limit)."""
    actual, expected = view.actual("logits").double(), view.expected["logits"].to(view.device).double()
    error = (actual - expected).abs().nan_to_num(nan=math.inf, posinf=math.inf).where(visible(view), 0)
    limit = limits(view)
    return error, torch.where(error > limit, error / limit.clamp(min=1e-300), error / limit.clamp(min=1e-30))


def chart(view: View) -> Tensor:
    """[T, context] of |error| / limit; infinite where a row sees nothing and yet has a number."""
    return torch.where(~visible(view) & (view.actual("logits") != -math.inf), math.inf, _errors(view)[1])


def check_values(view: View) -> list[Finding]:
    """Every visible logit lies within its bound; NaN and infinities count as infinitely far off."""
    actual, expected = view.actual("logits").double(), view.expected["logits"].to(view.device).double()
    seen, limit = visible(view), limits(view)
    error, ratio = _errors(view)
    row, token = divmod(int(ratio.argmax()), view.case.context)
    measured, bound = error[row, token].item(), limit[row, token].item()
    where = f"{view.rows.name(row)}, token {token}"
    if measured <= bound:
        return [Finding("logits", Status.PASSED, measured, bound, where)]
    count = int((error > limit).sum())
    hint = f"{count} of {int(seen.sum())} logits are off, here {actual[row, token]:.6g} for {expected[row, token]:.6g}"
    return [Finding("logits", Status.FAILED, measured, bound, where, hint)]


def check_outside(view: View) -> list[Finding]:
    """Cells of tokens that a row does not see, and of no token, are -inf: a top-k takes them as they are."""
    wrong = ~visible(view) & (view.actual("logits") != -math.inf)
    rest = view.run.beyond.get("logits")
    extra = torch.zeros_like(wrong[:, :0]) if rest is None else rest != -math.inf
    count = int(wrong.sum()) + int(extra.sum())
    if not count:
        return [Finding("outside", Status.PASSED, 0.0, 0.0)]
    inside = bool(wrong.any())
    row, cell = divmod(int((wrong if inside else extra).flatten().int().argmax()), (wrong if inside else extra).shape[1])
    assert inside or rest is not None
    value = (view.actual("logits") if inside or rest is None else rest)[row, cell].item()
    place = f"token {cell}" if inside else f"column {cell} of those that are no token of its request"
    past = cell - int(view.rows.position[row]) if inside else 0
    hint = f"{count} cells hold something else than -inf, here {value:.6g}"
    hint += f", {past} past the query (window off by one?)" if past == 1 else ""
    return [Finding("outside", Status.FAILED, float(count), 0.0, f"{view.rows.name(row)}, {place}", hint)]
