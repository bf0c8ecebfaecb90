"""`m3check compare OLD NEW`: exits 1 on a regression. Needs no GPU and no torch."""

from __future__ import annotations

import argparse

from m3check.commands import github
from m3check.commands.talk import emit, talk
from m3check.config import choose
from m3check.types import M3CheckError


def main(arguments: argparse.Namespace) -> int:
    """Print what changed."""
    choose("format", arguments.format, ("md", "json"))
    from m3check.report import compare, jsonfile
    from m3check.report import github as github_report

    growth = compare.GROWTH if arguments.growth is None else arguments.growth
    if not growth >= 1:
        raise M3CheckError(f"--growth {growth:g} is no growth; the least is 1")
    found = compare.compare(jsonfile.read(arguments.old), jsonfile.read(arguments.new), growth)
    emit(compare.as_json(found) if arguments.format == "json" else compare.render(found))
    github.leave(compare.render(found), github_report.regressions(found))
    code = 1 if found.regressions else 0
    n = len(found.regressions)
    talk(f"m3check: exit {code}: {n} regression{'s' if n != 1 else ''}, {found.common} results in both")
    return code
