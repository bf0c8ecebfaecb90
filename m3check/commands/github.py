"""What a command leaves for GitHub Actions where it runs there: a job summary and annotations. It never breaks a run."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from m3check.commands.talk import talk
from m3check.types import Record


def tell(record: Record) -> None:
    """Summary and annotations of a run or a merge."""
    if _here():
        from m3check.report import github, markdown

        leave(markdown.render(record), github.errors(record))


def leave(markdown: str, annotations: Sequence[str]) -> None:
    """Append a report to the step's summary, and print workflow commands to stderr, which the runner reads like stdout."""
    if not _here():
        return
    from m3check.report import github

    for line in annotations:
        talk(line)
    if not (name := os.environ.get("GITHUB_STEP_SUMMARY")):
        return
    try:
        path = Path(name)
        written = path.stat().st_size if path.exists() else 0
        text = github.summary(markdown, github.SUMMARY_LIMIT - written)
        with path.open("a", encoding="utf-8") as file:
            file.write(text)
        if not text:
            talk("m3check: the job summary is full; nothing was added")
    except OSError as error:
        talk(f"m3check: the job summary cannot be written: {error.strerror}")


def _here() -> bool:
    return os.environ.get("GITHUB_ACTIONS") == "true"
