"""The command line: what it asks of the run, its exit codes, and that a mistake is a sentence on stderr."""

from __future__ import annotations

import errno
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from records import finding, record, result

from m3check import api
from m3check.cli import main
from m3check.config import Event, RunOptions
from m3check.report import jsonfile
from m3check.types import M3CheckError, PlanLine, Record, Status

Main = Callable[..., tuple[int, str, str]]


@pytest.fixture
def m3check(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Main:
    """Run one command line in an empty folder; (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def call(line: str) -> tuple[int, str, str]:
        code = main(shlex.split(line))
        out, err = capsys.readouterr()
        return code, out, err

    return call


def runs(
    monkeypatch: pytest.MonkeyPatch, *results: Any, then: BaseException | None = None, **words: Any
) -> list[RunOptions]:
    """Have api.run report these results, then raise or return their record; gives the options it was called with."""
    asked: list[RunOptions] = []

    def run(options: RunOptions) -> Record:
        asked.append(options)
        assert options.progress is not None
        for done, each in enumerate(results, start=1):
            options.progress(Event(done, len(results), each))
        if then is not None:
            raise then
        return record(*results, command=options.command, **words)

    monkeypatch.setattr(api, "run", run)
    return asked


FAILED = result(
    Status.FAILED,
    findings=(finding("lost_token", Status.FAILED, measured=91.0, limit=8.0, where="token 3", hint="key 5 is lost"),),
)


def test_every_flag_reaches_the_run(m3check: Main, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = runs(monkeypatch, result())
    line = (
        "m3check run --arch sm100 --kernels vllm==0.33.0 ./mine.py --op sparse_attn decode --tier ci "
        "-k 'gauss and not fp8' --case a b --shard 2/3 --jobs 4 --seed 7 --timeout 2.5 --resume --require interpreted "
        "--strict --offline --out here"
    )
    m3check(line.removeprefix("m3check "))
    (options,) = asked

    assert (options.kernels, options.ops, options.cases) == (
        ("vllm==0.33.0", "./mine.py"),
        ("sparse_attn", "decode"),
        ("a", "b"),
    )
    assert (options.tier, options.expr, options.shard, options.jobs) == ("ci", "gauss and not fp8", (2, 3), 4)
    assert (options.seed, options.timeout, options.resume, options.require) == (7, 2.5, True, "interpreted")
    assert (options.strict, options.offline, options.out) == (True, True, Path("here"))
    assert options.command == line


def test_what_is_not_said_stays_as_the_options_have_it(m3check: Main, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = runs(monkeypatch, result())
    m3check("run --arch sm90")
    (options,) = asked

    assert options == RunOptions(arch="sm90", progress=options.progress)
    assert (options.kernels, options.tier, options.folder) == (("triton",), "smoke", Path("reports/sm90"))
    assert options.command == "m3check run --arch sm90"


def test_a_green_run_exits_0_and_leaves_three_reports(m3check: Main, monkeypatch: pytest.MonkeyPatch) -> None:
    runs(monkeypatch, result())
    code, out, err = m3check("run --arch sm100")

    assert code == 0
    assert out.startswith("# m3check sm100: green")
    assert "Nothing here ran on sm100 hardware" in out
    assert err.splitlines()[-1] == "m3check: exit 0: 1 results, none red; report: reports/sm100/report.md"
    assert sorted(p.name for p in Path("reports/sm100").iterdir()) == [
        "junit.xml",
        "report.html",
        "report.json",
        "report.md",
    ]
    assert jsonfile.read("reports/sm100").exit.code == 0


def test_a_red_run_exits_1_and_tells_each_failure_at_once(m3check: Main, monkeypatch: pytest.MonkeyPatch) -> None:
    runs(monkeypatch, result(op="decode"), FAILED)
    code, out, err = m3check("run --arch sm100")

    assert code == 1
    assert "FAILED sparse_attn/q=5,kv=2304 [triton] lost_token: 91 > 8 at token 3 (key 5 is lost)\n  m3check run" in err
    assert "FAILED" not in out


def test_a_run_where_nothing_ran_exits_5(m3check: Main, monkeypatch: pytest.MonkeyPatch) -> None:
    runs(monkeypatch, result(Status.SKIPPED, reason="needs a device"))
    code, _, err = m3check("run --arch sm100")

    assert code == 5
    assert "needs a device" in err.splitlines()[-1]


def test_an_interrupt_leaves_what_came_by_then(m3check: Main, monkeypatch: pytest.MonkeyPatch) -> None:
    runs(monkeypatch, result(), FAILED, then=KeyboardInterrupt())
    code, _, err = m3check("run --arch sm100")
    left = jsonfile.read("reports/sm100")

    assert code == left.exit.code == 2
    assert len(left.results) == 2
    assert err.splitlines()[-1].startswith("m3check: exit 2: interrupted after 2 results; report: ")


def test_a_defect_of_m3check_exits_3_with_a_traceback_and_keeps_the_results(
    m3check: Main, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs(monkeypatch, result(), then=ZeroDivisionError("by nothing"))
    code, _, err = m3check("run --arch sm100")

    assert code == 3
    assert "Traceback" in err
    assert "ZeroDivisionError: by nothing" in err.splitlines()[-1]
    assert len(jsonfile.read("reports/sm100").results) == 1


def test_a_defect_outside_a_run_exits_3_too(m3check: Main, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsonfile, "schema", lambda: 1 / 0)
    code, _, err = m3check("schema")

    assert code == 3
    assert "this is a defect of m3check" in err.splitlines()[-1]


def test_a_provider_that_cannot_be_found_exits_4_and_leaves_nothing(m3check: Main, monkeypatch: pytest.MonkeyPatch) -> None:
    runs(monkeypatch, then=M3CheckError("there is no vllm 99"))
    code, out, err = m3check("run --arch sm100 --kernels vllm==99")

    assert (code, out, err) == (4, "", "m3check: exit 4: there is no vllm 99\n")
    assert not Path("reports/sm100").exists()


def test_a_provider_lost_in_the_middle_exits_4_and_keeps_the_results(
    m3check: Main, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs(monkeypatch, result(), then=M3CheckError("triton could not be loaded again"))
    code, _, _ = m3check("run --arch sm100")

    assert code == 4
    assert len(jsonfile.read("reports/sm100").results) == 1


@pytest.mark.parametrize("name", ["torch", "triton"])
def test_a_missing_library_is_a_sentence_with_the_line_that_mends_it(
    m3check: Main, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    runs(monkeypatch, then=ModuleNotFoundError(f"No module named '{name}'", name=name))
    code, _, err = m3check("run --arch sm100")

    assert code == 4
    assert f"pip install {name}" in err
    assert "Traceback" not in err


def test_a_folder_that_cannot_be_written_is_found_before_anything_runs(
    m3check: Main, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = runs(monkeypatch, result())
    Path("taken").write_text("a file")
    code, _, err = m3check("run --arch sm100 --out taken/reports")

    assert (code, asked) == (4, [])
    assert "taken/reports cannot be written" in err
    assert Path("taken").read_text() == "a file"


def test_a_disk_that_fills_under_the_journal_exits_3_and_keeps_the_results(
    m3check: Main, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs(monkeypatch, result(), FAILED, then=OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "journal.jsonl"))
    code, _, err = m3check("run --arch sm100")

    assert code == 3
    assert "No space left on device (journal.jsonl)" in err.splitlines()[-1]
    assert len(jsonfile.read("reports/sm100").results) == 2


def full_disk(monkeypatch: pytest.MonkeyPatch, full: Callable[[Path], bool]) -> None:
    from m3check.report import files

    real = files.write_text

    def write_text(path: Path, text: str) -> Path:
        if full(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return real(path, text)

    monkeypatch.setattr(files, "write_text", write_text)


def test_a_disk_that_fills_under_the_report_moves_it(
    m3check: Main, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(elsewhere))
    full_disk(monkeypatch, lambda path: elsewhere not in path.parents)
    runs(monkeypatch, result())
    code, _, err = m3check("run --arch sm100")
    (moved,) = elsewhere.glob("m3check-*/report.json")

    assert code == jsonfile.read(moved).exit.code == 3
    assert str(moved.with_name("report.md")) in err.splitlines()[-1]
    assert "1 results, none red; but the reports could not be written to reports/sm100" in err


def test_with_no_disk_at_all_the_record_goes_to_stdout(m3check: Main, monkeypatch: pytest.MonkeyPatch) -> None:
    full_disk(monkeypatch, lambda _path: True)
    runs(monkeypatch, result())
    code, out, _ = m3check("run --arch sm100")

    assert code == 3
    assert jsonfile.loads(out[: out.index("\n}\n") + 3]).results == (result(),)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("", "no command given"),
        ("rum", "unknown command 'rum'; did you mean run? Known: run, list"),
        ("run", "required: --arch"),
        ("run --arch sm1000", "unknown arch 'sm1000'; did you mean sm100? Known: sm80"),
        ("run --arch sm100 --op sparse_atn", "unknown op 'sparse_atn'; did you mean sparse_attn?"),
        ("run --arch sm100 --tier smok", "unknown tier 'smok'; did you mean smoke? Known: smoke, ci, full, production"),
        ("run --arch sm100 --require luck", "unknown evidence 'luck'; known: device, interpreted, compiled"),
        ("run --arch sm100 --kernels vlm", "unknown provider 'vlm'"),
        ("run --arch sm100 --case sparse_attn", "case"),
        ("run --arch sm100 --shard 4/3", "--shard 4/3 does not exist"),
        ("run --arch sm100 --shard one", "wanted I/N"),
        ("run --arch sm100 --jobs -1", "--jobs -1"),
        ("run --arch sm100 --timeout 0", "--timeout 0 leaves no time"),
        ("run --arch sm100 --timeout nan", "leaves no time"),
        ("run --arch sm100 -k '(a'", "a parenthesis is not closed"),
        ("run --arch sm100 --sanitize", "watches every address already"),
        ("run --arch sm100 --sanitize memchk", "did you mean memcheck?"),
        ("run --arch sm100 --colour", "unrecognized arguments: --colour"),
        ("run --arch sm100 --ki x", "unrecognized arguments"),
        ("list --arch sm100 --format tabel", "unknown format 'tabel'; did you mean table?"),
        ("archs --explain sm42", "unknown arch 'sm42'"),
        ("show nowhere", "cannot be read"),
        ("show nowhere --format htm", "unknown format 'htm'; did you mean html?"),
        ("compare a", "NEW"),
        ("compare a b c", "unrecognized arguments: c"),
        ("compare a b --growth 0.5", "--growth 0.5 is no growth"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_4(m3check: Main, line: str, said: str) -> None:
    code, out, err = m3check(line)
    last = err.splitlines()[-1]

    assert (code, out) == (4, "")
    assert last.startswith("m3check: exit 4: ")
    assert said in last
    assert "Traceback" not in err


def test_list_prints_the_plan_and_its_reasons(m3check: Main, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [
        PlanLine("decode/a", "decode", "triton", "interpreted"),
        PlanLine("decode/b", "decode", "triton", "interpreted", "too big"),
    ]
    monkeypatch.setattr(api, "plan", lambda _options: lines)
    code, out, err = m3check("list --arch sm100")

    assert code == 0
    plan, _, production = out.partition("\n\n")
    assert "fmha_sm100 sparse_topk_select" in production
    assert [row.split() for row in plan.splitlines()[1:]] == [
        ["decode", "triton", "interpreted", "decode/a"],
        ["decode", "triton", "interpreted", "decode/b", "too", "big"],
    ]
    assert "2 planned, 1 of them skipped" in err
    assert json.loads(m3check("list --arch sm100 --format json")[1])[1]["skip"] == "too big"
    assert m3check("list --arch sm100 --require device")[0] == 1
    assert m3check("list --arch sm100 --require interpreted")[0] == 0
    monkeypatch.setattr(api, "plan", lambda _options: lines[1:])
    assert m3check("list --arch sm100")[0] == 5


def test_list_plans_the_real_smoke_tier(m3check: Main) -> None:
    code, out, _ = m3check("list --arch sm100 --format json -k 'gauss and not fp8' --op sparse_attn")

    assert code == 0
    assert {line["op"] for line in json.loads(out)} == {"sparse_attn"}


def test_archs_show_every_target_and_explain_one(m3check: Main) -> None:
    from m3check.arch import ARCHS

    _, out, _ = m3check("archs")
    assert [line.split()[0] for line in out.splitlines()[1:]] == list(ARCHS)
    code, out, _ = m3check("archs --explain gfx942")
    assert code == 0
    assert "65536 bytes" in out
    assert "Khattak & Mikaitis" in out
    assert "AITER sparse paged attention" in out
    _, out, _ = m3check("archs --explain sm100")
    assert "fmha_sm100 OnlyScore" in out
    assert "not run here, needs SM100" in out


def test_kernels_show_every_provider_and_the_signatures(m3check: Main) -> None:
    import ast

    from m3check.kernels import PROVIDERS
    from m3check.kernels.contract import SIGNATURES

    code, out, _ = m3check("kernels")
    assert code == 0
    assert all(provider.name in out for provider in PROVIDERS)
    _, out, _ = m3check("kernels --signatures")
    stubs = {
        node.name: [a.arg for a in node.args.kwonlyargs]
        for node in ast.parse(out).body
        if isinstance(node, ast.FunctionDef)
    }
    assert stubs == {op: list(parameters) for op, (parameters, _) in SIGNATURES.items()}
    _, out, _ = m3check("kernels --signatures index_topk")
    assert "def index_topk" in out
    assert "sm_scale" not in out
    assert not any(f"def {op}(" in out for op in SIGNATURES if op != "index_topk")
    code, _, err = m3check("kernels --signatures index_tpk")
    assert code == 4
    assert "did you mean index_topk?" in err


def test_kernels_show_every_promise_as_python_with_its_meaning(m3check: Main) -> None:
    from dataclasses import fields

    from m3check.types import Profile

    code, out, _ = m3check("kernels --profile")
    said: dict[str, object] = {}
    exec("\n".join(line for line in out.splitlines() if not line.startswith(" ")), said)  # its own text, made just now
    assert code == 0
    assert {field.name: said[field.name] for field in fields(Profile)} == vars(Profile())
    assert "smaller_id" in out


def test_schema_is_json_on_stdout(m3check: Main) -> None:
    code, out, err = m3check("schema")

    assert (code, err) == (0, "")
    assert json.loads(out)["title"].startswith("m3check record")


def saved(folder: str, *results: Any, **words: Any) -> str:
    Path(folder).mkdir()
    Path(folder, "report.json").write_text(jsonfile.dumps(record(*results, **words)))
    return folder


def test_show_renders_one_record_or_several(m3check: Main) -> None:
    saved("a", result())
    saved("b", FAILED, arch="sm90")

    assert m3check("show a")[:2] == (0, m3check("show a/report.json")[1])
    assert "# m3check: 2 records" in m3check("show a b")[1]
    assert m3check("show b --format junit")[1].startswith("<?xml")
    assert jsonfile.loads(m3check("show b --format json")[1]).arch == "sm90"


def test_compare_exits_1_on_a_regression_alone(m3check: Main) -> None:
    saved("old", result())
    saved("new", FAILED)

    assert m3check("compare old old")[0] == 0
    assert m3check("compare new old")[0] == 0
    code, out, err = m3check("compare old new")
    assert code == 1
    assert "Turned red (1)" in out
    assert err == "m3check: exit 1: 1 regression, 1 results in both\n"
    Path("old/report.json").write_text("{")
    assert m3check("compare old new")[0] == 4


def test_merge_judges_the_shards_as_one_run(m3check: Main) -> None:
    line = "m3check run --arch sm100 --kernels triton vllm --shard"
    saved("a", result(), command=f"{line} 1/2")
    saved("b", result(op="decode", provider="vllm"), command=f"{line} 2/2")
    saved("red", result(Status.FAILED, op="prefill"), command=f"{line} 2/2")

    assert m3check("merge a b")[0] == 0
    code, out, err = m3check("merge a b --out both")
    assert (code, out) == (0, "")
    assert "report: both/report.md" in err
    assert jsonfile.read("both").command == "m3check merge a b --out both"
    assert m3check("merge a")[0] == 5
    assert "shards are missing: 2/2" in m3check("merge a")[2]
    assert m3check("merge a b red")[0] == 1
    code, out, _ = m3check("merge a red")
    assert jsonfile.loads(out).exit.reason == "1 failed of 2 results; no result for vllm"


def test_merge_does_not_make_a_broken_run_good(m3check: Main) -> None:
    from m3check.types import Exit

    saved("a", result(), exit=Exit(2, "interrupted after 1 results"))
    saved("b", result(op="decode"))

    code, _, err = m3check("merge a b")
    assert code == 2
    assert "interrupted after 1 results" in err


def process(*words: str, **more: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "m3check", *words], capture_output=True, text=True, check=False, **more)


def test_help_and_version_are_data_and_import_nothing_heavy() -> None:
    code = (
        "import sys; from m3check.cli import main\n"
        "try: main(['run', '--help'])\n"
        "except SystemExit as e: assert e.code == 0\n"
        "print([m for m in ('torch', 'msgspec', 'tabulate', 'numpy', 'dataclasses', 'm3check.types') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, check=False, env=_paths())

    assert done.stdout.splitlines()[-1] == "[]"
    assert "--save-failures N" in done.stdout
    assert process("--version").stdout.startswith("m3check ")


def _paths() -> dict[str, str]:
    """Without site-packages' start-up hooks, which import what m3check does not."""
    import m3check

    return {**os.environ, "PYTHONPATH": str(Path(m3check.__file__).parents[1])}


def test_help_answers_at_once() -> None:
    used = min(_processor_seconds() for _ in range(3))

    assert used < 0.3, f"m3check run --help took {used:.2f} s of processor time at best"


def _processor_seconds() -> float:
    """Of one `m3check run --help`; other than the wall clock it does not depend on who else uses the machine."""
    before = os.times()
    assert process("run", "--help").returncode == 0
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def test_a_reader_that_goes_away_is_no_mistake() -> None:
    line = f"{shlex.quote(sys.executable)} -m m3check kernels --signatures"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", f"{line} | true"], capture_output=True, text=True, check=False)

    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_under_stdout_is_a_sentence() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "m3check", "schema"], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )

    assert (done.returncode, done.stderr) == (3, "m3check: exit 3: cannot write: No space left on device\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_summary_that_cannot_be_printed_changes_no_verdict(tmp_path: Path) -> None:
    script = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from records import record, result; from m3check import api; from m3check.cli import main\n"
        "api.run = lambda options: record(result())\n"
        "sys.exit(main(['run', '--arch', 'sm100']))"
    )
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", script], cwd=tmp_path, stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )

    assert done.returncode == 0, done.stderr
    assert "cannot be written to stdout" in done.stderr
    assert jsonfile.read(tmp_path / "reports/sm100").exit.code == 0


def test_a_job_that_is_ended_leaves_a_report(tmp_path: Path) -> None:
    script = (
        "import sys, time; from m3check import api; from m3check.cli import main\n"
        "def run(options):\n"
        "    print('ready', flush=True); time.sleep(60)\n"
        "api.run = run\n"
        "sys.exit(main(['run', '--arch', 'sm100']))"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", script], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    child.send_signal(signal.SIGTERM)
    _, err = child.communicate(timeout=30)

    assert child.returncode == 2, err
    assert jsonfile.read(tmp_path / "reports/sm100").exit.code == 2
