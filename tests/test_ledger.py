"""The ledger file: what an entry means, and that a mistake in it is told with file, entry and how to mend it."""

from __future__ import annotations

import datetime
from dataclasses import replace
from pathlib import Path

import pytest
from records import finding, result

from m3check import ledgerfile
from m3check.cli import main
from m3check.ledger import Entry, restored
from m3check.types import M3CheckError, Status

DAY = datetime.date(2026, 6, 1)
FAILED = result(Status.FAILED, reason="ids: lost", findings=(finding(status=Status.FAILED, measured=3.0),))
GOOD = {
    "op": '"sparse_attn"',
    "reason": '"r"',
    "issue": '"https://example.org/1"',
    "expires": "2026-12-31",
}


def written(path: Path, **words: str | None) -> Path:
    lines = [f"{key} = {value}" for key, value in {**GOOD, **words}.items() if value is not None]
    path.write_text("\n".join(["# known failures", "", "[[known]]", *lines, ""]))
    return path


def entry(**words: object) -> Entry:
    fixed = {"place": "known.toml, entry 1", "line": 3, "reason": "r", "issue": "https://e.org", "expires": DAY}
    return Entry(**{**fixed, "op": "sparse_attn", **words})  # type: ignore[arg-type]


def test_an_entry_is_read_with_its_line(tmp_path: Path) -> None:
    (read,) = ledgerfile.read(written(tmp_path / "known.toml", arch='["sm90", "sm100"]', provider='"vllm"')).entries

    assert read.line == 3
    assert (read.arch, read.provider, read.status) == (("sm90", "sm100"), ("vllm",), ("failed",))
    assert read.expires == datetime.date(2026, 12, 31)
    assert read.named == f"{tmp_path / 'known.toml'}, entry 1 (op 'sparse_attn')"


@pytest.mark.parametrize("date", ["2026-12-31", '"2026-12-31"', "2026-12-31T08:00:00Z"])
def test_a_day_may_be_written_in_each_way_that_toml_has(tmp_path: Path, date: str) -> None:
    assert ledgerfile.read(written(tmp_path / "known.toml", expires=date)).entries[0].expires.isoformat() == "2026-12-31"


def test_a_case_means_the_same_whatever_the_order_of_its_words(tmp_path: Path) -> None:
    path = written(tmp_path / "known.toml", op=None, case='"sparse_attn/kv=2304,q=5,h=4"')

    assert ledgerfile.read(path).entries[0].case == "sparse_attn/q=5,kv=2304"


def test_an_empty_ledger_is_a_ledger(tmp_path: Path) -> None:
    (tmp_path / "known.toml").write_text("# nothing is known\n")

    assert ledgerfile.read(tmp_path / "known.toml").entries == ()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"reason": None}, 'reason missing; add reason = "what is wrong"'),
        ({"reason": '""'}, "reason missing"),
        ({"issue": None, "expires": None}, "issue and expires missing"),
        ({"op": None}, "it selects nothing; add case ="),
        ({"opp": '"decode"'}, "unknown key 'opp'; did you mean op? Known: case, op, select, arch"),
        ({"op": '"decod"'}, "unknown op 'decod'; did you mean decode?"),
        ({"case": '"decode"'}, "expected a '/' after the op"),
        ({"select": '"(fp8"'}, "a parenthesis is not closed"),
        ({"select": "3"}, "select = 3 is not a text"),
        ({"arch": '"sm91"'}, "unknown arch 'sm91'; did you mean"),
        ({"arch": "[]"}, "arch = [] is neither a text nor a list of texts"),
        ({"provider": '"vlm"'}, "unknown provider 'vlm'"),
        ({"evidence": '"luck"'}, "unknown evidence 'luck'"),
        ({"status": '"passed"'}, "unknown status 'passed'; "),
        ({"issue": '"issue 7"'}, "issue = 'issue 7' is no address; wanted https://…"),
        ({"expires": '"soon"'}, "expires = 'soon' is no date; wanted expires = 2027-01-31 (year-month-day)"),
        ({"expires": "2026"}, "expires = 2026 is no date"),
    ],
)
def test_a_mistake_names_file_and_entry_and_exits_4_before_anything_runs(
    words: dict[str, str | None], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path / "known.toml", **words)
    out = tmp_path / "out"

    assert main(["run", "--arch", "sm100", "--ledger", str(path), "--out", str(out)]) == 4
    err = capsys.readouterr().err
    assert f"m3check: exit 4: the ledger {path}, entry 1: " in err
    assert said in err
    assert not out.exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[[known]", "is not TOML"),
        ("[known]\nop = 'decode'", "known is not a list of tables; write [[known]] over each entry"),
        ("[[knwon]]\nop = 'decode'", "unknown key 'knwon'; it holds [[known]] entries only"),
    ],
)
def test_a_file_that_is_no_ledger_is_told(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "known.toml").write_text(text)

    with pytest.raises(M3CheckError, match=r"the ledger .*known\.toml"):
        ledgerfile.read(tmp_path / "known.toml")
    with pytest.raises(M3CheckError) as raised:
        ledgerfile.read(tmp_path / "known.toml")
    assert said in str(raised.value)


