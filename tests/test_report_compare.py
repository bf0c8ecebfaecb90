"""compare and merge: what is a regression, and what a merge refuses to decide."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest
from records import finding, record, result

from m3check.report import compare, jsonfile
from m3check.report.merge import merge, results_of
from m3check.types import Exit, M3CheckError, Record, Result, Status

RED = result(Status.FAILED, findings=(finding(status=Status.FAILED, measured=3.0),))
GREEN = result()
SKIPPED = result(Status.SKIPPED, reason="no such op any more")


def kinds(old: Record, new: Record, **words: Any) -> list[str]:
    return [change.kind for change in compare.compare(old, new, **words).changes]


@pytest.mark.parametrize(
    ("old", "new", "kind"),
    [
        (GREEN, RED, "turned red"),
        (GREEN, result(Status.CRASHED, reason="signal"), "turned red"),
        (GREEN, SKIPPED, "skipped now"),
        (SKIPPED, RED, "red and new"),
        (result(evidence="device"), GREEN, "weaker evidence"),
        (GREEN, result(Status.INCONCLUSIVE), "weaker verdict"),
        (GREEN, result(Status.MISTRUSTED), "weaker verdict"),
        (GREEN, result(findings=(finding(measured=0.6),)), "closer to its limit"),
    ],
)
def test_a_regression(old: Result, new: Result, kind: str) -> None:
    other = result(op="decode")
    found = compare.compare(record(old, other), record(new, other))

    assert [change.kind for change in found.regressions] == [kind]
    assert found.regressions[0].case == GREEN.case
    assert kind in compare.render(found).lower()


@pytest.mark.parametrize(
    ("old", "new", "kind"),
    [
        (RED, GREEN, "turned green"),
        (RED, RED, "still red"),
        (SKIPPED, GREEN, "new"),
        (GREEN, result(evidence="device"), "stronger evidence"),
    ],
)
def test_no_regression(old: Result, new: Result, kind: str) -> None:
    other = result(op="decode")
    found = compare.compare(record(old, other), record(new, other))

    assert [change.kind for change in found.changes] == [kind]
    assert not found.regressions
    assert "no regression" in compare.render(found)


def test_the_same_record_twice_has_no_change() -> None:
    both = record(result(op="decode"), RED)
    found = compare.compare(both, both)

    assert [change.kind for change in found.changes] == ["still red"]
    assert found.common == 2


def test_cases_that_are_gone_and_cases_that_came() -> None:
    other = result(op="decode")

    assert kinds(record(GREEN, other), record(other)) == ["missing"]
    assert kinds(record(other), record(GREEN, other)) == ["new"]
    assert kinds(record(other), record(RED, other)) == ["red and new"]
    assert kinds(record(SKIPPED, other), record(other)) == []


def test_growth_is_measured_on_the_cases_of_both_records_and_by_the_factor() -> None:
    wide = result(case="sparse_attn/new", findings=(finding(measured=0.9),))
    grown = result(findings=(finding(measured=0.45),))

    assert kinds(record(GREEN), record(GREEN, wide)) == ["new"]
    assert kinds(record(GREEN), record(grown)) == []
    assert kinds(record(GREEN), record(grown), growth=1.5) == ["closer to its limit"]


def test_another_version_of_one_provider_is_compared_with_the_old_one() -> None:
    old = record(result(provider="vllm==0.32.0"), GREEN)
    new = record(result(Status.FAILED, provider="vllm==0.33.0"), GREEN)
    found = compare.compare(old, new)

    assert found.paired == (("vllm==0.32.0", "vllm==0.33.0"),)
    assert [(c.kind, c.provider) for c in found.changes] == [("turned red", "vllm==0.33.0")]
    assert "`vllm==0.32.0` was compared with `vllm==0.33.0`" in compare.render(found)


def test_strictness_of_each_record_decides_what_was_red() -> None:
    note = result(findings=(finding(status=Status.NOTED),))
    strict = record(note, command="m3check run --arch sm100 --strict")

    assert kinds(record(note), record(note)) == []
    assert kinds(record(note), strict) == ["turned red"]


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(M3CheckError, match="different targets"):
        compare.compare(record(GREEN), record(GREEN, arch="sm90"))
    with pytest.raises(M3CheckError, match="nothing ran"):
        compare.compare(record(SKIPPED), record(GREEN))


def test_a_comparison_as_json() -> None:
    told = json.loads(compare.as_json(compare.compare(record(GREEN), record(RED))))

    assert told["regressions"] == 1
    assert told["changes"][0]["kind"] == "turned red"


def test_shards_become_one_record_that_validates() -> None:
    parts = [
        record(GREEN, environment={"seconds": 1.5, "gpu": "A"}),
        record(result(op="decode"), environment={"seconds": 2.0, "gpu": "B", "torch": "2.13"}),
    ]
    together = results_of(parts)
    merged = merge(parts, together, Exit(0, "fine"), "m3check merge a b")

    assert [r.op for r in merged.results] == ["sparse_attn", "decode"]
    assert merged.summary == {"passed": 2}
    assert merged.environment == {"seconds": 3.5, "gpu": "A / B", "torch": "2.13"}
    jsonschema.validate(json.loads(jsonfile.dumps(merged)), jsonfile.schema())


def test_a_result_that_ran_replaces_a_skip_in_either_order() -> None:
    device = result(evidence="device")

    assert results_of([record(SKIPPED), record(GREEN)]) == (GREEN,)
    assert results_of([record(GREEN), record(SKIPPED)]) == (GREEN,)
    assert results_of([record(SKIPPED), record(device)]) == (device,)


def test_two_results_with_one_verdict_keep_the_later() -> None:
    later = result(seconds=9.0)

    assert results_of([record(GREEN), record(later)]) == (later,)


def test_two_verdicts_on_one_case_are_refused_and_so_are_two_targets() -> None:
    with pytest.raises(M3CheckError, match="does not choose between verdicts"):
        results_of([record(GREEN), record(RED)])
    with pytest.raises(M3CheckError, match="different targets"):
        results_of([record(GREEN), record(GREEN, arch="sm90")])


def test_evidence_of_two_kinds_stands_side_by_side() -> None:
    device = result(evidence="device")

    assert results_of([record(GREEN), record(device)]) == (GREEN, device)
