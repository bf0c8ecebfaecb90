"""What a worker answers to the author's bench: an explanation, the reason of a failure, a saved bundle."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from m3check import cases
from m3check.types import M3CheckError, PlanLine

if TYPE_CHECKING:
    from m3check.runner import Session


def answer(session: Session, message: dict[str, Any]) -> dict[str, Any]:
    """Do what `message["do"]` says for `message["line"]`; a refusal comes back as a sentence."""
    import msgspec

    line = msgspec.convert(message["line"], PlanLine)
    case = cases.parse_id(line.case)
    try:
        if message["do"] == "explain":
            from m3check.explain import as_data, explain

            return {"explanation": as_data(explain(case, session, line, width=message["width"]))}
        if message["do"] == "reason":
            from m3check.shrink import reason

            return {"reason": reason(case, session, message["wanted"])}
        if message["do"] == "save":
            from m3check.bundle import save

            return {"saved": str(save(case, session, line, Path(message["folder"]), message["description"]))}
    except M3CheckError as error:
        return {"refused": str(error)}
    raise ValueError(f"a worker cannot do {message['do']!r}")
