"""Inputs come from the id alone, the same bits everywhere, and each fill keeps what its first line promises."""

import hashlib
import math
from dataclasses import replace

import pytest
import torch

from m3check.cases import FILLS, SELECTIONS, case_id, make_inputs, parse_id, tier
from m3check.cases.fills import TIE_KINDS, index_dtypes
from m3check.cases.selections import visible_blocks
from m3check.cases.stream import Stream, normal_quantiles
from m3check.cases.validity import is_fp8, reads_main_cache
from m3check.paging import torch_dtype, words
from m3check.types import BLOCK, OPS, SPARSE, blocks


def tensors(inputs):
    return {name: t for name, t in vars(inputs).items() if isinstance(t, torch.Tensor)}


def digest(inputs):
    total = hashlib.sha256()
    for name, tensor in sorted(tensors(inputs).items()):
        total.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        total.update(words(tensor.cpu().contiguous().reshape(-1)).numpy().tobytes())
    return total.hexdigest()[:16]


SAMPLES = {
    "index_score/q=3+0+2,kv=2047+300+2305,h=2": "9fb4ccbcbe550f97",
    "index_score/q=5,kv=300,h=1,dtype=fp32,cache=fp32": "dd5f702bb3de9ef7",
    "index_score/q=5,kv=300,dtype=fp8_e4m3fnuz,cache=fp8_e4m3fnuz,fill=wide": "936af02b4e761670",
    "index_topk/q=3,kv=2690,h=2,topk=8": "229e817bfe1f66fb",
    "index_topk/q=6,kv=2690,fill=ties": "dfc1b266671d7dfe",
    "index_decode/q=2x2,kv=1+400,h=3,dtype=fp16,cache=fp16,fill=ties": "7d07cfe47177d059",
    "index_decode_score/q=1,kv=257,dtype=fp8_e5m2,cache=fp8_e5m2,fill=integer": "031c269befd7d926",
    "sparse_attn/q=5+1+0,kv=1025+129+384,h=2,g=4,topk=8,cache=fp8_e4m3fn,scale=token,fill=wide~3": "50b9e7420d844c6a",
    "sparse_attn/q=7,kv=900,h=3,g=2,topk=4,ids=holes,fill=ties": "189a930e4365d15b",
    "sparse_attn/q=7,kv=900,h=3,g=2,topk=4,ids=future,fill=integer": "4dbb256115ffabb1",
    "sparse_attn_decode/q=2x2,kv=1+700,h=2,g=2,topk=4,cache=fp8_e5m2,scale=scalar,ids=short": "cd25529a5b87174d",
    "decode/q=2,kv=300,g=1,icache=fp8_e4m3fn": "731a8fda4bea416c",
    "prefill/q=2,kv=300,d=64,g=1~7": "ebd6403752a16025",
}


@pytest.mark.parametrize("text", SAMPLES)
def test_sample_inputs_have_the_bits_they_always_had(text):
    assert digest(make_inputs(parse_id(text))) == SAMPLES[text]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("text", SAMPLES)
def test_a_gpu_gets_the_same_bits(text):
    assert digest(make_inputs(parse_id(text), "cuda")) == SAMPLES[text]


def test_the_path_of_a_device_gives_the_same_bits(monkeypatch):
    """The look-up on a device, in small chunks, run here on the CPU."""
    from m3check.cases import stream

    table, drawn = normal_quantiles(), Stream("x").words(1000)
    here = stream.look_up(table, drawn, (10, 100), "fp8_e5m2", "cpu")
    monkeypatch.setattr(stream, "CHUNK", 64)
    there = stream.gathered(words(torch.from_numpy(table).float().to(torch.float8_e5m2)), drawn, torch.device("cpu"))
    assert torch.equal(words(here).flatten(), there)


