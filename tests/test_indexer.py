"""The op `indexer`: wrong host code around right kernels is refused, each mistake by name; right host code passes."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch
import torch_kernels

from m3check import cases, reference, runner
from m3check.arch import ARCHS
from m3check.kernels.composed import Composed, ComposedMaker, Decode
from m3check.kernels.provider import Loaded, with_chains
from m3check.kernels.syncs import Watch
from m3check.reference.batch import batch
from m3check.types import Case, Kernel, M3CheckError, PlanLine, Profile, Status

MIXED = "indexer/q=1x3+3+2,kv=300+130+520+400+258,h=2,g=2,d=16,topk=2,init=1"
DRAFTS = "indexer/q=2x2+1+4,kv=300+0+140+390,h=2,g=1,d=16,topk=2,mq=4"
DECODES = "indexer/q=1x3,kv=300+0+520,h=2,g=2,d=16,topk=2"
PREFILLS = "indexer/q=3+2,kv=400+258,h=2,g=1,d=16,topk=2"
ALL = (MIXED, DRAFTS, DECODES, PREFILLS)


def launched(function):
    """The function as a launch: what it does inside is no host code of its caller's."""
    import functools

    @functools.wraps(function)
    def call(*args, **keywords):
        with torch._C.DisableTorchFunction():
            return function(*args, **keywords)

    return call


def parts() -> dict[str, Kernel]:
    names = ("index_score", "index_topk", "index_decode", "sparse_attn", "sparse_attn_decode")
    return {op: Kernel("torch", op, op, Profile(), launched(getattr(torch_kernels, op))) for op in names}


def result(text: str, kind: type[Composed] = Composed, layout: str = "head", invariants: tuple[str, ...] = ()):
    """What the checks say of one implementation on one case."""
    case = cases.parse_id(text)
    kernels, _ = with_chains(parts(), {})

    class Maker(ComposedMaker):
        def __call__(self, figures, buffers):
            return kind(self.parts, figures, buffers)

    kernel = dataclasses.replace(kernels["indexer"], function=Maker(parts(), layout))
    session = runner.Session(ARCHS["sm90"], "interpreted", "cpu", Loaded.of({"indexer": kernel}))
    return runner.run_one(case, session, PlanLine(text, "indexer", "torch", "interpreted", None, invariants), "")


def red(told) -> dict[str, str]:
    return {f.check: f"{f.where}: {f.hint}" for f in told.findings if f.status is Status.FAILED}


@pytest.mark.parametrize("text", ALL)
def test_right_host_code_passes_whatever_came_before(text):
    told = result(text, invariants=("poison", "pages", "strides", "steps", "stale"))
    assert told.status is Status.PASSED, (told.reason, red(told))
    checks = {finding.check for finding in told.findings}
    assert {"metadata", "handover", "ids", "element", "guards", "steps", "stale"} <= checks


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


class Shifted(Composed):
    """Hands over another part of the batch's rows: changed metadata of the indexer, of attention or of both."""

    change: tuple[str, ...] = ("index",)

    def build(self, batch):
        index, main = super().build(batch)
        return self.changed(index, batch) if "index" in self.change else index, (
            self.changed(main, batch) if "main" in self.change else main
        )

    def changed(self, metadata, batch):
        raise NotImplementedError


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


class Extended(Composed):
    """Keeps what MSA's and AITER's builders keep besides: of tokens and requests, and a score buffer filled with -inf."""

    spoiled: str = ""

    def kept(self, tensor):
        return tensor.clone() if self.spoiled == "moved" else tensor

    def build(self, batch):
        self.seen = getattr(self, "seen", -1) + 1
        index, main = super().build(batch)
        if not self.seen:
            rows = self._figures.max_tokens
            self.pages_seen, self.rebased = torch.zeros(rows, dtype=torch.int32), torch.zeros(rows, dtype=torch.int64)
            self.unified = torch.zeros(rows, self._figures.kv_heads, 8, dtype=torch.float32)
        tokens, decodes = batch.tokens, index.num_decodes
        lengths = batch.query_starts.diff()
        self.pages_seen[:tokens] = batch.positions // 128 + (self.spoiled != "valid")
        if not (self.spoiled == "scores" and self.seen):
            self.unified[:tokens] = -torch.inf
        page = 256 if self.spoiled != "page16" else 128
        slots = batch.slots.clamp(min=0) // 128 * page + batch.slots % 128
        self.rebased[:tokens] = slots.where(batch.slots >= 0, 0 if self.spoiled == "padding" else batch.slots)
        more = {
            "topk_num_valid_pages": self.kept(self.pages_seen[:tokens]),
            "topk_prefix_lens": self._prefix[: batch.requests],
            "topk_cu_seqlens_q": batch.query_starts,
            "unified_scores": self.unified[:tokens],
            "max_k_tiles": 1 if self.spoiled == "tiles" else 8,
            "slot_mapping": batch.slots,
            "page16_slot_mapping": self.rebased[:tokens],
        }
        prefill = index.prefill and SimpleNamespace(
            **vars(index.prefill),
            query_req_id=torch.arange(len(lengths) - decodes).repeat_interleave(lengths[decodes:])
            + (decodes if self.spoiled == "request" else 0),
            query_abs_pos=batch.positions[index.num_decode_tokens :] + (self.spoiled == "position"),
        )
        held = SimpleNamespace(**{**vars(index), **more, "prefill": prefill})
        return held, main

    def forward(self, metadata, tensors):
        prefill = metadata[0].prefill
        known = {n: v for n, v in vars(prefill).items() if not n.startswith("query_")} if prefill else None
        index = SimpleNamespace(**{**vars(metadata[0]), "prefill": known and SimpleNamespace(**known)})
        return super().forward((index, metadata[1]), tensors)


