"""Our Triton kernels against the fp64 references, edge by edge: on the GPU where there is one, else interpreted."""

from __future__ import annotations

import importlib
import inspect
from dataclasses import replace

import pytest
import simulate
import torch

triton = pytest.importorskip("triton")

from m3check import interpret, paging, reference  # noqa: E402
from m3check.cases.generate import make_inputs  # noqa: E402
from m3check.cases.ident import parse_id  # noqa: E402
from m3check.kernels import contract  # noqa: E402
from m3check.types import OPS, Kernel, blocks  # noqa: E402

if triton.knobs.runtime.interpret:
    interpret.install()

from m3check.kernels.triton import dequantise, selection, tiles  # noqa: E402

DEVICE = "cpu" if triton.knobs.runtime.interpret else "cuda"
HALF_ULP = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-24}
NAN, INF = float("nan"), float("inf")


def kernel(op: str) -> Kernel:
    module = importlib.import_module(f"m3check.kernels.triton.{op}")
    return Kernel("triton", op, op, module.PROFILE, getattr(module, op))


def case_inputs(text: str):
    return make_inputs(parse_id(text), DEVICE)


def run(inputs, poison="nan"):
    """The op's own output; watched memory must be untouched."""
    result = contract.call(kernel(inputs.case.op), inputs, paging.World(poison=poison))
    for guard in result.guards:
        assert guard.overwritten() == [], guard.name
    for frozen in result.frozen:
        assert frozen.changed() == 0, frozen.name
    return result.outputs[OPS[inputs.case.op].outputs[0]]


def assert_scores(inputs, actual):
    """Within what fp32 summation in any order explains; forced cells exactly, NaN where and only where due."""
    expected = reference.expected(reference.dequantised(inputs, "rounded"))["score"]
    magnitudes = replace(inputs, idx_q=inputs.idx_q.double().abs(), idx_k=inputs.idx_k.double().abs())
    bound = (
        inputs.case.head_dim
        * 2**-24
        * reference.index_score(magnitudes.idx_q, magnitudes.idx_k, tuple(inputs.case.requests()), torch.float64)
    )
    seen = expected != -INF
    assert torch.equal(actual[seen].isnan(), expected[seen].isnan())
    number = seen & ~expected.isnan()
    forced = number & (expected.abs() > 1e28)
    assert torch.equal(actual[forced].double(), expected[forced])
    plain = number & ~forced
    assert ((actual[plain].double() - expected[plain]).abs() <= bound[plain]).all()
    if inputs.case.op == "index_decode_score":  # its buffer was prefilled with poison; the other op makes a new one
        untouched = actual[~seen].isnan() | (actual[~seen] == paging.GARBAGE)
        assert (untouched | (actual[~seen] == -INF)).all()


def attention_errors(inputs, actual):
    """|error| over the bound: half an ulp of the result, and of each weight in the dot with V, and fp32 arithmetic."""
    problem = reference.dequantised(inputs, "rounded")
    expected = reference.expected(problem)["out"]
    largest = reference.expected(replace(problem, v=problem.v.double().abs()))["out"]
    u = HALF_ULP[actual.dtype]
    tiny = torch.finfo(actual.dtype).tiny
    bound = u * expected.abs() + (u + 2**-15) * largest + tiny
    return (actual.double() - expected).abs() / bound


def assert_attention(inputs, actual):
    assert not actual.isnan().any()
    assert attention_errors(inputs, actual).max() <= 1


SCORES = (
    "index_score/q=5+1+3,kv=1025+1+300,h=3",
    "index_score/q=70,kv=200,h=1,cache=fp16,dtype=fp16,layout=pool",
    "index_score/q=5,kv=385,h=3,d=64,dtype=fp32,cache=fp32",
    "index_score/q=5+0+2,kv=257+3+128,h=4,cache=fp8_e4m3fn",
    "index_score/q=2,kv=640,h=5,dtype=fp8_e5m2,cache=fp8_e5m2",
    "index_decode_score/q=2+2,kv=1025+129,init=1",
    "index_decode_score/q=3x4,kv=897+2+0+128,h=5,mq=4,init=2,local=2,layout=pool",
    "index_decode_score/q=1,kv=300,h=3,d=64,cache=fp8_e4m3fnuz,local=0",
    "index_decode_score/q=4,kv=513,h=2,dtype=fp8_e4m3fn,cache=fp8_e4m3fn,init=9",
)


