"""`m3check soak`: many seeds of a tier's cases, for false alarms and for mistakes that few inputs show."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from m3check.commands.options import options as options_of
from m3check.commands.talk import emit, talk
from m3check.types import M3CheckError

if TYPE_CHECKING:
    from m3check.soak import Soak

EVERY = 15.0
"""Seconds between two lines of progress."""


def main(arguments: argparse.Namespace) -> int:
    """Run the seeds, print counts and the largest measured/limit of each check, write soak.json."""
    from m3check import soak

    options = options_of(arguments)
    seeds = _seeds(arguments.seeds)
    folder = Path(arguments.out) if arguments.out else None
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    last = time.monotonic()

    def progress(so_far: Soak) -> None:
        nonlocal last
        if time.monotonic() - last > EVERY:
            last = time.monotonic()
            total = so_far.total
            other = total.results - total.statuses["passed"]
            talk(f"m3check: {total.results} of {so_far.asked} results, {other} did not pass")

    found = soak.run(options, seeds, arguments.minutes or 0.0, progress, arguments.judge or "cpu")
    found.command = shlex.join(["m3check", *sys.argv[1:]])
    if folder is not None:
        part = folder / "soak.json.part"
        part.write_text(json.dumps(found.data(), indent=1) + "\n", encoding="utf-8")
        part.replace(folder / "soak.json")
    emit(_tables(found))
    where = f"; record: {folder / 'soak.json'}" if folder is not None else ""
    talk(f"m3check: exit {found.exit.code}: {found.exit.reason} in {found.environment['seconds']:g} s{where}")
    return found.exit.code


def _tables(found: Soak) -> str:
    """Counts by op and provider, the largest measured/limit of each check, and what did not pass."""
    from tabulate import tabulate

    words = sorted({word for tally in found.tallies.values() for word in tally.statuses})
    rows: list[list[object]] = []
    ratios: dict[tuple[str, str], tuple[float, str]] = {}
    for (op, provider), tally in sorted(found.tallies.items()):
        rows.append([op, provider, tally.results, *(tally.statuses[word] or "" for word in words), tally.noted or ""])
        for check, (ratio, case) in tally.worst.items():
            if ratio > ratios.get((check, provider), (-1.0, ""))[0]:
                ratios[check, provider] = ratio, case
    counts = tabulate(rows, headers=["op", "provider", "results", *words, "noted too"], tablefmt="github")
    largest = tabulate(
        [[check, provider, f"{ratio:.3g}", case] for (check, provider), (ratio, case) in sorted(ratios.items())],
        headers=["check", "provider", "largest measured/limit", "on"],
        tablefmt="github",
        disable_numparse=True,
    )
    others = [f"- {r.status} {r.case} [{r.provider}] {r.reason}\n  {r.repro}" for r in found.others[:20]]
    more = [f"- … {len(found.others) - 20} more in the record"] if len(found.others) > 20 else []
    return "\n\n".join([counts, *([largest] if ratios else []), *(["\n".join(others + more)] if others else [])])


def _seeds(text: str) -> tuple[int, int]:
    """`A..B`, or `N` for 1..N."""
    first, _, last = text.partition("..")
    try:
        return (int(first), int(last)) if last else (1, int(first))
    except ValueError:
        raise M3CheckError(f"--seeds wants A..B, such as 1..100, or N for 1..N, got {text!r}") from None
