"""Invariants that bind the pieces of AMD: right ones hold all that fit, wrong ones that compare well do not."""

from __future__ import annotations

import functools

import pytest
from amd_models import (
    MERGED,
    fused,
    inserts,
    scored,
    selects,
    selects_and_writes,
    table,
)

from m3check import cases, invariants, runner
from m3check.arch import ARCHS
from m3check.kernels.provider import Loaded, Spec
from m3check.types import Kernel, PlanLine, Profile, Status


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
