"""How it is told: everything here reads Records and nothing else, so that any report can be made again."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from m3check.report import html, jsonfile, junit, markdown, matrix
from m3check.types import M3CheckError, Record


@dataclass(frozen=True)
class Format:
    """One way to tell records."""

    word: str
    """Behind --format."""
    file: str
    """What a run leaves in its folder; empty for none."""
    one: Callable[[Record], str]
    """A record as a report."""
    several: Callable[[Sequence[Record]], str]
    """Records of several targets as one text."""


RENDERERS: tuple[Format, ...] = (  # the record first: where the disk fills, the rest can be made again from it
    Format("json", "report.json", jsonfile.dumps, matrix.as_json),
    Format("md", "report.md", markdown.render, matrix.render),
    Format("junit", "junit.xml", lambda record: junit.render([record]), junit.render),
    Format("html", "report.html", lambda record: html.render([record]), html.render),
)

FORMATS: Mapping[str, Format] = {each.word: each for each in RENDERERS}

FILES: Mapping[str, str] = {each.word: each.file for each in RENDERERS if each.file}
"""What a run leaves in its folder, by format."""


def check_format(format: str) -> None:
    """Raise M3CheckError for a format that is unknown."""
    known = ", ".join(FORMATS)
    if format in FORMATS:
        return
    close = difflib.get_close_matches(format, FORMATS, n=1)
    guess = f"did you mean {close[0]}? Known: " if close else "known: "
    raise M3CheckError(f"unknown format {format!r}; {guess}{known}")


def render(records: Sequence[Record], format: str) -> str:
    """One record as a report, several as the op × arch × provider matrix. Raises M3CheckError for an unknown format."""
    check_format(format)
    told = FORMATS[format]
    return told.one(records[0]) if len(records) == 1 else told.several(records)


def write(record: Record, folder: Path) -> tuple[Path, ...]:
    """Write every report of a run, each file whole or not at all. Raises OSError where the folder cannot hold them."""
    from m3check.report.files import write_text

    folder.mkdir(parents=True, exist_ok=True)
    return tuple(write_text(folder / name, render([record], format)) for format, name in FILES.items())