def extended(spoiled: str) -> type[Composed]:
    return type(f"Extended{spoiled}", (Extended,), {"spoiled": spoiled})


@pytest.mark.parametrize("text", ALL)
def test_what_other_builders_keep_besides_is_read_where_it_is_there(text):
    told = result(text, Extended, invariants=("steps",))
    assert told.status is Status.PASSED, (told.reason, red(told))


@pytest.mark.parametrize(
    ("spoiled", "words"),
    [
        ("valid", "topk_num_valid_pages` of the indexer's metadata: holds 2+1+4"),
        ("scores", "`index.unified_scores`: not -inf after `build`"),
        ("moved", "`index.topk_num_valid_pages`: moved between two batches"),
        ("tiles", "max_k_tiles` of the indexer's metadata: holds 1, less than the longest, 5"),
        ("page16", "page16_slot_mapping` of the indexer's metadata"),
        ("padding", "page16_slot_mapping` of the indexer's metadata"),
        ("request", "prefill.query_req_id` of the indexer's metadata: holds 2+3+3+3+3, wanted 0+1+1+1+1"),
        ("position", "prefill.query_abs_pos` of the indexer's metadata"),
    ],
)
def test_what_other_builders_keep_besides_is_held_to_the_batch(spoiled, words):
    text = MIXED if spoiled in ("valid", "tiles") else DRAFTS
    told = red(result(text, extended(spoiled)))
    assert words in told.get("metadata", ""), told


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
        (Waits, DECODES, "head", "waits", "__int__ at test_indexer.py:"),
        (WaitsLate, DECODES, "head", "waits", "__bool__ at test_indexer.py:"),
        (DecodeBehind, MIXED, "head", "handover", "ids of rows [:, 3:8] stand in rows [:, 0:5]"),
        (Fresh, MIXED, "head", "handover", "a tensor of its own"),
        (BeyondTheBatch, MIXED, "head", "guards", "id buffer"),
    ],
)
def test_a_mistake_between_kernels_is_named(kind, text, layout, check, words):
    told = red(result(text, kind, layout))
    assert check in told, told
    assert words in told[check]


def test_reading_the_device_is_no_fault_of_a_batch_that_no_graph_runs():
    assert result(MIXED, Waits).status is Status.PASSED


class HostLengths(Composed):
    """Hands kernels the lengths that the host knew when the metadata were built."""

    def build(self, batch):
        index, main = super().build(batch)
        self._lengths = {**getattr(self, "_lengths", {}), id(index): batch.seq_lens_host.clone()}
        return index, main

    def forward(self, metadata, tensors):
        def known(held):
            lengths = self._lengths[id(metadata[0])][: held.num_decodes]
            return dataclasses.replace(held, decode=dataclasses.replace(held.decode, seq_lens=lengths))

        return super().forward((known(metadata[0]), known(metadata[1])), tensors)


class CopiedLate(Composed):
    """Copies lengths at the first launch with some metadata, so that only a launch before the refill shows it."""

    def forward(self, metadata, tensors):
        kept = self.__dict__.setdefault("kept", {})

        def copied(held):
            lengths = kept.setdefault(id(metadata[0]), held.decode.seq_lens.clone())
            return dataclasses.replace(held, decode=dataclasses.replace(held.decode, seq_lens=lengths))

        return super().forward((copied(metadata[0]), copied(metadata[1])), tensors)


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


@pytest.mark.parametrize(("kind", "text", "name"), [(HostLengths, DECODES, "stale"), (KeepsTheSplit, MIXED, "steps")])
def test_what_only_another_batch_shows(kind, text, name):
    assert result(text, kind).status is Status.PASSED
    assert list(red(result(text, kind, invariants=("steps", "stale") if text == DECODES else ("steps",)))) == [name]


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


def test_waits_are_seen_through_what_is_computed_from_the_device():
    device, host = torch.arange(4), torch.arange(4)
    with Watch([device], [host]) as watch:
        host[0].item()
        (host + 1).tolist()
        scratch = torch.empty(2, dtype=device.dtype)
        scratch.copy_(device[:2])
    assert watch.found == []
    with Watch([device], [host]) as watch:
        (device + 1)[0].item()
        scratch[device[:2] > 0]
        host.copy_(device)
        device.tolist()
    assert [place.split()[0] for place in watch.found] == ["item", "__getitem__", "copy_", "tolist"]


def test_a_case_tells_its_decodes():
    def count(queries: tuple[int, ...], longest: int = 0) -> int:
        return Case(op="indexer", query_lens=queries, kv_lens=(9,) * len(queries), max_query_len=longest).decodes

    assert [count((1, 1, 3)), count((2, 2, 3)), count((2, 2, 3), 4), count((5,), 4), count((3, 3), 4)] == [2, 0, 2, 0, 2]