def test_the_table_of_quantiles_is_what_it_always_was():
    table = normal_quantiles()
    assert hashlib.sha256(table.tobytes()).hexdigest()[:16] == "b93c5582655c5f9f"
    assert table.mean() == 0
    assert table.std() == pytest.approx(1, abs=1e-3)
    assert (table == -table[::-1]).all()


@pytest.mark.parametrize("case", tier("smoke", SPARSE), ids=case_id)
def test_inputs_have_the_shapes_and_dtypes_of_the_contract(case):
    inputs, t, n = make_inputs(case), case.total_queries, case.total_tokens
    index_query, index_key = index_dtypes(case)
    wanted = {}
    chain = bool(OPS[case.op].chain)
    if case.op == "index_topk":
        wanted["scores"] = ((case.kv_heads, t, case.block_columns), "fp32")
    elif chain or case.op.startswith("index"):
        wanted["idx_q"] = ((t, case.kv_heads, case.head_dim), index_query)
        wanted["idx_k"] = ((n, case.head_dim), index_key)
    if reads_main_cache(case.op):
        wanted["q"] = ((t, case.heads, case.head_dim), case.dtype)
        wanted["k"] = wanted["v"] = ((n, case.kv_heads, case.head_dim), case.cache_dtype)
        if not chain:
            wanted["topk_idx"] = ((case.kv_heads, t, case.topk), None)
        if case.scales != "none":
            wanted["k_scale"] = wanted["v_scale"] = (() if case.scales == "scalar" else (n, case.kv_heads), "fp32")
    made = tensors(inputs)
    assert {name: tuple(x.shape) for name, x in made.items()} == {name: shape for name, (shape, _) in wanted.items()}
    for name, (_, dtype) in wanted.items():
        assert made[name].dtype == (torch_dtype(dtype) if dtype else torch.int32)
        if name != "scores":
            assert torch.isfinite(made[name].float()).all()
    assert inputs.sm_scale == case.head_dim**-0.5


def test_tensors_depend_on_the_id_and_on_nothing_else():
    case = parse_id("sparse_attn/q=3,kv=300,h=2,g=2")
    again, other = make_inputs(case), make_inputs(replace(case, seed=1))
    assert digest(make_inputs(case)) == digest(again)
    for name, tensor in tensors(again).items():
        if name != "topk_idx":
            assert not torch.equal(tensor, getattr(other, name)), name
    assert not torch.equal(again.k, again.v)


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_gauss_gives_logits_that_matter(dtype):
    icache = "" if dtype == "bf16" else f",dtype={dtype},cache={dtype}"
    inputs = make_inputs(parse_id(f"sparse_attn_decode/q=4,kv=4096,h=2,g=4{icache}"))
    q, k = inputs.q.double().view(4, 2, 4, 128), inputs.k.double()
    logits = torch.einsum("thgd,nhd->thgn", q, k) * inputs.sm_scale
    assert 0.8 < logits.std() < 2
    heaviest = logits.softmax(-1).amax(-1)
    assert (heaviest > 3 / 4096).all()  # not uniform
    assert (heaviest < 0.5).all()  # and not one token alone
    assert inputs.v.double().std() == pytest.approx(1, abs=0.02)


def test_gauss_in_fp32_fills_bits_that_tf32_would_drop():
    q = make_inputs(parse_id("index_score/q=64,kv=64,dtype=fp32,cache=fp32")).idx_q
    low = q.view(torch.int32) & 0x1FFF  # what TF32 does not keep
    assert (low != 0).double().mean() > 0.9


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32", "fp8_e4m3fn", "fp8_e5m2", "fp8_e4m3fnuz", "fp8_e5m2fnuz"])
@pytest.mark.parametrize("dim", [64, 128])
def test_integer_scores_are_exact_in_every_accumulator(dtype, dim):
    inputs = make_inputs(parse_id(f"index_score/q=64,kv=1025,d={dim},dtype={dtype},cache={dtype},fill=integer"))
    q, k = inputs.idx_q.double(), inputs.idx_k.double()
    assert torch.equal(q, q.round())
    assert torch.equal(k, k.round())
    worst = torch.einsum("thd,nd->thn", q.abs(), k.abs()).max()
    assert worst <= (2**12 if is_fp8(dtype) else 2**23)
    assert worst > (2**9 if is_fp8(dtype) else 2**18)  # and not so small that bits stay unused
    assert q.unique().numel() >= 3
    assert k.unique().numel() >= 9


