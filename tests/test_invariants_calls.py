"""The form of a call changes no result: buffers given or not, spare rows, strides, limits, tiles, no query at all."""

from __future__ import annotations

import inspect
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
import torch_kernels as right
from test_invariants import PROFILE, like, run, session

from m3check import cases, invariants, runner
from m3check.types import PlanLine, Status

TOPK = "index_topk/q=1+2,kv=424+961,h=2,topk=5"
DECODE = "index_decode/q=2x2,kv=733+257,h=2,d=64,topk=4"
SCORES = "index_decode_score/q=2x2,kv=733+257,h=2,d=64,init=1"
PROMISED = replace(PROFILE, bitwise=frozenset({"apart", "empty"}))


def findings(functions, case, name, profile=PROFILE):
    result = run({**right.RIGHT, **functions}, case, (name,), profile)
    return {f.check: f for f in result.findings if f.status is not Status.PASSED}, result


def topk_into(score, cu_seqlens_q, prefix_lens, topk, init_blocks, local_blocks, out=None):
    """A right kernel that writes where it is told, or into a tensor of its own."""
    ids = right.index_topk(score, cu_seqlens_q, prefix_lens, topk, init_blocks, local_blocks)
    if out is None:
        return ids
    out[:, : ids.shape[1]] = ids
    return out[:, : ids.shape[1]]


def decode_into(
    idx_q,
    index_kv_cache,
    block_table,
    seq_lens,
    max_seq_len,
    topk,
    init_blocks,
    local_blocks,
    decode_query_len,
    score_out=None,
):
    """A right kernel that also gives its scores away."""
    arguments = (idx_q, index_kv_cache, block_table, seq_lens, max_seq_len)
    score = right.index_decode_score(*arguments, init_blocks, local_blocks, decode_query_len)
    if score_out is not None:
        columns = min(score.shape[2], score_out.shape[2])
        score_out[..., :columns] = score[..., :columns]
    return right.index_decode(*arguments, topk, init_blocks, local_blocks, decode_query_len)


def test_a_kernel_that_is_wrong_without_a_buffer():
    def wrong(score, cu_seqlens_q, prefix_lens, topk, init_blocks, local_blocks, out=None):
        ids = topk_into(score, cu_seqlens_q, prefix_lens, topk, init_blocks, local_blocks, out)
        return ids if out is not None else ids.flip(1)

    assert run({**right.RIGHT, "index_topk": wrong}, TOPK, ()).status is Status.PASSED
    red, result = findings({"index_topk": wrong}, TOPK, "own_buffers")
    assert set(red) == {"own_buffers"}
    assert "no buffer was given" in result.reason
    clean, result = findings({"index_topk": topk_into}, TOPK, "own_buffers")
    assert not clean
    assert "own_buffers" in {f.check for f in result.findings}


def test_a_kernel_that_needs_its_buffer_shows_nothing():
    def needs(score, cu_seqlens_q, prefix_lens, topk, init_blocks, local_blocks, out):
        return topk_into(score, cu_seqlens_q, prefix_lens, topk, init_blocks, local_blocks, out)

    red, result = findings({"index_topk": needs}, TOPK, "own_buffers")
    assert not red
    assert "own_buffers" not in {f.check for f in result.findings}


def test_a_result_must_stand_in_the_buffer_that_was_given():
    def elsewhere(score, cu_seqlens_q, prefix_lens, topk, init_blocks, local_blocks, out=None):
        return right.index_topk(score, cu_seqlens_q, prefix_lens, topk, init_blocks, local_blocks)

    def copied(score, cu_seqlens_q, prefix_lens, topk, init_blocks, local_blocks, out=None):
        return topk_into(score, cu_seqlens_q, prefix_lens, topk, init_blocks, local_blocks, out).clone()

    red, result = findings({"index_topk": elsewhere}, TOPK, "repeat")
    assert set(red) == {"given"}
    assert "-7777" in result.reason
    assert not findings({"index_topk": copied}, TOPK, "repeat")[0]


def test_rows_of_an_id_buffer_past_the_batch_belong_to_others():
    def spills(score, cu_seqlens_q, prefix_lens, topk, init_blocks, local_blocks, out=None):
        ids = topk_into(score, cu_seqlens_q, prefix_lens, topk, init_blocks, local_blocks, out)
        if out is not None and out.shape[1] > ids.shape[1]:
            out[:, ids.shape[1]] = -1
        return ids

    pool = f"{TOPK},layout=pool"
    assert set(findings({"index_topk": spills}, pool, "repeat")[0]) == {"guards"}
    assert not findings({"index_topk": topk_into}, pool, "repeat")[0]


