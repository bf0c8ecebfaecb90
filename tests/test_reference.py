"""The references on cases small enough to work out by hand, edge by edge."""

from __future__ import annotations

import math

import pytest
import torch

from m3check import reference
from m3check.reference import dequantised, expected, rows
from m3check.types import INIT_SCORE, LOCAL_SCORE, OPS, SPARSE, Case, Inputs, M3CheckError

INF, NAN = math.inf, math.nan
BASE_2 = math.log(2)  # as sm_scale it makes logits powers of two: a token weighs 2 ** (q·k)


def column(length: int, values: dict[int, float], default: float = 0.0) -> torch.Tensor:
    """[length, 1] keys of one dimension, `default` but for the tokens named."""
    keys = torch.full((length, 1), default)
    for token, value in values.items():
        keys[token] = value
    return keys


def score_of(op: str, query_lens, kv_lens, queries, keys, **of_case) -> dict[str, list]:
    """Outputs as lists, of one index head unless `queries` has more: queries [T] or [T, H], keys [N, 1]."""
    idx_q = torch.tensor(queries).reshape(sum(query_lens), -1, 1)
    case = Case(op=op, query_lens=query_lens, kv_lens=kv_lens, kv_heads=idx_q.shape[1], head_dim=1, **of_case)
    outputs = expected(Inputs(case, 1.0, idx_q=idx_q, idx_k=keys))
    return {name: tensor.squeeze(0).tolist() for name, tensor in outputs.items()}


# ---- index_score


def test_a_score_is_the_raw_largest_dot_of_the_tokens_seen():
    keys = column(130, {5: 3.0, 128: -1.0, 129: 7.0})
    score = score_of("index_score", (2,), (130,), [1.0, 2.0], keys)["score"]
    assert score == [[3, -1], [6, 14]]  # the first query stands at 128 and does not see token 129


def test_each_head_scores_with_its_own_query():
    score = score_of("index_score", (1,), (3,), [[1.0, -1.0]], column(3, {0: 5.0, 1: -4.0}))["score"]
    assert score == [[[5]], [[4]]]


def test_ragged_requests_read_only_their_own_tokens():
    keys = torch.cat([column(1, {0: 2.0}), column(200, {}, 99.0), column(129, {0: 4.0, 128: -6.0})])
    score = score_of("index_score", (1, 0, 1), (1, 200, 129), [1.0, 1.0], keys)["score"]
    assert score == [[2, -INF], [4, -6]]


def test_a_block_not_seen_scores_minus_infinity():
    score = score_of("index_score", (2,), (129,), [1.0, 1.0], column(129, {}, 1.0))["score"]
    assert score == [[1, -INF], [1, 1]]


def test_a_nan_dot_is_ignored_unless_the_block_has_nothing_else():
    keys = column(258, {0: NAN, 1: -2.0, 257: NAN}, -3.0)
    keys[128:256] = NAN
    score = torch.tensor(score_of("index_score", (2,), (258,), [1.0, 1.0], keys)["score"])
    wanted = torch.tensor([[-2.0, NAN, -3.0], [-2.0, NAN, -3.0]])  # token 257 is unseen, then seen beside token 256
    torch.testing.assert_close(score, wanted, equal_nan=True, rtol=0, atol=0)


def test_a_block_whose_only_visible_dots_are_nan_is_nan():
    score = score_of("index_score", (1,), (2,), [1.0], column(2, {}, NAN))["score"]
    assert math.isnan(score[0][0])


def test_infinite_dots_are_numbers():
    score = score_of("index_score", (1,), (130,), [1.0], column(130, {3: INF, 128: -INF, 129: -INF}))["score"]
    assert score == [[INF, -INF]]


