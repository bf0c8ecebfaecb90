"""Score checks: right sums in any order pass, wrong keys, heads, scales and masks are red."""

from __future__ import annotations

import math

import pytest
import simulate
import torch

from m3check import reference
from m3check.arch import Accumulator
from m3check.types import Inputs


@pytest.fixture(scope="module")
def problem() -> Inputs:
    return simulate.inputs("index_score/q=2+3,kv=1500+387,h=3")


def judge(problem, score, **options):
    return simulate.red(simulate.judge(problem, {"score": score}, **options))


@pytest.mark.parametrize("fill", ["gauss", "wide", "ties", "integer"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32", "fp8_e4m3fn"])
def test_right_scores_pass_in_either_order(fill, dtype):
    problem = simulate.inputs(f"index_score/q=2+3,kv=1500+387,h=2,dtype={dtype},cache={dtype},fill={fill}")
    for reverse in (False, True):
        assert not judge(problem, simulate.scores(problem, reverse))


def test_integers_must_be_exact():
    problem = simulate.inputs("index_score/q=2,kv=700,h=2,fill=integer")
    score = simulate.scores(problem)
    assert not judge(problem, score)
    score[1, 0, 2] = torch.nextafter(score[1, 0, 2], torch.tensor(math.inf))
    assert "block 2" in judge(problem, score)["score"].where


def test_scores_rounded_to_bf16_are_red(problem):
    assert "score" in judge(problem, simulate.scores(problem).bfloat16().float())


def test_a_neighbouring_block_is_named(problem):
    score = simulate.scores(problem)
    score[2, 1, 4] = score[2, 1, 5]
    red = judge(problem, score)
    assert "score of block 5" in red["score"].hint
    assert "request 0, query 1" in red["score"].where
    assert "index head 2, block 4" in red["score"].where


def test_a_neighbouring_head_is_named(problem):
    score = simulate.scores(problem)
    score[1, 0] = score[2, 0]
    assert "index head 2" in judge(problem, score)["score"].hint


def test_a_scale_is_named(problem):
    assert "times 0.0883883" in judge(problem, simulate.scores(problem) * 128**-0.5)["score"].hint


def test_a_maximum_without_its_last_token_is_red():
    problem = simulate.inputs("index_score/q=1,kv=1401,h=8")
    full = simulate.scores(problem)
    k = problem.idx_k.clone()
    position = (problem.idx_q[0].float() @ k.float().T)[:, 1280:].argmax(-1)
    key = int(position[0]) + 1280
    k[key] = 0
    score = simulate.scores(type(problem)(problem.case, problem.sm_scale, idx_q=problem.idx_q, idx_k=k))
    assert (score != full).any()
    red = judge(problem, score)
    assert "a key is missing" in red["score"].hint
    assert "block 10" in red["score"].where


def test_a_future_key_in_the_maximum_is_red():
    problem = simulate.inputs("index_score/q=100,kv=100,h=2")
    score = simulate.scores(problem)
    whole = (problem.idx_q.float().transpose(0, 1) @ problem.idx_k.float().T).amax(-1)
    score[:, :, 0] = whole
    assert "too large" in judge(problem, score)["score"].hint


def test_unwritten_and_infinite_cells_are_red(problem):
    for value in (math.nan, math.inf, -math.inf):
        score = simulate.scores(problem)
        score[0, 4, 1] = value
        assert "index head 0, block 1" in judge(problem, score)["finite_score"].where


def test_invisible_cells_may_be_minus_infinity_but_hold_no_number(problem):
    score = simulate.scores(problem)
    score[:, 2:, 4:] = -math.inf
    assert not judge(problem, score)
    score[1, 3, 7] = 0.5
    assert "request 1" in judge(problem, score)["invisible_score"].where
    assert not judge(problem, score, filled=False)


def test_forced_cells_by_profile():
    problem = simulate.inputs("index_decode_score/q=2x2,kv=1500+300,h=2,init=2,local=2")
    plain = simulate.scores(problem)
    forced = simulate.forced(problem.case, plain)
    assert not judge(problem, forced)
    assert "forced_score" in judge(problem, plain)
    assert not judge(problem, plain, forced_scores=False)
    assert "score" in judge(problem, forced, forced_scores=False)
    swapped = torch.where(forced == torch.tensor(1e30), torch.tensor(1e29), forced)
    assert "forced_score" in judge(problem, swapped)


def test_the_truncating_accumulator_model_explains_what_it_should():
    """fp8 with 13 fraction bits, as on sm90: its error passes under its own bound, and not under fp32's."""
    problem = simulate.inputs("index_score/q=2,kv=1500,h=2,dtype=fp8_e4m3fn,cache=fp8_e4m3fn")
    how = Accumulator(fraction_bits=13, inner=32)
    q, k = problem.idx_q.float(), problem.idx_k.float()
    score = simulate.scores(problem)
    for row in range(2):
        products = q[row][:, None] * k[: 1499 + row]  # [H, n, D]
        sums = torch.zeros(products.shape[:2])
        for step in range(0, 128, 32):
            terms = torch.cat([sums[..., None], products[..., step : step + 32]], -1)
            unit = torch.exp2(torch.floor(torch.log2(terms.abs().amax(-1, keepdim=True))) - 13)
            sums = (torch.trunc(terms / unit) * unit).sum(-1)
        padded = torch.nn.functional.pad(sums, (0, -sums.shape[-1] % 128), value=-math.inf)
        blocks = padded.unflatten(-1, (-1, 128)).amax(-1)
        score[:, row, : blocks.shape[-1]] = blocks
    assert not judge(problem, score, dot=how)
    assert "score" in judge(problem, score)


def test_a_nan_key_that_the_reference_ignores_passes():
    problem = simulate.inputs("index_score/q=1,kv=300,h=1")
    k = problem.idx_k.clone()
    k[5] = math.nan
    problem = type(problem)(problem.case, problem.sm_scale, idx_q=problem.idx_q, idx_k=k)
    expected = reference.expected(problem)["score"]
    findings = simulate.judge(problem, {"score": expected.float()})
    assert not simulate.red(findings)
