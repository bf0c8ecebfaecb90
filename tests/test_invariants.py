"""Each invariant catches a wrong kernel that the comparison alone lets pass, and lets right kernels pass."""

from __future__ import annotations

import inspect
import math
from dataclasses import replace

import pytest
import torch
import torch_insert
import torch_kernels as right

from m3check import arch, arena, cases, invariants, kernels, paging, runner
from m3check.arch import ARCHS
from m3check.checks.invariants.trial import coarsest
from m3check.kernels.provider import Loaded, Spec, with_chains
from m3check.types import OPS, Kernel, PlanLine, Profile, Result, Status

PROFILE = Profile(dequantise="rounded")


def like(op):
    """Give a wrapper the signature of the right kernel, which says what m3check passes."""

    def signed(function):
        function.__signature__ = inspect.signature(right.RIGHT.get(op) or torch_insert.kernel())
        return function

    return signed


def session(functions, profile=PROFILE):
    """A provider of torch functions, by op."""
    made = {op: Kernel("user", op, op, profile, function) for op, function in functions.items()}
    every, missing = with_chains(made, {})
    return runner.Session(ARCHS["sm90"], "interpreted", "cpu", Loaded(Spec("user", "user"), every, missing))


def run(functions, case, names=None, profile=PROFILE) -> Result:
    """One case with some invariants, or with all that fit."""
    parsed = cases.parse_id(case)
    names = invariants.fitting(parsed, "interpreted") if names is None else tuple(names)
    line = PlanLine(case, parsed.op, "user", "interpreted", None, names)
    return runner.run_one(parsed, session(functions, profile), line, "")


def caught(function, op, case, name, says=""):
    """The comparison alone passes; the invariant is red, by its name; the right kernel passes it."""
    functions = {**right.RIGHT, op: function}
    alone = run(functions, case, ())
    assert alone.status is Status.PASSED, alone.reason
    result = run(functions, case, (name,))
    assert result.status is Status.FAILED, result
    red = {f.check: f for f in result.findings if f.status is Status.FAILED}
    assert set(red) == {name}
    assert says in red[name].hint, red[name]
    clean = run(right.RIGHT, case, (name,))
    assert clean.status is Status.PASSED, clean.reason
    assert name in {f.check for f in clean.findings}, "it did not even look"
    return red[name]


SCORE = "index_score/q=2+3,kv=300+200,h=2,d=64"
ATTEND = "sparse_attn_decode/q=2x2,kv=600+333,h=2,g=2,d=64,topk=3"


def test_poison_catches_keys_behind_the_last_token_where_nan_hides_them():
    def unmasked(idx_q, index_kv_cache, block_table, cu_seqlens_q, seq_lens, prefix_lens, max_seq_len):
        rows = right.prefill_rows(cu_seqlens_q, prefix_lens)
        return right.score_rows(idx_q, index_kv_cache, block_table, rows, right.columns_of(max_seq_len), mask=False)

    found = caught(
        unmasked, "index_score", "index_score/q=1,kv=300,h=2,d=64", "poison", says="large numbers instead of NaN"
    )
    assert "request 0, query 0" in found.where
    assert "block 2" in found.where


def test_poison_also_fills_memory_that_a_wrapper_allocates():
    @like("sparse_attn_decode")
    def unwritten(**arguments):
        right.sparse_attn_decode(**arguments)
        scratch = torch.empty(1)  # a partial result that nobody wrote
        arguments["output"][0] += scratch.nan_to_num(0).to(arguments["output"].dtype)

    caught(unwritten, "sparse_attn_decode", ATTEND, "poison")


def test_pages_catches_a_block_table_kept_from_the_first_call():
    first = {}

    @like("sparse_attn_decode")
    def kept(block_table, kv_cache, **arguments):
        table = first.setdefault((tuple(kv_cache.shape), arguments["q"].data_ptr() * 0), block_table.clone())
        right.sparse_attn_decode(block_table=table, kv_cache=kv_cache, **arguments)

    caught(kept, "sparse_attn_decode", ATTEND, "pages", says="another order")


