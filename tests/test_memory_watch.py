"""Memory, seen exactly: small kernels that misuse it each in one way, kernels that use it rightly, and real ones."""

from __future__ import annotations

import inspect
import re
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from m3check import arch, cases, checks, interpret, kernels, paging, reference, verify
from m3check.checks.view import View
from m3check.kernels import contract
from m3check.kernels.triton.profile import PROFILE
from m3check.paging import Access, Territory
from m3check.runner import filled_memory
from m3check.types import OPS, Kernel, M3CheckError, Profile, Status

pytestmark = pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="needs TRITON_INTERPRET=1 from the start")


@pytest.fixture(autouse=True, scope="module")
def interpreter():
    interpret.install()


@contextmanager
def observed(*territories):
    from m3check.interpret import addresses

    with addresses.observed(territories) as seen:
        yield seen.accesses


@triton.jit
def copy(source, target, count, first, N: tl.constexpr):
    at = first + tl.arange(0, N)
    value = tl.load(source + at, mask=at < count)
    tl.store(target + at, value, mask=at < count)


@triton.jit
def each_its_own(target):
    tl.store(target + tl.program_id(0), tl.program_id(0))


@triton.jit
def all_the_same(target, factor):
    tl.store(target, tl.program_id(0) * factor)


@triton.jit
def read_neighbour(target):
    me = tl.program_id(0)
    tl.store(target + me, 1)
    if me > 0:
        tl.store(target + 8 + me, tl.load(target + me - 1))


@triton.jit
def count_up(target):
    tl.atomic_add(target, 1)


@triton.jit
def peek(source, first, target):
    at = tl.arange(0, 4)
    tl.store(target + at, tl.load(source + first + at))


@triton.jit
def fill(target, value):
    tl.store(target + tl.program_id(0), value)


@triton.jit
def dependent(source, target, WAIT: tl.constexpr):
    at = tl.program_id(0)
    if WAIT == "first":
        tl.extra.cuda.gdc_wait()
    value = tl.load(source + at)
    if WAIT == "later":
        tl.extra.cuda.gdc_wait()
    tl.store(target + at, value)


@triton.jit
def rows(source, target, stride, width, N: tl.constexpr):
    at = tl.arange(0, N)
    row = tl.program_id(0)
    value = tl.load(source + row * stride + at, mask=at < width, other=0)
    tl.store(target + row * N + at, value)


def line_of(text):
    """Where a piece of source stands in this file: file.py:12."""
    lines = Path(__file__).read_text().splitlines()
    return f"{Path(__file__).name}:{next(i for i, line in enumerate(lines, 1) if text in line)}"


def test_a_kernel_within_its_tensors_gives_nothing():
    source, target = torch.arange(8.0), torch.empty(8)
    with observed(Territory("source", source), Territory("target", target, output=True)) as found:
        copy[(2,)](source, target, 8, 0, 8)
    assert found == []
    assert torch.equal(source, target)


def test_one_element_past_a_tensor_is_named():
    source, target = torch.arange(8.0), torch.zeros(16)
    with observed(Territory("source", source), Territory("target", target, output=True)) as found:
        copy[(1,)](source, target, 9, 0, 16)
    assert found == [
        Access("outside", "load", "`source`", "1 element past the end of its storage", "copy", (0, 0, 0),
               line_of("value = tl.load(source + at, mask=at < count)"), 1)
    ]  # fmt: skip


def test_what_would_be_written_outside_every_tensor_is_not_written():
    memory = torch.zeros(8)
    source, target = torch.ones(8), torch.from_numpy(memory.numpy()[:4])  # torch knows no more than these four
    with observed(Territory("source", source), Territory("target", target, output=True)) as found:
        copy[(1,)](source, target, 8, 0, 8)
    assert [(a.misuse, a.kind, a.tensor, a.count) for a in found] == [("outside", "store", "`target`", 4)]
    assert found[0].where == "1 element past the end of its storage"
    assert memory.tolist() == [1, 1, 1, 1, 0, 0, 0, 0]


def test_a_neighbouring_row_of_the_same_storage_is_outside():
    wide = torch.arange(32.0).reshape(4, 8)
    target = torch.zeros(2, 8)
    with observed(Territory("table", wide[1:3, 2:6]), Territory("target", target, output=True)) as found:
        rows[(2,)](wide[1:3, 2:6], target, 8, 4, 8)
    assert found == []
    with observed(Territory("table", wide[1:3, 2:6]), Territory("target", target, output=True)) as found:
        rows[(2,)](wide[1:3, 2:6], target, 8, 5, 8)
    assert [(a.misuse, a.tensor, a.where, a.count) for a in found] == [
        ("outside", "`table`", "1 element past a cell of its view", 2)
    ]


