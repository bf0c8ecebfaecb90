"""`m3check merge RECORD...`: shards, or the parts of a run made on several machines, judged as one run."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

from m3check.commands.talk import emit, talk
from m3check.types import Exit, Record, Result


def main(arguments: argparse.Namespace) -> int:
    """Write or print the merged record; the exit code is that of one run with all these results."""
    from m3check import power, report
    from m3check.report import files, jsonfile
    from m3check.report.merge import merge, results_of

    records = [jsonfile.read(path) for path in arguments.records]
    results = results_of(records)
    words = ["m3check", "merge", *arguments.records, *(["--out", arguments.out] if arguments.out else [])]
    record = merge(records, results, verdict(records, results), shlex.join(words))
    record.environment["power"] = power.summary(results)  # of the merged cases, not the sum of what overlaps
    if arguments.out:
        folder = Path(arguments.out)
        files.check_writable(folder)
        report.write(record, folder)
    else:
        emit(jsonfile.dumps(record))
    where = f"; report: {Path(arguments.out) / report.FILES['md']}" if arguments.out else ""
    talk(f"m3check: exit {record.exit.code}: {record.exit.reason}{where}")
    return record.exit.code


def verdict(records: Sequence[Record], results: Sequence[Result]) -> Exit:
    """One run's exit, by the strictest of the merged commands; a part that broke off or is lost is never made good."""
    from m3check.report.exits import judge
    from m3check.report.tally import strict

    for record in records:
        if record.exit.code in (2, 3, 4):
            return Exit(record.exit.code, f"a merged record broke off: {record.exit.reason}")
    asked = [_asked(record) for record in records]
    if lost := _lost([shard for _, shard in asked]):
        return Exit(5, f"shards are missing: {', '.join(lost)}")
    named = list(dict.fromkeys(name for names, _ in asked for name in names))
    return judge(results, named, strict=any(strict(record) for record in records))


def _asked(record: Record) -> tuple[tuple[str, ...], tuple[int, int]]:
    """The providers that a record's command named, and its shard."""
    from m3check.cli import parser
    from m3check.commands.options import options
    from m3check.types import M3CheckError

    present = tuple(dict.fromkeys(result.provider for result in record.results))
    try:
        told = options(parser().parse_args(shlex.split(record.command)[1:]))
    except (M3CheckError, ValueError, TypeError, SystemExit):  # a merge of merges, or made through the Python API
        return present, (1, 1)
    return told.kernels, told.shard


def _lost(shards: Sequence[tuple[int, int]]) -> list[str]:
    return [f"{i}/{n}" for n in sorted({n for _, n in shards}) for i in range(1, n + 1) if (i, n) not in shards]
