"""`m3check show`: records rendered again."""

from __future__ import annotations

import argparse

from m3check.commands.talk import emit


def main(arguments: argparse.Namespace) -> int:
    """Print one record as a report, several as a matrix."""
    from m3check import report
    from m3check.report import jsonfile

    report.check_format(arguments.format)
    emit(report.render([jsonfile.read(path) for path in arguments.records], arguments.format))
    return 0
