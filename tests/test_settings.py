"""Where flags come from: default < file < environment < command line, for every setting, and what is refused in each."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest

from m3check import settings
from m3check.cli import main, parser
from m3check.commands.options import options
from m3check.config import RunOptions
from m3check.types import M3CheckError

SAID: dict[str, tuple[Any, str, str, str, Any, Any, Any]] = {
    # setting: default, TOML, environment, command line, and the three values that these stand for
    "arch": (None, '"sm90"', "sm100", "--arch gfx942", "sm90", "sm100", "gfx942"),
    "kernels": (
        ("triton",),
        '["vllm"]',
        "triton vllm==0.33.0",
        "--kernels a.py",
        ("vllm",),
        ("triton", "vllm==0.33.0"),
        ("a.py",),
    ),
    "op": ((), '["decode"]', "prefill", "--op index_topk", ("decode",), ("prefill",), ("index_topk",)),
    "tier": ("smoke", '"ci"', "full", "--tier production", "ci", "full", "production"),
    "jobs": (0, "2", "3", "--jobs 4", 2, 3, 4),
    "seed": (0, "2", "3", "--seed 4", 2, 3, 4),
    "timeout": (120.0, "10", "2.5", "--timeout 7", 10.0, 2.5, 7.0),
    "require": (None, '"device"', "interpreted", "--require compiled", "device", "interpreted", "compiled"),
    "strict": (False, "true", "0", "--strict", True, False, True),
    "offline": (False, "true", "no", "--offline", True, False, True),
    "ledger": (None, '"a.toml"', "b.toml", "--ledger c.toml", Path("a.toml"), Path("b.toml"), Path("c.toml")),
    "out": (None, '"a"', "b", "--out c", Path("a"), Path("b"), Path("c")),
    "floor": (
        (),
        "{min_cases = 1, max_skipped = 9}",
        "min_cases=2 max_known=0",
        "--floor min_cases=3",
        ("min_cases=1", "max_skipped=9"),
        ("min_cases=2", "max_skipped=9", "max_known=0"),
        ("min_cases=3", "max_skipped=9", "max_known=0"),
    ),
}


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty folder, and nothing of m3check in the environment."""
    monkeypatch.chdir(tmp_path)
    for name in ("M3CHECK_TIER", "M3CHECK_SEED", "M3CHECK_CACHE"):
        monkeypatch.delenv(name, raising=False)


def asked(line: str = "") -> RunOptions:
    words = shlex.split(line)
    return options(parser().parse_args(["run", *([] if "--arch" in words else ["--arch", "sm80"]), *words]))


def test_every_setting_is_tested_here() -> None:
    assert set(SAID) == set(settings.SETTINGS)