def test_strides_catches_a_dense_page_that_was_assumed():
    @like("sparse_attn_decode")
    def dense(kv_cache, **arguments):
        size = kv_cache.shape
        strides = (size[1] * size[2] * size[3], size[2] * size[3], size[3], 1)
        count = min(size[0], (kv_cache.untyped_storage().size() // kv_cache.element_size()) // strides[0])
        right.sparse_attn_decode(kv_cache=kv_cache.as_strided((count, *size[1:]), strides, 0), **arguments)

    caught(dense, "sparse_attn_decode", ATTEND, "strides", says="other strides")


def test_strides_catches_a_stride_of_a_dimension_of_size_one():
    @like("sparse_attn_decode")
    def by_head_stride(kv_cache, **arguments):
        page = kv_cache.shape[1] * kv_cache.stride(
            1
        )  # right wherever heads are dense, also for one head: its stride is the page's
        view = kv_cache.as_strided(kv_cache.shape, (page, *kv_cache.stride()[1:]), kv_cache.storage_offset())
        right.sparse_attn_decode(kv_cache=view.clone() if _fits(view) else torch.zeros(kv_cache.shape), **arguments)

    caught(by_head_stride, "sparse_attn_decode", "sparse_attn_decode/q=1,kv=600,h=1,g=2,d=64,topk=3", "strides")


def _fits(view):
    last = view.storage_offset() + sum((n - 1) * s for n, s in zip(view.shape, view.stride(), strict=True))
    return last < view.untyped_storage().size() // view.element_size()


def test_far_pages_catches_an_offset_of_32_bits():
    def narrow(cache, table, request, count):
        pages = []
        for page in table[request, :count].tolist():
            offset = page * cache.stride(0)
            wrapped = (offset + 2**31) % 2**32 - 2**31
            pages.append(cache.as_strided(cache.shape[1:], cache.stride()[1:], cache.storage_offset() + wrapped))
        return torch.stack(pages)

    def wrapping(idx_q, index_kv_cache, block_table, cu_seqlens_q, seq_lens, prefix_lens, max_seq_len):
        rows = right.prefill_rows(cu_seqlens_q, prefix_lens)
        return right.score_rows(idx_q, index_kv_cache, block_table, rows, right.columns_of(max_seq_len), narrow)

    caught(wrapping, "index_score", SCORE, "far_pages", says="2^31")


def test_far_rows_catches_an_offset_of_32_bits_where_64_are_promised():
    @like("sparse_attn_decode")
    def wrapping(**arguments):
        q = arguments["q"]
        rows = []
        for token in range(q.shape[0]):
            wrapped = (token * q.stride(0) + 2**31) % 2**32 - 2**31
            rows.append(q.as_strided(q.shape[1:], q.stride()[1:], q.storage_offset() + wrapped))
        right.sparse_attn_decode(**{**arguments, "q": torch.stack(rows)})

    functions = {"sparse_attn_decode": wrapping}
    promises = Profile(dequantise="rounded", bitwise=frozenset({"far_rows"}))
    assert run(functions, ATTEND, (), promises).status is Status.PASSED
    result = run(functions, ATTEND, ("far_rows",), promises)
    assert result.status is Status.FAILED
    assert "query tokens times their stride" in result.reason
    unpromised = run(functions, ATTEND, ("far_rows",))
    assert unpromised.status is Status.PASSED
    assert Status.NOTED in {f.status for f in unpromised.findings}
    assert run(right.RIGHT, ATTEND, ("far_rows",), promises).status is Status.PASSED


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int32, torch.float8_e4m3fn])
def test_spread_rows_hold_the_same_values_beyond_32_bits(dtype):
    tensor = torch.arange(24).view(2, 3, 4).to(dtype)
    far = arena.spread(tensor, 1)
    assert 2 * far.stride(1) > 2**31 > far.stride(1)
    assert torch.equal(far.float(), tensor.float())


