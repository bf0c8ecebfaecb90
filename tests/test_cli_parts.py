"""What the command line is made of: -k expressions, options, progress, doctor."""

from __future__ import annotations

import io
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from records import finding, result

from m3check import doctor
from m3check.cli import parser
from m3check.commands.options import options
from m3check.commands.progress import Progress
from m3check.config import Event, RunOptions
from m3check.expression import matcher
from m3check.types import M3CheckError, Status

TEXT = "sparse_attn/q=5,kv=2304,fill=ties cache_dtype=bf16"


@pytest.mark.parametrize(
    ("expr", "matches"),
    [
        ("", True),
        ("sparse_attn", True),
        ("SPARSE", True),
        ("decode", False),
        ("not decode", True),
        ("ties and bf16", True),
        ("ties and fp8", False),
        ("decode or ties", True),
        ("decode or ties and fp8", False),
        ("(decode or ties) and bf16", True),
        ("not (decode or ties)", False),
        ("not not ties", True),
        ("kv=2304,fill=ties", True),
        ("not decode and not fp8", True),
        ("not ties or bf16", True),
    ],
)
def test_an_expression_matches_as_in_pytest(expr: str, matches: bool) -> None:
    assert matcher(expr)(TEXT) is matches


@pytest.mark.parametrize("expr", ["a b", "a and", "or a", "not", "(a", "a)", "()", "a $ b", "and", "a (b)"])
def test_a_broken_expression_is_told_with_its_column(expr: str) -> None:
    with pytest.raises(M3CheckError, match=r"column \d+"):
        matcher(expr)


@pytest.mark.parametrize(
    "wanted",
    [
        RunOptions(arch="sm90"),
        RunOptions(arch="gfx942", kernels=("vllm==0.33.0", "./my kernels.py"), ops=("decode",), shard=(2, 5), timeout=7.5),
        RunOptions(
            arch="sm100", cases=("sparse_attn/q=5,kv=2304",), expr="a and not b", out=Path("some where"), strict=True
        ),
        RunOptions(arch="sm100", resume=True, offline=True, require="device", jobs=3, seed=9, tier="full"),
    ],
)
def test_the_command_of_a_run_makes_the_same_run(wanted: RunOptions) -> None:
    words = shlex.split(wanted.command)

    assert words[:2] == ["m3check", "run"]
    assert options(parser().parse_args(words[1:])) == wanted


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


RED = result(Status.FAILED, findings=(finding("row", Status.FAILED, measured=2.0, limit=1.0, where="row 3"),))


def test_without_a_terminal_there_is_a_line_for_each_twentieth() -> None:
    stream = io.StringIO()
    tell = Progress(stream)
    for done in range(1, 201):
        tell(Event(done, 200, result()))
    tell.close()
    lines = stream.getvalue().splitlines()

    assert lines == [f"{n} of 200 done, 0 red" for n in range(10, 201, 10)]
    assert len(tell.results) == 200


def test_without_a_terminal_a_search_is_heard_of_every_minute() -> None:
    now, stream = [0.0], io.StringIO()
    tell = Progress(stream, clock=lambda: now[0])
    for tried in range(1, 101):
        now[0] += 2.0
        tell(Event(tried, 0, running="index_topk/q=1,kv=1"))

    assert stream.getvalue().splitlines() == ["30 tried, 0 red", "60 tried, 0 red", "90 tried, 0 red"]


def test_a_terminal_has_one_line_that_is_rewritten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("COLUMNS", "60")
    now = [0.0]
    stream = Terminal()
    tell = Progress(stream, clock=lambda: now[0])
    for done in (1, 2, 3):
        now[0] += 10.0
        tell(Event(done, 9, RED if done == 2 else result()))
    tell.close()
    parts = stream.getvalue().split("\r\x1b[2K")

    assert parts[1] == "1/9 · 0 red · 1:20 left · sparse_attn/q=5,kv=2304"
    assert parts[2].startswith("\x1b[31mFAILED\x1b[0m sparse_attn/q=5,kv=2304 [triton] row: 2 > 1 at row 3\n  m3check run")
    assert parts[3].startswith("2/9 · 1 red · 1:10 left")
    assert parts[-1] == ""
    assert all(len(part) < 60 for part in parts if "\n" not in part)


