"""Laws that any right reference obeys, whatever the batch, and the second formulation on batches drawn at random."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_inputs import cases, inputs_of
from second_formulation import assert_agrees
from torch.nn.functional import scaled_dot_product_attention

from m3check.reference import expected
from m3check.types import Case

INDEX = ("index_score", "index_decode_score", "index_decode")
ATTENTION = ("sparse_attn", "sparse_attn_decode")
quick = settings(max_examples=40, deadline=None, derandomize=True)


def same(one, other, rtol=0.0, atol=0.0) -> None:
    assert set(one) == set(other)
    for name in one:
        torch.testing.assert_close(
            one[name], other[name], rtol=rtol, atol=atol, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
        )


@settings(quick, max_examples=250)
@given(cases())
def test_the_second_formulation_agrees_on_any_batch(case):
    assert_agrees(inputs_of(case))


@quick
@given(cases(INDEX + ATTENTION))
def test_fp32_is_fp64_but_for_rounding(case):
    inputs = inputs_of(case, nasty=False)
    exact, single = expected(inputs), expected(inputs, torch.float32)
    for name in set(exact) - {"ids", "score"}:
        assert single[name].dtype == torch.float32
        torch.testing.assert_close(single[name].double(), exact[name], rtol=1e-5, atol=1e-5)


@quick
@given(cases(), st.data())
def test_no_query_sees_the_future(case, data):
    """Everything after one query's position is changed; that query's row must not change by a bit."""
    inputs = inputs_of(case)
    request = data.draw(st.sampled_from([r for r in case.requests() if r.query_len] or [None]))
    if request is None:
        return
    i = data.draw(st.integers(0, request.query_len - 1))
    future = slice(request.kv_start + max(0, request.position(i) + 1), request.kv_start + request.kv_len)
    changed = {name: getattr(inputs, name).clone() for name in ("idx_k", "k", "v")}
    for tensor in changed.values():
        tensor[future] = float("nan")
    before, after = expected(inputs), expected(replace(inputs, **changed))
    row = request.query_start + i
    for name in before:
        axis = 0 if name in ("out", "lse") else 1
        torch.testing.assert_close(
            after[name].select(axis, row), before[name].select(axis, row), rtol=0, atol=0, equal_nan=True
        )


@quick
@given(cases(), st.randoms(use_true_random=False))
def test_permuted_heads_give_permuted_outputs(case, random):
    inputs = inputs_of(case)
    order = list(range(case.kv_heads))
    random.shuffle(order)
    query_order = [head * case.gqa + g for head in order for g in range(case.gqa)]
    permuted = replace(
        inputs, idx_q=inputs.idx_q[:, order], scores=inputs.scores[order], topk_idx=inputs.topk_idx[order],
        q=inputs.q[:, query_order], k=inputs.k[:, order], v=inputs.v[:, order],
    )  # fmt: skip
    before, after = dict(expected(inputs)), expected(permuted)
    for name in before:
        before[name] = before[name][:, query_order] if name in ("out", "lse") else before[name][order]
    same(dict(after), before, rtol=1e-12, atol=1e-12)


@quick
@given(cases())
def test_a_request_alone_is_what_it_is_in_the_batch(case):
    inputs = inputs_of(case)
    batch = expected(inputs)
    for request in case.requests():
        alone = replace(case, query_lens=(request.query_len,), kv_lens=(request.kv_len,))
        q, n, columns = request.queries, request.tokens, alone.block_columns
        parts = {"idx_q": inputs.idx_q[q], "idx_k": inputs.idx_k[n], "q": inputs.q[q], "k": inputs.k[n], "v": inputs.v[n]}
        parts |= {"scores": inputs.scores[:, q, :columns], "topk_idx": inputs.topk_idx[:, q]}
        single = expected(replace(inputs, case=alone, **parts))
        for name, tensor in batch.items():
            part = tensor[q] if name in ("out", "lse") else tensor[:, q]
            part = part[..., :columns] if "score" in name else part
            torch.testing.assert_close(single[name], part, rtol=1e-12, atol=1e-12, equal_nan=True)


@quick
@given(cases(("sparse_attn",)), st.randoms(use_true_random=False))
def test_the_order_of_the_ids_is_free(case, random):
    inputs = inputs_of(case)
    order = list(range(case.topk))
    random.shuffle(order)
    same(expected(inputs), expected(replace(inputs, topk_idx=inputs.topk_idx[..., order])), rtol=1e-12, atol=1e-12)


@quick
@given(cases(ATTENTION))
def test_all_blocks_listed_is_dense_causal_attention(case):
    case = replace(case, topk=max(1, case.block_columns))
    inputs = inputs_of(case)
    listed = torch.arange(case.topk).expand(case.kv_heads, case.total_queries, -1)
    out = expected(replace(inputs, topk_idx=listed.int()))["out"]
    for request in case.requests():
        q, k, v = inputs.q[request.queries], inputs.k[request.tokens], inputs.v[request.tokens]
        live = max(0, -request.prefix)  # its first rows may be dead
        position = torch.arange(request.prefix + live, request.kv_len)
        seen = torch.arange(request.kv_len) <= position[:, None]
        q, k, v = (t.double().transpose(0, 1)[None] for t in (q[live:], k, v))
        dense = scaled_dot_product_attention(q, k, v, seen, scale=inputs.sm_scale, enable_gqa=True)[0].transpose(0, 1)
        torch.testing.assert_close(out[request.queries][live:], dense, rtol=1e-12, atol=1e-12)


@quick
@given(cases(ATTENTION))
def test_equal_values_come_back_unchanged(case):
    """Weights sum to one: a constant v is the output of every row that attends anything."""
    inputs = inputs_of(case)
    outputs = expected(replace(inputs, v=torch.full_like(inputs.v, 3)))
    attends = outputs["lse"] > -torch.inf
    wanted = torch.where(attends, 3.0, 0.0)[..., None].expand_as(outputs["out"]).double()
    torch.testing.assert_close(outputs["out"], wanted, rtol=1e-13, atol=0)


@pytest.mark.parametrize(
    ("prefill", "decode"), [("index_score", "index_decode_score"), ("sparse_attn", "sparse_attn_decode")]
)
def test_decode_is_prefill_of_the_last_queries(prefill, decode):
    case = Case(op=prefill, query_lens=(3, 3), kv_lens=(3, 640), kv_heads=2, gqa=2, head_dim=8, topk=3, seed=5)
    inputs = inputs_of(case)
    one, other = expected(inputs), expected(replace(inputs, case=replace(case, op=decode)))
    if "plain_score" in other:
        other = {"score": other["plain_score"]}
    same(dict(one), dict(other))


@pytest.mark.gpu
@settings(quick, max_examples=60)
@given(cases(), st.sampled_from((torch.float64, torch.float32)))
def test_a_gpu_computes_the_same(case, dtype):
    """On a device too nothing is rounded further: no TF32, and the same ids."""
    inputs = inputs_of(case)
    tensors = {name: value.cuda() for name, value in vars(inputs).items() if isinstance(value, torch.Tensor)}
    there = expected(replace(inputs, **tensors), dtype)
    tolerance = 1e-11 if dtype == torch.float64 else 2e-5
    for name, tensor in expected(inputs, dtype).items():
        assert there[name].is_cuda
        if name == "ids" and case.op != "index_topk" and dtype == torch.float32:
            continue  # nearly equal scores may be rounded apart by another order of summation
        torch.testing.assert_close(there[name].cpu(), tensor, rtol=tolerance, atol=tolerance, equal_nan=True)
