"""report.json: what is written validates, what is read is the same, and what is no record is told in a sentence."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
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

    assert repr(jsonfile.loads(jsonfile.dumps(wanted))) == repr(wanted)  # repr: NaN equals itself in it


def test_every_result_has_the_fields_of_the_design_in_plain_json() -> None:
    data = json.loads(jsonfile.dumps(red()), parse_constant=pytest.fail)

    assert list(data) == ["schema_version", "tool", "arch", "environment", "command", "exit", "summary", "results"]
    for told in data["results"]:
        assert list(told) == [
            *("case", "op", "provider", "kernel", "evidence", "axes", "status", "reason", "findings", "seconds", "repro")
        ]
        for each in told["findings"]:
            assert list(each) == ["check", "status", "measured", "limit", "where", "hint"]


def test_the_schema_knows_every_axis_that_a_case_writes() -> None:
    axes = Case(op="decode", query_lens=(1,), kv_lens=(9,)).axes()
    known = jsonfile.schema()["$defs"]["Result"]["properties"]["axes"]["properties"]

    assert set(axes) - set(known) <= {"scales", "layout", "ids", "max_query_len", "seed"}
    assert set(known) <= set(axes)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1.0, 0.0, None, 1.25e-30])
def test_a_measured_value_survives(value: float | None) -> None:
    text = jsonfile.dump_result(result(findings=(finding(measured=value, limit=2.0),)))

    (found,) = jsonfile.load_result(text).findings
    assert repr(found.measured) == repr(value)
    assert json.loads(text, parse_constant=pytest.fail)


def test_figures_are_cut_to_seven_digits() -> None:
    told = jsonfile.dump_result(result(findings=(finding(measured=0.123456789),)))

    assert '"measured":0.1234568' in told


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


def test_three_thousand_results_stay_under_four_megabytes() -> None:
    findings = tuple(
        finding(check, measured=0.123456789, limit=0.7654321) for check in ("element", "row", "filter", "untouched")
    )
    many = record(
        *(result(case=f"sparse_attn/q=5+1+64,kv={i}+129+384,h=2,fill=gauss", findings=findings) for i in range(3000))
    )

    assert len(jsonfile.dumps(many)) < 4 << 20


def test_a_finding_needs_only_its_check_and_status() -> None:
    told = asdict(Finding("element", Status.PASSED))

    assert told == {"check": "element", "status": "passed", "measured": None, "limit": None, "where": "", "hint": ""}
