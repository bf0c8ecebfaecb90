"""Memory that a kernel does not own: cells around its buffers, its inputs, and cells past a result's logical shape."""

from __future__ import annotations

import math

from m3check.checks.view import View
from m3check.types import Finding, Status


def check_guards(view: View) -> list[Finding]:
    """Cells around and between the rows of output buffers keep their bits."""
    for guard in view.run.guards:
        places = guard.overwritten()
        if places:
            near = "before its first" if places[0] < 0 else "past or between its own"
            hint = f"wrote outside its view, {near} element; positions from the view's first element: {places}"
            told = guard.place(places[0])
            hint += f"; the first is {told}" if told else ""
            return [Finding("guards", Status.FAILED, float(len(places)), 0.0, f"buffer `{guard.name}`", hint)]
    return [Finding("guards", Status.PASSED, 0.0, 0.0)]


def check_given(view: View) -> list[Finding]:
    """Where a kernel was given a buffer and returned another tensor, the buffer holds the result all the same."""
    from m3check.checks.invariants.trial import difference

    for name, held in view.run.given.items():
        found = difference(view, {name: view.actual(name)}, {name: held.to(view.actual(name).dtype)})
        if found is not None:
            count, where, values = found
            hint = f"{count} cells of the buffer differ from the tensor returned, and a caller may read either: {values}"
            return [Finding("given", Status.FAILED, float(count), 0.0, where, hint)]
    return []


def check_inputs(view: View) -> list[Finding]:
    """Inputs keep their bits."""
    for frozen in view.run.frozen:
        changed = frozen.changed()
        if changed:
            hint = f"the kernel wrote into its input: {changed} elements have other bits than before"
            return [Finding("inputs", Status.FAILED, float(changed), 0.0, f"input `{frozen.name}`", hint)]
    return [Finding("inputs", Status.PASSED, 0.0, 0.0)]


def check_beyond(view: View) -> list[Finding]:
    """Padding columns of a returned tensor hold -inf or were not touched."""
    if not view.setting.filled:
        return [Finding("padding", Status.PASSED, 0.0, 0.0, hint="not judged: fresh memory was not filled")]
    for name, cells in view.run.beyond.items():
        wrong = ~(cells.isnan() | (cells == -math.inf))
        count = int(wrong.sum())
        if count:
            value = cells[wrong][0].item()
            hint = f"{count} padding cells of `{name}` hold a number, here {value:.6g}; wanted -inf or untouched"
            return [Finding("padding", Status.FAILED, float(count), 0.0, f"columns past the last block of `{name}`", hint)]
    return [Finding("padding", Status.PASSED, 0.0, 0.0)]
