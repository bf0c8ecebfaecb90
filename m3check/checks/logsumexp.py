"""The logsumexp beside an attention output, which merges parts of a row: in its base, and within what rounding explains."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from m3check.checks.attention import gathered
from m3check.checks.bounds import EXP2_ERROR, FORMATS, LN2, LOG2E, U32, dot_error
from m3check.checks.noise import Pairs, coherence_of, weight_errors
from m3check.checks.rowkinds import dead_rows
from m3check.checks.view import View
from m3check.types import Finding, Status

NOTHING = -1e29
"""Natural logarithm of a mass that no merge notices; kernels that mask with a finite number say so of dead rows."""


def _errors(view: View) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """[T, Hq] each: what was given, in bits; which rows are dead; |error|; the same by its limit."""
    actual, expected = view.actual("lse").double(), view.expected["lse"].to(view.device).double()
    actual = actual * (LOG2E if view.setting.profile.lse == "natural" else 1.0)
    dead = dead_rows(view).repeat_interleave(view.case.gqa, 1)
    error = (actual - expected).abs().nan_to_num(nan=math.inf, posinf=math.inf).masked_fill(dead, 0)
    error = error.masked_fill(dead & ~(actual < NOTHING), math.inf)
    return actual, dead, error, error / limits(view).clamp(min=1e-300)


def chart(view: View) -> Tensor:
    """[T, Hq] of |error| / limit."""
    return _errors(view)[3]


def check_lse(view: View) -> list[Finding]:
    """Live rows: within the bound of `limits`. Dead rows: -inf, or so far down that it weighs nothing in a merge."""
    expected, limit = view.expected["lse"].to(view.device).double(), limits(view)
    actual, dead, error, ratio = _errors(view)
    worst = int(ratio.argmax())
    row, head = divmod(worst, actual.shape[1])
    measured, bound = error.flatten()[worst].item(), limit.flatten()[worst].item()
    where = f"{view.rows.name(row)}, query head {head}"
    if measured <= bound:
        return [Finding("lse", Status.PASSED, measured, bound, where)]
    count, given, wanted = int((error > limit).sum()), actual[row, head].item(), expected[row, head].item()
    other = given * (LN2 if view.setting.profile.lse == "natural" else LOG2E)
    hint = f"{count} rows are off (in bits); this one holds {given:.6g}, wanted {wanted:.6g}"
    if dead[row, head]:
        hint += "; a row without any token, which must weigh nothing in a merge"
    elif abs(other - wanted) <= max(bound, 2.0**-9 * abs(wanted)):
        hint += f"; like the other base than the promised {view.setting.profile.lse}"
    return [Finding("lse", Status.FAILED, measured, bound, where, hint)]


def limits(view: View) -> Tensor:
    """[T, Hq] fp64 of how far log2 Σ exp(logits) of correct arithmetic may be off; 0 in dead rows."""
    if "lse" in view.memo:
        known: Tensor = view.memo["lse"]
        return known
    case = view.case
    result = torch.zeros(case.total_queries, case.heads, dtype=torch.float64, device=view.device)
    deviations = view.setting.deviations(case.total_queries * case.heads)
    lane = torch.arange(case.gqa, device=view.device)
    for row, head, pairs in gathered(view):
        result[row[:, None], head[:, None] * case.gqa + lane] = _limit(view, pairs, deviations).double()
    view.memo["lse"] = result
    return result


def _limit(view: View, pairs: Pairs, deviations: float) -> Tensor:
    """[P, G]: the weights' errors by their share, the sum of weights, and the roundings of the logarithm."""
    assert view.problem.q is not None
    sums = dot_error(pairs.q, pairs.k, view.setting.dot, pairs.whole)
    logit = (sums.value * view.problem.sm_scale).masked_fill(~pairs.attended[:, None], -math.inf)
    m = logit.amax(-1, keepdim=True)
    lse = m + (logit - m).exp().sum(-1, keepdim=True).log()
    weight = (logit - lse).exp()
    logit = logit.masked_fill(~pairs.attended[:, None], 0)
    bias, deviation, most = weight_errors(sums, logit, m, view.problem.sm_scale)
    each = torch.minimum(deviations * deviation, most) + (0 if bias is None else bias)
    shared = (weight * each).sum(-1) * (1 + 2.0**-8)
    rounded = FORMATS[view.problem.q.dtype].u  # a kernel may sum the weights that it rounded for the second product
    together = (coherence_of(logit, rounded, weight) * weight.square().sum(-1) / 3).sqrt()
    shared = shared + rounded * (deviations * together).clamp(max=1)
    tokens = pairs.attended.sum(-1)[:, None].float()
    steps = tokens / pairs.subtile + 1
    summed = U32 * torch.minimum(tokens, deviations * (tokens / 3).sqrt()) + steps * (EXP2_ERROR + 2 * U32)
    logs = 4 * U32 * (torch.maximum(m.abs(), lse.abs()).squeeze(-1) * LOG2E + 1) + 2 * EXP2_ERROR * (1 + tokens.log2())
    return LOG2E * (shared + summed) + logs