def test_integer_attention_keeps_its_logits_small():
    inputs = make_inputs(parse_id("sparse_attn/q=4,kv=1024,h=1,g=4,fill=integer"))
    logits = torch.einsum("tgd,nd->tgn", inputs.q.double(), inputs.k.double()[:, 0]) * inputs.sm_scale
    assert 1 < logits.std() < 3


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32", "fp8_e4m3fn", "fp8_e5m2"])
def test_wide_spans_12_binades_and_cancels(dtype):
    inputs = make_inputs(parse_id(f"index_score/q=8,kv=2048,dtype={dtype},cache={dtype},fill=wide"))
    q, k = inputs.idx_q.double(), inputs.idx_k.double()
    for values in (q, k):
        binades = values.abs().log2().floor()
        assert binades.max() - binades.min() >= 11
        assert binades.unique().numel() >= 12
    dots = torch.einsum("thd,nd->thn", q, k).abs()
    products = torch.einsum("thd,nd->thn", q.abs(), k.abs())
    assert (dots / products).median() < 0.2


@pytest.mark.parametrize("scale", ["none", "scalar", "token"])
def test_wide_logits_stay_below_a_thousand(scale):
    fp8 = f",cache=fp8_e4m3fn,scale={scale}" if scale != "none" else ""
    inputs = make_inputs(parse_id(f"sparse_attn_decode/q=4,kv=4096,h=2,g=4{fp8},fill=wide"))
    k = inputs.k.double() * (inputs.k_scale.double().reshape(-1, 1 if scale == "scalar" else 2, 1) if fp8 else 1)
    logits = torch.einsum("thgd,nhd->thgn", inputs.q.double().view(4, 2, 4, 128), k) * inputs.sm_scale
    assert logits.abs().max() < 1e3
    assert logits.std() > 1


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32", "fp8_e4m3fn", "fp8_e5m2", "fp8_e4m3fnuz"])
@pytest.mark.parametrize("dim", [64, 128])
def test_sunk_logits_lie_far_below_zero_and_still_differ(dtype, dim):
    query = dtype if not is_fp8(dtype) else "bf16"
    inputs = make_inputs(parse_id(f"sparse_attn_decode/q=4,kv=1024,h=2,g=4,d={dim},dtype={query},cache={dtype},fill=sunk"))
    q, k = inputs.q.double().view(4, 2, 4, dim), inputs.k.double()
    logits = torch.einsum("thgd,nhd->thgn", q, k) * inputs.sm_scale
    assert logits.max() < -150 * math.log(2)  # exp underflows to zero in fp32, subnormals included
    assert 0.5 < logits.std() < 2


def test_gauss_scores_have_no_ties_and_minus_infinity_where_nothing_is_visible():
    inputs = make_inputs(parse_id("index_topk/q=5+1,kv=8321+1,h=3"))
    visible = torch.from_numpy(visible_blocks(inputs.case))
    assert visible.tolist() == [65, 65, 65, 65, 66, 1]
    for row, count in enumerate(visible.tolist()):
        for head in range(3):
            seen, hidden = inputs.scores[head, row, :count], inputs.scores[head, row, count:]
            assert seen.unique().numel() == count
            assert (hidden == float("-inf")).all()
    assert not torch.equal(inputs.scores[0], inputs.scores[1])