def test_all_heads_share_one_key_and_mixed_dtypes_keep_their_values():
    case = Case(op="index_score", query_lens=(1,), kv_lens=(1,), kv_heads=2, head_dim=2)
    idx_q = torch.tensor([[[1.0, 2.0], [3.0, -1.0]]], dtype=torch.float16)
    idx_k = torch.tensor([[0.5, 0.4375]]).to(torch.float8_e4m3fn)
    assert expected(Inputs(case, 1.0, idx_q=idx_q, idx_k=idx_k))["score"].tolist() == [[[1.375]], [[1.0625]]]


# ---- index_topk

SELECTIONS = {  # scores of the visible blocks, topk, init, local: ids
    "best_first": ([1, 3, 2], 3, 0, 0, [1, 2, 0]),
    "ties_to_the_smaller_id": ([2, 5, 5, 2, 5], 4, 0, 0, [1, 2, 4, 0]),
    "zeros_of_both_signs_are_equal": ([-0.0, 0.0, -0.0, 0.0], 3, 0, 0, [0, 1, 2]),
    "nan_ranks_below_minus_infinity": ([NAN, -INF, NAN, 1, -INF], 4, 0, 0, [3, 1, 4, 0]),
    "infinity_is_a_score": ([0, INF, 5, INF], 3, 0, 0, [1, 3, 2]),
    "all_nan": ([NAN, NAN, NAN], 2, 0, 0, [0, 1]),
    "more_slots_than_blocks": ([1, 2], 5, 0, 0, [1, 0, -1, -1, -1]),
    "as_many_slots_as_blocks": ([1, 2, 3], 3, 0, 0, [2, 1, 0]),
    "one_block": ([-INF], 2, 1, 1, [0, -1]),
    "local_before_better_scores": ([9, 8, 7, -5], 3, 0, 1, [3, 0, 1]),
    "several_local_by_id": ([9, 1, 3, 2], 4, 0, 3, [1, 2, 3, 0]),
    "init_before_local": ([-9, 5, 6, -8], 3, 1, 1, [0, 3, 2]),
    "no_local_may_leave_out_the_own_block": ([3, 2, 1], 2, 0, 0, [0, 1]),
    "forced_whatever_the_score": ([NAN, 1e38, 2e38, INF, -INF], 3, 1, 1, [0, 4, 3]),
    "init_beyond_the_visible": ([1, 5, 3], 3, 9, 0, [0, 1, 2]),
    "both_counts_as_local": ([1, 2, 3, 4], 4, 3, 3, [0, 1, 2, 3]),
    "both_counts_as_local_when_slots_are_short": ([1, 2, 3, 4, 5], 2, 3, 4, [0, 1]),
    "too_many_forced_keep_init": ([0] * 9, 6, 4, 4, [0, 1, 2, 3, 5, 6]),  # the own block 8 is lost
    "all_both": ([0] * 9, 6, 9, 9, [0, 1, 2, 3, 4, 5]),
    "more_init_than_slots": ([5, 6, 7, 8], 2, 3, 1, [0, 1]),
    "local_wider_than_the_row": ([5, 7], 2, 0, 5, [0, 1]),
}


@pytest.mark.parametrize(("scores", "topk", "init", "local", "ids"), SELECTIONS.values(), ids=SELECTIONS)
@pytest.mark.parametrize("beyond", [-INF, INF, NAN], ids=str)
def test_selection(scores, topk, init, local, ids, beyond):
    """`beyond` fills a column that the query does not see: another request is longer."""
    seen = len(scores) * 128
    case = Case(op="index_topk", query_lens=(1, 1), kv_lens=(seen, seen + 1), kv_heads=1, topk=topk, init_blocks=init)
    row = torch.tensor([*scores, beyond])
    inputs = Inputs(Case(**{**vars(case), "local_blocks": local}), 1.0, scores=torch.stack([row, row])[None])
    chosen = expected(inputs)["ids"]
    assert chosen.dtype == torch.int32
    assert chosen[0, 0].tolist() == ids


