"""Certified selection: legal sets pass in any order and with any tie, every broken promise is red."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import simulate
import torch

from m3check import cases
from m3check.types import Inputs, Status


def topk(scores: list[float], *, count: int = 4, init: int = 0, local: int = 1) -> Inputs:
    """One row of one head with these scores."""
    case = cases.parse_id(f"index_topk/q=1,kv={len(scores) * 128},h=1,topk={count},init={init},local={local}")
    return Inputs(case, 1.0, scores=torch.tensor(scores)[None, None])


def judge(problem: Inputs, ids, **options):
    return simulate.red(simulate.judge(problem, {"ids": torch.tensor([[ids]], dtype=torch.int32)}, **options))


SCORES = [5.0, 1.0, 3.0, 3.0, 9.0, -2.0, 0.0, 4.0]


def test_any_order_and_either_tie_pass():
    problem = topk(SCORES)
    for ids in ([7, 4, 0, 2], [0, 3, 4, 7], [2, 7, 0, 4]):
        assert not judge(problem, ids)


def test_a_swap_of_blocks_that_are_not_tied_is_red():
    red = judge(topk(SCORES), [7, 4, 0, 1])
    assert "block 1 (score 1) was taken and block 2 (3) left out" in red["selection"].hint
    assert red["selection"].measured == 2.0


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        ([7, 4, 0, 0], "listed twice"),
        ([7, -1, 4, 0], "-1 before the end"),
        ([7, 4, 0, 8], "out of range"),
        ([7, 4, 0, -5], "below -1"),
        ([7, 4, 0, -7777], "never written"),
        ([7, 4, 0, -1], "-1 before the end"),
    ],
)
def test_malformed_lists_are_red(ids, words):
    assert words in judge(topk(SCORES), ids)["ids"].hint


def test_unused_slots_are_minus_one_and_invisible_blocks_are_not_listed():
    problem = simulate.inputs("index_topk/q=1x2,kv=200+900,h=1,topk=4")
    ids = simulate.select(problem.case, problem.scores)
    assert not simulate.red(simulate.judge(problem, {"ids": ids}))
    stale = ids.clone()
    stale[0, 0, 3] = 1
    assert "unused slot" in simulate.red(simulate.judge(problem, {"ids": stale}))["ids"].hint
    unseen = ids.clone()
    unseen[0, 0, 1] = 5
    assert "after the query's own" in simulate.red(simulate.judge(problem, {"ids": unseen}))["ids"].hint


def test_forced_blocks_must_be_there():
    problem = topk(SCORES, init=1, local=2)
    assert not judge(problem, [0, 6, 7, 4])
    for ids in ([4, 6, 7, 2], [0, 4, 2, 7]):
        assert "forced" in judge(problem, ids)


def test_more_forced_blocks_than_slots_by_either_rule():
    problem = topk(SCORES, count=3, init=2, local=2)
    assert not judge(problem, [0, 1, 6])  # init first: the own block is lost
    assert not judge(problem, [0, 1, 7])
    assert "forced" in judge(problem, [0, 6, 7])
    assert "forced" in judge(problem, [0, 1, 4])
    assert not judge(problem, [7, 0, 6], forcing="own_block")
    assert "forced" in judge(problem, [0, 1, 6], forcing="own_block")
    assert "forced" in judge(problem, [7, 0, 4], forcing="own_block")


def test_a_block_that_is_init_and_local_is_local():
    problem = topk([1.0, 2.0, 3.0, 4.0], count=3, init=3, local=2)  # init only: 0, 1; local: 2, 3
    assert not judge(problem, [0, 1, 2])
    assert not judge(problem, [0, 1, 3])
    assert "forced" in judge(problem, [0, 2, 3])


def test_order_and_ties_only_where_promised():
    problem = topk(SCORES)
    assert not judge(problem, [7, 4, 0, 3])
    assert "ties" in judge(problem, [7, 4, 0, 3], tie_rule="smaller_id")
    assert not judge(problem, [7, 4, 0, 2], tie_rule="smaller_id")
    assert not judge(problem, [7, 4, 0, 2], id_order="score")
    assert "order" in judge(problem, [7, 0, 4, 2], id_order="score")
    assert "order" in judge(problem, [7, 4, 0, 2], id_order="ascending")
    assert not judge(problem, [0, 2, 4, 7], id_order="ascending")


def test_nan_ranks_lowest_and_zeros_are_equal():
    problem = topk([math.nan, -math.inf, 2.0, math.inf, 1.0, 0.0], count=5)
    assert not judge(problem, [5, 3, 2, 4, 1])
    assert "selection" in judge(problem, [5, 3, 2, 4, 0])
    zeros = topk([0.0, -0.0, 0.0, -1.0, 5.0], count=3)
    for ids in ([4, 0, 1], [4, 1, 2], [4, 0, 2]):
        assert not judge(zeros, ids)


@pytest.mark.parametrize("odd", [math.nan, math.inf, 2e29])
def test_odd_scores_are_noted_where_nothing_is_promised(odd):
    problem = topk([5.0, odd, 3.0, 3.0, 9.0, 1.0], count=3)
    ids = [5, 2, 3]
    assert judge(problem, ids)
    findings = simulate.judge(problem, {"ids": torch.tensor([[ids]], dtype=torch.int32)}, odd_scores=frozenset())
    assert not simulate.red(findings)
    assert Status.NOTED in {f.status for f in findings}
    assert "selection" in judge(topk(SCORES), [7, 4, 0, 1], odd_scores=frozenset())


def test_nan_alone_can_be_promised_and_only_where_numbers_are_enough():
    promised = frozenset({"nan"})
    enough = topk([5.0, math.nan, 3.0, 2.0, 9.0, 1.0], count=3)
    assert not judge(enough, [5, 4, 0], odd_scores=promised)
    assert "selection" in judge(enough, [5, 4, 1], odd_scores=promised)
    for scores in ([5.0, math.nan, math.nan, math.nan, math.nan, 1.0], [5.0, math.nan, 3.0, 2.0, math.inf, 1.0]):
        assert judge(topk(scores, count=3), [5, 1, 2])
        assert not judge(topk(scores, count=3), [5, 1, 2], odd_scores=promised)


def test_scores_that_nobody_saw_have_slack_and_no_more():
    problem = simulate.inputs("index_decode/q=1,kv=2560,h=4,topk=4")
    score = simulate.scores(problem)
    ids = simulate.select(problem.case, score)
    assert not simulate.red(simulate.judge(problem, {"ids": ids}))
    for head in range(4):
        order = score[head, 0, :19].argsort(descending=True)
        swapped = ids.clone()
        swapped[head, 0] = torch.tensor([19, order[0], order[1], order[3]])
        red = simulate.red(simulate.judge(problem, {"ids": swapped}))
        assert f"index head {head}" in red["selection"].where
    # two blocks closer than rounding: either may be taken
    k = problem.idx_k.clone()
    k[128:256] = k[0:128]
    tied = replace(problem, idx_k=k)
    score = simulate.scores(tied)
    other = simulate.select(tied.case, score)
    listed = other[0, 0].tolist()
    if (0 in listed) != (1 in listed):
        other[0, 0] = torch.tensor([{0: 1, 1: 0}.get(b, b) for b in listed])
    assert not simulate.red(simulate.judge(tied, {"ids": other}))


def test_each_head_and_row_is_judged_by_its_own_scores():
    problem = simulate.inputs("index_topk/q=3,kv=2000,h=3,topk=5")
    ids = simulate.select(problem.case, problem.scores)
    assert not simulate.red(simulate.judge(problem, {"ids": ids}))
    assert "selection" in simulate.red(simulate.judge(problem, {"ids": ids.roll(1, 0)}))
