"""`m3check explain`: from one red case to its stage, its places and its cause."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from pathlib import Path

from m3check.commands.talk import emit, talk
from m3check.types import M3CheckError

LISTED = 10
"""Red results that are named where none was chosen."""


def main(arguments: argparse.Namespace) -> int:
    """Explain one case: 0 where it is green, 1 where it is red."""
    import msgspec

    from m3check import isolate
    from m3check.explain.process import Helper, default_arch
    from m3check.explain.text import render

    case, spec, arch = target(arguments.case, arguments.kernels, arguments.arch)
    terminal = sys.stdout.isatty()
    width = shutil.get_terminal_size((100, 24)).columns if terminal else 100
    with Helper(arch or default_arch(), spec, arguments.offline, arguments.timeout or 600.0, talk) as helper:
        talk(f"m3check: {helper.why}")
        line = helper.line(case)
        answer = helper.ask({"do": "explain", "line": msgspec.to_builtins(line), "width": width})
        evidence, name = helper.evidence, helper.arch
    if isinstance(answer, isolate.Death):
        emit(f"{line.case} [{spec}] on {name}, {evidence}: {answer.kind}: {answer.reason}")
        return 1
    data = answer["explanation"]
    if arguments.format == "json":
        emit(json.dumps(data, indent=1))
    else:
        emit(render(data, f"{line.case} [{spec}] on {name}, {evidence}", terminal and not os.environ.get("NO_COLOR")))
    if data["status"] != "passed":
        talk(f"m3check: smaller: m3check shrink --arch {name} --kernels {spec} {line.case}")
    return 0 if data["status"] == "passed" else 1


def target(text: str, spec: str | None, arch: str | None) -> tuple[str, str, str | None]:
    """(case id, provider, target) of a case id, or of `report.json#N`: the N-th red result of a record, counted from 1."""
    path, hash_, number = text.rpartition("#")
    if not hash_:
        if not text.endswith(".json") and not Path(text).is_dir():
            return text, spec or "triton", arch
        path = text
    from m3check.api import load_record
    from m3check.types import RED

    record = load_record(path)
    red = [result for result in record.results if result.status in RED and (spec is None or result.provider == spec)]
    if not number.isdigit() or not 1 <= int(number) <= len(red):
        first = "".join(f"\n  {path}#{i} {r.status} {r.case} [{r.provider}]" for i, r in enumerate(red[:LISTED], 1))
        asked = f"there is no #{number}" if hash_ else "name one of them"
        count = f"{len(red)} red result{'s' if len(red) != 1 else ''}"
        raise M3CheckError(f"{path} has {count}: {asked}{first}" if red else f"{path} has no red result to explain")
    result = red[int(number) - 1]
    return result.case, result.provider, arch or record.arch