def test_visible_blocks_grow_at_the_block_edge():
    case = Case(op="index_topk", query_lens=(3, 0, 1), kv_lens=(129, 128, 1), kv_heads=1, topk=2)
    ids = expected(Inputs(case, 1.0, scores=torch.tensor([[[5.0, 0.0]] * 4])))["ids"][0].tolist()
    assert ids == [[0, -1], [0, -1], [1, 0], [0, -1]]  # positions 126, 127, 128 and 0; the own block is local


def test_heads_choose_for_themselves():
    case = Case(op="index_topk", query_lens=(1,), kv_lens=(300,), kv_heads=2, topk=1, local_blocks=0)
    ids = expected(Inputs(case, 1.0, scores=torch.tensor([[[1.0, 2.0, 0.0]], [[1.0, 0.0, 2.0]]])))["ids"]
    assert ids.tolist() == [[[1]], [[2]]]


# ---- index_decode_score, index_decode


def test_decode_scores_hold_the_forced_cells():
    keys = column(600, {0: 1.0, 200: 2.0, 300: 3.0, 400: 4.0, 599: 5.0})
    of_case = {"init_blocks": 2, "local_blocks": 1}
    got = score_of("index_decode_score", (2,), (600,), [1.0, 1.0], keys, **of_case)
    init, local = torch.tensor([INIT_SCORE, LOCAL_SCORE], dtype=torch.float32).tolist()
    assert got["score"] == [[init, init, 3, 4, local]] * 2
    assert got["plain_score"] == [[1, 2, 3, 4, 0], [1, 2, 3, 4, 5]]


def test_a_block_both_init_and_local_holds_the_local_score():
    got = score_of("index_decode_score", (1,), (200,), [1.0], column(200, {}), init_blocks=2, local_blocks=1)
    init, local = torch.tensor([INIT_SCORE, LOCAL_SCORE], dtype=torch.float32).tolist()
    assert got["score"] == [[init, local]]


def test_rows_before_the_first_token_are_dead():
    keys = torch.cat([column(1, {0: 7.0}), column(130, {129: 8.0})])
    got = score_of("index_decode", (3, 3, 3), (1, 0, 130), [1.0] * 9, keys, topk=2)
    assert got["plain_score"] == [[-INF, -INF]] * 2 + [[7, -INF]] + [[-INF, -INF]] * 3 + [[0, -INF], [0, 0], [0, 8]]
    assert got["ids"] == [[-1, -1]] * 2 + [[0, -1]] + [[-1, -1]] * 3 + [[0, -1], [1, 0], [1, 0]]


def test_a_batch_of_dead_rows_has_no_columns_and_no_ids():
    got = score_of("index_decode", (1, 1), (0, 0), [1.0, 1.0], column(0, {}), topk=2)
    assert got == {"ids": [[-1, -1]] * 2, "score": [[], []], "plain_score": [[], []]}


def test_decode_selects_by_plain_scores_even_above_the_forced_ones():
    keys = column(400, {0: 3e30, 130: 2e30})
    assert score_of("index_decode", (1,), (400,), [1.0], keys, topk=2, local_blocks=1)["ids"] == [[3, 0]]


# ---- sparse_attn, sparse_attn_decode


def attend(ids, query_lens, kv_lens, q, k, v, op="sparse_attn", kv_heads=1):
    """(out, lse) as lists for queries [T, Hq] and caches [N, Hkv] of one dimension, ids [Hkv, T, topk]."""
    q, k, v = (torch.as_tensor(t, dtype=torch.float64) for t in (q, k, v))
    ids = torch.tensor(ids, dtype=torch.int32).reshape(kv_heads, sum(query_lens), -1)
    q, k, v = q.reshape(sum(query_lens), -1, 1), k.reshape(-1, kv_heads, 1), v.reshape(-1, kv_heads, 1)
    gqa = q.shape[1] // kv_heads
    case = Case(
        op=op,
        query_lens=query_lens,
        kv_lens=kv_lens,
        kv_heads=kv_heads,
        gqa=gqa,
        head_dim=1,
        topk=ids.shape[-1],
        dtype="fp32",
    )
    outputs = expected(Inputs(case, BASE_2, q=q, k=k, v=v, topk_idx=ids))
    return outputs["out"].squeeze(-1), outputs["lse"]


