"""What GitHub Actions gets: a summary that fits, ten annotations, and nothing in them that a kernel could have ordered."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from records import finding, record, red, result

from m3check.cli import main
from m3check.report import compare, github, jsonfile, markdown
from m3check.types import Exit, Record, Status


def told(made: Record, sentence: str = "floor min_cases: decode ran 1 case", **words: object) -> Record:
    breach = {"sentence": sentence, "file": "known.toml", "line": 3, **words}
    return replace(made, environment={**made.environment, "gate": {"breaches": [breach]}})


def test_a_red_result_is_an_error_with_its_finding_and_its_repro() -> None:
    first, *_ = github.errors(red())

    assert first.startswith("::error title=failed sparse_attn [triton]::sparse_attn/q=5,kv=2304%0Aelement: 1.5 > 1%0A")
    assert first.endswith("%0Am3check run --arch sm100 --kernels triton --case sparse_attn/q=5,kv=2304")


def test_a_kernel_file_of_the_repository_is_named_as_the_file() -> None:
    made = record(result(Status.ERROR, provider="./kernels/mine.py", reason="it raised"))

    assert github.errors(made)[0].startswith("::error file=kernels/mine.py,title=error sparse_attn [./kernels/mine.py]::")


def test_a_breach_comes_first_and_points_at_its_line() -> None:
    lines = github.errors(told(red()))

    assert lines[0] == "::error file=known.toml,line=3,title=m3check gate::floor min_cases: decode ran 1 case"
    assert len(lines) == 6


def test_a_green_run_is_not_annotated_and_one_without_a_verdict_is() -> None:
    assert github.errors(record(result())) == []
    assert github.errors(record(exit=Exit(5, "nothing ran"))) == ["::error title=m3check sm100::nothing ran"]


def test_beyond_ten_the_last_one_says_how_many_are_left() -> None:
    made = record(*(result(Status.FAILED, case=f"sparse_attn/q={i},kv=9") for i in range(1, 31)))
    lines = github.errors(made)

    assert len(lines) == 10
    assert lines[-1] == "::error title=m3check sm100::21 more; see the job summary or report.md"
    assert len(github.errors(record(*made.results[:10]))) == 10


def test_text_from_outside_cannot_begin_a_command_or_add_a_property() -> None:
    nasty = "50%\r\n::error::gotcha\n::set-output name=a::b\x1b[31m"
    made = told(record(result(Status.ERROR, provider="a,b: c\nd", reason=nasty)), sentence=nasty, file="a,line=9::x\n")

    for line in github.errors(made):
        assert "\n" not in line
        assert "\r" not in line
        assert "\x1b" not in line
        assert line.startswith("::error ")
    breach, error = github.errors(made)
    assert breach.startswith("::error file=a%2Cline=9%3A%3Ax%0A,line=3,title=m3check gate::50%25%0D%0A::error::gotcha%0A")
    assert "title=error sparse_attn [a%2Cb%3A c%0Ad]::" in error


def test_a_long_text_is_cut() -> None:
    (line,) = github.errors(record(result(Status.ERROR, reason="x" * 10_000)))

    assert len(line) < github.LONGEST + 200
    assert line.endswith("…")


def test_regressions_are_annotated() -> None:
    found = compare.compare(record(result()), record(result(Status.CRASHED, reason="signal 11")))

    assert github.regressions(found) == [
        "::error title=m3check%3A turned red::sparse_attn/q=5,kv=2304 [triton] crashed: signal 11"
    ]


def test_a_summary_that_fits_is_whole_and_one_that_does_not_says_so() -> None:
    text = markdown.render(red())
    assert github.summary(text) == text

    many = record(*(result(Status.FAILED, case=f"sparse_attn/q={i},kv=2304", reason="é" * 400) for i in range(1, 5000)))
    long = markdown.render(many)
    cut = github.summary(long)
    assert len(long.encode()) > github.SUMMARY_LIMIT > len(cut.encode()) > github.SUMMARY_LIMIT - 5000
    assert cut.startswith("# m3check sm100: RED")
    assert cut.splitlines()[-1].startswith("**Cut here: GitHub shows 1024 KB of ")
    assert "The whole report is `report.md`" in cut


def test_a_cut_inside_a_code_block_closes_it() -> None:
    cut = github.summary("```\n" + "x\n" * 1000, room=500)

    assert cut.count("```") == 2
    assert len(cut.encode()) < 500
    assert github.summary("y" * 1000, room=20) == "", "not even the sentence fits"


@pytest.fixture
def actions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on GitHub Actions with three records; the summary's path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))
    for name, made in {
        "green": record(result()),
        "red": record(result(Status.FAILED, findings=(finding("row", Status.FAILED),))),
    }.items():
        Path(f"{name}.json").write_text(jsonfile.dumps(made))
    return tmp_path / "summary.md"


def test_compare_and_merge_leave_a_summary_and_annotations(actions: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "green.json", "red.json"]) == 1
    out, err = capsys.readouterr()
    assert actions.read_text() == out
    assert "::error title=m3check%3A turned red::" in err
    assert "::error" not in out

    assert main(["merge", "red.json", "--out", "all"]) == 1
    assert actions.read_text() == out + Path("all/report.md").read_text()
    assert "::error title=failed sparse_attn [triton]::" in capsys.readouterr().err


def test_a_summary_that_cannot_be_written_changes_no_exit_code(
    actions: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", "/nowhere/summary.md")
    assert main(["compare", "green.json", "green.json"]) == 0
    assert "m3check: the job summary cannot be written: No such file or directory" in capsys.readouterr().err

    actions.write_text("x" * (github.SUMMARY_LIMIT - 10))
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(actions))
    assert main(["compare", "green.json", "green.json"]) == 0
    assert "the job summary is full; nothing was added" in capsys.readouterr().err
    assert actions.stat().st_size < github.SUMMARY_LIMIT


def test_elsewhere_nothing_is_left(
    actions: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GITHUB_ACTIONS")
    main(["compare", "green.json", "red.json"])

    assert "::" not in capsys.readouterr().err
    assert not actions.exists()
