"""`m3check doctor`: every line says what is there, or what is missing and what to do about it."""

from __future__ import annotations

import argparse

from m3check import doctor
from m3check.commands.talk import emit, talk

MARKS = {"ok": "ok", "missing": "MISSING", "broken": "BROKEN", "info": "-"}


def main(arguments: argparse.Namespace) -> int:
    """Print what was found as it is found; exits 4 where `m3check run` could not work."""
    if arguments.show_config:
        emit(show_config())
        return 0
    bad = 0
    for line in doctor.examine():
        bad += line.state in ("missing", "broken")
        emit(f"{MARKS[line.state]:<8} {line.what}: {line.found}" + (f"\n         → {line.advice}" if line.advice else ""))
    talk(f"m3check: exit {4 if bad else 0}: " + (f"{bad} things to mend" if bad else "ready"))
    return 4 if bad else 0


def show_config() -> str:
    """Each setting below the command line, with who said so."""
    from pathlib import Path

    from tabulate import tabulate

    from m3check.arch import ARCHS
    from m3check.settings import load

    def told(value: object) -> str:
        if isinstance(value, bool):
            return str(value).lower()
        if isinstance(value, tuple):
            return " ".join(value)
        return "" if value is None else str(value)

    common = load(folder=Path())
    rows = [(word, told(each.value), each.origin) for word, each in common.items()]
    for arch in ARCHS:
        own = load(arch, Path())["floor"]
        if own != common["floor"]:
            rows.append((f"floor[{arch}]", told(own.value), own.origin))
    return tabulate(rows, headers=["setting", "value", "origin"], tablefmt="plain", disable_numparse=True)
