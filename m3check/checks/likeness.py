"""What a wrong attention row resembles: another row's right answer, or this row's with a scale of another kind."""

from __future__ import annotations

import math

from torch import Tensor

from m3check.checks.view import View

ALIKE = 0.05
"""A guess must leave less than this share of the error."""


def looks_like(view: View, row: int, head: int) -> str:
    """What row `row` of query head `head` holds, as the end of a sentence; empty where nothing known fits."""
    actual = view.actual("out")[row, head].double()
    expected = view.expected_out.double()
    if not actual.any():
        return "; the row is zero"
    wrong = (actual - expected[row, head]).norm()
    heads = (expected[row] - actual).norm(dim=-1)
    heads[head] = math.inf
    if heads.min() < ALIKE * wrong:
        return f"; the row holds the result of query head {int(heads.argmin())}"
    queries = (expected[:, head] - actual).norm(dim=-1)
    queries[row] = math.inf
    if queries.min() < ALIKE * wrong:
        return f"; the row holds the result of {view.rows.name(int(queries.argmin()))}"
    for cause, factor in _scales(view):
        if (_attention(view, row, head, factor) - actual).norm() < ALIKE * wrong:
            return f"; like a softmax scale times {factor:.4g} ({cause})"
    return ""


def _scales(view: View) -> tuple[tuple[str, float], ...]:
    return (
        ("2^x where e^x belongs", math.log(2)),
        ("log2 e applied twice", 1 / math.log(2)),
        ("the softmax scale applied twice", view.problem.sm_scale),
        ("no softmax scale", 1 / view.problem.sm_scale),
        ("all logits zero", 0.0),
    )


def _attention(view: View, row: int, head: int, factor: float) -> Tensor:
    """One row of attention, its logits times `factor`: [D] fp64."""
    q, k, v = view.problem.q, view.problem.k, view.problem.v
    assert q is not None
    assert k is not None
    assert v is not None
    kv_head = head // view.case.gqa
    ids = view.attended[kv_head, row].unique()
    token = view.tokens(ids)
    token = token[(token >= 0) & (token <= view.last[row])] + view.rows.kv_start[row]
    logits = k[token, kv_head].double() @ q[row, head].double() * (view.problem.sm_scale * factor)
    attention: Tensor = logits.softmax(0) @ v[token, kv_head].double()
    return attention
