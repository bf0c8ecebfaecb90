"""The catalogue: the public defects of `rows`, re-created on a correct kernel as named edits or wrappers."""

from __future__ import annotations

import ast

from m3check.mutants import launching
from m3check.mutants.forms import Change, Dropped, Row, Wrap
from m3check.mutants.mutant import Edit, Mutant, content_key
from m3check.mutants.rows import ROWS
from m3check.mutants.sources import Sources


def mutants(origin: Sources, evidence: str) -> tuple[list[Mutant], list[Row]]:
    """The mutants of a provider that can be made here, and the rows that have none, each with its reason."""
    made: list[Mutant] = launching.mutants(origin) if evidence == "device" else []
    launched = {mutant.name.split()[0] for mutant in made}
    without: list[Row] = []
    for row in ROWS:
        forms = [form for form in row.forms if not isinstance(form, Change) or origin.name == "triton"]
        found = [mutant for form in forms for mutant in _mutants(origin, row, form)]
        if found and (row.where == "interpreted" or evidence == "device"):
            made += found
        elif row.name not in launched:
            without.append(row)
    return made, without


def _mutants(origin: Sources, row: Row, form: Wrap | Change | Dropped) -> list[Mutant]:
    """One mutant for an edit, one for each op of a wrapper: every op must show it."""
    name = f"{row.name} {form.what}"
    if isinstance(form, Dropped):
        return [mutant for file in origin.files for mutant in _without(origin, row, form, file)]
    if isinstance(form, Wrap):
        return [
            Mutant(
                origin.name,
                "catalogue",
                f"{name}: {op}",
                f"around {op}",
                content_key(origin.name, "catalogue", row.name, form.what, op),
                wrapper=form.wrapper(),
                ops=frozenset({op}),
                where=row.where,
            )
            for op in form.ops
        ]
    edits, lines = located(origin, form.replacements)
    file, before, after = form.replacements[0]
    text = f"{file}:{lines[0]} {before} → {after}" + (f" (and {len(edits) - 1} more)" if len(edits) > 1 else "")
    key = content_key(origin.name, "catalogue", row.name, form.what)
    return [Mutant(origin.name, "catalogue", name, text, key, edits, lines=(lines[0], lines[0]), where=row.where)]


def _without(origin: Sources, row: Row, form: Dropped, file: str) -> list[Mutant]:
    """A mutant for each statement of a file that is nothing but the call."""
    source = origin.read(file)
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    made: list[Mutant] = []
    for function in ast.parse(source).body:
        for node in ast.walk(function) if isinstance(function, ast.FunctionDef) else ():
            call = node.value if isinstance(node, ast.Expr) else None
            if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == form.call):
                continue
            assert isinstance(function, ast.FunctionDef)
            start = starts[call.lineno - 1] + call.col_offset
            end = starts[(call.end_lineno or call.lineno) - 1] + (call.end_col_offset or 0)
            key = content_key(origin.name, "catalogue", row.name, form.what, file, function.name, str(len(made)))
            made.append(
                Mutant(
                    origin.name,
                    "catalogue",
                    f"{row.name} {form.what}",
                    f"{file}:{call.lineno} {function.name}: {form.call} → pass",
                    key,
                    (Edit(file, start, end, b"pass"),),
                    lines=(call.lineno, call.end_lineno or call.lineno),
                    where=row.where,
                )
            )
    return made


def located(origin: Sources, replacements: tuple[tuple[str, str, str], ...]) -> tuple[tuple[Edit, ...], list[int]]:
    """Edits that replace texts which stand exactly once in their file, and the lines they begin on."""
    edits, lines = [], []
    for file, before, after in replacements:
        source = origin.read(file)
        if source.count(before.encode()) != 1:
            raise ValueError(f"{file} has {source.count(before.encode())} places that read {before!r}, wanted one")
        start = source.index(before.encode())
        edits.append(Edit(file, start, start + len(before.encode()), after.encode()))
        lines.append(source[:start].count(b"\n") + 1)
    return tuple(edits), lines
