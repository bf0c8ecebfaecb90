"""`m3check shrink`: the smallest case that still fails for the same reason; its id on stdout."""

from __future__ import annotations

import argparse

from m3check.commands.explain import target
from m3check.commands.talk import emit, talk
from m3check.types import Case, M3CheckError


def main(arguments: argparse.Namespace) -> int:
    """Shrink one case; 0 where that came to an end."""
    import msgspec

    from m3check import cases, isolate, shrink
    from m3check.explain.process import Helper, default_arch

    text, spec, arch = target(arguments.case, arguments.kernels, arguments.arch)
    case = cases.parse_id(text)
    with Helper(arch or default_arch(), spec, arguments.offline, arguments.timeout or 120.0, talk) as helper:
        talk(f"m3check: {helper.why}")
        line = helper.line(cases.case_id(case))

        def attempt(smaller: Case, wanted: str) -> str:
            from dataclasses import replace

            planned = msgspec.to_builtins(replace(line, case=cases.case_id(smaller)))
            answer = helper.ask({"do": "reason", "line": planned, "wanted": wanted})
            return answer.kind if isinstance(answer, isolate.Death) else str(answer["reason"])

        try:
            found = shrink.shrink(
                case, attempt, lambda words: talk(f"m3check: {words}"), arguments.seconds or shrink.SECONDS
            )
        except ValueError as error:
            raise M3CheckError(f"{error} with {spec} on {helper.arch}: there is nothing to shrink") from None
    end = "" if found.finished else "; its time was up, --seconds gives more"
    talk(f"m3check: {found.tries} tries, fails by {found.reason}{end}")
    emit(cases.case_id(found.case))
    return 0