def exactly(*rows_of_numbers, rel=1e-14):
    return pytest.approx(torch.tensor(rows_of_numbers, dtype=torch.float64), rel=rel, abs=0)


def test_weights_are_powers_of_two_of_the_logits():
    out, lse = attend([[0]], (1,), (2,), [1.0], [0.0, 1.0], [0.0, 3.0])
    assert out == exactly([2.0])  # weights 1/3 and 2/3
    assert lse == exactly([math.log2(3)])


def test_a_query_does_not_see_what_follows_it():
    out, lse = attend([[0], [0], [0]], (3,), (3,), [0.0] * 3, [5.0, 6.0, 7.0], [1.0, 3.0, 8.0])
    assert out == exactly([1.0], [2.0], [4.0])
    assert lse == exactly([0.0], [1.0], [math.log2(3)])


def test_only_listed_blocks_are_attended():
    v = torch.zeros(384)
    v[:128], v[128:256], v[256:] = 1.0, 100.0, 4.0
    out, lse = attend([[2, 0]], (1,), (384,), [0.0], torch.zeros(384), v)
    assert out == exactly([2.5])
    assert lse == exactly([8.0])  # 256 tokens of weight 1


@pytest.mark.parametrize("op", ["sparse_attn", "sparse_attn_decode"])
@pytest.mark.parametrize("ids", [[0, 1, -1, -1], [-1, 1, -1, 0], [9, 0, -5, 1], [2**31 - 1, -(2**31), 1, 0]], ids=str)
def test_ids_that_are_negative_or_not_visible_contribute_nothing_anywhere(ids, op):
    v = torch.cat([torch.full((128,), 2.0), torch.full((1,), 131.0), torch.full((999,), NAN)])
    out, lse = attend([ids, [0] * 4], (1, 1), (129, 999), [0.0, 0.0], torch.zeros(1128), v, op)
    assert out[:1] == exactly([3.0])  # (128 * 2 + 131) / 129
    assert lse[:1] == exactly([math.log2(129)])


def test_a_row_without_a_valid_id_is_zero():
    out, lse = attend([[-1, -1], [1, 7], [0, -1]], (3,), (5,), [1.0] * 3, [1.0] * 5, [6.0] * 5)
    assert out == exactly([0.0], [0.0], [6.0])
    assert lse == exactly([-INF], [-INF], [1 + math.log2(5)])


def test_dead_and_empty_requests_are_zero_and_the_others_are_not():
    ids = [[0]] * 6
    out, lse = attend(ids, (2, 2, 2), (1, 0, 2), [0.0] * 6, [0.0] * 3, [5.0, 7.0, 9.0], "sparse_attn_decode")
    assert out == exactly([0.0], [5.0], [0.0], [0.0], [7.0], [8.0])
    assert lse == exactly([-INF], [0.0], [-INF], [-INF], [0.0], [1.0])


def test_a_batch_without_tokens_is_zero():
    out, lse = attend([[-1], [0]], (1, 1), (0, 0), [1.0, 1.0], [], [], "sparse_attn_decode")
    assert out == exactly([0.0], [0.0])
    assert lse == exactly([-INF], [-INF])


def test_ragged_requests_attend_their_own_tokens():
    v = [1.0, 2.0, 50.0, 60.0, 70.0, 9.0]
    out, _ = attend([[0], [0]], (1, 0, 1), (2, 3, 1), [0.0, 0.0], [0.0] * 6, v)
    assert out == exactly([1.5], [9.0])


