"""compare and merge: what is a regression, and what a merge refuses to decide."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
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
        (GREEN, result(Status.KNOWN), "weaker verdict"),
        (result(Status.KNOWN), RED, "turned red"),
        (GREEN, result(findings=(finding(measured=0.6),)), "closer to its limit"),
        (result(findings=(finding(measured=0.0),)), result(findings=(finding(measured=0.6),)), "closer to its limit"),
        (GREEN, result(findings=(finding("another"),)), "check gone"),
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
        (result(Status.KNOWN), GREEN, "turned green"),
        (RED, RED, "still red"),
        (RED, result(Status.KNOWN), "now known"),
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


def test_what_says_nothing_is_no_change() -> None:
    exact, tiny = result(findings=(finding(measured=0.0),)), result(findings=(finding(measured=0.4),))
    note = result(findings=(finding(), finding("dead_rows", Status.NOTED)))
    worse = result(Status.FAILED, findings=(finding(status=Status.FAILED, measured=3.0), finding("shown_when_green")))

    assert kinds(record(exact), record(tiny)) == [], "another factor of two would still be within the limit"
    assert kinds(record(GREEN), record(result(findings=(finding(), finding("new", measured=0.9))))) == []
    assert kinds(record(note), record(GREEN)) == [], "a note that is gone is no check that is gone"
    assert kinds(record(worse), record(RED)) == ["still red"]


def test_a_run_that_is_no_longer_strict_does_not_look_better() -> None:
    note = result(findings=(finding(), finding("dead_rows", Status.NOTED)))
    strict = {"command": "m3check run --arch sm100 --strict"}

    assert kinds(record(GREEN, **strict), record(note)) == ["turned red"]
    assert kinds(record(note, **strict), record(note)) == ["still red"]


def test_what_was_compiled_is_compared_beside_what_was_computed() -> None:
    compiled = result(evidence="compiled", findings=(finding("registers"),))
    broken = result(Status.FAILED, evidence="compiled", findings=(finding("registers", Status.FAILED),))
    device = result(evidence="device")

    assert kinds(record(GREEN, compiled), record(GREEN, compiled)) == []
    assert kinds(record(GREEN, compiled), record(GREEN, broken)) == ["turned red"]
    assert kinds(record(GREEN, compiled), record(GREEN)) == ["missing"]
    assert kinds(record(GREEN, compiled), record(compiled)) == ["missing"]
    assert kinds(record(GREEN, compiled), record(device)) == ["stronger evidence"]
    assert results_of([record(SKIPPED), record(compiled)]) == (SKIPPED, compiled), "compiling it does not make a skip good"


@pytest.mark.parametrize("code", [2, 3, 4])
def test_a_run_that_broke_off_is_no_baseline_and_no_good_news(code: int) -> None:
    whole, broken = record(GREEN), record(GREEN, exit=Exit(code, "it broke"))

    assert kinds(whole, broken) == ["broke off"]
    with pytest.raises(M3CheckError, match=f"the OLD record broke off .exit {code}: it broke"):
        compare.compare(broken, whole)


def test_compare_and_merge_need_neither_torch_nor_triton_nor_numpy(tmp_path: Path) -> None:
    for name, each in {"old": GREEN, "new": RED}.items():
        (tmp_path / f"{name}.json").write_text(jsonfile.dumps(record(each)))
    code = """
import importlib.abc, sys
class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "triton", "numpy", "platformdirs", "remotezip"):
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Block())
from m3check.cli import main
lines = ("compare old.json old.json", "compare old.json new.json", "merge old.json --out all", "merge new.json --out all",
         "show old.json", "doctor --show-config")
codes = [main(line.split()) for line in lines]
print("codes", *codes)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)

    assert "no regression" in done.stdout
    assert "Turned red (1)" in done.stdout
    assert done.stdout.splitlines()[-1] == "codes 0 1 0 1 0 0", done.stderr


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
