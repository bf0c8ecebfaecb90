"""What a mixed batch's metadata hold: each mistake in any builder's object is refused by its field; right ones pass."""

from __future__ import annotations

import copy
import dataclasses
import functools
from types import SimpleNamespace

import pytest
import torch
from mixed_layers import ALL, DRAFTS, MIXED, layer, red, result

from m3check import cases, reference
from m3check.arch import ARCHS
from m3check.checks.metadata import check_metadata
from m3check.checks.setting import Setting
from m3check.checks.view import View
from m3check.kernels import contract
from m3check.kernels.composed import Composed
from m3check.kernels.indexer.metadata import moved
from m3check.types import OPS, Profile, Status


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


@functools.cache
def built(text: str) -> View:
    """A right step, its metadata among what was seen of it."""
    case = cases.parse_id(text)
    inputs = cases.make_inputs(case)
    kernel, setting = layer(), Setting(profile=Profile(), arch=ARCHS["sm90"], evidence="interpreted")
    run = contract.call(kernel, inputs)
    return View(OPS["indexer"], inputs, run, reference.expected(inputs), setting)


def told(text: str, path: str, value, part: str = "index") -> str:
    """What the check says where an attribute of the metadata holds another value; empty where it passes."""
    view = built(text)
    served = copy.deepcopy(dataclasses.replace(view.run.served, scores=None))
    *parts, name = path.split(".")
    held = getattr(served, part)
    for each in parts:
        held = held.setdefault(each, {})
    held[name] = value(held.get(name)) if callable(value) else value
    [finding] = check_metadata(dataclasses.replace(view, run=dataclasses.replace(view.run, served=served), memo={}))
    return "" if finding.status is Status.PASSED else f"{finding.where}: {finding.hint}"


def pages(text: str, part: str = "index") -> list[list[int]]:
    return built(text).run.served.tables[part]


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("seq_lens", ("int32", [300, 130, 520, 400, 258])),
        ("max_seq_len", 600),
        ("topk_max_query_len", 3),
        ("prefill.cu_seqlens_k", ("int32", [0, 400, 658])),
        ("prefill.total_kv_blocks", 9),
        ("prefill_msa.page_table", lambda _: ("int32", [*pages(MIXED)[3][:4], *pages(MIXED)[4][:3]])),
        ("decode.block_table", lambda _: ("int32", [row[:5] for row in pages(MIXED)[:3]])),
        ("decode.max_decode_query_len", 1),
        ("something_else", 7),
    ],
)
def test_right_fields_of_any_object_pass(path, value):
    assert told(MIXED, path, value) == ""


def shifted(table):
    return table[0], table[1][1:] + table[1][:1]


@pytest.mark.parametrize(
    ("text", "path", "value", "words"),
    [
        (MIXED, "seq_lens", ("int32", [300, 130, 520, 400, 257]), "wanted 300+130+520+400+258: visible tokens of all"),
        (MIXED, "seq_lens", ("int64", [300, 130, 520, 400, 258]), "is int64, wanted int32"),
        (MIXED, "max_seq_len", 519, "holds 519, less than the longest, 520"),
        (MIXED, "topk_max_query_len", 2, "holds 2, less than the longest, 3"),
        (MIXED, "prefill.cu_seqlens_k", ("int64", [0, 400, 658]), "wanted int32 0+400+658"),
        (MIXED, "decode.block_table", shifted, "the pages of request 0 in this cache"),
        (MIXED, "prefill.block_table", shifted, "the pages of request 3 in this cache"),
        (MIXED, "prefill.block_table", lambda _: ("int32", pages(MIXED, "main")[3:]), "request 3 in this cache"),
        (MIXED, "prefill.block_table", lambda held: (held[0], held[1][:1]), "has 1 rows, wanted 2"),
        (MIXED, "decode.block_table", lambda held: ("int64", held[1]), "is int64, wanted int32"),
        (MIXED, "prefill.page_table", lambda held: (held[0], held[1][1:]), "each request's pages in turn"),
        (MIXED, "prefill_msa.page_table", lambda _: ("int32", pages(MIXED)[3][:4] + pages(MIXED)[3][:3]), "pages in turn"),
        (DRAFTS, "decode.max_decode_query_len", 2, "holds 2, wanted 4, the longest query that counts as a decode"),
        (DRAFTS, "decode.max_decode_query_len", 8, "holds 8, wanted 4"),
        (DRAFTS, "decode.decode_query_len", 4, "holds 4, wanted 2"),
        (
            DRAFTS,
            "prefill.prefix_lens",
            lambda held: (held[0], [held[1][0], held[1][1] + 1]),
            "holds 139+387, wanted 139+386",
        ),
    ],
)
def test_a_wrong_field_of_any_object_is_named(text, path, value, words):
    said = told(text, path, value)
    assert path in said
    assert words in said


def test_views_are_told_from_copies_and_from_other_places():
    memory = torch.zeros(2, 8, dtype=torch.int32)
    held = {
        "decode.seq_lens": memory[0, :3],
        "index.prefill.seq_lens": memory[0, 3:5],
        "index.prefill.cu_seqlens_q": memory[0],
    }
    before = {f"x.{name}": tensor for name, tensor in held.items()}

    def moved_to(**changes):
        return moved(before, before | {f"x.{name.replace('__', '.')}": tensor for name, tensor in changes.items()})

    assert moved_to() == []
    assert moved_to(index__prefill__seq_lens=memory[0, 4:5]) == []  # behind one more decoded request
    assert moved_to(index__prefill__cu_seqlens_q=memory[0].clone()) == []  # rebased: a tensor of each step
    assert moved_to(decode__seq_lens=memory[0, :3].clone()) == ["x.decode.seq_lens"]
    assert moved_to(decode__seq_lens=memory[1, :3]) == ["x.decode.seq_lens"]  # two halves in turn
    assert moved_to(index__prefill__seq_lens=memory[0, 4:5].clone()) == ["x.index.prefill.seq_lens"]