def test_query_heads_read_the_kv_head_of_their_group():
    ids = [[[0]], [[1]]]
    k = torch.zeros(129, 2)
    v = torch.zeros(129, 2)
    v[:128, 0], v[128, 1] = 3.0, 7.0
    out, lse = attend(ids, (1,), (129,), [1.0, 2.0, 3.0, 4.0], k, v, kv_heads=2)
    assert out == exactly([3.0, 3.0, 7.0, 7.0])
    assert lse == exactly([7.0, 7.0, 0.0, 0.0])


def test_huge_logits_do_not_overflow():
    out, lse = attend([[0]], (1,), (2,), [1.0], [5000.0, 4999.0], [3.0, 0.0])
    assert out == exactly([2.0], rel=1e-12)  # a logit of 5000 · ln 2 is known to 5e-13
    assert lse == exactly([5000 + math.log2(1.5)])


def test_what_is_not_attended_may_hold_anything():
    k, v = torch.zeros(300), torch.ones(300)
    k[257:], v[257:] = NAN, INF  # the future
    k[:128], v[:128] = INF, NAN  # not listed
    out, lse = attend([[1, 2]] * 44, (44,), (300,), [1.0] * 44, k, v)
    assert out[0] == exactly(1.0)
    assert lse[0] == exactly(math.log2(129))


# ---- chains, dispatch


def test_the_references_cover_every_op_and_give_its_outputs():
    assert set(reference.REFERENCES) == set(OPS)
    for name, op in SPARSE.items():
        assert set(op.outputs) <= set(reference.REFERENCES[name][2].split())


@pytest.mark.parametrize("op", ["prefill", "decode"])
def test_a_chain_attends_what_it_selects(op):
    idx_k = column(300, {3: 1.0, 130: 9.0})
    v = torch.zeros(300, 1, 1)
    v[:128], v[128:256], v[256:] = 100.0, 1.0, 3.0
    case = Case(op=op, query_lens=(1,), kv_lens=(300,), kv_heads=1, gqa=1, head_dim=1, topk=2)
    zeros = torch.zeros(300, 1, 1)
    outputs = expected(Inputs(case, BASE_2, idx_q=torch.ones(1, 1, 1), idx_k=idx_k, q=torch.ones(1, 1, 1), k=zeros, v=v))
    assert outputs["ids"].tolist() == [[[2, 1]]]
    assert outputs["out"].item() == pytest.approx((44 * 3 + 128) / 172, rel=1e-14)
    plain = outputs["score" if op == "prefill" else "plain_score"]
    assert plain.tolist() == [[[1, 9, 0]]]


