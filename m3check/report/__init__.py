"""How it is told: everything here reads Records and nothing else, so that any report can be made again."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from m3check.types import M3CheckError

if TYPE_CHECKING:
    from m3check.types import Record

FORMATS = ("md", "json", "junit")

FILES = {"json": "report.json", "md": "report.md", "junit": "junit.xml"}
"""What a run leaves in its folder, the record first: where the disk fills, the rest can be made again from it."""


def check_format(format: str) -> None:
    """Raise M3CheckError for a format that is unknown, or not there yet."""
    if format == "html":
        raise M3CheckError("--format html is not available in this version; formats: " + ", ".join(FORMATS))
    if format not in FORMATS:
        close = difflib.get_close_matches(format, FORMATS, n=1)
        guess = f"did you mean {close[0]}? Known: " if close else "known: "
        raise M3CheckError(f"unknown format {format!r}; {guess}{', '.join(FORMATS)}")


def render(records: Sequence[Record], format: str) -> str:
    """One record as a report, several as the op × arch × provider matrix. Raises M3CheckError for an unknown format."""
    check_format(format)
    if format == "junit":
        from m3check.report import junit

        return junit.render(records)
    if format == "json":
        from m3check.report import jsonfile, matrix

        return jsonfile.dumps(records[0]) if len(records) == 1 else matrix.as_json(records)
    from m3check.report import markdown, matrix

    return markdown.render(records[0]) if len(records) == 1 else matrix.render(records)


def write(record: Record, folder: Path) -> tuple[Path, ...]:
    """Write every report of a run, each file whole or not at all. Raises OSError where the folder cannot hold them."""
    from m3check.report.files import write_text

    folder.mkdir(parents=True, exist_ok=True)
    return tuple(write_text(folder / name, render([record], format)) for format, name in FILES.items())