@pytest.mark.parametrize("text", SCORES)
@pytest.mark.parametrize("poison", ["nan", "garbage"])
def test_scores(text, poison):
    inputs = case_inputs(text)

    actual = run(inputs, poison)

    assert_scores(inputs, actual)


SELECTIONS = (
    "index_topk/q=5+3,kv=2500+129",
    "index_topk/q=5+0+3,kv=2500+4+129,h=3,topk=3,init=4,local=4",
    "index_topk/q=5+3,kv=2500+129,h=3,topk=17,init=2,local=3,layout=pool",
    "index_topk/q=3,kv=9000,topk=64,fill=ties",
    "index_topk/q=3,kv=9000,topk=1,fill=wide,local=0",
    "index_topk/q=3,kv=9000,topk=1,init=1",
    "index_topk/q=2,kv=300,topk=5,init=9,local=9",
)


@pytest.mark.parametrize("text", SELECTIONS)
def test_selected_ids_their_order_and_ties_are_the_references(text):
    inputs = case_inputs(text)

    assert torch.equal(run(inputs).long(), reference.expected(inputs)["ids"].long())


DECODE_SELECTIONS = (
    "index_decode/q=3x4,kv=2600+129+2+0,h=3,topk=5,mq=4,fill=integer",
    "index_decode/q=1x3,kv=2600+0+1,h=5,topk=17,init=2,local=3,fill=integer,layout=pool",
    "index_decode/q=2,kv=9000,h=1,topk=64,fill=integer,cache=fp8_e4m3fn,dtype=fp8_e4m3fn",
    "index_decode/q=2,kv=1300,h=2,topk=3,init=3,local=2,fill=ties",
)


@pytest.mark.parametrize("text", DECODE_SELECTIONS)
def test_decode_selects_the_references_ids_where_scores_are_exact(text):
    inputs = case_inputs(text)

    assert torch.equal(run(inputs).long(), reference.expected(inputs)["ids"].long())


def test_decode_ids_fit_the_kernels_own_scores():
    inputs = case_inputs("index_decode/q=2x3,kv=2600+700+0,h=3,topk=6,init=1")
    scores = {}
    function = importlib.import_module("m3check.kernels.triton.index_decode").index_decode

    def spied(**arguments):
        scores["score"] = arguments["score_out"]
        return function(**arguments)

    spied.__signature__ = inspect.signature(function)  # contract.call passes what it names
    inputs_kernel = replace(kernel("index_decode"), function=spied)
    ids = contract.call(inputs_kernel, inputs).outputs["ids"]

    case = inputs.case
    own = scores["score"][..., : case.block_columns].nan_to_num(nan=-INF)
    again = reference.index_topk(own, tuple(case.requests()), case.topk, case.init_blocks, case.local_blocks)
    assert torch.equal(ids, again)


def test_nan_infinite_and_signed_zero_scores_keep_ids_valid_and_ordered():
    inputs = case_inputs("index_topk/q=4,kv=2600,h=2,topk=7,init=1,local=2")
    odd = torch.tensor([NAN, INF, -INF, 0.0, -0.0, 1.0, 1e-45, -1e-45, 3e38, -3e38, 2e30], device=DEVICE)
    picks = torch.randint(len(odd), inputs.scores.shape, generator=torch.Generator().manual_seed(3))
    picks[0, 0] = 0  # a row of NaN alone
    picks[0, 1] = 2  # and of -inf
    inputs = replace(inputs, scores=odd[picks.to(DEVICE)])

    ids = run(inputs)

    assert torch.equal(ids, reference.expected(inputs)["ids"])
    assert (ids >= 0).all()  # 21 blocks are visible, so every slot holds one