def test_tied_scores_really_tie_in_all_kinds():
    scores = make_inputs(parse_id("index_topk/q=6,kv=8192,fill=ties")).scores
    kinds = {kind: scores[0, row, :63] for row, kind in enumerate(TIE_KINDS)}
    assert kinds["equal"].unique().numel() == 1
    assert kinds["two_valued"].unique().numel() == 2
    assert (kinds["descending"].diff() <= 0).all()
    assert kinds["descending"].unique().numel() == 32
    assert kinds["one_exponent"].frexp().exponent.unique().numel() == 1
    assert kinds["one_exponent"].unique().numel() < 20
    assert (kinds["negative"] < 0).all()
    assert (kinds["signed_zeros"] == 0).all()
    signs = kinds["signed_zeros"].signbit()
    assert signs.any()
    assert not signs.all()


@pytest.mark.parametrize("dtype", ["bf16", "fp32", "fp8_e4m3fn", "fp8_e5m2"])
def test_tied_keys_give_tied_block_scores(dtype):
    inputs = make_inputs(parse_id(f"index_score/q=3,kv={BLOCK * 12},h=3,dtype={dtype},cache={dtype},fill=ties"))
    q, k = inputs.idx_q.double(), inputs.idx_k.double()
    scores = torch.einsum("thd,bkd->thbk", q, k.view(12, BLOCK, -1)).amax(-1)[-1]
    sorts = [row[:11].unique().numel() for row in scores]  # the last block is cut by causality
    assert all(1 <= count <= 3 for count in sorts)
    kinds = {(row[:11] < 0).all().item() for row in scores} | {(row[:11] == 0).all().item() for row in scores}
    assert kinds == {True, False}  # some heads see only negative scores or zeros, some do not
    assert not torch.equal(k[:BLOCK], k[3 * BLOCK : 4 * BLOCK])  # same keys, another order


def test_tied_attention_keys_give_equal_logits():
    inputs = make_inputs(parse_id("sparse_attn/q=2,kv=1024,h=2,g=2,fill=ties"))
    for head in range(2):
        assert inputs.k[:, head].unique(dim=0).shape[0] == 4
    assert inputs.v[:, 0].unique(dim=0).shape[0] == 1024


def test_scales_are_distinct_and_neither_one_nor_powers_of_two():
    for text in (
        "sparse_attn/q=2,kv=3000,h=8,cache=fp8_e4m3fn,scale=token",
        "decode/q=2,kv=300,cache=fp8_e5m2,scale=token",
    ):
        inputs = make_inputs(parse_id(text))
        for scale in (inputs.k_scale, inputs.v_scale):
            assert scale.unique().numel() > 0.99 * scale.numel()
            assert 0.5 < scale.min() < 0.6
            assert 1.8 < scale.max() < 2
            assert (scale.frexp().mantissa != 0.5).all()
            assert (scale.diff(dim=0).abs() > 0.01).all()  # neighbours differ visibly
        assert not torch.equal(inputs.k_scale, inputs.v_scale)
    for seed in range(20):
        inputs = make_inputs(parse_id(f"sparse_attn/q=1,kv=2,cache=fp8_e4m3fn,scale=scalar~{seed}"))
        assert 0.5 < inputs.k_scale < 1 < inputs.v_scale < 2
        assert inputs.k_scale.frexp().mantissa != 0.5
        assert inputs.v_scale.frexp().mantissa != 0.5
    assert make_inputs(parse_id("sparse_attn/q=1,kv=2,cache=fp8_e4m3fn")).k_scale is None


def rows(ids, case):
    """(head, row, visible blocks, the row's ids)."""
    for head in range(case.kv_heads):
        for row, count in enumerate(visible_blocks(case).tolist()):
            yield head, row, count, ids[head, row].tolist()


LISTED = (
    "sparse_attn/q=40+7+0+130,kv=4097+7+300+3000,topk=8",
    "sparse_attn/q=20,kv=2200,h=8,topk=17",
    "sparse_attn/q=9,kv=1200,h=3,topk=3",
    "sparse_attn_decode/q=4x3,kv=2+0+2177,h=2",
    "sparse_attn_decode/q=1x4,kv=300+1+8192+127,topk=64",
)