def test_a_write_into_a_canary_is_named():
    guard = paging.guarded("out", [2, 4], 0.0, torch.float32, "cpu")
    source = torch.ones(16)
    with observed(Territory("source", source), Territory("out", guard.view, output=True)) as found:
        copy[(1,)](source, guard.view, 16, 0, 8)
        copy[(1,)](source, guard.view, 16, 8, 2)
    assert [(a.misuse, a.kind, a.tensor, a.where, a.count) for a in found] == [
        ("outside", "store", "`out`", "1 element past its end", 2)
    ]
    assert guard.overwritten() == [8, 9]


def test_a_write_into_an_input_is_named():
    source = torch.arange(8.0)
    with observed(Territory("source", source)) as found:
        copy[(1,)](source, source, 8, 0, 8)
    assert [(a.misuse, a.kind, a.tensor, a.count) for a in found] == [("input", "store", "`source`", 8)]


def test_two_programs_that_write_different_values_to_one_address_race():
    target = torch.zeros(4, dtype=torch.int32)
    with observed(Territory("target", target, output=True)) as found:
        each_its_own[(4,)](target)
        all_the_same[(3,)](target, 0)
        all_the_same[(1,)](target, 5)  # another launch comes after this one
        count_up[(3,)](target)
    assert found == []
    with observed(Territory("target", target, output=True)) as found:
        all_the_same[(3,)](target, 5)
    assert [(a.misuse, a.where, a.program, a.count) for a in found] == [("race", "element 0", (1, 0, 0), 2)]
    assert found[0].line == line_of("tl.store(target, tl.program_id(0) * factor)")


def early(wait, between=0, pdl=True, fresh=False):
    """What is told of a launch that reads what the one before it, or `between` launches earlier, wrote."""
    scratch, other, target = torch.empty(4), torch.empty(4), torch.empty(4)
    known = Territory("scratch", scratch, fresh=True) if fresh else Territory("scratch", scratch, output=True)
    with observed(known, Territory("other", other, output=True), Territory("target", target, output=True)) as found:
        if not fresh:
            fill[(4,)](scratch, 3.0)
        for _ in range(between):
            fill[(4,)](other, 1.0)
        dependent[(4,)](scratch, target, wait, **({"launch_pdl": True} if pdl else {}))
    return [(a.misuse, a.tensor, a.kernel, a.program, a.count) for a in found]


@pytest.mark.parametrize("wait", ["later", "never"])
@pytest.mark.parametrize("fresh", [False, True])
def test_a_dependent_launch_reads_what_the_one_before_wrote_only_after_it_waited(wait, fresh):
    assert early(wait, fresh=fresh) == [("early", "`scratch`", "dependent", (0, 0, 0), 4)]
    assert early("first", fresh=fresh) == []


def test_other_launches_need_not_wait():
    assert early("never", pdl=False) == []  # it begins when the one before has ended
    assert early("never", between=1) == []  # the launch in between has waited for it


def test_what_another_program_of_the_launch_wrote_cannot_be_read():
    target = torch.zeros(16, dtype=torch.int32)
    with observed(Territory("target", target, output=True)) as found:
        read_neighbour[(1,)](target)
    assert found == []
    with observed(Territory("target", target, output=True)) as found:
        read_neighbour[(3,)](target)
    assert [(a.misuse, a.count) for a in found] == [("unordered", 2)]


@pytest.mark.parametrize(
    ("make", "clean"),
    [
        (lambda: torch.empty(8), False),
        (lambda: torch.empty(2, 4)[1].new_empty(8), False),
        (lambda: torch.zeros(8), True),
        (lambda: torch.empty(8).fill_(2.0), True),
        (lambda: torch.ones(4).repeat(2), True),
        (lambda: torch.arange(16.0)[8:], True),
    ],
)
def test_a_temporary_is_read_only_after_it_was_written(make, clean):
    target = torch.zeros(8)
    with observed(Territory("target", target, output=True)) as found:
        copy[(1,)](make(), target, 8, 0, 8)
    assert found == [] if clean else [(a.misuse, a.kind, a.count) for a in found] == [("unwritten", "load", 8)]
    assert clean or re.fullmatch(r"temporary \[8\] of test_memory_watch\.py:\d+", found[0].tensor)


