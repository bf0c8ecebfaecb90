"""Memory that a kernel does not own: guards, inputs, padding columns; and the list of checks itself."""

from __future__ import annotations

import math

import pytest
import simulate
import torch

from m3check import checks, paging, reference
from m3check.types import OPS, Profile, Status

SETTING = checks.Setting(profile=Profile(), evidence="interpreted")


@pytest.fixture
def problem():
    return simulate.inputs("index_score/q=1,kv=300,h=1")


def judge(problem, run, setting=SETTING):
    return simulate.red(checks.compare(problem, run, reference.expected(problem), setting))


def test_a_write_around_a_buffer_is_red(problem):
    guard = paging.guarded("score_out", [1, 1, 3], math.nan, torch.float32, "cpu")
    guard.view.copy_(simulate.scores(problem))
    run = paging.Run({"score": guard.view.clone()}, guards=[guard])
    assert not judge(problem, run)
    guard.view.as_strided((1,), (1,), guard.view.storage_offset() + 3).fill_(1.0)
    assert "buffer `score_out`" in judge(problem, run)["guards"].where


def test_a_changed_input_is_red(problem):
    frozen = paging.Frozen.of("idx_q", problem.idx_q.clone())
    run = paging.Run({"score": simulate.scores(problem)}, frozen=[frozen])
    assert not judge(problem, run)
    frozen.tensor[3] = 0.25
    assert "input `idx_q`" in judge(problem, run)["inputs"].where


def test_padding_columns_hold_minus_infinity_or_were_not_touched(problem):
    run = paging.Run({"score": simulate.scores(problem)}, beyond={"score": torch.tensor([[[math.nan, -math.inf]]])})
    assert not judge(problem, run)
    run.beyond["score"][0, 0, 0] = 1.0
    assert "padding" in judge(problem, run)
    assert not judge(problem, run, checks.Setting(profile=Profile(), evidence="device", filled=False))


def test_every_check_says_what_it_sees_and_passes_with_a_finding():
    names = [check.name for check in checks.CHECKS]
    assert len(set(names)) == len(names)
    assert all(check.catches and check.blind for check in checks.CHECKS)
    problem = simulate.inputs("prefill/q=2,kv=900,h=1,g=2,topk=3")
    score = simulate.scores(problem)
    ids = simulate.select(problem.case, score)
    findings = simulate.judge(problem, {"score": score, "ids": ids, "out": simulate.attention(problem, ids)})
    # The others read one fill each, what only an interpreter can see (tests/test_memory_watch.py), a buffer that a kernel
    # was given and did not return (tests/test_invariants_calls.py), a mixed batch, or outputs of another family of ops.
    silent = {"memory", "given", "metadata", "handover", "waits"}
    outputs = {"", *OPS["prefill"].outputs}
    everywhere = {c.name for c in checks.CHECKS if "fill=" not in c.catches and c.output in outputs} - silent
    assert everywhere <= {f.check for f in findings}
    assert {f.status for f in findings} == {Status.PASSED}