@pytest.mark.parametrize("text", LISTED)
@pytest.mark.parametrize("name", SELECTIONS)
def test_id_lists_keep_their_first_line(text, name):
    case = replace(parse_id(text), ids=name)
    ids = make_inputs(case).topk_idx
    full = make_inputs(case if name == "full" else replace(case, ids="full")).topk_idx
    assert full.shape == ids.shape
    hole_seen = fewer = 0
    for _, _, visible, row in rows(ids, case):
        valid = [i for i in row if 0 <= i < visible]
        count = min(case.topk, visible)
        assert len(valid) == len(set(valid)), "ids are distinct"
        trailing = row[: len(row) - row[::-1].index(next((i for i in row[::-1] if i != -1), row[-1]))]
        if name in ("full", "ascending"):
            assert len(valid) == count
            assert row[count:] == [-1] * (case.topk - count)
            assert name == "full" or valid == sorted(valid)
        elif name == "short":
            assert min(1, visible) <= len(valid) <= max(count - (count > 1), min(1, visible))
            assert row[len(valid) :] == [-1] * (case.topk - len(valid))
            fewer += len(valid) < count
        elif name == "holes":
            assert min(1, visible) <= len(valid)
            hole_seen += -1 in trailing and visible > 0
            assert visible == 0 or -1 in trailing
        else:
            unseen = [i for i in row if i >= visible]
            assert len(unseen) == 1
            assert unseen[0] <= case.block_columns
            assert set(row) - set(valid) - set(unseen) <= {-1}
    assert name != "short" or fewer
    assert name != "holes" or hole_seen


@pytest.mark.parametrize("text", LISTED)
def test_heads_list_different_blocks_where_they_can(text):
    case = parse_id(text)
    ids = make_inputs(case).topk_idx
    own = seen = 0
    for row, visible in enumerate(visible_blocks(case).tolist()):
        sets = [frozenset(ids[head, row].tolist()) for head in range(case.kv_heads)]
        if visible > case.topk and visible - 1 >= case.kv_heads:
            assert len(set(sets)) == case.kv_heads
        if visible > 1:
            own += (visible - 1) in sets[0]
            seen += 1
    assert own > 0.6 * seen


@pytest.mark.parametrize("fill", ["gauss", "integer", "wide"])
@pytest.mark.parametrize("dtype", ["bf16", "fp8_e4m3fn"])
def test_heads_score_blocks_in_different_order(fill, dtype):
    """A kernel that uses another head's selection, or one for all heads, must come out different."""
    inputs = make_inputs(parse_id(f"index_decode/q=2,kv={BLOCK * 40},dtype={dtype},cache={dtype},fill={fill}"))
    scores = torch.einsum("thd,bkd->thbk", inputs.idx_q.double(), inputs.idx_k.double().view(40, BLOCK, -1)).amax(-1)
    for row in scores:
        chosen = {tuple(head.topk(16).indices.sort().values.tolist()) for head in row}
        assert len(chosen) == 4


def test_future_ids_stay_in_the_request_where_it_has_later_blocks():
    case = parse_id("sparse_attn/q=300,kv=1300,h=1,g=1,topk=4,ids=future")
    ids = make_inputs(case).topk_idx
    inside = 0
    for _, row, visible, listed in rows(ids, case):
        (unseen,) = [i for i in listed if i >= visible]
        if visible < blocks(1300):
            assert unseen < blocks(1300), row
            inside += 1
    assert inside > 100


def test_every_fill_and_list_says_what_it_promises():
    for fill in FILLS.values():
        assert len(fill.summary) > 20
    for make in SELECTIONS.values():
        assert make.__doc__


def test_a_case_made_by_hand_with_unknown_words_is_refused():
    from m3check.types import M3CheckError

    case = replace(parse_id("index_score/q=1,kv=1"), fill="flat")
    with pytest.raises(M3CheckError, match="unknown fill 'flat'"):
        make_inputs(case)
