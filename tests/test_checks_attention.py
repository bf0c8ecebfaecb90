"""Attention checks: right kernels of many styles pass, and each wrong one is red with its cause named."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest
import simulate
import torch
from simulate import Edit, Style

from m3check.arch import Accumulator
from m3check.types import Inputs, Status

CASE = "sparse_attn_decode/q=1x2,kv=2048+700,h=2,g=8,topk=8"

STYLES = {
    "one_pass": Style(),
    "small_tiles_reversed": Style(tile=32, reverse=True, lse=True),
    "split_rounded_partials": Style(splits=8, partials=torch.bfloat16, lse=True),
    "split_fp32_partials": Style(splits=2),
    "natural_exp": Style(natural=True, splits=4),
    "sums_the_rounded_p": Style(rounded_sum=True, tile=64),
    "fp32_p": Style(fp32_p=True),
}


ONE_PASS = Style()


def run(problem: Inputs, style: Style = ONE_PASS, edit: Edit = simulate.RIGHT, **options):
    out = simulate.attention(problem, problem.topk_idx, style, edit)
    return simulate.judge(problem, {"out": out}, normaliser="lse" if style.lse else "sum", **options)


def case(text: str = CASE, **changes) -> Inputs:
    from m3check import cases

    return simulate.inputs(replace(cases.parse_id(text), **changes))


@pytest.fixture(scope="module")
def gauss() -> Inputs:
    return case()


@pytest.mark.parametrize("style", STYLES.values(), ids=STYLES)
@pytest.mark.parametrize("fill", ["gauss", "wide", "ties", "integer"])
def test_right_kernels_pass(style, fill):
    problem = case(fill=fill, seed=3)
    findings = run(problem, style)
    assert not simulate.red(findings)
    assert {f.check for f in findings} >= {"element", "row", "token", "scale", "finite", "dead_row"}


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
@pytest.mark.parametrize("style", [Style(), Style(splits=4, tile=64)], ids=["one_pass", "split"])
def test_right_kernels_of_other_dtypes_pass(dtype, style):
    assert not simulate.red(run(case(dtype=dtype, cache_dtype=dtype), style))


@pytest.mark.parametrize("scales", ["none", "scalar", "token"])
def test_right_kernels_on_fp8_caches_pass(scales):
    assert not simulate.red(run(case(cache_dtype="fp8_e4m3fn", scales=scales)))


@pytest.mark.parametrize("style", [Style(), Style(splits=8, partials=torch.bfloat16)], ids=["one_pass", "split"])
def test_a_truncating_accumulator_has_wider_bounds(gauss, style):
    limits = []
    for how in (Accumulator(), Accumulator(fraction_bits=23, inner=16), Accumulator(fraction_bits=13, inner=32)):
        findings = run(gauss, style, dot=how, pv=how)
        assert not simulate.red(findings)
        limits.append(next(f.limit for f in findings if f.check == "element"))
    assert limits[0] <= limits[1] < limits[2]


def test_prefill_rows_with_prefixes_pass():
    assert not simulate.red(run(simulate.inputs("sparse_attn/q=3+1+130,kv=1500+1+130,h=1,g=4,topk=6")))


def logits(change):
    """An edit of the logits [T, H, G, n]."""

    def edit(values):
        values = values.clone()
        change(values)
        return values

    return Edit(logits=edit)


def without(row, head, group, token):
    def change(values):
        values[row, head, group, token] = -math.inf

    return logits(change)


def slot_token(problem: Inputs, row: int, head: int, index: int) -> int:
    """Position of the token at `index` of the gathered list."""
    return int(problem.topk_idx[head, row, index // 128]) * 128 + index % 128


def test_a_token_lost_for_a_group_is_named(gauss):
    red = simulate.red(run(gauss, edit=without(0, 1, slice(None), 300)))
    assert "lost" in red["token"].hint
    assert f"token {slot_token(gauss, 0, 1, 300)}" in red["token"].hint
    assert "kv head 1, its whole group" in red["token"].where
    assert "request 0" in red["token"].where


def test_a_token_lost_for_one_head_is_named(gauss):
    weights = torch.einsum("gd,nd->gn", gauss.q[0, 8:16].float(), gauss.k[: 128 * 16, 1].float())
    head = 5
    ids = gauss.topk_idx[1, 0].long()
    listed = (ids[:, None] * 128 + torch.arange(128)).flatten()
    typical = int(weights[head, listed].argsort()[len(listed) * 2 // 3])
    red = simulate.red(run(gauss, edit=without(0, 1, head, typical)))
    assert f"query head {8 + head} alone" in red["token"].where
    assert f"token {int(listed[typical])} lost" in red["token"].hint


def test_a_token_counted_twice_is_named(gauss):
    def twice(values):
        values[0, 1, :, 300] += 1.0  # in units of log2: double the weight

    red = simulate.red(run(gauss, edit=logits(twice)))
    assert f"token {slot_token(gauss, 0, 1, 300)} counted twice" in red["token"].hint


def test_a_lost_block_is_named(gauss):
    red = simulate.red(run(gauss, edit=without(0, 0, slice(None), slice(256, 384))))
    assert f"block {int(gauss.topk_idx[0, 0, 2])} lost" in red["token"].hint
    assert f"block {int(gauss.topk_idx[0, 0, 2])} lost" in red["element"].hint


def test_the_last_token_masked_is_named():
    problem = simulate.inputs("sparse_attn_decode/q=1,kv=1000,h=1,g=8,topk=8")
    index = (problem.topk_idx[0, 0].tolist().index(7)) * 128 + 999 % 128
    red = simulate.red(run(problem, edit=without(0, 0, slice(None), index)))
    assert "token 999 lost or masked, the query's own" in red["token"].hint


def test_a_future_token_seen_is_named():
    problem = simulate.inputs("sparse_attn_decode/q=2,kv=1000,h=1,g=8,topk=8")
    right = simulate.attention(problem, problem.topk_idx)
    # both queries at the last position: the first sees one token of its future
    moved = replace(problem, case=replace(problem.case, query_lens=(1,)), q=problem.q[:1], topk_idx=problem.topk_idx[:, :1])
    out = right.clone()
    out[0] = simulate.attention(moved, moved.topk_idx)[0]
    red = simulate.red(simulate.judge(problem, {"out": out}))
    assert "token 999 attended, which is 1 past the query" in red["token"].hint


@pytest.mark.parametrize("factor", [1.01, 0.99])
def test_a_scale_a_percent_off_is_fitted(gauss, factor):
    red = simulate.red(run(gauss, edit=Edit(scale=factor)))
    fitted = float(re.search(r"softmax scale off by ([-+.0-9]+)%", red["scale"].hint)[1])
    assert fitted == pytest.approx(100 * (factor - 1), abs=0.1)


@pytest.mark.parametrize(("factor", "words"), [(math.log(2), "2^x where e^x"), (1 / math.log(2), "log2 e applied twice")])
def test_another_base_is_named(gauss, factor, words):
    red = simulate.red(run(gauss, edit=Edit(scale=factor)))
    assert {"element", "row", "scale"} <= set(red)
    assert words in red["element"].hint


def test_a_factor_on_the_output_is_named(gauss):
    out = (simulate.attention(gauss, gauss.topk_idx).double() * 1.01).to(torch.bfloat16)
    red = simulate.red(simulate.judge(gauss, {"out": out}))
    assert float(re.search(r"factor ([.0-9]+)", red["scale"].hint)[1]) == pytest.approx(1.01, abs=1e-3)


def test_neighbour_heads_exchanged_are_named(gauss):
    out = simulate.attention(gauss, gauss.topk_idx)
    out[0, [3, 4]] = out[0, [4, 3]]
    red = simulate.red(simulate.judge(gauss, {"out": out}))
    assert "holds the result of query head" in red["element"].hint


def test_a_stale_split_partial_is_red(gauss):
    def stale(out, lse):
        out = out.clone()
        out[2, 0] = out[2, 1]  # the partial of another row
        return out, lse

    assert {"element", "row"} <= set(simulate.red(run(gauss, Style(splits=4), Edit(split=stale))))


@pytest.mark.parametrize("scale", ["k_scale", "v_scale"])
def test_a_scale_that_was_dropped_is_red(scale):
    from m3check import cases, reference

    made = cases.make_inputs(cases.parse_id("sparse_attn_decode/q=1,kv=1500,h=2,g=4,topk=8,cache=fp8_e4m3fn,scale=token"))
    problem = reference.dequantised(made, "rounded")
    dropped = replace(made, **{scale: torch.ones_like(getattr(made, scale))})
    out = simulate.attention(reference.dequantised(dropped, "rounded"), problem.topk_idx)
    assert {"element", "row"} <= set(simulate.red(simulate.judge(problem, {"out": out})))


def test_an_output_rounded_through_a_coarser_format_is_red():
    problem = case(dtype="fp16", cache_dtype="fp16")
    out = simulate.attention(problem, problem.topk_idx).bfloat16().half()
    assert "element" in simulate.red(simulate.judge(problem, {"out": out}))


def test_weights_rounded_to_fp8_are_red(gauss):
    # p in e4m3, which a kernel of bf16 queries does not promise
    def coarse(values):
        values.copy_(torch.log2(torch.exp2(values - values.amax(-1, keepdim=True)).to(torch.float8_e4m3fn).float()))

    assert simulate.red(run(gauss, edit=logits(coarse)))


def test_dead_rows_by_profile():
    problem = simulate.inputs("sparse_attn_decode/q=1x3,kv=0+300+0,h=2,g=2,topk=4")
    out = simulate.attention(problem, problem.topk_idx)
    out[[0, 2]] = 0
    assert not simulate.red(simulate.judge(problem, {"out": out}))
    out[0] = math.nan
    assert "dead_row" in simulate.red(simulate.judge(problem, {"out": out}))
    for promise in ("nan", "any"):
        findings = simulate.judge(problem, {"out": out}, dead_rows=promise)
        assert not simulate.red(findings)
        assert [f.check for f in findings if f.status is Status.NOTED] == ["dead_row"]


def test_unwritten_rows_and_infinities_are_red(gauss):
    right = simulate.attention(gauss, gauss.topk_idx)
    for value in (math.nan, math.inf):
        out = right.clone()
        out[1, 3] = value
        red = simulate.red(simulate.judge(gauss, {"out": out}))
        assert "request 1" in red["finite"].where
        assert "kv head 0" in red["finite"].where


@pytest.mark.parametrize("kind", ["short", "holes", "future"])
def test_lists_that_a_kernel_does_not_accept_are_noted(kind):
    problem = simulate.inputs(f"sparse_attn/q=5,kv=1500,h=2,g=2,topk=6,ids={kind}")
    right = simulate.attention(problem, problem.topk_idx)
    assert not simulate.red(simulate.judge(problem, {"out": right}))
    wrong = simulate.attention(problem, problem.topk_idx.where(problem.topk_idx >= 0, 0))
    wrong = torch.where(torch.isclose(wrong, right), wrong * 1.5, wrong)
    assert simulate.red(simulate.judge(problem, {"out": wrong}))
    findings = simulate.judge(problem, {"out": wrong}, id_lists=frozenset({"full", "ascending"}))
    assert not simulate.red(findings)
    assert "element" in {f.check for f in findings if f.status is Status.NOTED}


def test_a_chain_names_its_first_guilty_stage():
    problem = simulate.inputs("prefill/q=2,kv=2305,h=2,g=2,topk=4")
    score = simulate.scores(problem)
    ids = simulate.select(problem.case, score)
    out = simulate.attention(problem, ids)
    assert not simulate.red(simulate.judge(problem, {"score": score, "ids": ids, "out": out}))
    wrong = out.clone()
    wrong[0, 0] *= 2
    red = simulate.red(simulate.judge(problem, {"score": score, "ids": ids, "out": wrong}))
    assert red["element"].hint.endswith("first guilty stage: sparse_attn")
    low = score * 0.5
    red = simulate.red(simulate.judge(problem, {"score": low, "ids": simulate.select(problem.case, low), "out": wrong}))
    assert all(f.hint.endswith("first guilty stage: index_score") for f in red.values())
    assert set(red) >= {"score", "element"}
    assert "selection" not in red  # judged on the kernel's own scores


def test_a_chain_is_judged_on_its_own_selection():
    problem = simulate.inputs("decode/q=1,kv=2305,h=1,g=2,topk=4")
    ids = simulate.select(problem.case, simulate.scores(problem)).flip(-1)
    out = simulate.attention(problem, ids)
    assert not simulate.red(simulate.judge(problem, {"ids": ids, "out": out}))
    other = ids.clone()
    other[0, 0, -2] = next(b for b in range(19) if b not in ids[0, 0])
    red = simulate.red(simulate.judge(problem, {"ids": other, "out": simulate.attention(problem, other)}))
    assert set(red) == {"selection"}
    assert "first guilty stage: index_decode" in red["selection"].hint
