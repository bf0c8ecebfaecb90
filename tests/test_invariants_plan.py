"""Which cases show which invariants: enough of them in each tier, the cheapest, and every one for a named case."""

from __future__ import annotations

import pytest

from m3check import cases, invariants, runner
from m3check.config import RunOptions


def plan(**options):
    """What is run; what is compiled beside it shows no invariant of these."""
    return [line for line in runner.plan(RunOptions(arch="sm90", **options)) if line.evidence != "compiled"]


@pytest.mark.parametrize("tier", ["smoke", "ci", "full"])
@pytest.mark.parametrize("evidence", ["interpreted", "device"])
def test_a_tier_shows_every_invariant_on_every_op_often_enough(tier, evidence):
    listed = [(cases.case_id(case), case, cases.cost(case, evidence)) for case in cases.tier(tier)]
    given = invariants.assign(listed, evidence, tier)
    by_id = {name: case for name, case, _ in listed}
    for invariant in invariants.INVARIANTS:
        if evidence not in invariant.evidence or tier not in invariant.tiers:
            continue
        for op in invariant.ops:
            shown = [name for name, names in given.items() if invariant.name in names and by_id[name].op == op]
            assert len(shown) == invariants.shows(invariant, op, tier), f"{invariant.name} on {op}: {shown}"
            assert all(invariant.fits(by_id[name]) for name in shown)


def test_the_cheapest_case_comes_first_and_the_next_is_of_another_kind():
    ids = ["index_score/q=9,kv=300", "index_score/q=9,kv=301", "index_score/q=9,kv=302,layout=pool"]
    listed = [(name, cases.parse_id(name), seconds) for name, seconds in zip(ids, (1.0, 2.0, 3.0), strict=True)]
    assert set(invariants.assign(listed, "interpreted", "smoke")) == {ids[0]}
    several = invariants.assign(listed, "interpreted", "ci")
    assert several[ids[2]] == several[ids[0]]
    only_one = invariants.assign(listed[:2], "interpreted", "ci")
    assert only_one[ids[1]] == only_one[ids[0]], "where there is no other kind, one more of the same will do"


def test_a_probe_that_holds_its_values_still_is_the_last_choice():
    ids = ["sparse_attn/q=5,kv=1409,h=2,g=4,topk=4,fill=ties", "sparse_attn/q=5,kv=2500"]
    listed = [(name, cases.parse_id(name), seconds) for name, seconds in zip(ids, (1.0, 2.0), strict=True)]
    assert "future" in invariants.assign(listed, "interpreted", "smoke")[ids[1]]


def test_a_named_case_shows_whatever_a_run_of_a_tier_asked_of_it():
    for tier in ("smoke", "ci"):
        asked = [line for line in plan(tier=tier) if line.invariants]
        named = {line.case: line for line in plan(cases=tuple(line.case for line in asked))}
        for line in asked:
            assert set(line.invariants) <= set(named[line.case].invariants)


def test_a_named_case_shows_all_that_fit_unless_that_takes_long():
    [quick] = plan(cases=("index_score/q=9,kv=300",))
    assert quick.invariants == invariants.fitting(cases.parse_id(quick.case), "interpreted")
    [slow] = plan(cases=("sparse_attn/q=500,kv=9000",))
    assert slow.invariants == ()


@pytest.mark.parametrize("part", [{"expr": "gauss"}, {"ops": ("index_topk", "decode")}, {"seed": 3}])
def test_a_part_of_a_tier_and_another_seed_change_nothing(part):
    whole = {line.case: line.invariants for line in plan(tier="ci")}
    for line in plan(tier="ci", **part):
        assert line.invariants == whole[line.case.removesuffix("~3")]


def test_shards_share_the_invariants_of_the_whole():
    whole = {line.case: line.invariants for line in plan(tier="ci")}
    parts = [line for i in (1, 2, 3) for line in plan(tier="ci", shard=(i, 3))]
    assert {line.case: line.invariants for line in parts} == whole


def test_refused_cases_show_nothing():
    lines = plan(tier="ci", kernels=("vllm:/nowhere",))  # nothing is known of it: only its fp8 dtypes are refused
    assert any(line.invariants for line in lines)
    assert not [line for line in lines if line.skip and line.invariants]


def test_a_production_run_and_an_unfit_case_show_none():
    assert not any(line.invariants for line in plan(tier="production"))
    assert "batch_order" not in invariants.fitting(cases.parse_id("index_score/q=9,kv=300"), "device")


def test_every_entry_says_what_it_sees_and_names_what_carries_it_out():
    import importlib

    names = [invariant.name for invariant in invariants.INVARIANTS]
    assert len(set(names)) == len(names)
    for invariant in invariants.INVARIANTS:
        assert invariant.catches
        assert invariant.blind
        module, _, function = invariant.run.partition(".")
        assert callable(getattr(importlib.import_module(f"m3check.checks.invariants.{module}"), function))


def test_a_case_that_suits_an_invariant_comes_before_cheaper_ones():
    ids = ["sparse_attn_decode/q=1,kv=300,h=2,g=2,d=64,topk=3", "sparse_attn_decode/q=1,kv=300,h=2,g=2,topk=4"]
    listed = [(name, cases.parse_id(name), seconds) for name, seconds in zip(ids, (1.0, 9.0), strict=True)]
    given = invariants.assign(listed, "device", "smoke")
    assert "same_as_prefill" in given[ids[0]]
    given = invariants.assign(listed, "device", "smoke", lambda name, case: name == "same_as_prefill" and case.topk == 4)
    assert "same_as_prefill" in given[ids[1]]
    assert "same_as_prefill" not in given[ids[0]]
    assert "repeat" in given[ids[0]]
