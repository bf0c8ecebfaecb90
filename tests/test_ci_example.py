"""examples/ci: the workflow is YAML with the jobs that docs/ci.md speaks of, and m3check takes every command in it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from m3check import cases, ledgerfile, settings
from m3check.cli import parser
from m3check.commands.options import options

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "ci"
WORKFLOW = EXAMPLE / "m3check.yml"


class Yaml:
    """The part of YAML that workflows are written in: mappings, lists, `|` texts, and [a, b] on one line."""

    def __init__(self, text: str) -> None:
        assert "\t" not in text
        self.lines = [line.rstrip() for line in text.splitlines()]
        self.at = 0

    def _peek(self) -> tuple[int, str] | None:
        while self.at < len(self.lines) and re.fullmatch(r"\s*(#.*)?", self.lines[self.at]):
            self.at += 1
        if self.at == len(self.lines):
            return None
        line = self.lines[self.at]
        return len(line) - len(line.lstrip()), line.strip()

    def value(self, indent: int) -> Any:
        """What stands at `indent`: a list where it begins with a dash, else a mapping."""
        found = self._peek()
        assert found is not None
        assert found[0] == indent
        return self._list(indent) if found[1].startswith("- ") else self._mapping(indent)

    def _list(self, indent: int) -> list[Any]:
        items = []
        while (found := self._peek()) and found[0] == indent and found[1].startswith("- "):
            self.lines[self.at] = " " * (indent + 2) + found[1].removeprefix("- ").strip()
            items.append(self.value(indent + 2))
        return items

    def _mapping(self, indent: int) -> dict[str, Any]:
        made: dict[str, Any] = {}
        while (found := self._peek()) and found[0] == indent and not found[1].startswith("- "):
            key, rest = re.fullmatch(r"([\w.-]+):(?:\s+(.*))?", found[1]).groups()  # type: ignore[union-attr]
            assert key not in made, f"{key} stands twice"
            self.at += 1
            made[key] = self._text(indent) if rest == "|" else _scalar(rest) if rest else self._below(indent)
        return made

    def _below(self, indent: int) -> Any:
        found = self._peek()
        return self.value(found[0]) if found and found[0] > indent else None

    def _text(self, indent: int) -> str:
        start = self.at
        while self.at < len(self.lines) and (not self.lines[self.at] or self.lines[self.at].startswith(" " * (indent + 2))):
            self.at += 1
        return "\n".join(line[indent + 2 :] for line in self.lines[start : self.at])


def _scalar(text: str) -> Any:
    if text.startswith("["):
        return [part.strip() for part in text.strip("[]").split(",")]
    return text.strip('"')


def workflow() -> dict[str, Any]:
    yaml = Yaml(WORKFLOW.read_text())
    whole = yaml.value(0)
    assert yaml._peek() is None, "the end was reached"
    assert isinstance(whole, dict)
    return whole


def runs() -> Iterator[tuple[str, str]]:
    """(job, line) of each shell line, expressions of the workflow replaced by what the first matrix entry gives."""
    for name, job in workflow()["jobs"].items():
        for step in job["steps"]:
            for line in step.get("run", "").splitlines():
                yield name, re.sub(r"\$\{\{ matrix\.(\w+) \}\}", "1", line)


def test_the_three_jobs_are_there_and_the_last_waits_for_the_others() -> None:
    jobs = workflow()["jobs"]

    assert list(jobs) == ["cpu", "gpu", "gate"]
    assert jobs["gate"]["needs"] == ["cpu", "gpu"]
    assert jobs["gate"]["if"] == "${{ !cancelled() }}", "a red job must not silence the gate"
    for job in jobs.values():
        assert job["timeout-minutes"]
        for step in job["steps"]:
            assert ("run" in step) != ("uses" in step)
            assert "|| true" not in step.get("run", "")
            assert "continue-on-error" not in step
    for name in ("cpu", "gpu"):
        upload = jobs[name]["steps"][-1]
        assert upload["uses"].startswith("actions/upload-artifact@")
        assert upload["if"] == "always()", "a red run's report is wanted most"


@pytest.mark.parametrize(("job", "line"), [(job, line) for job, line in runs() if line.startswith("m3check ")])
def test_every_command_is_taken_by_the_real_parser(job: str, line: str) -> None:
    words = shlex.split(line.partition(" >> ")[0])[1:]
    arguments = parser().parse_args(words)

    if arguments.command == "run":
        assert options(arguments, settings=False).out is not None


def test_the_commands_are_those_of_a_gate_and_the_shards_are_all() -> None:
    words = [line.split()[1] for _, line in runs() if line.startswith("m3check ")]
    job = workflow()["jobs"]["cpu"]

    assert words == ["run", "run", "merge", "compare", "compare", "show"]
    (line,) = [step["run"] for step in job["steps"] if "m3check run" in step.get("run", "")]
    assert job["strategy"]["matrix"]["shard"] == ["1", "2", "3"]
    assert "--shard ${{ matrix.shard }}/3 " in line


def test_the_settings_and_the_ledger_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(EXAMPLE)
    known = ledgerfile.read("known.toml")

    assert settings.load("sm100", environ={})["ledger"].value == Path("known.toml")
    assert "evidence=device" in settings.load("sm90", environ={})["floor"].value
    assert "evidence=device" not in settings.load("sm100", environ={})["floor"].value
    for entry in known.entries:
        assert any(entry.selects(cases.case_id(case), case.op, case.axes()) for case in cases.tier("full"))


def test_the_floors_can_be_met(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(EXAMPLE)
    floors = dict(word.split("=") for word in settings.load("sm100", environ={})["floor"].value)
    planned = [case.op for case in cases.tier("ci")]

    for key, value in floors.items():
        if key.startswith("min_cases."):
            assert planned.count(key.partition(".")[2]) >= int(value)


def test_the_document_names_each_file_and_each_flag_that_exists() -> None:
    text = (ROOT / "docs" / "ci.md").read_text()
    words = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text))
    known = {flag for command in ("run", "merge", "compare", "doctor", "show") for flag in _flags(command)}

    assert words <= known, words - known
    for path in re.findall(r"\]\((\.\./[\w./]+)\)", text):
        assert (ROOT / "docs" / path).exists(), path


def _flags(command: str) -> set[str]:
    actions = next(action for action in parser()._actions if action.dest == "command")
    return {flag for action in actions.choices[command]._actions for flag in action.option_strings}  # type: ignore[index,union-attr,call-overload]