def test_a_file_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(M3CheckError, match="cannot be read: No such file or directory"):
        ledgerfile.read(tmp_path / "gone.toml")


@pytest.mark.parametrize(
    ("words", "means"),
    [
        ({}, True),
        ({"op": "decode"}, False),
        ({"op": "", "case": "sparse_attn/q=5,kv=2304"}, True),
        ({"op": "", "case": "sparse_attn/q=5,kv=2305"}, False),
        ({"select": "fill=gauss and not fp8"}, True),
        ({"select": "fp8"}, False),
        ({"provider": ("triton",)}, True),
        ({"provider": ("vllm", "triton")}, True),
        ({"provider": ("vllm",)}, False),
        ({"evidence": ("interpreted",)}, True),
        ({"evidence": ("compiled",)}, False),
    ],
)
def test_all_that_an_entry_says_must_hold(words: dict[str, object], means: bool) -> None:
    assert entry(**words).means(FAILED) is means


def test_a_provider_without_a_version_is_any_version_of_it() -> None:
    new = replace(FAILED, provider="vllm==0.33.0")

    assert entry(provider=("vllm",)).means(new)
    assert entry(provider=("vllm==0.33.0",)).means(new)
    assert not entry(provider=("vllm==0.32.0",)).means(new)


@pytest.mark.parametrize(
    ("words", "excuses"),
    [
        ({}, True),
        ({"status": ("crashed",)}, False),
        ({"status": ("crashed", "failed")}, True),
        ({"check": ("element",)}, True),
        ({"check": ("row",)}, False),
    ],
)
def test_an_entry_excuses_the_kinds_of_failure_that_it_names(words: dict[str, object], excuses: bool) -> None:
    assert entry(**words).excuses(FAILED) is excuses


def test_a_second_check_that_fails_is_not_excused_by_an_entry_for_the_first() -> None:
    both = replace(FAILED, findings=(*FAILED.findings, finding("row", Status.FAILED)))

    assert not entry(check=("element",)).excuses(both)
    assert entry(check=("element", "row")).excuses(both)


@pytest.mark.parametrize("status", [Status.FAILED, Status.ERROR, Status.CRASHED, Status.TIMEOUT])
def test_a_known_result_can_be_restored(status: Status, tmp_path: Path) -> None:
    before = replace(FAILED, status=status, reason="a: b: c")
    ledger = ledgerfile.read(written(tmp_path / "known.toml", status='["failed", "error", "crashed", "timeout"]'))
    known = ledger.cover(before, "sm100", False, DAY)

    assert known.status is Status.KNOWN
    assert restored(known) == before
    assert restored(before) is before
    assert ledger.cover(known, "sm100", False, DAY) is known


def test_two_coverings_say_the_same_once(tmp_path: Path) -> None:
    ledger = ledgerfile.read(written(tmp_path / "known.toml", expires="2026-01-01"))
    once = ledger.cover(FAILED, "sm100", False, DAY)

    assert once.reason.startswith("ids: lost; ")
    assert ledger.cover(once, "sm100", False, DAY) == once


def test_a_note_that_m3check_did_not_write_restores_nothing() -> None:
    odd = result(Status.KNOWN, findings=(finding("ledger", Status.KNOWN, hint="whatever"),))

    assert restored(odd) is odd
