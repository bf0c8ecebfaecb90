"""A selection by several ranks: keys packed and merged, the layer around them, the table that the merge writes."""

from __future__ import annotations

from dataclasses import replace

import pytest
from amd_models import (
    MERGED,
    judged,
    scored,
    selects,
    selects_and_writes,
)

import m3check
from m3check.types import Status

TIED = "index_topk_cp/q=2x2,kv=1300+300,h=2,topk=3,fill=ties"
FORCED = "index_topk_cp/q=1x3,kv=1500+129+0,h=4,topk=4,init=1,local=2"
ODD = "index_topk_cp/q=2x3,kv=1200+1+640,h=2,topk=4,fill=odd"


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


WRITTEN = "index_topk_cp_table/q=2x3,kv=1200+1+640,h=1,topk=4,layout=pool"


def test_a_merge_that_writes_the_table_as_well_is_judged_on_its_own_ids():
    assert judged(WRITTEN, selects_and_writes(), MERGED) == (Status.PASSED, set())
    assert "pages" in judged(WRITTEN, selects_and_writes("first rank"), MERGED)[1], "the keys of one rank"
    assert "context" in judged(WRITTEN, selects_and_writes("drafts"), MERGED)[1], "positions without the draft tokens"
    assert judged(WRITTEN, selects_and_writes("stride"), MERGED)[1] == {"pages"}
    assert judged(WRITTEN, selects_and_writes("last"), MERGED)[1] == {"selection"}


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