def test_room_catches_a_limit_taken_for_the_length():
    @like("index_decode_score")
    def limit(seq_lens, max_seq_len, decode_query_len, **arguments):
        lengths = seq_lens.clone()
        if len(lengths) == 1:
            lengths[0] = max_seq_len
            arguments["block_table"] = arguments["block_table"][:, : right.columns_of(max_seq_len)]
        columns = right.columns_of(int(seq_lens.max()))
        score = right.index_decode_score(
            seq_lens=seq_lens, max_seq_len=max_seq_len, decode_query_len=decode_query_len, **arguments
        )
        forced = right.force(
            torch.zeros_like(score), right.decode_rows(lengths, decode_query_len), 0, arguments["local_blocks"]
        )
        wrong = score[..., :columns].clone()
        if not forced[..., :columns].any():
            wrong[..., columns - 1] = 0.0
        score[..., :columns] = wrong
        return score

    caught(limit, "index_decode_score", "index_decode_score/q=1,kv=600,h=2,d=64", "room", says="max_seq_len was")


def test_future_catches_a_peak_over_tokens_that_are_not_visible():
    def peaking(q, kv_cache, topk_idx, block_table, cu_seqlens_q, seq_lens, prefix_lens, sm_scale, output):
        rows = right.prefill_rows(cu_seqlens_q, prefix_lens)
        dim, group = q.shape[-1], q.shape[1] // kv_cache.shape[1]

        def top(logits, row, head):
            request = rows[row][0]
            token = torch.arange(int(seq_lens[request]))
            keys = kv_cache[block_table[request, token // 128].long(), head, token % 128, :dim].float()
            lanes = slice(head * group, (head + 1) * group)
            return (q[row, lanes].float() @ keys.T * sm_scale).amax(-1, keepdim=True)  # the own block's end included

        right.attend_rows(q, kv_cache, topk_idx, block_table, rows, sm_scale, output, top=top)

    case = "sparse_attn/q=8,kv=300,h=2,g=2,d=64,topk=3"
    found = caught(peaking, "sparse_attn", case, "future", says="after the queries' positions")
    assert "position 29" in found.where


def test_neighbours_catches_a_peak_shared_by_the_batch():
    def shared(q, kv_cache, topk_idx, block_table, seq_lens, sm_scale, output, decode_query_len):
        rows = right.decode_rows(seq_lens, decode_query_len)
        peak = []

        def top(logits, row, head):
            peak.append(logits.amax())
            return logits.amax() * 0.5 + max(peak) * 0.5

        right.attend_rows(q, kv_cache, topk_idx, block_table, rows, sm_scale, output, top=top)

    case = "sparse_attn_decode/q=1x3,kv=600+333+450,h=1,g=4,d=64,topk=3,dtype=fp32,cache=fp32"
    caught(shared, "sparse_attn_decode", case, "neighbours", says="every request but 1")


def test_batch_order_catches_state_carried_from_request_to_request():
    def carried(q, kv_cache, topk_idx, block_table, seq_lens, sm_scale, output, decode_query_len):
        rows = right.decode_rows(seq_lens, decode_query_len)
        last = [torch.tensor(-math.inf)]

        def top(logits, row, head):
            last[0] = torch.maximum(last[0], logits.amax())  # not reset for the next request
            return last[0]

        right.attend_rows(q, kv_cache, topk_idx, block_table, rows, sm_scale, output, top=top)

    case = "sparse_attn_decode/q=1x3,kv=600+333+450,h=1,g=4,d=64,topk=3,dtype=fp32,cache=fp32"
    caught(carried, "sparse_attn_decode", case, "batch_order", says="reverse order")


def _as_if(wrong_when, op, spoil):
    """The right kernel, whose result is spoiled where `wrong_when(arguments)`."""

    @like(op)
    def kernel(**arguments):
        result = right.RIGHT[op](**arguments)
        if wrong_when(arguments):
            spoil(arguments.get("output") if result is None else result)
        return result

    return kernel


def _double(tensor):
    tensor[:] *= 2


def test_head_order_catches_a_head_that_is_treated_by_its_place():
    case = cases.make_inputs(cases.parse_id(SCORE))
    first = float(case.idx_q[0, 0, 0])
    other = _as_if(lambda a: float(a["idx_q"][0, 0, 0]) != first, "index_score", _double)
    caught(other, "index_score", SCORE, "head_order", says="heads stood in another order")


def test_alone_catches_a_batch_of_one():
    single = _as_if(lambda a: len(a["seq_lens"]) == 1, "sparse_attn_decode", _double)
    caught(single, "sparse_attn_decode", ATTEND, "alone", says="request 1 was alone")


def test_padded_catches_a_dead_row_that_moves_its_neighbours():
    padded = _as_if(lambda a: bool((a["seq_lens"] == 0).any()), "index_decode", lambda ids: ids.copy_(ids.roll(1, 1)))
    caught(padded, "index_decode", "index_decode/q=1x2,kv=2305+1800,h=2,d=64,topk=4", "padded", says="length 0")


@pytest.mark.parametrize(
    ("op", "result", "spoil", "says"),
    [
        ("index_decode", None, lambda ids: ids.zero_(), "no query saw a token: ids"),
        ("sparse_attn_decode", "output", lambda out: out.fill_(1), "no query saw a token: dead_row"),
        ("sparse_attn_decode", "output", lambda out: out.fill_(float("nan")), "no query saw a token: dead_row"),
    ],
)
def test_all_padded_looks_at_the_rows_of_a_batch_that_sees_nothing(op, result, spoil, says):
    @like(op)
    def wrong(**arguments):
        given = right.RIGHT[op](**arguments)
        if not arguments["seq_lens"].any():
            spoil(given if result is None else arguments[result])
        return given

    case = {"index_decode": "index_decode/q=1x2,kv=1305+700,h=2,d=64,topk=4", "sparse_attn_decode": ATTEND}[op]
    caught(wrong, op, case, "all_padded", says=says)


def test_chunked_catches_a_prefix_that_is_ignored():
    @like("index_score")
    def no_prefix(prefix_lens, **arguments):
        return right.index_score(prefix_lens=torch.zeros_like(prefix_lens), **arguments)

    caught(no_prefix, "index_score", "index_score/q=140,kv=140,h=1,d=64", "chunked", says="two chunks")


def test_chunked_certifies_selections():
    @like("index_topk")
    def no_prefix(prefix_lens, **arguments):
        return right.index_topk(prefix_lens=torch.zeros_like(prefix_lens), **arguments)

    caught(no_prefix, "index_topk", "index_topk/q=400,kv=400,h=1,topk=2", "chunked", says="two chunks")


def test_verify_catches_a_single_token_that_misses_itself():
    single = _as_if(lambda a: a["decode_query_len"] == 1, "sparse_attn_decode", _double)
    caught(single, "sparse_attn_decode", ATTEND, "verify", says="single decode rows")


def test_same_as_prefill_catches_two_kernels_that_answer_differently():
    @like("sparse_attn")
    def too_far(prefix_lens, **arguments):
        right.sparse_attn(prefix_lens=prefix_lens - 1, **arguments)

    functions = {**right.RIGHT, "sparse_attn": too_far}
    assert run(functions, ATTEND, ()).status is Status.PASSED
    result = run(functions, ATTEND, ("same_as_prefill",))
    assert result.status is Status.FAILED
    assert "went through sparse_attn" in result.reason


def test_same_as_prefill_judges_the_prefill_kernel_by_its_own_promises():
    def unguarded(**arguments):
        right.sparse_attn(**arguments)
        future = (arguments["topk_idx"] > 4).any(-1).any(0)  # blocks that no request has
        arguments["output"][future] = math.nan

    unguarded = like("sparse_attn")(unguarded)
    case = "sparse_attn_decode/q=2x2,kv=600+333,h=2,g=2,d=64,topk=3,ids=future"
    made = session({**right.RIGHT, "sparse_attn": unguarded})
    accepts = made.loaded.kernels["sparse_attn"]
    pickier = replace(accepts, profile=replace(PROFILE, id_lists=frozenset({"full"})))
    line = PlanLine(case, "sparse_attn_decode", "user", "interpreted", None, ("same_as_prefill",))
    assert runner.run_one(cases.parse_id(case), made, line, "").status is Status.FAILED
    made = replace(made, loaded=replace(made.loaded, kernels={**made.loaded.kernels, "sparse_attn": pickier}))
    assert runner.run_one(cases.parse_id(case), made, line, "").status is Status.PASSED


@pytest.mark.parametrize(
    ("name", "field", "op", "case"),
    [
        ("other_scale", "sm_scale", "sparse_attn_decode", ATTEND),
        ("other_init", "init_blocks", "index_topk", "index_topk/q=2,kv=2305,h=2,topk=5"),
        ("other_local", "local_blocks", "index_decode", "index_decode/q=1x2,kv=2305+1800,h=2,d=64,topk=4"),
        ("other_init", "init_blocks", "index_decode_score", "index_decode_score/q=1x2,kv=2305+1800,h=2,d=64"),
    ],
)
def test_a_scalar_kept_from_the_first_call_is_caught(name, field, op, case):
    kept = {}

    @like(op)
    def baked(**arguments):
        return right.RIGHT[op](**{**arguments, field: kept.setdefault(field, arguments[field])})

    caught(baked, op, case, name, says=field)


def test_a_topk_kept_from_the_first_call_is_caught():
    kept = {}

    @like("index_topk")
    def baked(topk, **arguments):
        best = right.index_topk(topk=kept.setdefault("topk", topk), **arguments)
        return best[..., :topk].flip(-1) if topk != kept["topk"] else best

    @like("index_topk")
    def cut(topk, **arguments):  # a list cut from one of another length, its best first: right as it stands
        return right.index_topk(topk=topk + 1, **arguments)[..., :topk]

    case = "index_topk/q=2,kv=2305,h=2,topk=5"
    reversed_ = run({"index_topk": baked}, case, ("other_topk",), Profile(id_order="score"))
    assert reversed_.status is Status.FAILED
    assert "topk = 4" in reversed_.reason
    assert run({"index_topk": cut}, case, ("other_topk",)).status is Status.PASSED


def test_repeat_catches_a_second_call_that_is_wrong():
    calls = []

    @like("sparse_attn_decode")
    def stateful(**arguments):
        right.sparse_attn_decode(**arguments)
        calls.append(0)
        if len(calls) % 2 == 0:
            arguments["output"][0] = 0

    functions = {"sparse_attn_decode": stateful}
    assert run(functions, ATTEND, ()).status is Status.PASSED
    calls.clear()
    result = run(functions, ATTEND, ("repeat",))
    assert result.status is Status.FAILED
    assert "called twice" in result.reason


def test_repeat_notes_other_bits_and_is_red_where_they_are_promised():
    calls = []

    @like("sparse_attn_decode")
    def restless(**arguments):
        right.sparse_attn_decode(**arguments)
        calls.append(0)
        output = arguments["output"]
        if len(calls) % 2 == 0:  # one ulp of one element of bf16, as another order of summation may give
            output.view(torch.int16)[0, 0, 0] += 1

    functions = {"sparse_attn_decode": restless}
    result = run(functions, ATTEND, ("repeat",))
    assert (result.status, [f.status for f in result.findings if f.check == "repeat"]) == (Status.PASSED, [Status.NOTED])
    calls.clear()
    promised = run(functions, ATTEND, ("repeat",), Profile(dequantise="rounded", bitwise=frozenset({"repeat"})))
    assert promised.status is Status.FAILED


def test_a_kernel_that_never_repeats_its_bits_is_held_to_the_bounds_everywhere():
    calls = []

    @like("sparse_attn_decode")
    def restless(**arguments):
        right.sparse_attn_decode(**arguments)
        calls.append(0)
        arguments["output"].view(torch.int16)[0, 0, 0] += 11 * len(calls) // 7 % 2

    result = run({**right.RIGHT, "sparse_attn_decode": restless}, ATTEND)
    assert result.status is Status.PASSED, result.reason


def test_two_outcomes_are_judged_by_the_less_precise_of_their_instructions():
    exact, short = arch.FP32, arch.Accumulator(13, 32)
    both = [arch.Arithmetic(exact, exact, short), arch.Arithmetic(exact, short, exact)]
    runs = [paging.Run({}, arithmetic=both[0]), paging.Run({}), paging.Run({}, arithmetic=both[1])]
    assert coarsest(runs) == (exact, short, short)
    assert coarsest([runs[1]]) is None


def test_a_kernel_that_raises_on_the_changed_call_is_red():
    @like("sparse_attn_decode")
    def one_at_least_two(**arguments):
        assert len(arguments["seq_lens"]) > 1, "wants two requests"
        right.sparse_attn_decode(**arguments)

    result = run({"sparse_attn_decode": one_at_least_two}, ATTEND, ("alone",))
    assert result.status is Status.FAILED
    assert "wants two requests" in result.reason


def test_a_write_beside_the_buffer_in_the_changed_call_is_red():
    @like("sparse_attn_decode")
    def spills(**arguments):
        right.sparse_attn_decode(**arguments)
        output = arguments["output"]
        if len(arguments["seq_lens"]) == 1:
            output.as_strided((1,), (1,), output.storage_offset() + output.numel()).fill_(1.0)

    result = run({"sparse_attn_decode": spills}, ATTEND, ("alone",))
    assert result.status is Status.FAILED
    assert "wrote outside its view" in result.reason


RIGHT_CASES = (
    "index_score/q=3+0+2,kv=447+300+305,h=2,d=64,dtype=fp8_e4m3fn,cache=fp8_e4m3fn,fill=integer",
    "index_topk/q=1+2,kv=1024+1561,h=2,topk=5,init=2,local=2",
    "index_decode_score/q=3x2,kv=2+633,h=2,d=64,dtype=fp16,cache=fp16,mq=8,fill=wide",
    "index_decode/q=2x2,kv=733+1,h=2,d=64,topk=4,init=1,mq=4",
    "sparse_attn/q=5+1+0,kv=525+129+384,h=2,g=4,d=64,topk=4,cache=fp8_e4m3fn,scale=token",
    "sparse_attn/q=5,kv=509,h=2,g=2,d=64,topk=4,ids=holes,layout=nhd",
    "sparse_attn_decode/q=4x2,kv=2+577,h=2,g=2,d=64,topk=4,cache=fp8_e5m2,scale=scalar,layout=pool",
    "prefill/q=3+1,kv=609+129,h=2,g=2,d=64,topk=3,init=1,cache=fp8_e4m3fn,icache=fp8_e4m3fn,scale=scalar",
    "decode/q=2x3,kv=1+609+0,h=2,g=2,d=64,topk=3,cache=fp8_e4m3fn,icache=fp8_e4m3fn,scale=token,mq=4",
)


@pytest.mark.parametrize("case", RIGHT_CASES)
def test_right_kernels_hold_every_invariant(case):
    result = run(right.RIGHT, case)
    assert result.status is Status.PASSED, result.reason
    absent = {"autotune", "tiles", "own_buffers"}  # torch kernels have no configurations, and these take no buffers
    names = set(invariants.fitting(cases.parse_id(case), "interpreted")) - absent
    assert names <= {f.check for f in result.findings}


@pytest.mark.parametrize("case", RIGHT_CASES)
def test_our_triton_kernels_hold_every_invariant(case):
    pytest.importorskip("triton")
    from m3check.api import verify  # noqa: F401  # switches the interpreter on before triton is imported
    from m3check.arch import present

    if present():
        pytest.skip("a run on this machine's device shows it")
    from m3check import interpret

    interpret.install()
    loaded = kernels.load(kernels.parse_spec("triton"), ARCHS["sm90"], "interpreted", True)
    parsed = cases.parse_id(case)
    names = invariants.fitting(parsed, "interpreted")
    line = PlanLine(case, parsed.op, "triton", "interpreted", None, names)
    result = runner.run_one(parsed, runner.Session(ARCHS["sm90"], "interpreted", "cpu", loaded), line, "")
    assert result.status is Status.PASSED, result.reason
    assert OPS[parsed.op].name == result.op
