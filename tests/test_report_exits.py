"""The exit code: which results make which one."""

from __future__ import annotations

import pytest
from records import finding, result

from m3check.report.exits import judge
from m3check.types import Evidence, Exit, Status

SKIP = result(Status.SKIPPED, reason="needs a device")
NOTED = result(findings=(finding(status=Status.NOTED),))


@pytest.mark.parametrize("status", [Status.FAILED, Status.ERROR, Status.CRASHED, Status.TIMEOUT])
def test_a_red_result_is_exit_1(status: Status) -> None:
    told = judge([result(), result(status)], ["triton"])

    assert (told.code, told.reason) == (1, f"1 {status} of 2 results")


@pytest.mark.parametrize("status", [Status.MISTRUSTED, Status.INCONCLUSIVE])
def test_a_doubtful_result_is_red_only_when_strict(status: Status) -> None:
    assert judge([result(), result(status)], ["triton"]).code == 0
    assert judge([result(), result(status)], ["triton"], strict=True).code == 1


def test_a_note_is_red_only_when_strict() -> None:
    assert judge([NOTED], ["triton"]).code == 0
    assert judge([NOTED], ["triton"], strict=True) == judge([NOTED], ["triton"], strict=True)
    assert judge([NOTED], ["triton"], strict=True).code == 1


def test_a_known_failure_is_not_red() -> None:
    told = judge([result(), result(Status.KNOWN)], ["triton"], strict=True)

    assert told.code == 0
    assert "1 known" in told.reason


def test_nothing_that_ran_is_never_success() -> None:
    assert judge([], ["triton"]).code == 5
    assert judge([], []).code == 5
    assert judge([SKIP, SKIP], ["triton"]).code == 5
    assert "needs a device" in judge([SKIP, SKIP], ["triton"]).reason


def test_every_named_provider_must_give_results() -> None:
    told = judge([result()], ["triton", "vllm==0.33.0"])

    assert told.code == 5
    assert "no result for vllm==0.33.0" in told.reason
    assert judge([result(), result(provider="vllm==0.33.0")], ["triton", "vllm==0.33.0"]).code == 0
    assert judge([result(), result(Status.SKIPPED, provider="vllm==0.33.0")], ["triton", "vllm==0.33.0"]).code == 5


def test_red_weighs_more_than_missing_and_says_both() -> None:
    told = judge([result(Status.FAILED)], ["triton", "vllm"])

    assert (told.code, told.reason) == (1, "1 failed of 1 results; no result for vllm")


def test_what_nobody_named_never_changes_the_code() -> None:
    assert judge([result(), result(Status.FAILED, provider="sglang")], ["triton"]).code == 0
    assert judge([result(provider="sglang")], ["triton"]).code == 5


def test_a_name_without_a_version_stands_for_any_but_not_for_a_longer_name() -> None:
    assert judge([result(provider="vllm==0.33.0")], ["vllm"]).code == 0
    assert judge([result(provider="vllm_fork")], ["vllm"]).code == 5


@pytest.mark.parametrize("require", ["device", "compiled"])
def test_evidence_weaker_than_required_is_a_failure(require: Evidence) -> None:
    told = judge([result()], ["triton"], require=require)

    assert told.code == 1
    assert f"--require {require}: 1 case of triton has interpreted results only" in told.reason


def test_the_device_does_for_every_kind_and_the_others_not_for_each_other() -> None:
    device, compiled = result(evidence="device"), result(evidence="compiled")
    for require in ("device", "interpreted", "compiled"):
        assert judge([device], ["triton"], require=require).code == 0
    assert judge([result()], ["triton"], require="interpreted").code == 0
    assert judge([compiled], ["triton"], require="compiled").code == 0
    assert judge([compiled], ["triton"], require="interpreted").code == 1
    assert judge([result(), compiled], ["triton"], require="compiled").code == 0
    assert judge([result(), compiled], ["triton"], require="interpreted").code == 0


def test_each_case_of_each_named_provider_needs_the_required_evidence() -> None:
    both, other = [result(), result(evidence="compiled")], result(case="sparse_attn/other")
    assert judge([*both, other], ["triton"], require="compiled").code == 1
    assert judge([*both, result(provider="vllm")], ["triton", "vllm"], require="compiled").code == 1
    assert judge([*both, result(provider="vllm")], ["triton"], require="compiled").code == 0


def test_a_case_that_the_target_cannot_compile_is_no_weaker_evidence_where_others_compile() -> None:
    fp8 = "sparse_attn/fp8"
    skipped = result(Status.SKIPPED, case=fp8, evidence="compiled", reason="Triton compiles no fp8 here")
    assert (
        judge([result(case=fp8), skipped, result(), result(evidence="compiled")], ["triton"], require="compiled").code == 0
    )
    assert judge([result(case=fp8), skipped], ["triton"], require="compiled").code == 1, "then nothing was compiled"


def test_red_weighs_as_much_as_weak_evidence_and_nothing_that_ran_weighs_more() -> None:
    told = judge([result(Status.FAILED)], ["triton"], require="device")
    assert told.code == 1
    assert "1 failed of 1 results; --require device" in told.reason
    assert judge([SKIP], ["triton"], require="device").code == 5


def test_an_interrupted_run_is_exit_2_whatever_came() -> None:
    assert judge([result(Status.FAILED)], ["triton"], interrupted=True).code == 2


def test_a_breach_is_red_beside_green_results_and_is_said_beside_red_ones() -> None:
    told = ["floor one", "floor two", "floor three"]
    failed = result(Status.FAILED)

    assert judge([result()], ["triton"], breaches=told[:1]) == Exit(1, "floor one; 1 results, none red")
    assert judge([result()], ["triton"], breaches=told).reason.startswith("floor one (and 2 more breaches); ")
    assert judge([failed], ["triton"], breaches=told[:1]) == Exit(1, "1 failed of 1 results; floor one")
    assert judge([result()], ["triton", "vllm"], breaches=told[:1]).reason.startswith("floor one; no result for vllm")
    assert judge([result(Status.SKIPPED)], ["triton"], breaches=told[:1]).code == 5
    assert judge([result()], ["triton"], breaches=told[:1], interrupted=True).code == 2