def test_scores_beyond_the_forcing_constants_do_not_displace_forced_blocks():
    inputs = case_inputs("index_decode/q=1,kv=2600,h=2,topk=4,init=1,local=2,dtype=fp32,cache=fp32")
    inputs = replace(inputs, idx_q=inputs.idx_q * 1e18, idx_k=inputs.idx_k * 1e18)

    ids = run(inputs)

    assert ids[..., :3].tolist() == [[[0, 19, 20]]] * 2
    assert torch.equal(ids, reference.expected(inputs)["ids"])


def test_a_nan_key_is_ignored_among_others_and_a_block_of_them_scores_nan():
    inputs = case_inputs("index_score/q=3,kv=400,h=2")
    inputs.idx_k[5] = NAN  # among others
    inputs.idx_k[128:256] = NAN  # a block of its own
    inputs.idx_k[399] = NAN  # the last query alone sees it

    assert_scores(inputs, run(inputs))


def test_a_narrow_tile_and_a_merge_choose_the_same_ids(monkeypatch):
    inputs = case_inputs("index_topk/q=5+3,kv=9000+129,h=3,topk=17,init=2,local=3")
    whole = run(inputs)
    monkeypatch.setattr(tiles, "selection_width", lambda columns: 16)
    monkeypatch.setattr(tiles, "selection_rows", lambda rows, width: 4)

    assert torch.equal(run(inputs), whole)


