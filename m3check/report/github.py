"""What GitHub Actions draws: a job summary and at most ten annotations. Pure functions; commands/github.py writes them.

GitHub refuses a step's summary above 1 MiB whole and drops annotations after the tenth of a step, so what does not fit is
left out here, with a sentence that says how much.
"""

from __future__ import annotations

from collections.abc import Sequence

from m3check.report.compare import Comparison
from m3check.report.markdown import sentence, telling
from m3check.report.tables import clean
from m3check.report.tally import breaches, red_word, strict
from m3check.types import Breach, Record, Result

SUMMARY_LIMIT = 1024 * 1024
"""Bytes that GitHub takes for one step."""
ANNOTATIONS = 10
"""That GitHub shows of one kind for one step."""
LONGEST = 2000
"""Characters of one annotation; a longer one is cut."""


def summary(markdown: str, room: int = SUMMARY_LIMIT) -> str:
    """A report in fewer than `room` bytes: whole lines from its start, and a sentence on what was left out."""
    whole = markdown.encode()
    if len(whole) < room:
        return markdown
    note = f"**Cut here: GitHub shows {room // 1024} KB of {len(whole) // 1024} KB. The whole report is `report.md`.**\n"
    kept = whole[: max(0, room - len(note.encode()) - 16)]
    text = kept[: kept.rfind(b"\n") + 1].decode()
    fence = "```\n" if sum(line.startswith("```") for line in text.splitlines()) % 2 else ""
    made = f"{text}{fence}\n{note}"
    return made if len(made.encode()) < room else ""


def errors(record: Record) -> list[str]:
    """Workflow commands for what made a record red: breaches first, then results; the last one counts what is left out."""
    stern = strict(record)
    told = [_breach(breach) for breach in breaches(record)]
    told += [_result(result, stern) for result in record.results if red_word(result, stern)]
    if not told and record.exit.code:
        told = [command("error", f"m3check {record.arch}", record.exit.reason)]
    return _first(told, f"m3check {record.arch}")


def regressions(found: Comparison) -> list[str]:
    """Workflow commands for the regressions of a comparison."""
    told = [
        command("error", f"m3check: {c.kind}", f"{c.case or c.op} [{c.provider}] {c.detail}") for c in found.regressions
    ]
    return _first(told, f"m3check compare {found.arch}")


def command(kind: str, title: str, message: str, file: str = "", line: int = 0) -> str:
    """One workflow command on one line; nothing in title, message or file can end it or begin another."""
    facts = {"file": file, "line": str(line) if file and line else "", "title": title}
    words = ",".join(f"{key}={_property(value)}" for key, value in facts.items() if value)
    short = clean(message)
    return f"::{kind} {words}::{_data(short if len(short) <= LONGEST else short[: LONGEST - 1] + '…')}"


def _breach(breach: Breach) -> str:
    return command("error", "m3check gate", breach.sentence, breach.file, breach.line)


def _result(result: Result, stern: bool) -> str:
    told = [sentence(finding) for finding in telling(result, stern)] or [result.reason]
    file = result.provider if result.provider.endswith(".py") else ""  # a kernel of this repository
    title = f"{red_word(result, stern)} {result.op} [{result.provider}]"
    return command("error", title, f"{result.case}\n{told[0]}\n{result.repro}", file.removeprefix("./"))


def _first(told: Sequence[str], title: str) -> list[str]:
    if len(told) <= ANNOTATIONS:
        return list(told)
    left = len(told) - (ANNOTATIONS - 1)
    return [*told[: ANNOTATIONS - 1], command("error", title, f"{left} more; see the job summary or report.md")]


def _data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(clean(text)).replace(":", "%3A").replace(",", "%2C")
