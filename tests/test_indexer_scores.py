"""The persistent score buffer of the op `indexer`: scores in their own rows pass, those in others or elsewhere do not."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch_kernels
from mixed_layers import DECODES, MIXED, launched, parts, red, result

from m3check.kernels.composed import Composed
from m3check.types import Kernel, Status


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