def test_a_temporary_that_a_kernel_wrote_in_part():
    source, target = torch.ones(8), torch.zeros(8)
    with observed(Territory("source", source), Territory("target", target, output=True)) as found:
        scratch = torch.empty(8)
        copy[(1,)](source, scratch, 6, 0, 8)
        copy[(1,)](scratch, target, 6, 0, 8)
        assert not found
        copy[(1,)](scratch, target, 8, 0, 8)
    assert [(a.misuse, a.where, a.count) for a in found] == [("unwritten", "element 6", 2)]


def test_scratch_kept_from_an_earlier_call_is_nobodys_mistake():
    scratch, target = torch.ones(8), torch.zeros(8)
    with observed(Territory("target", target, output=True)) as found:
        copy[(1,)](scratch, target, 8, 0, 8)
    assert found == []


def test_pages_that_no_request_owns_are_told_apart():
    cache, target = torch.ones(4, 8), torch.zeros(4, 8)
    owned = torch.tensor([True, True, False, True])
    with observed(Territory("cache", cache, owned), Territory("target", target, output=True)) as found:
        rows[(2,)](cache, target, 8, 8, 8)
        assert not found
        rows[(3,)](cache, target, 8, 8, 8)
    assert [(a.misuse, a.tensor, a.where, a.program) for a in found] == [("unowned", "`cache`", "page 2", (2, 0, 0))]


# The check, on what the watch found.


def view(text, accesses, **promises):
    case = cases.parse_id(text)
    inputs = cases.make_inputs(case)
    run = paging.Run({"out": torch.zeros(1)}, accesses=accesses)
    setting = checks.Setting(profile=Profile(**promises), evidence="interpreted")
    return View(OPS[case.op], reference.dequantised(inputs, "rounded"), run, {}, setting)


def judged(text, accesses, **promises):
    (check,) = [check for check in checks.CHECKS if check.name == "memory"]
    return check.run(view(text, accesses, **promises))


ATTEND = "sparse_attn/q=1,kv=300,h=1,g=1,topk=2"
READ = Access("outside", "load", "`q`", "1 element past its end", "attend", (3, 0, 1), "mine.py:7", 5)


def test_a_finding_names_tensor_distance_line_and_program():
    (finding,) = judged(ATTEND, [READ])
    assert finding.status is Status.FAILED
    assert finding.measured == 5
    assert finding.where == "`q`, 1 element past its end"
    assert "mine.py:7, attend, program (3, 0, 1)" in finding.hint


def test_nothing_found_passes_and_nobody_looking_says_nothing():
    assert [f.status for f in judged(ATTEND, [])] == [Status.PASSED]
    assert judged(ATTEND, None) == []


def test_id_lists_without_a_promise_are_noted():
    assert [f.status for f in judged(f"{ATTEND},ids=holes", [READ])] == [Status.FAILED]
    (finding,) = judged(f"{ATTEND},ids=holes", [READ], id_lists=frozenset({"full"}))
    assert finding.status is Status.NOTED


# Whole kernels.


def call(kernel, text):
    from m3check.interpret import addresses

    with filled_memory():
        return contract.call(kernel, cases.make_inputs(cases.parse_id(text)), observe=addresses.observed)


REAL = (
    "index_score/q=5+1,kv=385+129,h=2,layout=pool",
    "index_topk/q=1+2,kv=1024+641,h=1,topk=5,init=2,local=2",
    "index_decode/q=2x2,kv=385+0,h=2,topk=3,mq=4",
    "sparse_attn/q=3+0,kv=641+129,h=1,g=4,topk=3,cache=fp8_e4m3fn,scale=token,layout=nhd",
    "sparse_attn_decode/q=1x3,kv=641+0+127,h=2,g=2,topk=3,layout=pool",
    "prefill/q=2,kv=641,h=1,g=2,topk=3",
    "decode/q=1x2,kv=641+0,h=2,g=2,topk=3",
)


@pytest.mark.parametrize("spec", ["triton", "vllm==0.33.0"])
@pytest.mark.parametrize("text", REAL)
def test_right_kernels_stay_clean(spec, text):
    try:
        loaded = kernels.load(kernels.parse_spec(spec), arch.find_arch("sm90"), "interpreted", True)
    except M3CheckError as error:
        pytest.skip(f"{spec} is not in the cache: {error}")
    assert call(loaded.kernels[cases.parse_id(text).op], text).accesses == []


