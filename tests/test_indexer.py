"""The op `indexer`: right host code passes whatever came before; what its reference and the words of its cases mean."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from mixed_layers import ALL, MIXED, red, result

from m3check import cases, reference
from m3check.reference.batch import batch
from m3check.types import Case, M3CheckError, Status


@pytest.mark.parametrize("text", ALL)
def test_right_host_code_passes_whatever_came_before(text):
    told = result(text, invariants=("poison", "pages", "strides", "steps", "stale"))
    assert told.status is Status.PASSED, (told.reason, red(told))
    checks = {finding.check for finding in told.findings}
    assert {"metadata", "handover", "ids", "element", "guards", "steps", "stale"} <= checks


@pytest.mark.parametrize(
    "text",
    ["indexer/q=2x2+1+2,kv=129+0+130+131,h=1,g=1,d=16,topk=1,mq=4", "indexer/q=2x2,kv=1+131,h=1,g=1,d=16,topk=1,mq=4"],
)
def test_right_host_code_gives_the_same_in_other_company_and_by_other_routes(text):
    """A prefilled request becomes a decoded one when another order, or a chunk, makes it as long as those."""
    names = ("alone", "batch_order", "chunked", "verify")
    told = result(text, invariants=names)
    assert told.status is Status.PASSED, (told.reason, red(told))
    assert set(names) <= {finding.check for finding in told.findings}


def test_the_builder_in_plain_python_and_the_words_of_a_case_agree():
    for text in ALL:
        case = cases.parse_id(text)
        known = batch(case.query_lens, case.kv_lens, case.max_query_len)
        assert known["num_decodes"] == [case.decodes]
        assert known["num_decode_tokens"][0] + known["num_prefill_tokens"][0] == case.total_queries
    assert batch((2, 2, 1, 4), (300, 0, 140, 390), 4) == {
        "num_decodes": [2], "num_decode_tokens": [4], "num_prefills": [2], "num_prefill_tokens": [5],
        "decode_query_len": [2], "decode_seq_lens": [300, 0], "prefill_seq_lens": [140, 390],
        "prefill_prefix_lens": [139, 386], "prefill_cu_seqlens_q": [0, 1, 5],
        "prefill_pages": [(2 << 32) + b for b in range(2)] + [(3 << 32) + b for b in range(4)],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("indexer/q=1+2,kv=5+1,h=1", "request 1 is prefilled"),
        ("indexer/q=0+2,kv=5+9,h=1", "the first request has no query"),
        ("indexer/q=1,kv=5,h=1,mq=1", "leave it out"),
        ("indexer/q=1,kv=0,h=1", "at least one request with a visible token"),
        ("indexer/q=1,kv=9,h=1,ids=short", "does not read ids"),
    ],
)
def test_batches_that_make_no_sense_are_refused(text, sentence):
    with pytest.raises(M3CheckError, match=sentence):
        cases.parse_id(text)


def test_a_reference_row_is_that_of_its_own_phase():
    case = cases.parse_id(MIXED)
    whole = reference.dequantised(cases.make_inputs(case), "rounded")
    got = reference.expected(whole)
    alone = dataclasses.replace(whole, case=dataclasses.replace(case, op="prefill", max_query_len=0))
    wanted = reference.expected(alone)
    assert torch.equal(got["ids"].sort(-1).values, wanted["ids"].sort(-1).values)
    torch.testing.assert_close(got["out"], wanted["out"])


def test_a_case_tells_its_decodes():
    def count(queries: tuple[int, ...], longest: int = 0) -> int:
        return Case(op="indexer", query_lens=queries, kv_lens=(9,) * len(queries), max_query_len=longest).decodes

    assert [count((1, 1, 3)), count((2, 2, 3)), count((2, 2, 3), 4), count((5,), 4), count((3, 3), 4)] == [2, 0, 2, 0, 2]
