"""Mistakes of kernels that once passed tier `ci`, each with what catches it now."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch_kernels as right

from m3check import runner
from m3check.arch import ARCHS
from m3check.cases import case_id, parse_id, tier
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


def red(result):
    return {f.check for f in result.findings if f.status is Status.FAILED}


def of_ci(op, *words):
    """The case of tier `ci` whose id has these words."""
    [case] = [case for case in tier("ci", [op]) if all(word in case_id(case) for word in words)]
    return case_id(case)


def aliased(op, apart):
    """The right kernel, but requests that are `apart` or more use the block table of one before them."""

    @like(op)
    def changed(block_table, **given):
        rows = torch.arange(len(block_table)) % apart
        return right.RIGHT[op](block_table=block_table[rows], **given)

    return changed


@pytest.mark.parametrize("apart", [8, 64, 1000])
@pytest.mark.parametrize(
    ("op", "words"),
    [
        ("index_score", ("1x69+3",)),
        ("index_decode_score", ("1x70",)),
        ("sparse_attn", ("1x69+3",)),
        ("sparse_attn_decode", ("2x70",)),
    ],
)
def test_requests_past_the_eighth_or_the_sixty_fourth_show(op, words, apart):
    result = judged(aliased(op, apart), of_ci(op, *words))
    assert result.status is (Status.PASSED if apart == 1000 else Status.FAILED), result.reason
    assert apart == 1000 or {"score", "element", "finite"} & red(result)


@pytest.mark.parametrize("rows", [8, 64, 1000])
def test_rows_of_a_selection_past_a_tile_show(rows):
    @like("index_topk")
    def wrapped(score, cu_seqlens_q, prefix_lens, topk, init_blocks, local_blocks):
        starts = cu_seqlens_q.tolist()
        seen = right.prefill_rows(cu_seqlens_q, prefix_lens)
        seen = [(r, int(prefix_lens[r]) + (i - starts[r]) % rows) for i, (r, _) in enumerate(seen)]
        return right.select_rows(score, seen, topk, init_blocks, local_blocks)

    result = judged(wrapped, of_ci("index_topk", "q=66+1x16"))
    assert result.status is (Status.PASSED if rows == 1000 else Status.FAILED), result.reason
    assert rows == 1000 or red(result) & {"ids", "forced"}


@pytest.mark.parametrize(("tile", "from_tile"), [(64, 2), (128, 1), (256, 0), (64, 9)])
def test_a_tile_that_reaches_one_query_too_little_shows(tile, from_tile):
    @like("index_score")
    def short(cu_seqlens_q, prefix_lens, **given):
        score = right.index_score(cu_seqlens_q=cu_seqlens_q, prefix_lens=prefix_lens, **given)
        for row, (request, position) in enumerate(right.prefill_rows(cu_seqlens_q, prefix_lens)):
            query = position - int(prefix_lens[request])
            if query % tile == tile - 1 and query // tile >= from_tile and position % right.BLOCK == 0:
                score[:, row, position // right.BLOCK] = float("nan")  # nobody wrote it
        return score

    result = judged(short, of_ci("index_score", "q=257x2"))
    assert red(result) == (set() if from_tile == 9 else {"finite_score"})


@pytest.mark.parametrize(("fill", "bits"), [("close", 0), ("close", 1), ("close", 16), ("gauss", 16)])
def test_a_selection_that_leaves_bits_of_a_score_out_shows_among_close_scores(fill, bits):
    @like("index_topk")
    def lossy(score, **given):
        order = score.view(torch.int32) >> bits << bits  # as a radix sort of the leading bits has them
        return right.index_topk(order.view(torch.float32), **given)

    case = of_ci("index_topk", "fill=close")
    result = judged(lossy, case if fill == "close" else case.removesuffix(",fill=close"))
    assert red(result) == ({"selection"} if bits and fill == "close" else set())  # as bf16 in a short row of others