@triton.jit
def first_keys(cache, table, score, stride_page, blocks, D: tl.constexpr, TOO_FAR: tl.constexpr):
    """Not a score, but the right memory: each visible block's first key, channel 0."""
    for block in range(blocks + TOO_FAR):
        page = tl.load(table + block)
        keys = tl.load(cache + page * stride_page + tl.arange(0, D))
        tl.store(score + block, tl.sum(keys.to(tl.float32)))


@pytest.mark.parametrize("too_far", [0, 1])
def test_a_loop_that_runs_one_block_too_far_reads_a_page_of_nobody(too_far):
    def index_score(idx_q, index_kv_cache, block_table, cu_seqlens_q, prefix_lens, max_seq_len):
        score = torch.empty(1, 1, 16)
        first_keys[(1,)](index_kv_cache, block_table, score, index_kv_cache.stride(0),
                         -(-max_seq_len // 128), index_kv_cache.shape[2], too_far)  # fmt: skip
        return score

    kernel = Kernel("mine", "index_score", "index_score", Profile(), index_score)
    accesses = call(kernel, "index_score/q=1,kv=300,h=1").accesses
    assert [(a.misuse, a.tensor) for a in accesses] == [("unowned", "`index_kv_cache`")] * too_far


@pytest.mark.parametrize("case", cases.tier("smoke", ops=("index_score",)), ids=cases.case_id)
def test_page_0_may_always_be_read_and_undefined_columns_never_name_it(case):
    pages = paging.Pages.shuffled(case, "index", "cpu")
    readable = pages.readable(case)
    assert readable[0]
    for row, length in enumerate(case.kv_lens):
        used = -(-length // 128)
        assert readable[pages.table[row, :used].long()].all()
        assert not readable[pages.table[row, used:].long()].any()


@triton.jit
def at_least(score, scratch, USED: tl.constexpr):
    at = tl.arange(0, 4)
    value = tl.load(score + at, mask=at < 3)
    other = tl.load(scratch + at, mask=at < 3)
    tl.store(score + at, tl.maximum(value, tl.where(USED, other, float("-inf"))), mask=at < 3)


@pytest.mark.parametrize("used", [True, False])
def test_an_unwritten_value_is_red_only_where_the_result_depends_on_it(used):
    """Fresh memory holds NaN, which a maximum ignores, so that the scores alone look right."""
    from m3check.kernels.triton.index_score import index_score as right

    def index_score(**keywords):
        score = right(**keywords)
        at_least[(1,)](score, torch.empty(4), used)
        return score

    result = verify("index_score/q=1,kv=300,h=1", index_score, PROFILE, invariants=False)
    (finding,) = [f for f in result.findings if f.check == "memory"]
    assert finding.where == f"temporary [4] of {line_of('at_least[(1,)](score, torch.empty(4), used)')}, element 0"
    assert finding.status is (Status.FAILED if used else Status.NOTED)
    assert result.status is (Status.FAILED if used else Status.PASSED)
    assert {f.check for f in result.findings if f.status is Status.FAILED} <= {"memory"}


@pytest.mark.parametrize("past", [True, False])
def test_memory_is_watched_in_the_calls_of_invariants_too(past):
    """A read past the queries in every call but the first, of values that are not used."""
    from m3check.kernels.triton.index_score import index_score as right

    calls = []

    def index_score(idx_q, **keywords):
        calls.append(1)
        if idx_q.is_contiguous() and idx_q.numel():
            peek[(1,)](idx_q, idx_q.numel() if past and len(calls) > 1 else 0, torch.zeros(4))
        return right(idx_q, **keywords)

    case = "index_score/q=1,kv=300,h=1"
    index_score.__signature__ = inspect.signature(right)
    result = verify(case, index_score, PROFILE)
    red = [f for f in result.findings if f.status is Status.FAILED]
    assert result.status is (Status.FAILED if past else Status.PASSED), result
    assert all("a changed call reads memory outside every tensor" in f.hint and f.check != "memory" for f in red)
    assert {"poison", "far_pages"} <= {f.check for f in red} if past else not red


def test_a_call_without_a_launch_says_nothing_about_memory():
    def index_topk(score, cu_seqlens_q, prefix_lens, topk, init_blocks, local_blocks):
        return torch.zeros(*score.shape[:2], topk, dtype=torch.int32)

    result = verify("index_topk/q=1,kv=100,h=1,topk=1", index_topk, invariants=False)
    assert result.status is Status.PASSED
    assert not [f for f in result.findings if f.check == "memory"]
