"""Generic edits of kernel sources: every small change of an expression that a tired hand could make, from the syntax tree.

Both the Triton functions of a file and the Python functions that launch them are edited: where, `walk` says; how, `kinds`.
"""

from __future__ import annotations

import ast
import re

from m3check.mutants.mutant import Edit, Mutant, content_key
from m3check.mutants.reach import Reach
from m3check.mutants.walk import Walk


def mutants(provider: str, file: str, source: bytes, reach: Reach | None = None) -> list[Mutant]:
    """Every generic mutant of one file, in the order of the file; with `reach`, of what calls can reach alone."""
    reach = reach or Reach()
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))

    def span(node: ast.AST) -> tuple[int, int]:
        first = starts[node.lineno - 1] + node.col_offset  # type: ignore[attr-defined]
        last = starts[node.end_lineno - 1] + node.end_col_offset  # type: ignore[attr-defined]
        return first, last

    def text(node: ast.AST) -> str:
        start, end = span(node)
        return source[start:end].decode()

    found: list[Mutant] = []
    seen: dict[tuple[str, ...], int] = {}
    for function in ast.parse(source).body:
        if not isinstance(function, ast.FunctionDef) or not reach.holds(function.name):
            continue
        if function.name == "warm_up":  # it gives no result, and no case calls it: the invariant `warm` does
            continue
        for site in Walk(function, text, reach).sites():
            start, end = span(site.node)
            line_from, line_to = starts[site.lines[0] - 1], starts[site.lines[1]]
            before = _squeezed(source[line_from:line_to])
            after = _squeezed(source[line_from:start] + site.new.encode() + source[end:line_to])
            if before == after:
                continue
            identity = (provider, file, function.name, site.kind, before, after)
            seen[identity] = seen.get(identity, -1) + 1
            old = _squeezed(source[start:end])
            line = site.node.lineno  # type: ignore[attr-defined]
            found.append(
                Mutant(
                    provider,
                    site.kind,
                    f"{file}:{line}",
                    f"{file}:{line} {function.name}: {_short(old)} → {_short(' '.join(site.new.split())) or 'nothing'}",
                    content_key(*identity, str(seen[identity])),
                    (Edit(file, start, end, site.new.encode()),),
                    lines=site.lines,
                    function=function.name,
                )
            )
    unique: dict[bytes, Mutant] = {}
    for mutant in found:  # two kinds may make the same text of the same place
        edit = mutant.edits[0]
        unique.setdefault(b"%d %d %s" % (edit.start, edit.end, edit.new), mutant)
    return list(unique.values())


def _squeezed(text: bytes) -> str:
    return " ".join(re.sub(r"#.*", "", line) for line in text.decode().split("\n")).strip()


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 70 else text[:69] + "…"
