"""Probe fills of attention, read out: which tokens it attended, and what two of them weigh. Exact, in tokens."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from m3check.checks.bounds import EXP2_ERROR, FORMATS, LN2, LOG2E, U32, half_ulp
from m3check.checks.noise import SUBTILE
from m3check.checks.readout import Count, told
from m3check.checks.rowkinds import dead_rows, promised_rows, valid_ids
from m3check.checks.view import View
from m3check.types import BLOCK, Finding, Status

UNACCEPTED = "; on an id list that this kernel does not accept"


def attended_tokens(view: View) -> Tensor:
    """[T, Hkv] how many tokens each row attends to."""
    ids, valid = view.attended.transpose(0, 1), valid_ids(view)
    position = view.rows.position[:, None, None]
    return ((position + 1 - ids * BLOCK).clamp(0, BLOCK) * valid).sum(-1)


def check_membership(view: View) -> list[Finding]:
    """Output times the number of attended tokens counts them: every channel within two roundings of a whole number."""
    if view.case.fill != "membership":
        return []
    actual = view.actual("out").double()
    number = attended_tokens(view).repeat_interleave(view.case.gqa, 1)[..., None].double()
    wanted = (view.expected_out.double() * number).round()
    counted = (actual * number).where(actual.isfinite(), wanted)  # what is not finite is another check's finding
    limit = wanted * _counting_error(view, number)
    return _judge(view, "membership", (counted - wanted).abs(), limit, lambda row, head, _: _miscounted(view, row, head))


def _counting_error(view: View, number: Tensor) -> Tensor:
    """Relative error of a mean of `number` equal weights: two roundings and the sum's.

    The output is rounded, and either partial outputs are or weights that were divided by their sum first (else they are 1).
    """
    dtype = view.actual("out").dtype
    steps = number / SUBTILE + 2
    lse = LN2 * steps * (U32 * number.clamp(min=2).log2() + EXP2_ERROR) + steps * (EXP2_ERROR + 2 * U32)
    return 2 * FORMATS[dtype].u + lse


def _miscounted(view: View, row: int, head: int) -> str:
    kv_head = head // view.case.gqa
    number = int(attended_tokens(view)[row, kv_head])
    return told(Count.of(view, row, head, number))


def check_needle(view: View) -> list[Finding]:
    """One key has all the weight: the output is its value, rounded once."""
    if view.case.fill != "needle":
        return []
    actual, wanted = view.actual("out").double(), view.expected_out.double()
    limit = half_ulp(wanted, view.actual("out").dtype) + wanted.abs() * _needle_error(view)
    error = (actual - wanted).abs().where(actual.isfinite(), 0)
    return _judge(view, "needle", error, limit, lambda row, head, _: _found(view, row, head))


def _needle_error(view: View) -> Tensor:
    """[T, Hq, 1] relative: scaling of logits (of which lse is the largest), exp2, a sum of one weight; tf32 cuts values."""
    cut = 0.0 if view.setting.pv.operand_bits is None else 2.0 ** (1 - view.setting.pv.operand_bits)
    largest = view.expected["lse"].to(view.device).double().abs().nan_to_num(0, 0, 0)
    return (4 * U32 * largest + 4 * EXP2_ERROR + cut)[..., None]


def _logits(view: View, row: int, head: int) -> tuple[Tensor, Tensor]:
    """(attended tokens of a row, ascending, and their logits in nats, fp64)."""
    q, k = view.problem.q, view.problem.k
    assert q is not None
    assert k is not None
    kv_head = head // view.case.gqa
    ids = view.attended[kv_head, row]
    ids = ids[(ids >= 0) & (ids < view.rows.visible[row])].unique()
    token = (ids[:, None] * BLOCK + torch.arange(BLOCK, device=ids.device)).flatten()
    token = token[token <= view.rows.position[row]]
    keys = k[view.rows.kv_start[row] + token, kv_head].double()
    return token, keys @ q[row, head].double() * view.problem.sm_scale


def _found(view: View, row: int, head: int) -> str:
    """Which token's value a row holds instead of the needle's."""
    v = view.problem.v
    assert v is not None
    token, logit = _logits(view, row, head)
    needle, start, length = int(token[logit.argmax()]), int(view.rows.kv_start[row]), int(view.rows.kv_len[row])
    out = view.actual("out")[row, head].double()
    wanted = f"wanted that of token {needle} (block {needle // BLOCK}, offset {needle % BLOCK})"
    if not out.any():
        return f"the row is zero, as if token {needle} (block {needle // BLOCK}, offset {needle % BLOCK}) were never read"
    kv_head = head // view.case.gqa
    off = (v.double() - out).abs() > half_ulp(out, view.actual("out").dtype) * 2
    same = (~off.any(-1)).nonzero()  # [·, 2] rows of all requests and heads
    for place, other in same.tolist():
        if start <= place < start + length:
            at = place - start
            whose = "" if other == kv_head else f" of kv head {other}"
            far = f", {at - int(view.rows.position[row])} past the query" if at > view.rows.position[row] else ""
            return f"holds the value of token {at} (block {at // BLOCK}, offset {at % BLOCK}){whose}{far}; {wanted}"
    if len(same):
        return f"holds a value of another request; {wanted}"
    ratio = out / v[start + needle, kv_head].double()
    if (ratio - ratio.median()).abs().max() < 0.02 * ratio.median().abs():
        return f"holds the value of token {needle} times {ratio.median().item():.5g}"
    others = logit.masked_fill(token == needle, -math.inf).softmax(0) @ v[start + token, kv_head].double()
    toward = v[start + needle, kv_head].double() - others
    share = float((out - others) @ toward / toward.square().sum())
    if abs(share) < 0.25:
        return f"token {needle} (block {needle // BLOCK}, offset {needle % BLOCK}) was not attended"
    return f"holds no token's value; {wanted}"


def check_two_keys(view: View) -> list[Finding]:
    """The lighter of two keys has the weight that its distance in nats gives it, wherever the two stand."""
    if view.case.fill != "two_keys":
        return []
    actual, wanted = view.actual("out").double(), view.expected_out.double()
    dtype = view.actual("out").dtype
    roundings = 2 if view.setting.profile.partials == "fp32" else 3  # of the weight, of partial outputs, of the output
    flushed = 2.0**-25 if dtype == torch.float16 else 0.0
    logits = _needle_error(view) + view.problem.sm_scale * _dot_error(view)
    limit = wanted * (roundings * FORMATS[dtype].u + logits) + flushed
    error = (actual - wanted).abs().where(actual.isfinite(), 0)
    return _judge(view, "two_keys", error, limit, lambda row, head, over: _odds(view, row, head) + _merge(view, over))


def _dot_error(view: View) -> float:
    """How far q·k may be off: three products, of 56 and at most 20 bits' worth each, and what truncation does to them."""
    how, q, k = view.setting.dot, view.problem.q, view.problem.k
    assert q is not None
    assert k is not None
    largest = 3 * float(q.abs().max()) * float(k.abs().max()) if k.numel() else 0.0
    cut = 0.0 if how.operand_bits is None else 2.0 ** (2 - how.operand_bits)
    step = 4 * U32 if how.fraction_bits is None else (how.inner + 1) * 2.0 ** (1 - how.fraction_bits)
    return largest * (cut + step * (1 if how.fraction_bits is None else math.ceil(view.case.head_dim / how.inner)))


