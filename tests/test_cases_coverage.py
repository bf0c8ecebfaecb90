"""The tiers cover every pair of axis values: proved from the lists alone."""

import random
from itertools import combinations

import pytest

from m3check.cases import case_id, complaint, tier
from m3check.cases.axes import build, excluded, often_refused, point, values
from m3check.cases.covering import covered, legal_pairs, uncovered
from m3check.cases.tiers import listed, listed_cases
from m3check.types import SPARSE


@pytest.mark.parametrize("op", SPARSE)
@pytest.mark.parametrize("name", ["ci", "full"])
def test_every_legal_pair_of_axis_values_is_in_some_case(op, name):
    assert uncovered(op, name, tier(name)) == set()


@pytest.mark.parametrize("op", SPARSE)
def test_a_list_with_a_hole_is_seen(op):
    cases = [case for case in tier("ci") if case.op == op]
    lost = [case for case in cases if point(case)["batch"] != 2]
    missing = uncovered(op, "ci", lost)
    assert missing
    assert all(("batch", 2) in pair for pair in missing) or len(lost) < len(cases)


@pytest.mark.parametrize("op", SPARSE)
def test_no_value_of_an_axis_is_excluded_altogether(op):
    for name in ("ci", "full"):
        pairs = legal_pairs(op, name)
        for axis, tried in values(op, name).items():
            for value in tried:
                assert any((axis, value) in pair for pair in pairs), f"{axis}={value} meets nothing"


@pytest.mark.parametrize("op", SPARSE)
def test_every_value_of_ci_is_among_those_of_full_or_smaller(op):
    full = values(op, "full")
    for axis, tried in values(op, "ci").items():
        if axis not in ("query_len", "blocks"):
            assert set(tried) <= set(full[axis])


def test_a_point_is_read_off_its_case_whoever_made_it():
    chance = random.Random(1)
    seen = 0
    for op in SPARSE:
        for _ in range(300):
            at = {axis: chance.choice(tried) for axis, tried in values(op, "full").items()}
            if excluded(op, at):
                continue
            case = build(op, at)
            if case is None or complaint(case):
                continue
            read = point(case)
            same = {axis for axis in at if read[axis] == at[axis]}
            assert set(at) - same <= {"mix"}, f"{case_id(case)}: {at} read as {read}"
            seen += 1
    assert seen > 100


def test_excluded_pairs_are_really_illegal_or_unaffordable():
    """What the dtype rules exclude, the validity rules refuse as well."""
    for op in ("sparse_attn", "index_score", "prefill"):
        plain = next(point(case) for case in tier("smoke") if case.op == op)
        for axis in ("cache_dtype", "scales"):
            for value in values(op, "full").get(axis, ()):
                at = {**plain, axis: value}
                case = build(op, at)
                assert case is not None
                if complaint(case) is not None:
                    assert excluded(op, at) is not None


def test_a_value_that_is_often_refused_hides_the_rest_of_its_case():
    with_three = next(case for case in tier("full") if case.op == "decode" and case.kv_heads == 3)
    assert all(3 in {value for _, value in pair} for pair in covered(with_three))
    plain = next(
        case
        for case in tier("full")
        if case.op == "decode" and not any(often_refused("decode", *i) for i in point(case).items())
    )
    assert len(list(covered(plain))) == len(list(combinations(point(plain), 2)))


def test_lists_are_canonical_and_without_repetition():
    names = ("smoke", "real", "probes", "named", "ci", "probes_full", "full", "long")
    lines = [line for name in names for line in listed(name)]
    assert len(lines) == len(set(lines))
    assert lines == [case_id(case) for case in listed_cases(*names)]