@pytest.mark.parametrize("where", ["m3check.toml", "pyproject.toml"])
@pytest.mark.parametrize("word", list(SAID))
def test_the_later_layer_wins(word: str, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    default, toml, variable, flag, in_file, in_environment, on_line = SAID[word]
    field, key = settings.SETTINGS[word][0], "floors" if word == "floor" else word

    def value(line: str = "") -> Any:
        given = settings.load()[word].value if word == "arch" and not line else getattr(asked(line), field)
        return given

    assert value() == default
    heading = "[tool.m3check]\n" if where == "pyproject.toml" else ""
    Path(where).write_text(f"{heading}{key} = {toml}\n")
    assert value() == in_file
    assert settings.load()[word].origin == where
    assert value(flag) == (on_line if word != "floor" else ("min_cases=3", "max_skipped=9"))
    monkeypatch.setenv(f"M3CHECK_{word.upper()}", variable)
    assert value() == in_environment
    assert settings.load()[word].origin == f"M3CHECK_{word.upper()}"
    assert value(flag) == on_line
    Path(where).unlink()
    assert value(flag) == (on_line if word != "floor" else ("min_cases=3", "max_known=0"))


def test_a_switch_can_be_switched_off_again() -> None:
    Path("m3check.toml").write_text("strict = true\noffline = true\n")

    assert (asked().strict, asked().offline) == (True, True)
    assert (asked("--no-strict --no-offline").strict, asked("--no-offline").offline) == (False, False)


def test_the_command_of_a_run_needs_no_settings_file_and_is_not_changed_by_one() -> None:
    text = 'tier = "ci"\nstrict = true\njobs = 3\nledger = "known.toml"\n[floors]\nmin_cases = 2\n'
    Path("m3check.toml").write_text(text)
    made = asked("--tier smoke --no-strict --jobs 0 --floor none")
    assert made.command == ("m3check run --arch sm80 --tier smoke --jobs 0 --no-strict --ledger known.toml --floor none")
    assert options(parser().parse_args(shlex.split(made.command)[1:])) == made
    Path("m3check.toml").unlink()
    assert options(parser().parse_args(shlex.split(made.command)[1:])) == made


def test_floors_are_layered_key_by_key_and_none_forgets_what_is_below(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("m3check.toml").write_text("[floors]\nmin_cases = {each = 5, decode = 9}\nevidence = 'device'\n")

    assert asked().floors == ("min_cases.each=5", "min_cases.decode=9", "evidence=device")
    assert asked("--floor min_cases.decode=1").floors == ("min_cases.each=5", "min_cases.decode=1", "evidence=device")
    assert asked("--floor none").floors == ("none",)
    monkeypatch.setenv("M3CHECK_FLOOR", "none max_known=0")
    assert asked().floors == ("none", "max_known=0")
    assert asked("--floor max_skipped=0").floors == ("none", "max_known=0", "max_skipped=0")


def test_the_floors_of_the_target_that_is_run_are_taken() -> None:
    Path("m3check.toml").write_text("arch = 'sm90'\n[floors]\nmin_cases = 5\n[floors.sm90]\nmin_cases = 7\nmax_known = 1\n")

    assert asked().floors == ("min_cases=5",)
    assert asked("--arch sm90").floors == ("min_cases=7", "max_known=1")
    assert settings.load()["floor"].value == ("min_cases=7", "max_known=1")


def test_a_file_elsewhere_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("m3check.toml").write_text('tier = "ci"\n')
    Path("below").mkdir()
    monkeypatch.chdir(tmp_path / "below")

    assert asked().tier == "smoke"


def test_a_pyproject_without_the_table_says_nothing() -> None:
    Path("pyproject.toml").write_text("[project]\nname = 'x'\n[tool.ruff]\nline-length = 80\n")
    assert settings.read(Path()) == ({}, "")
    Path("m3check.toml").write_text("jobs = 1\n")
    assert asked().jobs == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('teir = "ci"', "m3check.toml: unknown key 'teir'; did you mean tier? Known: arch, kernels"),
        ("jobs = 'two'", "m3check.toml: jobs = 'two': wanted a whole number"),
        ("jobs = true", "jobs = True: wanted a whole number"),
        ("jobs = 1.5", "jobs = 1.5: wanted a whole number"),
        ("jobs = -1", "--jobs -1 cannot be; the least is 0 (settings: jobs from m3check.toml)"),
        ("timeout = '1m'", "timeout = '1m': wanted a number of seconds"),
        ("strict = 1", "strict = 1: wanted true or false"),
        ("kernels = []", "kernels = []: wanted a list of texts"),
        ("kernels = [1]", "kernels = [1]: wanted a list of texts"),
        ("tier = ''", "tier = '': wanted a text"),
        (
            'tier = "smok"',
            "unknown tier 'smok'; did you mean smoke? Known: smoke, ci, full, production (settings: tier from",
        ),
        ("k = 'fp8'", "m3check.toml: k cannot be set in a file; say it on the command line"),
        ("shard = '1/2'", "shard cannot be set in a file"),
        ("floors = 3", "floors = 3: wanted a table [floors]"),
        ("[floors]\nmin_case = 3", "m3check.toml: unknown floor 'min_case'; did you mean min_cases?"),
        ("[floors]\nmin_cases = 'x'", "floor min_cases=x: wanted a whole number, 0 or more"),
        ("[floors]\nmin_cases = {decod = 3}", "unknown op 'decod'; did you mean decode?"),
        ("[floors]\nmin_cases = -3", "floor min_cases=-3: wanted a whole number"),
        ("[floors]\nmax_known = true", "floor max_known = True: wanted a whole number"),
        ("[floors]\nevidence = 'luck'", "unknown evidence 'luck'"),
        ("[floors]\nsm90 = 3", "floors.sm90 = 3 is not a table; wanted [floors.sm90]"),
        ("[floors.sm9]\nmin_cases = 3", "unknown floor 'sm9'"),
        ("tier = ", "m3check.toml is not TOML: Invalid value (at line 1"),
    ],
)
def test_a_mistake_in_the_file_is_a_sentence(text: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("m3check.toml").write_text(text + "\n")

    assert main(["list", "--arch", "sm90"]) == 4
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("M3CHECK_TEIR", "ci", "unknown variable 'M3CHECK_TEIR'; did you mean M3CHECK_TIER?"),
        ("M3CHECK_JOBS", "two", "M3CHECK_JOBS='two': wanted a whole number"),
        ("M3CHECK_STRICT", "maybe", "M3CHECK_STRICT='maybe': wanted 1 or 0"),
        ("M3CHECK_FLOOR", "min_cases", "M3CHECK_FLOOR: 'min_cases' is no floor; wanted KEY=VALUE with one of min_cases"),
        (
            "M3CHECK_TIER",
            "smok",
            "unknown tier 'smok'; did you mean smoke? Known: smoke, ci, full, production (settings: tier",
        ),
        ("M3CHECK_CASE", "a/b", "M3CHECK_CASE cannot be set in the environment; say it on the command line"),
    ],
)
def test_a_mistake_in_the_environment_is_a_sentence(
    name: str, value: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(name, value)

    assert main(["list", "--arch", "sm90"]) == 4
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("min_case=3", "unknown floor 'min_case'; did you mean min_cases?"),
        ("min_cases.decod=3", "unknown op 'decod'; did you mean decode?"),
        ("max_known.decode=3", "floor max_known.decode: only min_cases is said of one op"),
        ("min_cases=many", "floor min_cases=many: wanted a whole number, 0 or more"),
    ],
)
def test_a_mistake_on_the_command_line_is_a_sentence(flag: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--arch", "sm90", "--floor", flag]) == 4
    assert said in capsys.readouterr().err


def test_an_empty_variable_says_nothing_and_the_cache_is_no_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("M3CHECK_TIER", " ")
    monkeypatch.setenv("M3CHECK_CACHE", "/somewhere")

    assert asked().tier == "smoke"


def test_settings_in_two_files_are_refused() -> None:
    Path("m3check.toml").write_text("jobs = 1\n")
    Path("pyproject.toml").write_text("[tool.m3check]\njobs = 2\n")

    with pytest.raises(M3CheckError, match=r"settings stand in m3check\.toml and in .* keep one of them"):
        settings.load()


def test_doctor_shows_each_value_with_its_origin(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("pyproject.toml").write_text(
        "[tool.m3check]\ntier = 'ci'\n[tool.m3check.floors]\nmin_cases = 2\n[tool.m3check.floors.sm90]\nmin_cases = 9\n"
    )
    monkeypatch.setenv("M3CHECK_STRICT", "yes")

    assert main(["doctor", "--show-config"]) == 0
    rows = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()[1:]}
    assert set(rows) == {*settings.SETTINGS, "floor[sm90]"}
    assert rows["tier"] == ["ci", "pyproject.toml"]
    assert rows["strict"] == ["true", "M3CHECK_STRICT"]
    assert rows["kernels"] == ["triton", "default"]
    assert rows["floor"] == ["min_cases=2", "pyproject.toml"]
    assert rows["floor[sm90]"] == ["min_cases=9", "pyproject.toml"]

    Path("pyproject.toml").write_text("[tool.m3check]\nteir = 'ci'\n")
    assert main(["doctor", "--show-config"]) == 4