def test_no_color_and_a_dumb_terminal_are_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("NO_COLOR", "1"), ("TERM", "dumb")):
        with monkeypatch.context() as patch:
            patch.setenv("TERM", "xterm")
            patch.setenv(name, value)
            stream = Terminal()
            Progress(stream)(Event(1, 1, RED))

            assert "\x1b[31m" not in stream.getvalue()
            assert ("\r" in stream.getvalue()) is (name == "NO_COLOR")


def test_results_that_a_resumed_run_already_had_do_not_shorten_the_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    now = [0.0]
    stream = Terminal()
    tell = Progress(stream, clock=lambda: now[0])
    now[0] = 10.0
    tell(Event(91, 100, result()))

    assert "91/100 · 0 red · 1:30 left" in stream.getvalue()


def test_text_from_a_kernel_cannot_drive_the_terminal() -> None:
    stream = io.StringIO()
    Progress(stream)(Event(1, 100, result(Status.ERROR, reason="boom\x1b[2J\nm3check: exit 0: fine")))

    assert "\x1b" not in stream.getvalue()
    assert stream.getvalue().count("\n") == 2


def test_a_message_is_passed_on() -> None:
    stream = io.StringIO()
    Progress(stream)(Event(0, 5, message="vllm 0.99 is not a version whose hashes are known"))

    assert "hashes are known" in stream.getvalue()


def test_doctor_says_what_is_missing_and_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_version", lambda name: "" if name in ("torch", "triton") else "1.0")
    lines = {line.what: line for line in doctor.examine()}

    assert lines["torch"].state == "missing"
    assert "pip install 'torch>=2.9'" in lines["torch"].advice
    assert "pip install 'triton>=3.6'" in lines["triton"].advice
    assert lines["interpreter"].state == "missing"
    assert all(line.advice for line in lines.values() if line.state in ("missing", "broken"))
    msa = lines["provider fmha_sm100"]  # no package of that name, but a part of vLLM's, or MSA's own
    assert msa.state == "ok" or ("install one" in msa.advice and "an SM100 or SM103 GPU" in msa.advice)


def test_doctor_tells_sound_repaired_and_unrepaired_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = (
        '[["masks", false, false, ""], ["bf16 dot", true, true, "was wrong"], ["fp8", true, false, "cannot be patched"]]'
    )
    monkeypatch.setattr(doctor, "_version", lambda _name: "1.0")
    monkeypatch.setattr(doctor, "_ask", lambda *_code, **_environment: (answer, ""))
    lines = {line.what: line for line in doctor._interpreter()}

    assert (lines["interpreter: masks"].state, lines["interpreter: bf16 dot"].state) == ("ok", "ok")
    assert "repaired" in lines["interpreter: bf16 dot"].found
    assert (lines["interpreter: fp8"].state, lines["interpreter: fp8"].found) == (
        "broken",
        "not repaired: cannot be patched",
    )


def test_doctor_survives_what_it_asks() -> None:
    assert doctor._ask("print(1); print(2)") == ("2", "")
    assert doctor._ask("raise SystemExit('torch is broken')") == ("", "torch is broken")
    assert doctor._ask("import os; os.abort()")[0] == ""


def test_doctor_works_where_torch_and_triton_cannot_be_imported(tmp_path: Path) -> None:
    for name in ("torch", "triton"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('not here')")
    code = "import sys; sys.path.insert(0, sys.argv.pop()); from m3check.cli import main; sys.exit(main(['doctor']))"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": "", "PYTHONPATH": str(tmp_path), "M3CHECK_CACHE": str(tmp_path / "cache")},
    )

    assert done.returncode == 4, done.stderr
    assert "BROKEN   torch imports" in done.stdout
    assert str(tmp_path / "cache") in done.stdout
    assert "Traceback" not in done.stderr
