"""An explanation as text for a terminal."""

from __future__ import annotations

from typing import Any

LEGEND = "· within the bound, 1 … 9 one to nine doublings beyond it, # more, N not finite or not a number"


def render(data: dict[str, Any], headline: str, colour: bool) -> str:
    """All that is known, the cause first."""
    from m3check.explain.places import coloured

    lines = [headline]
    if data["status"] == "passed":
        return f"{headline}\npassed: every comparison and every invariant of the case holds; there is nothing to explain\n"
    lines += [f"FAILED {sentence}" for sentence in data["findings"]]
    if data["how"]:
        lines.append(f"the first call is right; a later one is not: {data['how']}")
    lines += ["", f"stage     {data['stage']}"]
    lines += [f"          {stage}: {words}" for stage, words in data["stages"]]
    if data["pattern"]:
        lines.append(f"fails in  {data['pattern']}")
    lines += ["", *_cause(data)]
    if data["places"]:
        lines += ["", "the error points at", *(f"  {place}" for place in data["places"])]
    if data["worst"]:
        lines += ["", "worst", *(f"  {place}" for place in data["worst"])]
    if data["heat"]:
        lines += [
            "",
            f"where ({LEGEND})",
            *(coloured(line) if colour and i else line for i, line in enumerate(data["heat"])),
        ]
    if data["toggles"]:
        lines += ["", "does it go away?"]
        words = {True: "gone      ", False: "still red ", None: "not tried "}
        lines += [f"  {words[clears]}{name}{f' ({remark})' if remark else ''}" for name, clears, remark in data["toggles"]]
    return "\n".join(lines) + "\n"


def _cause(data: dict[str, Any]) -> list[str]:
    groups = data["explained"]
    if not groups:
        return ["cause     none of the known mistakes gives this output; the places below are what is known"]
    if len(groups) == 1 and len(groups[0]) == 1:
        return [f"cause     {_sentence(*groups[0][0])}"]
    lines = []
    for group in groups:
        if len(group) > 1:
            lines.append("cause     this case cannot tell these apart:")
            lines += [f"          - {_sentence(*one)}" for one in group]
        else:
            lines.append(f"cause     {_sentence(*group[0])}")
    if len(groups) > 1:
        lines.insert(0, f"{len(groups)} mistakes explain the output within the bound; another case may tell which it is:")
    return lines


def _sentence(name: str, words: str, pattern: str) -> str:
    """The sentence of one hypothesis, with the rows that it holds for."""
    from m3check import invariants

    if name in {entry.name for entry in invariants.INVARIANTS} or words.startswith("memory: "):
        return f"{words.removeprefix('memory: ')} [{name}]"
    where = f" ({pattern})" if pattern else ""
    return f"the output equals the reference once this is changed: {words}{where} [{name}]"
