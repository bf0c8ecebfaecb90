"""Wrong host code around right kernels, in the op `indexer`: each mistake is refused by its name."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from mixed_layers import DECODES, MIXED, HostLengths, Shifted, red, result

from m3check.kernels.composed import Composed, Decode
from m3check.types import Status


class TokenMajor(Composed):
    """Keeps ids token-major and passes its transpose on: as right as head-major."""

    def __init__(self, kernels, figures, buffers):
        super().__init__(kernels, figures, dataclasses.replace(buffers, ids=buffers.ids.transpose(0, 1)))


def test_a_token_major_buffer_that_is_read_as_such_passes():
    assert result(MIXED, TokenMajor, "token").status is Status.PASSED


class Confused(Composed):
    """Takes a buffer that was allocated token-major for a head-major one."""

    def __init__(self, kernels, figures, buffers):
        ids = buffers.ids
        wrong = ids.as_strided((ids.shape[1], ids.shape[0] - 1, ids.shape[2]), ids.stride())
        super().__init__(kernels, figures, dataclasses.replace(buffers, ids=wrong))


def test_of_one_head_both_layouts_are_the_same():
    assert result(MIXED.replace("h=2", "h=1"), Confused, "token").status is Status.PASSED


class NotRebased(Shifted):
    """Row starts of the prefilled part count from the first row of the batch."""

    change = ("index", "main")

    def changed(self, metadata, batch):
        if metadata.prefill is None:
            return metadata
        starts = batch.query_starts[metadata.num_decodes :].clone()
        return dataclasses.replace(metadata, prefill=dataclasses.replace(metadata.prefill, cu_seqlens_q=starts))


class DecodePrefix(Shifted):
    """Prefilled requests have the prefix lengths of the decoded ones."""

    change = ("index", "main")

    def changed(self, metadata, batch):
        if metadata.prefill is None or metadata.decode is None:
            return metadata
        count = metadata.num_prefills
        return dataclasses.replace(
            metadata, prefill=dataclasses.replace(metadata.prefill, prefix_lens=self._prefix[:count])
        )


class OtherSplit(Shifted):
    """Attention counts one decoded request less than the indexer."""

    change = ("main",)

    def changed(self, metadata, batch):
        if metadata.num_decodes < 2:
            return metadata
        rows = metadata.num_decode_tokens // metadata.num_decodes
        return dataclasses.replace(
            metadata,
            num_decodes=metadata.num_decodes - 1,
            num_decode_tokens=metadata.num_decode_tokens - rows,
            num_prefills=metadata.num_prefills + 1,
            num_prefill_tokens=metadata.num_prefill_tokens + rows,
        )


class Copied(Shifted):
    """Lengths of the decoded requests are copied into new memory."""

    change = ("index", "main")

    def changed(self, metadata, batch):
        if metadata.decode is None:
            return metadata
        lengths = metadata.decode.seq_lens.clone()
        return dataclasses.replace(metadata, decode=dataclasses.replace(metadata.decode, seq_lens=lengths))


class Waits(Composed):
    """Asks the device for the longest length."""

    def build(self, batch):
        assert int(batch.seq_lens.max()) >= 0
        return super().build(batch)


class WaitsLate(Composed):
    """Skips a step without live rows, which it must look up."""

    def forward(self, metadata, tensors):
        decode = metadata[0].decode
        if isinstance(decode, Decode) and not decode.seq_lens.any():
            return None, None
        return super().forward(metadata, tensors)


class DecodeBehind(Composed):
    """Writes decoded rows where prefilled ones begin, and prefilled ones to the front; attention reads the right places."""

    def _select(self, op, ids, **arguments):
        whole, tokens = self._buffers.ids, ids.shape[1]
        start = ids.storage_offset() - whole.storage_offset()
        rows = start // whole.stride(1)
        at = 3 if op == "index_decode" else 0
        assert rows in (0, 3)
        super()._select(op, whole[:, at : at + tokens], **arguments)


class Fresh(Composed):
    """Returns ids of its own, and leaves the persistent buffer to those who were there before."""

    def forward(self, metadata, tensors):
        kept = self._buffers
        self._buffers = dataclasses.replace(kept, ids=torch.full_like(kept.ids, -1))
        returned = super().forward(metadata, tensors)
        self._buffers = kept
        return returned


class BeyondTheBatch(Composed):
    """Clears the whole buffer at each step, rows of nobody too."""

    def forward(self, metadata, tensors):
        self._buffers.ids.fill_(-1)
        return super().forward(metadata, tensors)


@pytest.mark.parametrize(
    ("kind", "text", "layout", "check", "words"),
    [
        (Confused, MIXED, "token", "handover", "another layout than the buffer was allocated with"),
        (Confused, MIXED, "token", "ids", "request"),
        (NotRebased, MIXED, "head", "metadata", "prefill.cu_seqlens_q` of the indexer's metadata: holds 3+6+8"),
        (DecodePrefix, MIXED, "head", "metadata", "prefill.prefix_lens` of the indexer's metadata: holds 299+129"),
        (OtherSplit, MIXED, "head", "metadata", "num_decodes` of the attention's metadata: holds 2, wanted 3"),
        (Copied, DECODES, "head", "metadata", "`index.decode.seq_lens`: moved between two batches"),
        (Copied, MIXED, "head", "metadata", "`index.decode.seq_lens`: moved between two batches"),
        (Waits, DECODES, "head", "waits", "__int__ at test_indexer_mistakes.py:"),
        (WaitsLate, DECODES, "head", "waits", "__bool__ at test_indexer_mistakes.py:"),
        (DecodeBehind, MIXED, "head", "handover", "ids of rows [:, 3:8] stand in rows [:, 0:5]"),
        (Fresh, MIXED, "head", "handover", "a tensor of its own"),
        (BeyondTheBatch, MIXED, "head", "guards", "id buffer"),
    ],
)
def test_a_mistake_between_kernels_is_named(kind, text, layout, check, words):
    told = red(result(text, kind, layout))
    assert check in told, told
    assert words in told[check]


class Miscounted(Shifted):
    """Takes the longest query of the batch for that of a decode, which kernels refuse."""

    def changed(self, metadata, batch):
        return dataclasses.replace(metadata, decode=dataclasses.replace(metadata.decode, decode_query_len=3))


def test_of_a_step_that_raises_the_metadata_are_judged():
    told = result(MIXED, Miscounted)
    assert told.status is Status.ERROR
    assert "raised" in told.reason
    assert "`decode.decode_query_len` of the indexer's metadata holds 3, wanted 1" in told.reason


def test_reading_the_device_is_no_fault_of_a_batch_that_no_graph_runs():
    assert result(MIXED, Waits).status is Status.PASSED


class KeepsTheSplit(Composed):
    """Takes every batch to have as many decoded requests as the first one had."""

    def decodes(self, batch):
        self._split = getattr(self, "_split", super().decodes(batch))
        return min(self._split, batch.requests)


class PrefixesBehindTheFirst(Shifted):
    """Takes it that a batch has a decoded request: prefix lengths of prefilled ones begin behind the first row."""

    change = ("index", "main")

    def changed(self, metadata, batch):
        if metadata.prefill is None:
            return metadata
        first = max(metadata.num_decodes, 1)
        prefixes = self._prefix[first : first + metadata.num_prefills]
        return dataclasses.replace(metadata, prefill=dataclasses.replace(metadata.prefill, prefix_lens=prefixes))


class FirstIsLongest(Shifted):
    """Scores no more blocks than the first decoded request has."""

    change = ("index", "main")

    def changed(self, metadata, batch):
        if metadata.decode is None:
            return metadata
        longest = int(batch.seq_lens_host[0])
        return dataclasses.replace(metadata, decode=dataclasses.replace(metadata.decode, max_seq_len=longest))


class WholeBlocks(Shifted):
    """Counts a prefix in whole blocks."""

    change = ("index", "main")

    def changed(self, metadata, batch):
        if metadata.prefill is None:
            return metadata
        prefixes = self._prefix[metadata.num_decodes : batch.requests]
        prefixes.copy_(prefixes // 128 * 128)
        return dataclasses.replace(metadata, prefill=dataclasses.replace(metadata.prefill, prefix_lens=prefixes))


class BeforeItsOwnToken(Composed):
    """Lets a single query attend to what was there before it."""

    def forward(self, metadata, tensors):
        def earlier(held):
            if held.decode is None or held.decode.decode_query_len > 1:
                return held
            lengths = (held.decode.seq_lens - 1).clamp(min=1)
            return dataclasses.replace(held, decode=dataclasses.replace(held.decode, seq_lens=lengths))

        return super().forward((metadata[0], earlier(metadata[1])), tensors)


@pytest.mark.parametrize(
    ("kind", "text", "name"),
    [
        (PrefixesBehindTheFirst, "indexer/q=1+2,kv=300+390,h=1,g=1,d=16,topk=2", "alone"),
        (FirstIsLongest, "indexer/q=1x2,kv=390+129,h=1,g=1,d=16,topk=2", "batch_order"),
        (WholeBlocks, "indexer/q=1+4,kv=300+132,h=1,g=1,d=16,topk=1", "chunked"),
        (BeforeItsOwnToken, "indexer/q=2+4,kv=300+260,h=1,g=1,d=16,topk=2,mq=2", "verify"),
    ],
)
def test_what_only_another_company_or_another_route_shows(kind, text, name):
    assert result(text, invariants=(name,)).status is Status.PASSED
    assert result(text, kind).status is Status.PASSED
    assert list(red(result(text, kind, invariants=(name,)))) == [name]


@pytest.mark.parametrize(("kind", "text", "name"), [(HostLengths, DECODES, "stale"), (KeepsTheSplit, MIXED, "steps")])
def test_what_only_another_batch_shows(kind, text, name):
    assert result(text, kind).status is Status.PASSED
    assert list(red(result(text, kind, invariants=("steps", "stale") if text == DECODES else ("steps",)))) == [name]