@pytest.mark.parametrize("op", ["prefill", "decode"])
def test_each_head_of_a_chain_attends_its_own_selection(op):
    case = Case(op=op, query_lens=(1,), kv_lens=(300,), kv_heads=2, gqa=1, head_dim=1, topk=1, local_blocks=0)
    v = torch.arange(300).div(128, rounding_mode="floor").float().reshape(300, 1, 1).expand(300, 2, 1)  # its own block
    idx_q, zeros = torch.tensor([[[1.0], [-1.0]]]), torch.zeros(300, 2, 1)
    idx_k = column(300, {140: 2.0, 260: -3.0})
    outputs = expected(Inputs(case, 1.0, idx_q=idx_q, idx_k=idx_k, q=torch.zeros(1, 2, 1), k=zeros, v=v))
    assert outputs["ids"].tolist() == [[[1]], [[2]]]
    assert outputs["out"].flatten().tolist() == pytest.approx([1.0, 2.0], rel=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_outputs_have_the_dtype_asked_for(dtype):
    case = Case(op="decode", query_lens=(2,), kv_lens=(5,), kv_heads=1, gqa=2, head_dim=4, topk=2)
    bf16 = {"dtype": torch.bfloat16}
    inputs = Inputs(
        case, 0.5, torch.ones(2, 1, 4, **bf16), torch.ones(5, 4, **bf16), None, torch.ones(2, 2, 4, **bf16),
        torch.ones(5, 1, 4, **bf16), torch.ones(5, 1, 4, **bf16),
    )  # fmt: skip
    outputs = expected(inputs, dtype)
    assert {name: tensor.dtype for name, tensor in outputs.items() if name != "ids"} == dict.fromkeys(
        ("score", "plain_score", "out", "lse"), dtype
    )


def test_a_missing_tensor_and_scales_left_over_are_refused_in_words():
    case = Case(op="sparse_attn", query_lens=(1,), kv_lens=(1,))
    with pytest.raises(M3CheckError, match="sparse_attn reads q, which these inputs lack"):
        expected(Inputs(case, 1.0))
    with pytest.raises(M3CheckError, match="dequantised"):
        expected(Inputs(case, 1.0, k_scale=torch.tensor(2.0)))


def test_chunks_change_nothing(monkeypatch):
    generator = torch.Generator().manual_seed(1)
    case = Case(op="prefill", query_lens=(40, 3), kv_lens=(300, 900), kv_heads=2, gqa=2, head_dim=8, topk=3, init_blocks=1)
    shapes = {"idx_q": (43, 2, 8), "idx_k": (1200, 8), "q": (43, 4, 8), "k": (1200, 2, 8), "v": (1200, 2, 8)}
    inputs = Inputs(case, 0.3, **{name: torch.randn(shape, generator=generator) for name, shape in shapes.items()})
    whole = expected(inputs)
    monkeypatch.setattr(rows, "CHUNK_BYTES", 1)
    row_by_row = expected(inputs)
    for name, tensor in whole.items():
        torch.testing.assert_close(row_by_row[name], tensor, rtol=1e-13, atol=1e-13)


def test_matrices_are_multiplied_in_full_precision_whatever_the_process_allows():
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        outside = [backend.fp32_precision for backend in backends]
        with rows.full_precision():
            inside = [backend.fp32_precision for backend in backends]
        after = [backend.fp32_precision for backend in backends]
    finally:
        torch.set_float32_matmul_precision(before)
    assert inside == ["ieee", "ieee"]
    assert outside == after != inside


# ---- dequantised


def caches(codes: torch.Tensor, dtype: torch.dtype, k_scale=None, v_scale=None) -> Inputs:
    """Attention inputs whose keys and values are `codes` [N, Hkv, D], with queries of `dtype`."""
    case = Case(op="sparse_attn", query_lens=(1,), kv_lens=(len(codes),), kv_heads=codes.shape[1], head_dim=codes.shape[2])
    return Inputs(
        case, 1.0, q=torch.zeros(1, 16, codes.shape[2], dtype=dtype), k=codes, v=codes, k_scale=k_scale, v_scale=v_scale
    )


def worth(bits: int, exponent_bits: int, bias: int, unsigned_zero: bool, infinities: bool) -> float:
    """The number that an fp8 code means, from the definition of its dialect."""
    mantissa_bits = 7 - exponent_bits
    sign = -1.0 if bits & 0x80 else 1.0
    exponent, mantissa = (bits & 0x7F) >> mantissa_bits, bits & ((1 << mantissa_bits) - 1)
    if unsigned_zero and bits == 0x80:
        return NAN
    if infinities and exponent == (1 << exponent_bits) - 1:
        return NAN if mantissa else sign * INF
    if not unsigned_zero and not infinities and bits & 0x7F == 0x7F:
        return NAN
    fraction = mantissa / (1 << mantissa_bits)
    return sign * (math.ldexp(1 + fraction, exponent - bias) if exponent else math.ldexp(fraction, 1 - bias))


DIALECTS = {
    torch.float8_e4m3fn: (4, 7, False, False),
    torch.float8_e4m3fnuz: (4, 8, True, False),
    torch.float8_e5m2: (5, 15, False, True),
    torch.float8_e5m2fnuz: (5, 16, True, False),
}


@pytest.mark.parametrize("query_dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("dialect", DIALECTS, ids=str)
@pytest.mark.parametrize("rule", ["rounded", "folded"])
def test_all_256_codes_mean_what_their_dialect_says(dialect, query_dtype, rule):
    codes = torch.arange(256, dtype=torch.uint8).view(dialect).reshape(256, 1, 1)
    got = dequantised(caches(codes, query_dtype), rule)
    assert got.k.dtype == (query_dtype if rule == "rounded" else torch.float64)
    wanted = torch.tensor([worth(bits, *DIALECTS[dialect]) for bits in range(256)], dtype=torch.float64)
    torch.testing.assert_close(got.k.double().flatten(), wanted, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(got.v.double().flatten(), wanted, rtol=0, atol=0, equal_nan=True)


def test_a_scalar_scale_multiplies_everything_and_is_gone():
    codes = torch.tensor([1.5, -3.0]).to(torch.float8_e4m3fn).reshape(2, 1, 1)
    got = dequantised(caches(codes, torch.bfloat16, torch.tensor(0.25), torch.tensor(3.0)), "rounded")
    assert (got.k.flatten().tolist(), got.v.flatten().tolist()) == ([0.375, -0.75], [4.5, -9.0])
    assert got.k_scale is None
    assert got.v_scale is None


def test_a_token_scale_belongs_to_one_token_and_head():
    codes = torch.ones(2, 2, 3).to(torch.float8_e5m2)
    scale = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    got = dequantised(caches(codes, torch.float32, scale, scale / 2), "rounded")
    assert got.k.tolist() == [[[1.0] * 3, [2.0] * 3], [[3.0] * 3, [4.0] * 3]]
    assert got.v.tolist() == [[[0.5] * 3, [1.0] * 3], [[1.5] * 3, [2.0] * 3]]


def test_rounded_is_the_nearest_of_the_query_dtype_and_folded_is_exact():
    codes = torch.full((1, 1, 1), 1.125).to(torch.float8_e4m3fn)
    scale = torch.tensor(1.0 + 2.0**-20)
    exact = 1.125 + 1.125 * 2.0**-20
    rounded, folded = (dequantised(caches(codes, torch.bfloat16, scale, scale), rule).k for rule in ("rounded", "folded"))
    assert rounded.item() == 1.125
    assert folded.item() == exact


def test_rounded_goes_through_the_fp32_product():
    """1.75 · scale lies above the middle of the bf16 numbers 1 and 1 + 2^-7, but fp32 rounds it onto the middle, a tie."""
    code, middle = 1.75, 1.0 + 2.0**-8
    scale = torch.tensor(middle / code, dtype=torch.float32)
    assert code * scale.item() > middle
    codes = torch.full((1, 1, 1), code).to(torch.float8_e4m3fn)
    assert dequantised(caches(codes, torch.bfloat16, scale, scale), "rounded").k.item() == 1.0
    assert dequantised(caches(codes, torch.bfloat16, scale, scale), "folded").k.item() == code * scale.item()


@pytest.mark.parametrize("rule", ["rounded", "folded"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_a_cache_that_is_not_fp8_keeps_its_values(dtype, rule):
    codes = torch.tensor([1.0 + 2.0**-7, -3.0]).to(dtype).reshape(2, 1, 1)
    got = dequantised(caches(codes, torch.float16), rule)
    assert got.k.double().tolist() == codes.double().tolist()


def test_scales_beside_a_cache_that_is_not_fp8_are_refused():
    with pytest.raises(M3CheckError, match="fp8 cache"):
        dequantised(caches(torch.ones(1, 1, 1), torch.float32, torch.tensor(2.0), torch.tensor(2.0)), "rounded")


def test_inputs_without_a_main_cache_pass_through():
    inputs = Inputs(Case(op="index_topk", query_lens=(1,), kv_lens=(1,)), 1.0, scores=torch.zeros(4, 1, 1))
    assert dequantised(inputs, "rounded") is inputs
