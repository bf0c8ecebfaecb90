"""`m3check list`: the plan of a run, with the reason for everything it would skip, and what production runs there."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from m3check.commands.options import options as options_of
from m3check.commands.talk import emit, talk
from m3check.config import choose
from m3check.report.tally import SUFFICES


def main(arguments: argparse.Namespace) -> int:
    """Print the plan; exits 5 where a run would have nothing to run, 1 where none of it is the required evidence."""
    choose("format", arguments.format, ("table", "json"))
    options = options_of(arguments)
    from m3check import api, cases, dispatched, runner

    lines = api.plan(options)
    if arguments.format == "json":
        emit(json.dumps([asdict(line) for line in lines], indent=1))
    elif lines:
        from tabulate import tabulate

        rows = [
            (line.op, line.provider, line.evidence, line.case, ", ".join(line.invariants), line.skip or "")
            for line in lines
        ]
        headers = ["op", "provider", "evidence", "case", "invariants", "skipped because"]
        emit(tabulate(rows, headers=headers, tablefmt="plain", disable_numparse=True))
        production = dispatched.planned(options.arch, lines, lambda case: cases.parse_id(case).axes())
        heads = ["op", f"on {options.arch} production runs", "when", "of which this plan has"]
        emit(f"\n{tabulate(production, headers=heads, tablefmt='plain', disable_numparse=True)}")
    skipped = sum(line.skip is not None for line in lines)
    due = [line for line in lines if line.skip is None]
    code, nothing = (0, "") if due else (5, "; nothing would run")
    if not lines:
        nothing += f": {runner.why_none(options)}"
    if due and options.require and not any(line.evidence in SUFFICES[options.require] for line in due):
        code, nothing = 1, f"; nothing would have {options.require} evidence, which is required"
    talk(f"m3check: exit {code}: {len(lines)} planned, {skipped} of them skipped{nothing}")
    return code
