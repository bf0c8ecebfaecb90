"""One result put on trial: the first call, the means to call again, and how two outcomes are held against each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from m3check.arch import Arithmetic
from m3check.checks import integrity
from m3check.checks.outputs import OUTPUTS
from m3check.checks.setting import Setting
from m3check.checks.view import View
from m3check.paging import Run, World, words
from m3check.types import OPS, Case, Finding, Inputs, Status

UNPROMISED = "this kernel does not promise to bear that"

REPEATS = 3
"""Calls that must give the same bits before other bits are blamed on a change."""


@dataclass
class Trial:
    """What an invariant has to work with; `call` and its like raise whatever the kernel raises."""

    inputs: Inputs
    """As the kernel saw them first: scales beside codes."""
    first: Run
    setting: Setting
    call: Callable[[Inputs, World], Run]
    """The same kernel on any inputs of its op."""
    judge: Callable[[Inputs, Run], list[Finding]]
    """All comparisons of a run with the reference."""
    other: Callable[[str, Inputs], tuple[Run, list[Finding]]] | None = None
    """The provider's kernel of another op, judged by its own profile; raises M3CheckError where there is none."""
    refuses: Callable[[Case], str | None] = lambda case: None
    """Why the kernel cannot run a case."""
    configurations: Sequence[tuple[str, Callable[[], Any]]] = ()
    """Named configurations of the kernels behind this one, and what pins each."""
    unpin: Callable[[], Any] = lambda: None
    tiles: Sequence[tuple[str, Callable[[], AbstractContextManager[None]]]] = ()
    """Named tile sizes and split counts of the provider's kernels, and what sets each for a while."""
    warm: Callable[[], list[Finding]] | None = None
    """The kernel warmed up and given batches of other sizes, and what those compiled."""
    watched: Callable[[Inputs], Run] | None = None
    """The kernel called once more as it was first, every access to memory watched."""
    replay: Callable[[Sequence[Inputs], World], list[Run] | str] | None = None
    """Capture a graph on the first inputs and replay it on the others, which differ in contents and lengths only; or the
    sentence why it cannot be captured."""
    captured: Callable[[], Run | str] | None = None
    """Of a mixed batch: capture the step before in a graph and replay it; or the sentence why it cannot be captured."""
    launches: Callable[[Sequence[tuple[Inputs, World]], int], list[tuple[int, Run]]] | None = None
    """Many launches in flight at once, a stream for each of some inputs; (which inputs, the run) of each launch."""
    behind: Callable[[Inputs, int], list[Run]] | None = None
    """Calls whose lengths and ids an earlier kernel writes while a dependent launch may already run."""
    without_dependent_launch: Callable[[Inputs], Run] | None = None
    repeats: bool | None = None
    """Whether a second call gave the same bits; None: nobody has tried."""
    memo: dict[str, Any] = field(default_factory=dict)
    misuse: Finding | None = None
    """How the first further call that misused memory did so; None: none did, or nobody watched."""

    def view(self, inputs: Inputs | None = None, run: Run | None = None) -> View:
        """A result as checks see it, without a reference."""
        inputs = inputs or self.inputs
        return View(OPS[inputs.case.op], inputs, run or self.first, {}, self.setting)

    def passed(self, name: str, hint: str = "") -> Finding:
        """The finding of an invariant that holds."""
        return Finding(name, Status.PASSED, 0.0, 0.0, hint=hint)

    def unless_promised(self, finding: Finding) -> Finding:
        """A finding that is named like a promise: noted where it is red and the profile does not promise it."""
        if finding.status is not Status.FAILED or finding.check in self.setting.profile.bitwise:
            return finding
        return replace(finding, status=Status.NOTED, hint=f"{finding.hint}; {UNPROMISED}")

    def same(self, name: str, change: str, run: Run, *, rows: Tensor | None = None, bitwise: bool = True) -> Finding:
        """Hold a run (rows in the order of the first) against the first one, in promised cells of `rows` [T] bool.

        Where the bits may differ, or the kernel does not even repeat itself, all comparisons judge the second outcome.
        """
        broken = damage(run)
        if broken:
            return replace(broken, check=name, hint=f"{change}: {broken.hint}")
        view = self.view()
        found = difference(view, self.first.outputs, run.outputs, rows)
        if found is None:
            return self.passed(name)
        count, where, values = found
        if bitwise and self.repeatable():
            return Finding(name, Status.FAILED, float(count), 0.0, where, f"{change}, and {count} cells changed: {values}")
        both = Run(merged(view, self.first.outputs, run.outputs, rows), arithmetic=coarsest([self.first, run]))
        return self.judged(name, change, self.inputs, both)

    def judged(self, name: str, change: str, inputs: Inputs, run: Run) -> Finding:
        """The worst that the comparisons have to say about a run."""
        return self.worst(name, change, self.judge(inputs, run))

    def worst(self, name: str, change: str, findings: Sequence[Finding]) -> Finding:
        """The first red finding under this name, or that there is none."""
        for finding in findings:
            if finding.status is Status.FAILED:
                return replace(finding, check=name, hint=f"{change}: {finding.check}: {finding.hint}")
        return self.passed(name)

    def repeatable(self) -> bool:
        """Whether the kernel gives the same bits again: promised, or tried REPEATS times."""
        if "repeat" in self.setting.profile.bitwise:
            return True
        if self.repeats is None:
            view, first = self.view(), self.first.outputs
            self.repeats = all(
                difference(view, first, self.call(self.inputs, World()).outputs) is None for _ in range(REPEATS)
            )
        return self.repeats