def test_rows_wider_than_a_tile_are_cut_and_merged():
    columns = 8192
    score = torch.randn(2, 3, columns, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    topk = importlib.import_module("m3check.kernels.triton.index_topk").index_topk
    starts = torch.tensor([0, 3], dtype=torch.int32, device=DEVICE)
    prefix = torch.tensor([columns * 128 - 3], dtype=torch.int32, device=DEVICE)

    ids = topk(score, starts, prefix, 3, 64, 1, 1)

    assert torch.equal(ids[..., 2:].long(), score[..., 1:-1].topk(62).indices + 1)
    assert ids[..., :2].tolist() == [[[0, columns - 1]] * 3] * 2


def test_rows_past_the_last_query_are_left_alone():
    score = torch.randn(2, 3, 16, device=DEVICE)
    out = torch.full((2, 5, 4), 77, dtype=torch.int32, device=DEVICE)
    topk = importlib.import_module("m3check.kernels.triton.index_topk").index_topk
    starts = torch.tensor([0, 0, 2], dtype=torch.int32, device=DEVICE)

    returned = topk(score, starts, torch.tensor([9, 1000], dtype=torch.int32, device=DEVICE), 2, 4, 0, 1, out)

    assert returned.data_ptr() == out.data_ptr()
    assert returned.shape == (2, 3, 4)
    assert (out[:, 2:] == 77).all()  # the third row of scores belongs to no request
    assert (out[:, :2] != 77).all()


ATTENTIONS = (
    "sparse_attn/q=3+2,kv=1025+129,h=3,g=5,topk=3,ids=holes",
    "sparse_attn/q=3+0+2,kv=1025+7+129,h=1,g=1,topk=17,ids=future,dtype=fp16,cache=fp16,d=64",
    "sparse_attn/q=3+2,kv=1025+129,h=2,g=5,topk=8,ids=short,cache=fp8_e4m3fn,scale=token,layout=nhd",
    "sparse_attn/q=3,kv=700,h=2,g=3,topk=8,ids=ascending,cache=fp8_e5m2,scale=scalar,layout=pool",
    "sparse_attn/q=1,kv=9000,h=1,g=3,topk=64,cache=fp8_e4m3fnuz",
    "sparse_attn/q=2,kv=385,h=2,g=20,topk=1,dtype=fp32,cache=fp32",
    "sparse_attn_decode/q=3x3,kv=1025+2+0,h=3,g=5,topk=16,ids=holes,layout=pool",
    "sparse_attn_decode/q=1x2,kv=9025+200,h=1,g=6,topk=64,cache=fp8_e5m2fnuz,scale=token",
    "sparse_attn_decode/q=1x2,kv=1025+200,h=2,g=7,topk=7,dtype=fp32,cache=fp32,ids=future",
    "sparse_attn_decode/q=2,kv=1025,h=1,g=1,topk=1,d=64,dtype=fp16,cache=fp8_e4m3fn,scale=scalar,ids=short",
    "sparse_attn_decode/q=1x3,kv=129+128+1,h=3,g=16,topk=3,layout=nhd,fill=ties",
)


@pytest.mark.parametrize("text", ATTENTIONS)
@pytest.mark.parametrize("poison", ["nan", "garbage"])
def test_attention(text, poison):
    inputs = case_inputs(text)

    assert_attention(inputs, run(inputs, poison))


def test_the_bound_of_these_tests_sees_a_lost_block():
    inputs = case_inputs("sparse_attn/q=3,kv=1025,h=2,g=4,topk=8")
    lost = replace(inputs, topk_idx=inputs.topk_idx.clone())
    lost.topk_idx[1, 2, 3] = -1

    assert attention_errors(inputs, run(lost)).max() > 2


@pytest.mark.parametrize("op", ["sparse_attn", "sparse_attn_decode"])
@pytest.mark.parametrize("ids", [-1, -(2**31), 9, 2**31 - 1])
def test_a_list_without_a_visible_block_gives_exact_zeros(op, ids):
    inputs = case_inputs(f"{op}/q=2,kv=1025,h=2,g=3,topk=5")
    inputs.topk_idx[0, 0] = ids

    out = run(inputs)

    assert (out[0, :3] == 0).all()
    assert_attention(inputs, out)


@pytest.mark.parametrize("op", ["sparse_attn", "sparse_attn_decode"])
@pytest.mark.parametrize("split", [1, 2, 16])
def test_attention_in_small_steps_and_any_split(op, split, monkeypatch):
    inputs = case_inputs(f"{op}/q=2,kv=1500,h=2,g=3,topk=7,ids=holes")
    monkeypatch.setattr(tiles, "attention_keys", lambda dtype: 64)  # the tile of a GPU
    monkeypatch.setattr(tiles, "splits", lambda programs, most: min(split, most))

    assert_attention(inputs, run(inputs))


def test_scoring_in_small_steps_and_tiles(monkeypatch):
    inputs = case_inputs("index_score/q=9+2,kv=1025+129,h=3")
    monkeypatch.setattr(tiles, "score_keys", lambda dtype: 32)
    monkeypatch.setattr(tiles, "score_rows", lambda rows, dtype: 16)
    monkeypatch.setattr(tiles, "splits", lambda programs, most: 3)

    assert_scores(inputs, run(inputs))


@pytest.mark.parametrize("op", ["index_decode_score", "index_decode"])
def test_a_larger_max_decode_query_len_changes_no_bit(op):
    inputs = case_inputs(f"{op}/q=3x2,kv=1025+2,h=3" + (",topk=4" if op == "index_decode" else ""))
    wide = replace(inputs, case=replace(inputs.case, max_query_len=8))

    ours, wider = run(inputs), run(wide)

    assert torch.equal(ours.nan_to_num(nan=7.0) if ours.is_floating_point() else ours, wider.nan_to_num(nan=7.0))


def test_transposed_buffers_are_used_by_their_strides():
    inputs = case_inputs("index_decode/q=2x2,kv=1025+300,h=3,topk=4")
    function = importlib.import_module("m3check.kernels.triton.index_decode").index_decode
    case = inputs.case
    scores = torch.full((4, case.block_columns + 3, 3), NAN, device=DEVICE).permute(2, 0, 1)
    out = torch.full((4, 3, 8), 77, dtype=torch.int32, device=DEVICE).transpose(0, 1)[..., ::2]

    def strided(**arguments):
        arguments |= {"idx_q": torch.stack([arguments["idx_q"]] * 2, -1)[..., 0], "out": out, "score_out": scores}
        return function(**arguments)

    strided.__signature__ = inspect.signature(function)  # contract.call passes what it names
    ids = contract.call(replace(kernel("index_decode"), function=strided), inputs).outputs["ids"]

    assert torch.equal(ids, run(inputs))
    assert_scores(replace(inputs, case=replace(case, op="index_decode_score")), scores[..., : case.block_columns])


@pytest.mark.parametrize("op", ["sparse_attn", "sparse_attn_decode"])
def test_attention_reads_and_writes_by_strides(op):
    inputs = case_inputs(f"{op}/q=3,kv=700,h=2,g=3,topk=4")
    function = importlib.import_module(f"m3check.kernels.triton.{op}").__dict__[op]
    out = torch.full((6, 128, 3), NAN, dtype=torch.bfloat16, device=DEVICE).permute(2, 0, 1)

    def strided(**arguments):
        arguments["q"] = arguments["q"].transpose(0, 2).contiguous().transpose(0, 2)
        arguments["topk_idx"] = arguments["topk_idx"].permute(2, 1, 0).contiguous().permute(2, 1, 0)
        function(**arguments | {"output": out})
        return out

    strided.__signature__ = inspect.signature(function)  # contract.call passes what it names
    contract.call(replace(kernel(op), function=strided), inputs)

    assert torch.equal(out, run(inputs))


FP8 = (torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz)


@pytest.mark.parametrize("dtype", FP8, ids=str)
def test_every_fp8_code_is_decoded_exactly(dtype):
    """By way of an attention to one key: out = v, which bf16 holds exactly."""
    codes = torch.arange(256, dtype=torch.uint8).view(dtype)
    numbers = codes.float()
    word = {v: k for k, v in {"fp8_" + str(d).split("_", 1)[1]: d for d in FP8}.items()}[dtype]
    inputs = case_inputs(f"sparse_attn/q=1,kv=1,h=2,g=1,topk=1,cache={word}")
    v = codes.view(torch.uint8).reshape(1, 2, 128).to(DEVICE).view(dtype)

    out = run(replace(inputs, v=v)).flatten().float().cpu()

    assert dequantise.FORMATS[dtype] in word
    assert torch.equal(out.isnan(), numbers.isnan())
    assert torch.equal(out.nan_to_num(nan=0), numbers.nan_to_num(nan=0))


def test_what_a_call_cannot_mean_is_refused_in_words():
    inputs = case_inputs("sparse_attn/q=2,kv=129,h=2,g=1,topk=1,cache=fp8_e4m3fn,scale=scalar")
    with pytest.raises(ValueError, match="given together"):
        run(replace(inputs, v_scale=None))
    cache = torch.zeros(2, 3, 128, 8)
    with pytest.raises(ValueError, match=r"k_scale has shape \[3, 4\], wanted \[1\] or \[3, 256\]"):
        importlib.import_module("m3check.kernels.triton.scales").mode("e5m2", cache, torch.ones(3, 4), torch.ones(3, 256))
    decode = kernel("index_decode").function
    with pytest.raises(ValueError, match="3 tokens, wanted 2 requests"):
        decode(torch.zeros(3, 1, 64), cache, torch.zeros(2, 1), torch.zeros(2), 128, 1, 0, 1, 1, 1)


def test_an_empty_batch_is_no_launch():
    empty = torch.zeros(0, 2, 64, device=DEVICE)
    starts = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    score = kernel("index_score").function(
        empty, torch.zeros(1, 128, 64), torch.zeros(0, 1, dtype=torch.int32), starts, starts[:0], starts[:0], 0, 1, 2
    )
    assert score.shape[:2] == (2, 0)
    assert kernel("index_topk").function(score, starts, starts[:0], 0, 4, 0, 1).shape == (2, 0, 4)


def test_the_sort_key_has_room_for_every_block():
    assert selection.ID_MASK.value >= blocks(2**31 - 1) - 1


def test_near_logits_may_round_apart():
    """Row 5 has four distinct logits; two are 0.0002 apart, on either side of where p is rounded to bf16."""
    inputs = case_inputs("sparse_attn/q=4x2,kv=1920+2047,h=3,g=1,topk=8,layout=nhd,fill=ties~116")
    right = run(inputs)
    assert not simulate.red(simulate.judge(inputs, {"out": right}, partials="fp32"))
    lost = inputs.topk_idx.clone()
    lost[1, 5, 3] = lost[1, 5, 7]  # 128 of its thousand tokens are lost, 128 come twice
    wrong = run(replace(inputs, topk_idx=lost))
    assert "token" in simulate.red(simulate.judge(inputs, {"out": wrong}, partials="fp32"))
