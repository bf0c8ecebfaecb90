"""`m3check doctor`: every line says what is there, or what is missing and what to do about it."""

from __future__ import annotations

import argparse

from m3check import doctor
from m3check.commands.talk import emit, talk

MARKS = {"ok": "ok", "missing": "MISSING", "broken": "BROKEN", "info": "-"}


def main(_arguments: argparse.Namespace) -> int:
    """Print what was found as it is found; exits 4 where `m3check run` could not work."""
    bad = 0
    for line in doctor.examine():
        bad += line.state in ("missing", "broken")
        emit(f"{MARKS[line.state]:<8} {line.what}: {line.found}" + (f"\n         → {line.advice}" if line.advice else ""))
    talk(f"m3check: exit {4 if bad else 0}: " + (f"{bad} things to mend" if bad else "ready"))
    return 4 if bad else 0
