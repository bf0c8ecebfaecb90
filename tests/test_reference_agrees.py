"""The references against a second formulation that shares no helper with them, over every case of tier `ci`."""

from __future__ import annotations

import pytest
from second_formulation import assert_agrees

from m3check.cases import case_id, make_inputs, tier
from m3check.reference import dequantised
from m3check.types import SPARSE

CI = tier("ci", SPARSE)


@pytest.mark.parametrize("case", CI, ids=case_id)
def test_both_formulations_agree(case):
    inputs = make_inputs(case)
    for rule in ("rounded", "folded") if inputs.k_scale is not None else ("rounded",):
        assert_agrees(dequantised(inputs, rule))


def test_ci_has_cases_of_every_op():
    assert {case.op for case in CI} == set(SPARSE)
