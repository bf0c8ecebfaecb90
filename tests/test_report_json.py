"""report.json: what is written validates, what is read is the same, and what is no record is told in a sentence."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from records import GOLDEN, finding, green, record, red, result

from m3check.report import files, jsonfile
from m3check.types import Case, Finding, M3CheckError, Status


@pytest.fixture(scope="module")
def validator() -> Any:
    schema = jsonfile.schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


@pytest.mark.parametrize("name", GOLDEN)
def test_a_written_record_validates_against_the_schema(name: str, validator: Any) -> None:
    validator.validate(json.loads(jsonfile.dumps(GOLDEN[name]())))


@pytest.mark.parametrize(
    ("path", "wrong"),
    [
        (("results", 0, "status"), "fine"),
        (("results", 0, "evidence"), "simulated"),
        (("results", 0, "findings", 0, "measured"), "large"),
        (("results", 0, "axes", "cache_dtype"), "float8"),
        (("exit",), 0),
    ],
)
def test_the_schema_refuses_what_is_wrong(path: tuple[str | int, ...], wrong: object, validator: Any) -> None:
    data = json.loads(jsonfile.dumps(green()))
    place = data
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = wrong

    with pytest.raises(jsonschema.ValidationError):
        validator.validate(data)


@pytest.mark.parametrize("field", ["schema_version", "arch", "environment", "command", "exit", "summary", "results"])
def test_the_schema_wants_every_field_of_a_record(field: str, validator: Any) -> None:
    data = json.loads(jsonfile.dumps(green()))
    del data[field]

    with pytest.raises(jsonschema.ValidationError):
        validator.validate(data)


@pytest.mark.parametrize("name", GOLDEN)
def test_a_record_is_the_same_after_writing_and_reading(name: str) -> None:
    wanted = GOLDEN[name]()

    read = jsonfile.loads(jsonfile.dumps(wanted))
    assert repr([r.findings for r in read.results]) == repr([r.findings for r in wanted.results])  # NaN equals itself in it
    assert [replace(r, findings=()) for r in read.results] == [replace(r, findings=()) for r in wanted.results]
    assert replace(read, results=()) == replace(wanted, results=())


def test_every_result_has_the_fields_of_the_design_in_plain_json() -> None:
    data = json.loads(jsonfile.dumps(red()), parse_constant=pytest.fail)

    assert list(data) == ["schema_version", "tool", "arch", "environment", "command", "exit", "summary", "results"]
    for told in data["results"]:
        assert list(told) == [
            *("case", "op", "provider", "kernel", "evidence", "axes", "status", "reason", "findings", "seconds", "repro")
        ]
        for each in told["findings"]:
            fields = ["check", "status", "measured", "limit", "where", "hint"]
            assert list(each) == fields or (each["status"] == "passed" and list(each) == fields[:4])


def test_the_schema_knows_every_axis_that_a_case_has() -> None:
    axes = Case(op="decode", query_lens=(1,), kv_lens=(9,)).axes()

    assert set(axes) == set(jsonfile.schema()["$defs"]["Result"]["properties"]["axes"]["properties"])


def test_axes_of_the_design_always_stand_and_others_where_they_are_moved() -> None:
    design = {
        "batch",
        "context",
        "query_len",
        "topk",
        "gqa",
        "kv_heads",
        "head_dim",
        "cache_dtype",
        "init_blocks",
        "local_blocks",
    }
    plain = Case(op="decode", query_lens=(2,), kv_lens=(9,))
    moved = replace(plain, max_query_len=4, seed=3, layout="pool", dtype="fp16")
    for case, more in ((plain, set()), (moved, {"max_query_len", "seed", "layout", "dtype"})):
        text = jsonfile.dump_result(result(axes=case.axes()))
        lean = json.loads(jsonfile.dumps(record(result(axes=case.axes()))))["results"][0]["axes"]

        assert set(lean) == design | {"fill"} | more
        assert jsonfile.load_result(text).axes == case.axes()
        assert jsonfile.loads(jsonfile.dumps(record(result(axes=case.axes())))).results[0].axes == case.axes()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1.0, 0.0, None, 1.25e-30])
def test_a_measured_value_survives(value: float | None) -> None:
    text = jsonfile.dump_result(result(findings=(finding(measured=value, limit=2.0),)))

    (found,) = jsonfile.load_result(text).findings
    assert repr(found.measured) == repr(value)
    assert json.loads(text, parse_constant=pytest.fail)


def test_figures_are_cut_to_six_digits_and_a_pass_to_what_is_read_of_it() -> None:
    exact = finding("exact", measured=0.0, limit=0.0)
    told = record(result(findings=(finding(measured=0.123456789, limit=0.0, where="row 3"), exact)))

    assert (
        '"findings":[{"check":"element","status":"passed","measured":0.123457,"limit":0},{"check":"exact","status":"passed"}]'
        in jsonfile.dumps(told)
    )
    assert "row 3" in jsonfile.dump_result(told.results[0])


def test_keys_that_are_not_known_are_ignored() -> None:
    data = json.loads(jsonfile.dumps(green()))
    data["colour"] = data["results"][0]["mood"] = data["results"][0]["findings"][0]["weight"] = 3

    assert jsonfile.loads(json.dumps(data)) == green()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no valid JSON"),
        ("{", "no valid JSON"),
        ("\udcff", "no valid JSON"),
        ("[]", "no schema_version"),
        ('{"tests": 3}', "no schema_version"),
        ('{"schema_version": "2.0"}', "schema 2.0; this m3check reads 1.x"),
        ('{"schema_version": "1.0"}', "missing required field"),
        ('{"schema_version": "1.7", "results": [3]}', "not a record of schema 1.7"),
    ],
)
def test_what_is_no_record_is_told_in_a_sentence(text: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    file.write_bytes(text.encode(errors="surrogateescape"))

    with pytest.raises(M3CheckError, match=said) as caught:
        jsonfile.read(file)
    assert str(file) in str(caught.value)


def test_a_status_that_is_not_known_is_told() -> None:
    text = jsonfile.dumps(green()).replace('"status":"passed"', '"status":"splendid"', 1)

    with pytest.raises(M3CheckError, match="splendid"):
        jsonfile.loads(text)


def test_a_folder_stands_for_its_report(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(jsonfile.dumps(green()))

    assert jsonfile.read(tmp_path) == green()
    with pytest.raises(M3CheckError, match="cannot be read"):
        jsonfile.read(tmp_path / "nowhere")


def test_a_torn_line_of_a_journal_is_a_value_error() -> None:
    line = jsonfile.dump_result(result())

    assert jsonfile.load_result(line) == result()
    with pytest.raises(ValueError, match=r"Unterminated|Expecting"):
        jsonfile.load_result(line[: len(line) // 2])


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = files.write_text(tmp_path / "report.json", "old")
    with pytest.raises(UnicodeEncodeError):
        files.write_text(target, "new \udc80")

    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
    assert target.stat().st_mode & 0o077 == 0o666 & ~files._umask() & 0o077


def test_a_full_run_of_two_providers_stays_under_four_megabytes() -> None:
    passed = tuple(
        finding(f"check_{i}", measured=0.123456789, limit=0.7654321, where="request 0, query 3") for i in range(4)
    )
    exact = tuple(finding(f"exact_{i}", measured=0.0, limit=0.0) for i in range(5))
    case = "sparse_attn/q=5+1+0,kv=2047+300+2305,h=2,g=4,topk=4,cache=fp8_e4m3fn,scale=token,layout=pool,{}"
    many = record(*(result(case=case.format(i), findings=passed + exact) for i in range(2 * 1736)))

    assert len(jsonfile.dumps(many)) < 4e6


def test_a_record_that_left_fields_out_is_written_whole() -> None:
    data = json.loads(jsonfile.dumps(record(result(Status.FAILED, findings=(finding(status=Status.FAILED),)))))
    del data["results"][0]["reason"], data["results"][0]["findings"][0]["hint"]
    again = json.loads(jsonfile.dumps(jsonfile.loads(json.dumps(data))))

    assert again["results"][0]["reason"] == again["results"][0]["findings"][0]["hint"] == ""


def test_a_finding_needs_only_its_check_and_status() -> None:
    told = asdict(Finding("element", Status.PASSED))

    assert told == {"check": "element", "status": "passed", "measured": None, "limit": None, "where": "", "hint": ""}
