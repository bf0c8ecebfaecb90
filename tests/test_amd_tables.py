"""Tables of pages for a paged attention: right ones in any order, and wrong ones."""

from __future__ import annotations

import pytest
import torch
from amd_models import (
    HOLES,
    LISTED,
    TABLE,
    fused,
    judged,
    prefill,
    table,
)

import m3check
from m3check import cases, kernels, reference
from m3check.arch import ARCHS
from m3check.cases import families
from m3check.checks import pages
from m3check.checks.setting import Setting
from m3check.checks.view import View
from m3check.kernels import contract, ours
from m3check.paging import Run
from m3check.types import OPS, Case, Kernel, Profile, Status


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("case", [TABLE, LISTED, HOLES])
def test_a_right_table_passes_in_whatever_order_its_whole_pages_are(case, reverse):
    build = table(reverse=reverse)
    kernel = build if "decode" in case else prefill(build)
    assert judged(case, kernel) == (Status.PASSED, set())


@pytest.mark.parametrize(
    ("mistake", "case", "checks"),
    [
        ("length", TABLE, {"context"}),  # positions without the draft tokens
        ("padded", TABLE, {"context"}),
        ("order", TABLE, {"pages"}),  # the query's own block is not the last one
        ("lost", TABLE, {"pages"}),
        ("neighbour", TABLE, {"pages"}),
        ("stale", TABLE, {"pages"}),
        ("request", TABLE, {"pages"}),
        ("whole", TABLE, {"context"}),
        ("tail", LISTED, {"context"}),
        ("slot", LISTED, {"pages"}),
        ("stride", HOLES, {"pages"}),
    ],
)
def test_a_wrong_table_is_refused(mistake, case, checks):
    build = table(mistake)
    status, found = judged(case, build if "decode" in case else prefill(build))
    assert status is Status.FAILED
    assert checks <= found


def test_far_rows_of_lists_and_an_empty_batch_bind_who_promises_them():
    """Offsets of 32 bits into lists, which are then put together, of which there must be some."""
    build, promises = table(), Profile(bitwise=frozenset({"far_rows", "empty"}))

    def wrapping(topk_idx, block_table, seq_lens, decode_query_len, block_page_stride):
        first, (_, tokens, topk), (_, row, each) = topk_idx.storage_offset(), topk_idx.shape, topk_idx.stride()
        offsets = [first + (t * row + 2**31) % 2**32 - 2**31 for t in range(tokens)]
        lists = torch.stack([topk_idx.as_strided((topk,), (each,), offset) for offset in offsets])
        return build(lists[None], block_table, seq_lens, decode_query_len, block_page_stride)

    def told(kernel, profile=None):
        return {f.check: f.status for f in m3check.verify(TABLE, kernel, profile).findings}

    assert set(told(build, promises).values()) == {Status.PASSED}
    assert {c for c, status in told(wrapping, promises).items() if status is Status.FAILED} == {"far_rows", "empty"}
    assert {c for c, status in told(wrapping).items() if status is Status.NOTED} == {"far_rows", "empty"}


def test_the_reference_reads_lists_and_positions_alone():
    case = Case(op="sparse_pa_table", query_lens=(2,), kv_lens=(131,), kv_heads=1, topk=3)
    ids = torch.tensor([[[0, -1, 1], [5, 1, -2]]], dtype=torch.int32)
    found, context = reference.sparse_pa_table(ids, tuple(case.requests()))
    assert context.tolist() == [128 + 2, 3]
    assert found[0].tolist() == [*range(16), *[-1] * 8]
    assert found[1].tolist() == [*range(8, 16), *[-1] * 16]


def test_what_we_have_no_kernel_for_is_a_sentence_in_a_plan_and_in_a_run():
    pytest.importorskip("triton")
    spec, arch = kernels.parse_spec("triton"), ARCHS["gfx950"]
    loaded = kernels.load(spec, arch, "interpreted")
    for op in (op for op in OPS.values() if op.family == "amd"):
        case = next(c for c in map(cases.parse_id, families.listed("smoke")) if c.op == op.name)
        sentence = ours.refuses(spec, case, arch, "interpreted")
        assert loaded.refuses(case) == sentence
        assert (op.name in loaded.kernels) is (sentence is None)
        assert sentence is None or f"no kernel of its own for {op.name}, a piece of vLLM's path on AMD" in sentence


def test_our_own_tables_are_right(tmp_path):
    pytest.importorskip("triton")
    loaded = kernels.load(kernels.parse_spec("triton"), ARCHS["gfx950"], "interpreted")
    for case in (TABLE, HOLES, LISTED):
        assert judged(case, loaded.kernels[case.partition("/")[0]]) == (Status.PASSED, set())


def test_pages_past_the_context_may_be_of_the_own_block_and_of_no_other():
    inputs = cases.make_inputs(cases.parse_id("sparse_pa_table_decode/q=1,kv=17,h=1,topk=2"))
    expected = reference.expected(inputs)

    def found(cell, page):
        actual = {"pages": expected["pages"].clone(), "context": expected["context"]}
        actual["pages"][0, cell] = page
        setting = Setting(profile=Profile(), evidence="interpreted")
        return pages.check_pages(View(OPS[inputs.case.op], inputs, Run(actual), expected, setting))[0].status

    assert found(2, -1) is Status.PASSED  # 17 tokens are in two pages
    assert found(8, 3) is Status.PASSED
    assert found(8, pages.FOREIGN) is Status.FAILED
    assert found(8, 9) is Status.FAILED
    assert found(1, 0) is Status.FAILED


def test_a_fused_table_is_judged_on_the_ids_beside_it():
    case = "index_decode_table/q=2x3,kv=700+1+300,h=1,topk=3,layout=pool"
    assert judged(case, fused()) == (Status.PASSED, set())
    assert judged(case, fused("table"))[1] == {"pages"}, "pages of the index cache"
    assert judged(case, fused("counter"))[1] == {"counter"}


def test_a_result_that_is_no_pair_breaks_the_contract():
    kernel = Kernel("x", "sparse_pa_table_decode", "x", Profile(), lambda topk_idx, block_table, seq_lens: topk_idx)
    with pytest.raises(contract.BrokenContract, match=r"wanted \(table"):
        contract.call(kernel, cases.make_inputs(cases.parse_id(TABLE)))
