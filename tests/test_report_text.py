"""report.md, junit.xml and the matrix: what must be said, and what must never look green."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from records import finding, green, nothing, record, red, result

from m3check import report
from m3check.report import jsonfile, junit, markdown, tables
from m3check.types import Exit, M3CheckError, Status


def test_an_interpreted_run_says_first_that_nothing_ran_on_the_hardware() -> None:
    lines = report.render([green()], "md").splitlines()

    assert "Nothing here ran on sm100 hardware" in "\n".join(lines[:6])
    assert "interpreted" in "\n".join(lines[:6])


def test_a_run_on_the_hardware_names_it() -> None:
    text = markdown.head(record(result(evidence="device"), environment={"gpu": "NVIDIA B200", "host": "x86_64"}))

    assert "ran on sm100 hardware (NVIDIA B200)" in text
    assert "Nothing here ran" not in text


def test_a_gpu_that_did_not_run_the_kernels_is_not_named_as_the_machine() -> None:
    text = markdown.head(record(result(), environment={"gpu": "NVIDIA H200", "host": "x86_64"}))

    assert "H200" not in text
    assert "Nothing here ran on sm100 hardware" in text


def test_every_red_result_has_its_place_figures_hint_and_repro() -> None:
    text = markdown.failures(red())

    for word in ("91.2", "limit 8", "token 3, kv head 1, key 517", "is missing", "SIGSEGV", "no result within 120 s"):
        assert word in text
    assert text.count("- repro: `m3check run --arch sm100") == 5


def test_beyond_forty_red_results_each_still_has_a_line() -> None:
    many = record(
        *(result(Status.FAILED, case=f"decode/q=1,kv={i}", findings=(finding(status=Status.FAILED),)) for i in range(90))
    )
    text = markdown.failures(many)

    assert text.count("### FAILED") == markdown.DETAILED
    assert all(f"`decode/q=1,kv={i}`" in text for i in range(90))


def test_strict_runs_show_what_strictness_made_red() -> None:
    note = result(findings=(finding("dead_rows", Status.NOTED, where="request 1"),))

    assert markdown.failures(record(note)) == ""
    assert "dead_rows" in markdown.failures(record(note, command="m3check run --arch sm100 --strict"))


def test_the_soundness_table_holds_the_worst_passed_ratio_and_leaves_failures_out() -> None:
    told = record(
        result(findings=(finding(measured=0.3, limit=0.6),)),
        result(case="sparse_attn/worst", findings=(finding(measured=0.9, limit=1.0),)),
        result(Status.FAILED, case="sparse_attn/red", findings=(finding(status=Status.FAILED, measured=7.0),)),
    )
    (row,) = [line for line in markdown.margins(told).splitlines() if "sparse_attn" in line]

    assert [cell.strip() for cell in row.strip("|").split("|")] == [
        *("element", "sparse_attn", "2", "0.7", "0.9", "triton", "`sparse_attn/worst`")
    ]


@pytest.mark.parametrize(
    ("measured", "limit", "wanted"),
    [
        (1.0, 2.0, 0.5),
        (None, 2.0, None),
        (1.0, None, None),
        (1.0, 0.0, None),
        (math.nan, 2.0, math.inf),
        (math.inf, 2.0, math.inf),
    ],
)
def test_a_ratio_is_measured_by_limit(measured: float | None, limit: float | None, wanted: float | None) -> None:
    assert tables.ratio(finding(measured=measured, limit=limit)) == wanted


def test_foreign_text_cannot_break_a_table_or_reach_a_terminal() -> None:
    text = report.render([record(result(Status.SKIPPED, reason="a | b\n<script>\x1b[2J\x00"))], "md")

    assert "a \\| b &lt;script>" in text
    assert "\x1b" not in text
    assert "\x00" not in text


def test_a_junit_suite_is_one_provider_and_op_and_counts_add_up() -> None:
    root = ElementTree.fromstring(report.render([red()], "junit"))

    assert root.attrib == {"name": "m3check", "tests": "6", "failures": "2", "errors": "3", "skipped": "0"}
    assert [suite.get("name") for suite in root] == [
        f"sm100.triton.{op}" for op in ("index_score", "index_topk", "sparse_attn", "prefill", "decode")
    ]
    for suite in root:
        assert int(suite.get("tests", "")) == len(suite.findall("testcase"))
        assert int(suite.get("failures", "")) == len(suite.findall("testcase/failure"))


def test_junit_holds_repro_and_evidence_and_no_forbidden_character() -> None:
    text = report.render([red()], "junit")
    root = ElementTree.fromstring(text)

    assert "\x00" not in text
    for case in root.iter("testcase"):
        facts = {p.get("name"): p.get("value") for p in case.iter("property")}
        assert facts["repro"] == f"m3check run --arch sm100 --kernels triton --case {case.get('name')}"
        assert facts["evidence"] in ("interpreted", "device")


@pytest.mark.parametrize("status", [Status.SKIPPED, Status.KNOWN, Status.MISTRUSTED, Status.INCONCLUSIVE])
def test_what_is_no_pass_is_not_drawn_green(status: Status) -> None:
    root = ElementTree.fromstring(junit.render([record(result(status, reason="because"), exit=Exit(0, ""))]))

    assert root.get("skipped") == "1"
    assert root.find(".//skipped").get("message") == "because"  # type: ignore[union-attr]


@pytest.mark.parametrize("code", [2, 3, 4, 5])
def test_a_run_without_a_verdict_is_an_error_in_junit(code: int) -> None:
    root = ElementTree.fromstring(junit.render([record(result(), exit=Exit(code, "broken off"))]))

    assert root.get("errors") == "1"
    assert root.find(".//error").get("message") == "broken off"  # type: ignore[union-attr]


def test_a_matrix_shows_each_record_with_its_evidence() -> None:
    other = replace(red(), arch="sm90")
    text = report.render([green(), other, nothing()], "md")

    assert "Nothing ran on the hardware of: sm100 #1, sm100 #2." in text
    rows = {
        tuple(c.strip() for c in line.split("|")[1:3]): line for line in text.splitlines() if line.startswith("| sparse")
    }
    assert "2 of 2 passed, interpreted, 0.7" in rows["sparse_attn", "sm100 #1"]
    assert "RED 2 of 2, interpreted, inf" in rows["sparse_attn", "sm90"]
    assert "skipped 2" in rows["sparse_attn", "sm100 #2"]
    assert [record for _, record in rows] == ["sm90", "sm100 #1", "sm100 #2"], "in the order of the targets"
    assert text.endswith(f"## Made by\n\n```\n{chr(10).join(['m3check run --arch sm100'] * 3)}\n```\n")


def test_a_matrix_as_json_is_plain_json() -> None:
    rows = json.loads(report.render([green(), replace(red(), arch="sm90")], "json"), parse_constant=pytest.fail)

    told = {(row["record"], row["op"], row["provider"]): row for row in rows}
    assert told["sm90", "decode", "triton"]["red"] == 1
    assert told["sm90", "sparse_attn", "triton"]["worst"] == "inf"
    assert told["sm100", "sparse_attn", "triton"]["summary"] == {"passed": 2}


def test_an_unknown_format_lists_the_known_ones() -> None:
    with pytest.raises(M3CheckError, match=f"did you mean junit.*{', '.join(report.FORMATS)}"):
        report.render([green()], "junitt")


@pytest.mark.parametrize("told", report.RENDERERS, ids=lambda told: told.word)
def test_every_format_tells_one_record_and_several_and_leaves_its_file(told: report.Format, tmp_path: Path) -> None:
    one, several = report.render([green()], told.word), report.render([green(), replace(red(), arch="sm90")], told.word)

    assert one != several
    report.write(green(), tmp_path)
    assert not told.file or (tmp_path / told.file).read_text(encoding="utf-8") == one
    assert {path.name for path in tmp_path.iterdir()} == set(report.FILES.values())


GATE = {
    "ledger": "known.toml",
    "known": 2,
    "floors": ["min_cases=3"],
    "breaches": [{"sentence": "floor min_cases: <b>decode</b> ran 1 case", "file": "", "line": 0}],
    "waiting": ["known.toml, entry 1 selects 3 cases that are not in this part of the run"],
}


def test_a_gate_is_told_after_the_head_and_a_breach_is_no_green_junit() -> None:
    plain = green()
    gated = replace(plain, exit=Exit(1, "floor min_cases"), environment={**plain.environment, "gate": GATE})
    text = markdown.render(gated)

    assert text.index("# m3check sm100: RED") < text.index("## Gate") < text.index("## Summary")
    assert "- **floor min_cases: &lt;b>decode&lt;/b> ran 1 case**" in text
    assert "- not judged here: known.toml, entry 1 selects 3 cases" in text
    assert "- ledger `known.toml`: 2 known failures\n- floors: `min_cases=3`" in text
    assert "## Gate" not in markdown.render(plain)
    root = ElementTree.fromstring(junit.render([gated]))
    assert (root.get("errors"), root.get("failures")) == ("1", "0")
    assert ElementTree.fromstring(junit.render([plain])).get("errors") == "0"


@pytest.mark.parametrize("odd", ["text", {"breaches": "text"}, {"breaches": ["text", {"line": "x"}], "floors": [3]}])
def test_a_gate_of_another_shape_breaks_no_report(odd: object) -> None:
    plain = green()

    assert markdown.render(replace(plain, environment={**plain.environment, "gate": odd}))


def test_what_was_compiled_has_a_table_of_its_own_and_is_no_margin():
    def passed(check, measured=None, limit=None, where="k #1 warps=4 stages=2", hint=""):
        return finding(check, Status.PASSED, measured=measured, limit=limit, where=where, hint=hint)

    other = "k #2 warps=4 stages=1"
    found = (
        passed("shared_memory", 1024.0, 65_536.0),
        passed("shared_memory", 4096.0, 65_536.0, other),
        passed("registers", 48.0, 512.0),
        passed("registers", 32.0, 512.0, other),
        passed("spills", 0.0, 2048.0),
        passed("occupancy", 8.0, 32.0),
        passed("occupancy", 16.0, 32.0, other),
        passed("matrix", hint="v_mfma_f32_16x16x16_bf16"),
        passed("matrix", hint="v_mfma_f32_16x16x16_bf16 (fp8 upcast)", where=other),
    )
    made = record(result(), result(evidence="compiled", findings=found))
    text = markdown.render(made)
    [row] = [line for line in text.splitlines() if line.startswith("| triton") and "| k " in line]
    assert [word.strip() for word in row.strip("|").split("|")] == [
        "triton", "k", "2", "4,096", "48", "0", "8 of 32", "v_mfma_f32_16x16x16_bf16 (fp8 upcast)",
    ]  # fmt: skip
    assert "shared_memory" not in markdown.margins(made)
    assert markdown.render(jsonfile.loads(jsonfile.dumps(made))) == text, "a report can be made again from report.json"
    rows = [line.split("|")[3].strip() for line in markdown.summary(made).splitlines() if "sparse_attn" in line]
    assert rows == ["interpreted", "compiled"], "one row for each kind of evidence"
    assert "## Compiled" not in markdown.render(record(result()))
    cases = ElementTree.fromstring(junit.render([made])).iter("testcase")
    assert len({(case.get("classname"), case.get("name")) for case in cases}) == 2, "JUnit readers tell them by their names"
