"""Mistakes of attention kernels that once passed tier `ci`, each with what catches it now."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch_kernels as right

from m3check import runner
from m3check.arch import ARCHS
from m3check.cases import parse_id
from m3check.kernels.contract import check_signature
from m3check.kernels.provider import Loaded, Spec
from m3check.types import Kernel, PlanLine, Profile, Result, Status


def judged(function, case, names=(), profile=Profile()) -> Result:  # noqa: B008  # frozen
    """One case on one function, with some invariants."""
    parsed = parse_id(case)
    kernel = Kernel("user", parsed.op, parsed.op, profile, function)
    session = runner.Session(ARCHS["sm90"], "interpreted", "cpu", Loaded(Spec("user", "user"), {parsed.op: kernel}))
    return runner.run_one(parsed, session, PlanLine(case, parsed.op, "user", "interpreted", None, tuple(names)), "")


def like(op):
    """Give a wrapper the signature of the right kernel, which says what m3check passes."""

    def signed(function):
        function.__signature__ = inspect.signature(right.RIGHT[op])
        return function

    return signed


def with_top(top):
    """Decode attention that subtracts something else than the maximum of the logits."""

    @like("sparse_attn_decode")
    def changed(q, kv_cache, topk_idx, block_table, seq_lens, sm_scale, output, decode_query_len, **scales):
        rows = right.decode_rows(seq_lens, decode_query_len)
        right.attend_rows(q, kv_cache, topk_idx, block_table, rows, sm_scale, output, **scales, top=top)

    return changed


SHAPE = "sparse_attn_decode/q=2,kv=641,h=1,g=2,d=64,topk=3"


@pytest.mark.parametrize("fill", ["gauss", "sunk"])
def test_a_maximum_that_starts_at_zero_shows_where_all_logits_are_sunk(fill):
    floored = with_top(lambda logits, row, head: logits.amax(-1, keepdim=True).clamp(min=0))
    result = judged(floored, f"{SHAPE},fill={fill}".removesuffix(",fill=gauss"))
    assert result.status is (Status.FAILED if fill == "sunk" else Status.PASSED)
    if fill == "sunk":
        assert "finite" in {f.check for f in result.findings if f.status is Status.FAILED}


def test_any_maximum_that_does_not_underflow_is_right_in_sunk_rows():
    higher = with_top(lambda logits, row, head: logits.amax(-1, keepdim=True) + 3)
    result = judged(higher, f"{SHAPE},fill=sunk")
    assert result.status is Status.PASSED, result.reason
    assert torch.isfinite(torch.tensor([f.measured or 0.0 for f in result.findings])).all()


def test_a_function_of_any_keywords_is_given_no_buffer_that_it_may_do_without():
    taken = check_signature("index_topk", lambda **keywords: None, "any")
    assert "out" not in taken
    assert {"score", "topk"} <= taken
    assert "output" in check_signature("sparse_attn", lambda **keywords: None, "any")
    assert "out" in check_signature("index_topk", lambda out, **keywords: None, "any")
