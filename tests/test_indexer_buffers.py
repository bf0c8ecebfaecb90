"""Persistent buffers of the op `indexer`: lists and scores in other rows, or read from there, are told; right ones pass."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch_kernels
from mixed_layers import DECODES, MIXED, launched, parts, red, result

from m3check.kernels.composed import Composed
from m3check.types import Kernel, Status


class Swapped(Composed):
    """Returns the lists of the two parts the wrong way round; the buffer is right."""

    def forward(self, metadata, tensors):
        return super().forward(metadata, tensors)[::-1]


def test_lists_that_are_returned_the_wrong_way_round_are_told():
    words = "the indexer returned ids that begin in row 3 of the buffer"
    assert words in red(result(MIXED, Swapped)).get("handover", "")


class ReadsElsewhere(Composed):
    """Right lists, which attention reads one row too far, behind those of the decoded part, or of another head."""

    place: str = ""

    def _attend(self, op, output, **arguments):
        whole, lists = self._buffers.ids, arguments["topk_idx"]
        first = (lists.storage_offset() - whole.storage_offset()) // whole.stride(1)
        if self.place == "next":
            lists = whole[:, first + 1 :][:, : lists.shape[1]]
        elif self.place == "front" and op == "sparse_attn":
            lists = whole[:, : lists.shape[1]]
        elif self.place == "head":
            lists = lists.flip(0)
        super()._attend(op, output, **(arguments | {"topk_idx": lists}))


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("next", "attention of row 0 is that on the list +1 rows away"),
        ("front", "attention of row 3 is that on the list -3 rows away"),
        ("head", "attention of kv head 0 is that on the lists of head 1"),
    ],
)
def test_attention_that_reads_other_lists_is_told_which(place, words):
    case = "indexer/q=1x3+3,kv=390+258+390+300,h=2,g=1,d=16,topk=2"
    assert result(case).status is Status.PASSED
    assert words in red(result(case, type("Reads", (ReadsElsewhere,), {"place": place}))).get("handover", "")


class Silent(Composed):
    """Returns no list of prefilled rows."""

    def forward(self, metadata, tensors):
        return super().forward(metadata, tensors)[0], None


class Mute(Composed):
    """Returns no list at all, as MSA's class does."""

    def forward(self, metadata, tensors):
        super().forward(metadata, tensors)
        return None, None


def test_a_part_whose_list_is_not_returned_is_told():
    assert result(DECODES, Silent).status is Status.PASSED
    assert result(MIXED, Mute).status is Status.PASSED
    assert "the indexer returned no list for a part of 5 rows" in red(result(MIXED, Silent)).get("handover", "")


def scoring() -> dict[str, Kernel]:
    """Kernels that write scores where they are told to."""
    made = parts()

    @launched
    def index_score(idx_q, index_kv_cache, block_table, cu_seqlens_q, seq_lens, prefix_lens, max_seq_len, score_out=None):
        given = (idx_q, index_kv_cache, block_table, cu_seqlens_q, seq_lens, prefix_lens, max_seq_len)
        return into(score_out, torch_kernels.index_score(*given))

    @launched
    def index_decode(idx_q, index_kv_cache, block_table, seq_lens, max_seq_len, topk, init_blocks, local_blocks,
                     decode_query_len, score_out=None):  # fmt: skip
        given = (idx_q, index_kv_cache, block_table, seq_lens, max_seq_len)
        score = torch_kernels.index_decode_score(*given, init_blocks, local_blocks, decode_query_len)
        into(score_out, score)
        return torch_kernels.index_decode(*given, topk, init_blocks, local_blocks, decode_query_len)

    for function in (index_score, index_decode):
        made[function.__name__] = dataclasses.replace(made[function.__name__], function=function)
    return made


def into(buffer, score):
    view = buffer[..., : score.shape[2]]
    view.copy_(score)
    return view


class OtherScores(Composed):
    """Gives kernels other rows of the score buffer than their queries'; ids are right."""

    place: str = ""

    def _call(self, op, **arguments):
        whole, given = self._buffers.scores, arguments.get("score_out")
        if given is not None and self.place == "own":
            arguments["score_out"] = torch.empty_like(given)
        elif given is not None and op == "index_score":
            arguments["score_out"] = whole[:, : given.shape[1]]
        return super()._call(op, **arguments)


@pytest.mark.parametrize("text", [MIXED, DECODES])
def test_scores_in_their_rows_of_the_buffer_pass(text):
    told = result(text, made=scoring())
    assert told.status is Status.PASSED, (told.reason, red(told))


@pytest.mark.parametrize(("place", "text"), [("front", MIXED), ("own", DECODES)])
def test_scores_in_other_rows_of_the_buffer_or_in_none_are_told(place, text):
    told = red(result(text, type("Placed", (OtherScores,), {"place": place}), made=scoring()))
    assert list(told) == ["handover"]
    assert "the score buffer: row 0, of request 0, query 0" in told["handover"]