@pytest.mark.parametrize(
    ("spoil", "check"),
    [
        (lambda score: score.mul_(0.5), "score"),
        (lambda score: score.fill_(float("nan")), "finite_score"),
        (lambda score: score.clamp_(max=1e28), "forced_score"),
    ],
)
def test_the_scores_of_a_decode_selection_are_judged_too(spoil, check):
    def wrong(**keywords):
        ids = decode_into(**keywords)
        if keywords.get("score_out") is not None:
            spoil(keywords["score_out"])
        return ids

    wrong.__signature__ = inspect.signature(decode_into)
    red, _ = findings({"index_decode": wrong}, DECODE, "repeat")
    assert check in red
    assert not findings({"index_decode": decode_into}, DECODE, "repeat")[0]


def test_strides_of_channels_bind_only_a_kernel_that_promises_them():
    def dense(score, cu_seqlens_q, prefix_lens, topk, init_blocks, local_blocks):
        step = score.stride(-1)
        assumed = score.as_strided(score.shape, (score.stride(0), score.stride(1), 1)) if step != 1 else score
        return right.index_topk(assumed, cu_seqlens_q, prefix_lens, topk, init_blocks, local_blocks)

    red, _ = findings({"index_topk": dense}, TOPK, "apart", PROMISED)
    assert red["apart"].status is Status.FAILED
    noted, result = findings({"index_topk": dense}, TOPK, "apart")
    assert noted["apart"].status is Status.NOTED
    assert result.status is Status.PASSED
    for case in (TOPK, DECODE, SCORES, "sparse_attn/q=2,kv=509,h=2,g=2,d=64,topk=3,cache=fp8_e4m3fn,scale=token"):
        assert not findings({}, case, "apart", PROMISED)[0]


@pytest.mark.parametrize("case", [TOPK, DECODE, "index_score/q=2+1,kv=300+200,h=2,d=64"])
def test_a_batch_without_queries_binds_only_a_kernel_that_promises_it(case):
    op = case.partition("/")[0]

    @like(op)
    def divides(**keywords):
        tokens = keywords["idx_q"].shape[0] if "idx_q" in keywords else keywords["score"].shape[1]
        assert 64 // tokens >= 0
        return right.RIGHT[op](**keywords)

    red, _ = findings({op: divides}, case, "empty", PROMISED)
    assert red["empty"].status is Status.FAILED
    assert "ZeroDivisionError" in red["empty"].hint
    noted, _ = findings({op: divides}, case, "empty")
    assert noted["empty"].status is Status.NOTED
    assert not findings({}, case, "empty", PROMISED)[0]


def test_a_chunk_of_many_tiles_shows_when_the_limit_is_that_of_a_million_tokens():
    case = "index_decode/q=1,kv=9000,h=1,d=16,topk=3"

    @like("index_decode")
    def one_tile(**keywords):
        if keywords["max_seq_len"] < 1 << 20:
            return right.index_decode(**keywords)
        short = {**keywords, "seq_lens": keywords["seq_lens"].clamp(max=64 * 128)}  # blocks after the first tile are lost
        return right.index_decode(**short)

    red, _ = findings({"index_decode": one_tile}, case, "longest")
    assert set(red) == {"longest"}
    assert not findings({}, case, "longest")[0]


def test_every_choice_of_tiles_is_tried_and_undone():
    case = "index_topk/q=2,kv=2305,h=2,topk=4"
    step = {"blocks": 1000}

    @contextmanager
    def chosen():
        before = step["blocks"]
        step["blocks"] = 8
        try:
            yield
        finally:
            step["blocks"] = before

    def by_steps(score, cu_seqlens_q, prefix_lens, topk, init_blocks, local_blocks):
        ids = right.index_topk(score, cu_seqlens_q, prefix_lens, topk, init_blocks, local_blocks)
        return torch.where(ids >= 2 * step["blocks"], 0, ids)  # the third step is never made

    def result(function):
        parsed = cases.parse_id(case)
        made = session({**right.RIGHT, "index_topk": function})
        made.loaded = replace(made.loaded, tiles=(("steps of 8 blocks", chosen),))
        return runner.run_one(parsed, made, PlanLine(case, "index_topk", "user", "interpreted", None, ("tiles",)), "")

    found = result(by_steps)
    assert found.status is Status.FAILED
    assert "with steps of 8 blocks" in found.reason
    assert step["blocks"] == 1000
    clean = result(right.index_topk)
    assert clean.status is Status.PASSED
    assert "tiles" in {f.check for f in clean.findings}


def test_what_a_kernel_need_not_bear_is_an_invariant_of_that_name():
    assert {invariant.name for invariant in invariants.INVARIANTS} >= invariants.PROMISES
