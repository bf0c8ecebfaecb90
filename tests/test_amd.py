"""The pieces of vLLM's path on AMD: tables of pages and shared selections, right ones and wrong ones, in plain torch."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch

import m3check
from m3check import cases, invariants, kernels, reference, runner
from m3check.arch import ARCHS
from m3check.cases import families
from m3check.checks import pages
from m3check.checks.setting import Setting
from m3check.checks.view import View
from m3check.kernels import contract, ours, vllm_amd, vllm_amd_together
from m3check.kernels.provider import Loaded, Spec
from m3check.paging import Run
from m3check.types import ODD_SCORES, OPS, Case, Kernel, M3CheckError, PlanLine, Profile, Status

TABLE = "sparse_pa_table_decode/q=3x3,kv=1001+2+256,h=1,topk=6"
HOLES = "sparse_pa_table/q=4+2,kv=900+140,h=1,topk=6,ids=holes,layout=pool"
LISTED = "sparse_pa_table_decode/q=1x4,kv=16+17+640+700,h=1,topk=3,ids=short"


def table(mistake="", reverse=False):
    """A builder of tables for decode in plain torch."""

    def sparse_pa_table_decode(topk_idx, block_table, seq_lens, decode_query_len, block_page_stride):
        rows, topk = topk_idx.shape[1:]
        out = torch.zeros(rows, topk * 8, dtype=torch.int32)
        context = torch.zeros(rows, dtype=torch.int32)
        for t in range(rows):
            request = t // decode_query_len
            position = int(seq_lens[request]) - decode_query_len + t % decode_query_len
            if mistake == "length" and position >= 0:
                position = int(seq_lens[request]) - 1
            if position < 0 and mistake != "padded":
                continue
            own = position // 128
            ids = [int(b) for b in topk_idx[0, t] if 0 <= b <= own]
            early = [b for b in ids if b != own][:: -1 if reverse else 1]
            listed = [*early, *([own] if own in ids else [])]
            if mistake == "order":
                listed = ids
            if mistake == "lost":
                listed = listed[1:]
            if mistake == "neighbour" and len(listed) > 1:
                listed[0] = (listed[0] + 1) % own
            stride = 8 if mistake == "stride" else block_page_stride
            cells = [int(block_table[request, b]) * stride + j for b in listed for j in range(8)]
            if mistake == "slot":
                cells[:2] = cells[1::-1] if len(listed) == 1 else cells[:2]
            out[t, : len(cells)] = torch.tensor(cells, dtype=torch.int32)
            if mistake == "stale":
                out[t, len(cells) :] = 77
            if mistake == "request":
                out[t, : len(cells)] = int(block_table[request - 1, 0]) * stride
            inside = position % 128 + 1
            context[t] = 128 * len(early) + (0 if own not in ids else 128 if mistake == "whole" else inside)
            if mistake == "tail" and own not in ids:
                context[t] += inside
        if mistake == "padded":
            context.clamp_(min=1)
        return out, context

    return sparse_pa_table_decode


def prefill(build):
    """The same for prefill, a query at a time."""

    def sparse_pa_table(topk_idx, block_table, query_req_id, query_abs_pos, block_page_stride):
        made = [
            build(topk_idx[:, t : t + 1], block_table[r : r + 1], query_abs_pos[t : t + 1] + 1, 1, block_page_stride)
            for t, r in enumerate(query_req_id.tolist())
        ]
        return torch.cat([rows for rows, _ in made]), torch.cat([lengths for _, lengths in made])

    return sparse_pa_table


def judged(case, kernel, profile=None):
    found = m3check.verify(case, kernel, profile, invariants=False)
    return found.status, {f.check for f in found.findings if f.status is Status.FAILED}


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


# A selection by several processes.

TIED = "index_topk_cp/q=2x2,kv=1300+300,h=2,topk=3,fill=ties"
FORCED = "index_topk_cp/q=1x3,kv=1500+129+0,h=4,topk=4,init=1,local=2"
ODD = "index_topk_cp/q=2x3,kv=1200+1+640,h=2,topk=4,fill=odd"
MERGED = Profile(id_order="score", tie_rule="larger_id", odd_scores=ODD_SCORES - {"huge", "infinite"})


def ordered(score):
    """32 bits that sort like the score; NaN lowest, -0 as 0."""
    if score != score:
        return 0
    bits = int(torch.tensor(score + 0.0, dtype=torch.float32).view(torch.int32)) & 0xFFFFFFFF
    return bits ^ (0xFFFFFFFF if bits >> 31 else 0x80000000)


def exchange(mistake=""):
    """vLLM's exchange of keys in plain torch."""

    def forced(score, block, visible, init_blocks, local_blocks):
        if block >= max(0, visible - local_blocks) and mistake != "forcing":
            return 1e29
        return 1e30 if block < init_blocks else score

    def local_topk_keys(scores, seq_lens, *, topk, rank, world, query_len, global_blocks, init_blocks, local_blocks, out):
        out.zero_()
        for h, t in torch.cartesian_prod(*map(torch.arange, scores.shape[:2])).tolist():
            visible = max(0, -(-(int(seq_lens[t // query_len]) - query_len + t % query_len + 1) // 128))
            keys = []
            for place in range(scores.shape[2]):
                block = place * world + rank
                if block < visible and not (mistake == "last" and rank == world - 1 and place == 0):
                    value = forced(float(scores[h, t, place]), block, visible, init_blocks, local_blocks)
                    named = place if mistake == "own" else block
                    key = 0xFFFFFFFF if mistake == "nan" and value != value else ordered(value)
                    keys.append(1 << 48 | key << 16 | (0xFFFE - named if mistake == "ties" else named + 1))
            best = sorted(keys, reverse=True)[: topk - 1 if mistake == "short" else topk]
            out[h, t, : len(best)] = torch.tensor(best, dtype=torch.int64)
        return out

    def merge_topk_keys(
        keys, topk_idx, seq_lens, *, query_len, init_blocks, local_blocks, attention_block_table=None,
        sparse_block_table_out=None, sparse_context_lens_out=None, block_page_stride=None,
    ):  # fmt: skip
        flat = keys.permute(1, 2, 0, 3).flatten(2)
        best = flat.sort(-1, descending=True).values[..., : topk_idx.shape[-1]]
        block = (best & 0xFFFF).int()
        block = 0xFFFE - block if mistake == "ties" else block - 1
        topk_idx.copy_(block.masked_fill(best == 0, -1))
        if attention_block_table is not None:
            first = (keys[0] & 0xFFFF).int() - 1 if mistake == "first rank" else topk_idx
            lengths = seq_lens - (query_len - 1 if mistake == "drafts" else 0)
            made = table()(
                first, attention_block_table, lengths, query_len, 8 if mistake == "stride" else block_page_stride
            )
            sparse_block_table_out.copy_(made[0])
            sparse_context_lens_out.copy_(made[1])
        return topk_idx

    return {"local_topk_keys": local_topk_keys, "merge_topk_keys": merge_topk_keys}


def selects(mistake=""):
    return vllm_amd.PIECES["index_topk_cp"].composed(exchange(mistake))


@pytest.mark.parametrize("case", [TIED, FORCED, ODD])
def test_a_right_selection_of_several_ranks_passes(case):
    assert judged(case, selects(), MERGED) == (Status.PASSED, set())


@pytest.mark.parametrize(
    ("mistake", "case", "check"),
    [
        ("ties", TIED, "ties"),
        ("forcing", FORCED, "forced"),
        ("own", TIED, "ids"),  # ids of a rank's own blocks, not of all
        ("last", "index_topk_cp/q=1,kv=1300,h=2", "ids"),
        ("short", "index_topk_cp/q=8,kv=2300,h=2,topk=2,local=0", "selection"),
        ("nan", ODD, "forced"),
    ],
)
def test_a_wrong_selection_of_several_ranks_is_refused(mistake, case, check):
    status, found = judged(case, selects(mistake), MERGED)
    assert status is Status.FAILED, mistake
    assert check in found


def test_ties_are_judged_by_the_rule_that_a_profile_names():
    smaller = replace(MERGED, tie_rule="smaller_id")
    assert judged(TIED, selects("ties"), smaller) == (Status.PASSED, set())
    assert judged(TIED, selects(), smaller)[1] >= {"ties"}
    assert judged(TIED, selects(), replace(MERGED, tie_rule="any")) == (Status.PASSED, set())


def selects_and_writes(mistake=""):
    return vllm_amd.PIECES["index_topk_cp_table"].composed(exchange(mistake))


WRITTEN = "index_topk_cp_table/q=2x3,kv=1200+1+640,h=1,topk=4,layout=pool"


def test_a_merge_that_writes_the_table_as_well_is_judged_on_its_own_ids():
    assert judged(WRITTEN, selects_and_writes(), MERGED) == (Status.PASSED, set())
    assert "pages" in judged(WRITTEN, selects_and_writes("first rank"), MERGED)[1], "the keys of one rank"
    assert "context" in judged(WRITTEN, selects_and_writes("drafts"), MERGED)[1], "positions without the draft tokens"
    assert judged(WRITTEN, selects_and_writes("stride"), MERGED)[1] == {"pages"}
    assert judged(WRITTEN, selects_and_writes("last"), MERGED)[1] == {"selection"}


def scored(mistake=""):
    """Block scores of one rank's blocks, in plain torch."""

    def indexer_context_scores(
        idx_q, cache, block_table, seq_lens, max_seq_len, rank, world, query_len, sm_scale, out=None
    ):
        assert cache.is_contiguous()
        columns = (max_seq_len + 128 * world - 1) // (128 * world)
        scores = out[:, : idx_q.shape[0], :columns].fill_(float("-inf"))
        if mistake == "buffer":
            scores = scores.clone()
        for t in range(idx_q.shape[0]):
            length = int(seq_lens[t // query_len]) - query_len + t % query_len + 1
            for place in range(columns):
                block = place * world + (0 if mistake == "rank" else rank)
                seen = min(128, length - 128 * block) if mistake != "causal" else 128
                if length > 128 * block and seen > 0:
                    keys = cache[int(block_table[t // query_len, block]), :seen].float()
                    best = (idx_q[t].float() @ keys.T).amax(-1) * sm_scale
                    scores[:, t, place] = -best if mistake == "sign" else best
        return scores

    parts = vllm_amd_together.held_to_buffers(exchange() | {"indexer_context_scores": indexer_context_scores})
    return vllm_amd.PIECES["index_decode_cp"].composed({"IndexerCPDecode": layer(parts, mistake)})


def layer(parts, mistake):
    """vLLM's layer of one rank in plain torch."""

    class Layer:
        def __init__(
            self, *, total_heads, rank, world_size, max_tokens, max_seq_len, topk, group, device, head_dim, **forced
        ):
            self.local_heads = max(1, total_heads // world_size)
            self.replicas = max(1, world_size // total_heads)
            self.head_offset = rank // self.replicas * self.local_heads
            self.place, self.limit, self.topk, self.forced = (rank, world_size), max_seq_len, topk, forced
            self.scores = torch.empty(total_heads, max_tokens, -(-max_seq_len // (128 * world_size)))

        def __call__(self, q, cache, table, seq_lens, query_len, out, *, scale):
            every = self.group.all_gather(q.contiguous(), 0).view(self.place[1], *q.shape)[:: self.replicas]
            every = every.permute(1, 0, 2, 3).flatten(1, 2)
            if mistake == "order":
                every = every.flip(1)
            scores = parts["indexer_context_scores"](
                every, cache, table, seq_lens, self.limit, *self.place, query_len, scale, out=self.scores
            )
            keys = torch.empty(*scores.shape[:2], self.topk, dtype=torch.int64)
            rank, world = self.place
            blocks = -(-self.limit // 128)
            parts["local_topk_keys"](
                scores, seq_lens, topk=self.topk, rank=rank, world=world, query_len=query_len, global_blocks=blocks,
                out=keys, **self.forced,
            )  # fmt: skip
            keys = self.group.all_gather(keys, 0).view(world, *keys.shape)
            own = slice(self.head_offset, self.head_offset + self.local_heads)
            parts["merge_topk_keys"](
                keys[:, :1] if mistake == "heads" else keys[:, own], out, seq_lens, query_len=query_len, **self.forced
            )

    return Layer


@pytest.mark.parametrize(
    "case", ["index_decode_cp/q=2x2,kv=700+2,h=2,topk=3", "index_decode_cp/q=1,kv=1300,h=1,topk=4,init=1"]
)
def test_context_parallel_scoring_is_held_to_the_selection_of_one_process(case):
    assert judged(case, scored(), MERGED) == (Status.PASSED, set())
    for mistake in ("rank", "sign"):
        assert judged(case, scored(mistake), MERGED)[0] is Status.FAILED, mistake
    for mistake in ("order", "heads") if "h=2" in case else ():
        assert judged(case, scored(mistake), MERGED)[0] is Status.FAILED, mistake
    found = m3check.verify(case, scored("buffer"), MERGED, invariants=False)
    assert found.status is Status.ERROR
    assert "did not write its result into the buffer that it was given as out" in found.reason


# A selector that writes the table itself.


def fused(mistake=""):
    def index_decode_table(
        idx_q, index_kv_cache, block_table, seq_lens, max_seq_len, topk, init_blocks, local_blocks, num_kv_heads,
        decode_query_len, max_decode_query_len, out, attention_block_table, sparse_block_table_out,
        sparse_context_lens_out, block_page_stride, completion_counter,
    ):  # fmt: skip
        rows = idx_q.shape[0]
        out[:, :rows] = -1
        for t in range(rows):
            r = t // decode_query_len
            length = int(seq_lens[r]) - decode_query_len + t % decode_query_len + 1
            values = []
            for b in range(max(0, -(-length // 128))):
                keys = index_kv_cache[int(block_table[r, b]), : length - 128 * b]
                last = b >= -(-length // 128) - local_blocks
                values.append(
                    1e29 if last else 1e30 if b < init_blocks else float((idx_q[t, 0].float() @ keys.float().T).max())
                )
            best = sorted(range(len(values)), key=lambda b: (-values[b], b))[:topk]
            out[0, t, : len(best)] = torch.tensor(best, dtype=torch.int32)
        read = block_table if mistake == "table" else attention_block_table
        pages_, lengths = table()(out[:, :rows], read, seq_lens, decode_query_len, block_page_stride)
        sparse_block_table_out.copy_(pages_)
        sparse_context_lens_out.copy_(lengths)
        completion_counter.fill_(int(mistake == "counter"))
        return out[:, :rows]

    return index_decode_table


def held(case, kernel, names, profile=MERGED):
    """Red findings of a right-looking kernel by invariants, on a case that its comparisons pass."""
    parsed = cases.parse_id(case)
    assert set(names) <= set(invariants.fitting(parsed, "interpreted")), "they fit"
    made = Kernel("user", parsed.op, parsed.op, profile, kernel)
    loaded = Loaded(Spec("user", "user"), {parsed.op: made})
    session = runner.Session(ARCHS["gfx950"], "interpreted", "cpu", loaded)
    line = PlanLine(case, parsed.op, "user", "interpreted", None, tuple(names))
    result = runner.run_one(parsed, session, line, "")
    return {f.check for f in result.findings if f.status is Status.FAILED}, {f.check for f in result.findings}


def changed(kernel, change):
    """A kernel whose keywords are changed first, or whose result is."""

    @functools.wraps(kernel)
    def wrapped(**keywords):
        after = change(keywords)
        result = kernel(**keywords)
        return after(result) if after else result

    return wrapped


FUSED = "index_decode_table/q=2x2,kv=400+200,h=1,topk=3"
SHARED = "index_decode_cp/q=2x2,kv=400+260,h=2,topk=3"
GIVEN = "index_topk_cp/q=2x2,kv=700+400,h=2,topk=3"
BESIDE = "index_topk_cp_table/q=2x2,kv=700+400,h=1,topk=3"
ROWS = "sparse_pa_table_decode/q=2x2,kv=500+256,h=1,topk=3"


@pytest.mark.parametrize("case", [FUSED, SHARED, GIVEN, BESIDE, ROWS, "index_insert/q=4+3,kv=300+140,d=32"])
def test_right_pieces_hold_every_invariant_that_fits(case):
    op = case.partition("/")[0]
    kernel = {
        "index_decode_table": fused, "index_decode_cp": scored, "index_topk_cp": selects,
        "index_topk_cp_table": selects_and_writes, "sparse_pa_table_decode": table, "index_insert": inserts,
    }[op]()  # fmt: skip
    names = invariants.fitting(cases.parse_id(case), "interpreted")
    red, shown = held(case, kernel, names, MERGED if "_cp" in op else Profile())
    assert red == set()
    assert {"repeat", "alone" if op != "index_insert" else "far_pages"} <= shown


def keeps(name):
    """What a keyword was in the first call."""
    first = {}

    def change(keywords):
        keywords[name] = first.setdefault(name, keywords[name])

    return change


def a_longer_limit(keywords):
    """The blocks of the limit for those of the request."""
    if keywords["max_seq_len"] > 5000:
        keywords["seq_lens"] = keywords["seq_lens"] - 128


def an_earlier_table(keywords):
    """The pages that attention has while all requests are live."""
    if not bool((keywords["seq_lens"] == 0).any()):
        return None
    return lambda ids: keywords["sparse_block_table_out"].fill_(0) is None or ids


def padding_counts(keywords):
    """Where a row is padded, the others see a block less."""
    if bool((keywords["seq_lens"] == 0).any()):
        keywords["seq_lens"] = (keywords["seq_lens"] - 128).clamp(min=0)


def by_page(keywords):
    """Pages taken for the first ones where they are high."""
    if int(keywords["block_table"].max()) > 1 << 16:
        keywords["block_table"] = keywords["block_table"] % 3


def counts_calls():
    """A result that differs at every second call."""
    calls = []

    def change(keywords):
        calls.append(0)
        return (lambda ids: ids.flip(-1)) if len(calls) == 2 else None

    return change


def slot_in_32_bits(keywords):
    """The offset of a far slot wraps around."""
    slots, width = keywords["index_slot_mapping"], keywords["index_cache"].shape[-1]
    wrapped = (slots * width + 2**31) % 2**32 - 2**31
    keywords["index_slot_mapping"] = slots.where(slots * width < 2**31, wrapped // width)


@pytest.mark.parametrize(
    ("case", "change", "name"),
    [
        (FUSED, lambda: a_longer_limit, "room"),
        (FUSED, lambda: by_page, "far_pages"),
        (FUSED.replace("kv=400", "kv=900"), lambda: keeps("init_blocks"), "other_init"),
        (SHARED, lambda: a_longer_limit, "room"),
        (SHARED, lambda: by_page, "far_pages"),
        (SHARED, lambda: padding_counts, "padded"),
        (GIVEN, lambda: keeps("local_blocks"), "other_local"),
        (GIVEN, counts_calls, "repeat"),
        (BESIDE, lambda: an_earlier_table, "padded"),
        ("index_insert/q=4+3,kv=300+140,d=32", lambda: slot_in_32_bits, "far_pages"),
    ],
)
def test_wrong_pieces_that_compare_well_do_not_hold_an_invariant(case, change, name):
    op = case.partition("/")[0]
    kernel = {
        "index_decode_table": fused, "index_decode_cp": scored, "index_topk_cp": selects, "index_insert": inserts,
        "index_topk_cp_table": selects_and_writes,
    }[op]()  # fmt: skip
    red, _ = held(case, changed(kernel, change()), (name,), MERGED if "_cp" in op else Profile())
    assert red == {name}


def test_a_fused_table_is_judged_on_the_ids_beside_it():
    case = "index_decode_table/q=2x3,kv=700+1+300,h=1,topk=3,layout=pool"
    assert judged(case, fused()) == (Status.PASSED, set())
    assert judged(case, fused("table"))[1] == {"pages"}, "pages of the index cache"
    assert judged(case, fused("counter"))[1] == {"counter"}


# Slots.

INSERT = "index_insert/q=9+3,kv=300+5,d=32"
REBASE = "page16_rebase/q=9+3,kv=300+130"


def test_a_table_that_is_not_written_into_the_buffer_of_the_step_is_refused():
    def slots(slot_mapping, block_size):
        return slot_mapping.where(slot_mapping < 0, slot_mapping // block_size * 2 * block_size + slot_mapping % block_size)

    def rebased(keeps):
        def table(block_table, out):
            return torch.mul(block_table, 2, out=out) if keeps else block_table * 2

        parts = {"minimax_m3_rebase_slots_to_page16": slots, "minimax_m3_rebase_block_table_to_page16": table}
        return vllm_amd.PIECES["page16_rebase"].composed(parts)

    assert judged(REBASE, rebased(True)) == (Status.PASSED, set())
    assert m3check.verify(REBASE, rebased(False), invariants=False).status is Status.ERROR


def saturated(key, dtype):
    largest = torch.finfo(dtype).max
    return key.float().clamp(-largest, largest).to(dtype)


def cut(key, dtype):
    """Towards zero instead of to nearest."""
    code = saturated(key, dtype)
    return torch.where(code.float().abs() > key.float().abs(), code.view(torch.uint8) - 1, code.view(torch.uint8)).view(
        dtype
    )


def flushed(key, dtype):
    """Numbers below the smallest normal one lost."""
    return saturated(key * (key.abs() >= torch.finfo(dtype).smallest_normal), dtype)


CODES = {
    "cut": cut,
    "flushed": flushed,
    "NaN past the largest": lambda key, dtype: key.float().where(key.abs() <= 448, torch.nan).to(dtype),
    "half away": lambda key, dtype: saturated(key.float() * (1 + 2**-12), dtype),
    "a scale": lambda key, dtype: saturated(key.float() / 1.07, dtype),
}
"""Wrong ways to fp8 codes."""


def inserts(mistake=""):
    def index_insert(index_k, index_cache, index_slot_mapping):
        for t, slot in enumerate(index_slot_mapping.tolist()):
            if slot < 0 and mistake == "stops":
                break
            if slot < 0 and mistake != "padding":
                continue
            if mistake == "neighbour" and slot % 128 < 127:
                slot += 1
            key = index_k[t - 1] if mistake == "key" else index_k[t]
            key = -key.abs() if mistake == "sign" else key
            index_cache[slot // 128, slot % 128] = CODES.get(mistake, saturated)(key, index_cache.dtype)

    return index_insert


def rebases(mistake=""):
    def page16_rebase(slot_mapping, block_table, block_size):
        slots = slot_mapping // block_size * 2 * block_size + slot_mapping % block_size
        if mistake != "padding":
            slots = slots.where(slot_mapping >= 0, slot_mapping)
        if mistake == "twice":
            slots = slot_mapping * 2
        return slots, block_table * (1 if mistake == "table" else 2)

    return page16_rebase


@pytest.mark.parametrize("case", [INSERT, f"{INSERT},cache=fp8_e4m3fn,layout=pool"])
def test_keys_are_held_to_their_slots(case):
    assert judged(case, inserts()) == (Status.PASSED, set())
    assert judged(case, inserts("padding"))[1] == {"guards"}
    assert judged(case, inserts("neighbour"))[1] >= {"guards", "index_keys"}
    for mistake in ("key", "sign", "stops"):
        assert judged(case, inserts(mistake))[1] == {"index_keys"}, mistake


@pytest.mark.parametrize("mistake", CODES)
def test_codes_of_wide_keys_are_saturated_and_rounded_to_nearest(mistake):
    case = "index_insert/q=12,kv=140,d=64,cache=fp8_e4m3fn,fill=wide"
    assert judged(case, inserts()) == (Status.PASSED, set())
    assert judged(case, inserts(mistake))[1] == {"index_keys"}
    keys = cases.make_inputs(cases.parse_id(case)).more["index_k"].float().abs()
    assert bool((keys > 464).any())
    assert bool((keys < 2**-10).any())
    assert bool(((keys.log2() % 1).exp2() * 16 % 2 == 1).any()), "ties between codes"


def test_renumbered_slots_and_pages_stand_for_what_they_did():
    assert judged(REBASE, rebases()) == (Status.PASSED, set())
    assert judged(REBASE, rebases("padding"))[1] == {"slots"}, "a negative slot becomes another one"
    assert judged(REBASE, rebases("twice"))[1] == {"slots"}
    assert judged(REBASE, rebases("table"))[1] == {"blocks"}


def test_a_function_is_lifted_out_of_a_file_that_cannot_be_imported(tmp_path):
    file = tmp_path / "file.py"
    file.write_text("import vllm_of_nowhere\n\ndef twice(x: vllm_of_nowhere.Tensor):\n    return torch.add(x, x)\n")
    assert vllm_amd._lifted(file, "twice", {})(torch.tensor(3)) == 6


# What runs where.


def test_only_amd_has_the_pieces_and_a_version_says_what_it_lacks(tmp_path):
    ops = tmp_path / "ops"
    ops.mkdir()
    (ops / "sparse_pa.py").write_text("def minimax_m3_build_sparse_block_table_prefill(topk_idx, block_table): ...\n")
    assert "production does not use it" in vllm_amd.missing("sparse_pa_table", ops, ARCHS["sm90"], "9.9")
    assert vllm_amd.missing("sparse_pa_table", ops, ARCHS["gfx942"], "9.9") is None
    assert "no minimax_m3_build_sparse_block_table_decode" in vllm_amd.missing(
        "sparse_pa_table_decode", ops, ARCHS["gfx942"], "9.9"
    )
    assert "takes no block_page_stride" in vllm_amd.refusal("sparse_pa_table", cases.parse_id(HOLES), ops)
    assert vllm_amd.refusal("sparse_pa_table", cases.parse_id("sparse_pa_table/q=1,kv=1,h=1"), ops) is None
    wide = cases.parse_id("index_decode_cp/q=1,kv=300,d=64")
    assert "head_dim 64" in vllm_amd.refusal("index_decode_cp", wide, ops)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("sparse_pa_table/q=1,kv=1", "for one KV head"),
        ("index_decode_cp/q=1,kv=1,layout=nhd", "known here: hnd, pool"),
        ("index_decode_cp/q=1,kv=1,fill=odd", "known here: gauss"),
        ("index_topk_cp/q=1,kv=1,d=64", "does not read d"),
    ],
)
def test_a_case_that_makes_no_sense_says_so(text, sentence):
    with pytest.raises(M3CheckError, match=sentence):
        cases.parse_id(text)


def test_every_listed_case_can_be_made_and_judged_by_its_reference():
    for tier in ("smoke", "ci"):
        for case in (cases.parse_id(line) for line in families.listed(tier)):
            if OPS[case.op].family == "amd" and case.context < 9_000:
                assert set(OPS[case.op].outputs) & set(reference.expected(cases.make_inputs(case)))


def test_a_result_that_is_no_pair_breaks_the_contract():
    kernel = Kernel("x", "sparse_pa_table_decode", "x", Profile(), lambda topk_idx, block_table, seq_lens: topk_idx)
    with pytest.raises(contract.BrokenContract, match=r"wanted \(table"):
        contract.call(kernel, cases.make_inputs(cases.parse_id(TABLE)))