def _odds(view: View, row: int, head: int) -> str:
    """The distance of the two keys that a row's output tells, and what would make it so."""
    token, logit = _logits(view, row, head)
    if len(token) < 2:
        return "the row sees one key only"
    best = logit.topk(2)
    gap = float(best.values[0] - best.values[1])
    heavy, light = (int(x) for x in token[best.indices])
    where = "the same block" if heavy // BLOCK == light // BLOCK else "different blocks"
    keys = f"tokens {heavy} and {light} ({where}) are {gap:.4g} nats apart"
    weight = view.actual("out")[row, head].double().median().item()
    if weight <= 0:
        return f"{keys}; token {light} has no weight at all"
    if weight >= 1:
        return f"{keys}; token {heavy} has no weight at all, or weights do not add up to 1 ({weight:.5g})"
    found = math.log((1 - weight) / weight)
    text = f"{keys}; the output says {found:.4g}"
    for factor, cause in (
        (LN2, "2^x where e^x belongs"),
        (LOG2E, "log2 e applied twice"),
        (0.0, "both weigh the same: a weight of the merge is lost"),
        (view.problem.sm_scale, "the softmax scale applied twice"),
    ):
        if abs(found - gap * factor) < 0.05 * max(gap, 1):
            return f"{text}: {cause}"
    return f"{text}, {found / gap:.4f} times as much"


def _merge(view: View, over: Tensor) -> str:
    """Whether all that is wrong stands in different blocks, while keys of one block come out right."""
    apart = []
    for row, head in (~dead_rows(view)).repeat_interleave(view.case.gqa, 1).nonzero().tolist()[:64]:
        token, logit = _logits(view, row, head)
        if len(token) > 1:
            pair = token[logit.topk(2).indices].div(BLOCK, rounding_mode="floor")
            apart.append((bool(pair[0] != pair[1]), bool(over[row, head])))
    if any(different and wrong for different, wrong in apart) and {
        wrong for different, wrong in apart if not different
    } == {False}:
        return "; two keys of one block come out right: look at what joins blocks and chunks"
    return ""


def _judge(view: View, check: str, error: Tensor, limit: Tensor, say) -> list[Finding]:  # type: ignore[no-untyped-def]
    """Findings about [T, Hq, D]: the worst row of those that the profile promises, and one about the others."""
    live = (~dead_rows(view)).repeat_interleave(view.case.gqa, 1)
    accepted = promised_rows(view).repeat_interleave(view.case.gqa, 1)
    over = (error > limit).any(-1) & live
    findings = []
    ratio = (error / limit.clamp(min=1e-30)).where(live[..., None], 0)
    for status, among in ((Status.FAILED, accepted), (Status.NOTED, ~accepted)):
        if not (over & among).any():
            continue
        row, head = divmod(int((over & among).flatten().int().argmax()), view.case.heads)
        channel = int(ratio[row, head].argmax())
        place = f"{view.rows.name(row)}, {_whose(view, over & among, row, head)}"
        hint = say(row, head, over) + (UNACCEPTED if status is Status.NOTED else "")
        hint += f"; {int((over & among).sum())} rows of a query head are wrong"
        measured, allowed = error[row, head, channel].item(), limit[row, head, channel].item()
        findings.append(Finding(check, status, measured, allowed, place, hint))
    if not any(finding.status is Status.FAILED for finding in findings):
        worst = int(ratio.masked_fill(~accepted[..., None], 0).argmax())
        findings.insert(0, Finding(check, Status.PASSED, error.flatten()[worst].item(), limit.flatten()[worst].item()))
    return findings


def _whose(view: View, over: Tensor, row: int, head: int) -> str:
    group = view.case.gqa
    kv_head = head // group
    whole = bool(over[row, kv_head * group : (kv_head + 1) * group].all())
    return f"kv head {kv_head}" if whole else f"query head {head} (kv head {kv_head})"