def coarsest(runs: Sequence[Run]) -> Arithmetic | None:
    """How the least precise of some runs summed; None where none of them says."""
    said = [run.arithmetic for run in runs if run.arithmetic is not None]
    if not said:
        return None
    return Arithmetic(*(min(each, key=lambda how: how.precision) for each in zip(*said, strict=True)))


def damage(run: Run) -> Finding | None:
    """A finding about memory that a call should not have written, if it did."""
    view = View(OPS["index_score"], None, run, {}, None)  # type: ignore[arg-type]  # they look at the run alone
    for finding in (*integrity.check_guards(view), *integrity.check_inputs(view)):
        if finding.status is Status.FAILED:
            return finding
    return None


def promised(view: View) -> dict[str, Tensor]:
    """The cells of each output that its kernel owns and makes promises about, as masks that broadcast."""
    return {name: output.promised(view) for name, output in OUTPUTS.items() if name in view.run.outputs}


def compared(view: View, name: str, mask: Tensor, rows: Tensor | None) -> Tensor:
    """The mask of one output at its full shape, cut to `rows` [T]."""
    shape = view.run.outputs[name].shape
    mask = mask.expand(shape)
    if rows is None:
        return mask
    return mask & rows.view([-1 if dim == OUTPUTS[name].rows else 1 for dim in range(len(shape))])


def difference(
    view: View, one: Mapping[str, Tensor], two: Mapping[str, Tensor], rows: Tensor | None = None
) -> tuple[int, str, str] | None:
    """(how many cells differ in bits, where the first is, both values) of two outcomes; None where they are the same."""
    for name, mask in promised(view).items():
        if name not in one or name not in two:  # scores, where a selection was given no buffer for them
            continue
        a, b = one[name], two[name]
        if a.dtype != b.dtype:
            return a.numel(), name, f"dtype {a.dtype}, then {b.dtype}"
        differ = (words(a) != words(b)) & compared(view, name, mask, rows)
        if a.is_floating_point():
            differ &= ~(a.isnan() & b.isnan())
        count = int(differ.sum())
        if count:
            place = tuple(int(i) for i in differ.nonzero()[0])
            return count, _where(view, name, place), f"{a[place].item():.9g}, then {b[place].item():.9g}"
    return None


def _where(view: View, name: str, place: tuple[int, ...]) -> str:
    """A cell of an output in the words of a user."""
    output = OUTPUTS[name]
    return f"`{name}` of {view.rows.name(place[output.rows])}, {output.place.format(*place)}"


def merged(
    view: View, one: Mapping[str, Tensor], two: Mapping[str, Tensor], rows: Tensor | None = None
) -> dict[str, Tensor]:
    """The second outcome in promised cells of `rows`, the first everywhere else."""
    cells = promised(view)
    return {name: two[name].where(compared(view, name, cells[name], rows), one[name]) for name in cells if name in two}
