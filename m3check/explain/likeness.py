"""Which hypothesis gives what a kernel gave, in ops beside block-sparse attention: no stages, some outputs at once.

A hypothesis explains an output where the op's own checks, with its answer for the reference's and the bounds of its inputs,
accept every wrong unit: a head of a row, or a row where an output has no heads. Units that are right take no part: there
its own answer stands in for the kernel's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from m3check.explain.diagnose import PLAIN
from m3check.hypotheses import Hypothesis, touching
from m3check.hypotheses.hypothesis import Ground
from m3check.hypotheses.side import fitted, rounded
from m3check.types import OPS, Finding, Inputs, Outputs, Status

if TYPE_CHECKING:
    from torch import Tensor

    from m3check.checks import Setting
    from m3check.paging import Run, World

Masks = dict[str, "Tensor"]
"""By output: bool of the units that are meant, [T, heads] or [T]."""


@dataclass(frozen=True, eq=False)
class Match:
    """A hypothesis that explains every wrong unit."""

    hypothesis: Hypothesis
    answer: Outputs
    """As a kernel would have given it."""
    everywhere: bool
    """Whether the kernel gave it in all units that the hypothesis changes, and not in some of them only."""


@dataclass(frozen=True, eq=False)
class Call:
    """One call of an op and how it is judged; the arguments of `checks.compare`."""

    problem: Inputs
    run: Run
    expected: Outputs
    setting: Setting
    world: World
    on_ids: Callable[[Tensor], Outputs] | None = None

    def refused(self, problem: Inputs, outputs: Outputs, expected: Outputs) -> bool:
        """Whether the checks refuse some outputs."""
        from m3check import checks

        return checks.refuses(problem, outputs, expected, self.setting, self.on_ids)

    def given(self, problem: Inputs, outputs: Outputs) -> dict[str, Tensor]:
        """What a kernel gives of these outputs that errs by the last rounding alone; what the call has of them."""
        made = rounded(problem, outputs, self.setting.profile)
        return {name: made[name].to(actual.device) for name, actual in self.run.outputs.items() if name in made}

    def ratios(self) -> dict[str, Tensor]:
        """|error| / limit of every cell of every output."""
        from m3check.checks import charts
        from m3check.checks.view import View

        op = OPS[self.problem.case.op]
        chart = charts.by_output(View(op, self.problem, self.run, self.expected, self.setting, self.on_ids))
        return {name: ratio.nan_to_num(nan=float("inf"), posinf=float("inf")) for name, ratio in chart.items()}

    def wrong(self, ratios: dict[str, Tensor]) -> Masks:
        """The wrong units; all of them where only a statistic over cells says that some are."""
        found = {name: _units(name, ratio > 1) for name, ratio in ratios.items()}
        if OPS[self.problem.case.op].family != "insert":  # an insert writes apart what it gives; elsewhere it is one thing
            together: dict[tuple[int, ...], Tensor] = {}
            for mask in found.values():
                together[tuple(mask.shape)] = together.get(tuple(mask.shape), mask) | mask
            found = {name: together[tuple(mask.shape)] for name, mask in found.items()}
        if not any(bool(mask.any()) for mask in found.values()):
            return {name: mask | True for name, mask in found.items()}
        return found


def matches(call: Call) -> list[Match]:
    """Every hypothesis that explains the call, those alone that need no exceptions where there are such.

    None where no output is wrong, but the memory around them.
    """
    from m3check import reference

    if not call.refused(call.problem, call.run.outputs, call.expected):
        return []
    ground = Ground(call.problem, call.expected, reference.expected, call.setting.profile, call.world)
    ratios = call.ratios()
    wrong = call.wrong(ratios)
    right = call.given(call.problem, call.expected)
    found = []
    for hypothesis in touching(call.problem.case.op):
        try:
            made = hypothesis.applied(ground)
            match = made and _tried(call, hypothesis, *made, wrong, ratios, right)
        except (IndexError, RuntimeError):  # the changed inputs are none that a reference takes
            continue
        if match:
            found.append(match)
    if any(match.everywhere for match in found):
        found = [match for match in found if match.everywhere]
    return found


def classes(found: Sequence[Match], call: Call) -> list[list[Match]]:
    """Matches whose answers are the same in all wrong units, together: this case cannot tell them apart."""
    import torch

    wrong = call.wrong(call.ratios())

    def shown(match: Match) -> list[Tensor]:
        return [
            x.double().nan_to_num(nan=1e99).where(_cells(name, wrong[name], x), 0.0) for name, x in match.answer.items()
        ]

    groups: list[list[Match]] = []
    for match in found:
        alike = (g for g in groups if all(torch.equal(a, b) for a, b in zip(shown(g[0]), shown(match), strict=True)))
        group = next(alike, None)
        if group is None:
            groups.append([match])
        else:
            group.append(match)
    return groups


def named(findings: list[Finding], found: Sequence[Match]) -> list[Finding]:
    """Findings whose first red one tells which mistakes explain it."""
    from dataclasses import replace

    red = next((i for i, finding in enumerate(findings) if finding.status is Status.FAILED), None)
    if red is None or not found:
        return findings
    told = [f"{match.hypothesis.words} [{match.hypothesis.name}]" for match in found[:MOST]]
    more = f", and {len(found) - MOST} more" if len(found) > MOST else ""
    words = f"like {told[0]}" if len(found) == 1 else f"like one of: {', '.join(told)}{more}"
    first = findings[red]
    hint = f"{first.hint}; {words}" if first.hint else words
    return [*findings[:red], replace(first, hint=hint), *findings[red + 1 :]]


MOST = 3
"""Mistakes that a finding names at most."""


def _tried(
    call: Call, hypothesis: Hypothesis, problem: Inputs, expected: Outputs,
    wrong: Masks, ratios: dict[str, Tensor], right: dict[str, Tensor],
) -> Match | None:  # fmt: skip
    answer = fitted(expected, call.expected)
    given = call.given(problem, answer)
    actual = {name: call.run.outputs[name] for name in given}
    cells = {name: _cells(name, wrong[name], given[name]) for name in given}
    for name, x in given.items():
        lost = (x.isnan() != actual[name].isnan()) & cells[name]
        if bool(lost.any()) or _far(actual[name], x, right[name], ratios[name]):
            return None
    # NaN explains NaN and is out of the way: what is judged of such cells is the right answer.
    nan = {name: x.isnan() for name, x in given.items()}
    bare = {name: x.where(~x.isnan(), call.expected[name]) for name, x in answer.items()}
    stand_in = {name: x.where(~nan[name], right[name]) for name, x in given.items()}

    def refused(theirs: dict[str, Tensor]) -> bool:
        mixed = {name: x.where(theirs[name] & ~nan[name], stand_in[name].to(x.dtype)) for name, x in actual.items()}
        if all(bool((mixed[name] == stand_in[name]).all()) for name in given):
            return False  # bit for bit: no check need agree, since some look at more than the reference's answer
        return call.refused(problem, mixed, bare)

    if refused(cells):
        return None
    differs = {name: (x != right[name]) & ~(nan[name] & right[name].isnan()) for name, x in given.items()}
    rows = {name: _units(name, cell) for name, cell in differs.items()}
    elsewhere = {name: _cells(name, rows[name] & ~wrong[name], given[name]) for name in given}
    spared = any(bool(mask.any()) for mask in elsewhere.values()) and (
        any(bool((nan[name] & elsewhere[name]).any()) for name in given)
        or refused({name: cells[name] | elsewhere[name] for name in given})
    )
    return Match(hypothesis, given, not spared)


def _far(actual: Tensor, answer: Tensor, right: Tensor, ratio: Tensor) -> bool:
    """Whether wrong cells are no nearer to the hypothesis' answer than to the right one, or plainly wrong ones hardly."""
    finite = ratio.isfinite() & actual.isfinite() & right.isfinite()

    def nearer(cells: Tensor, share: float) -> bool:
        off, was = ((actual.double() - x.double()).where(cells, 0.0).square().sum() for x in (answer, right))
        return bool(off <= share * was)

    return not (nearer(finite & (ratio > PLAIN), 0.25) and nearer(finite & (ratio > 1), 1.0))


def _units(name: str, cells: Tensor) -> Tensor:
    """Which units [T, heads] or [T] have one of these cells."""
    if cells.dim() == 3:
        return cells.any(-1)
    return cells if name == "lse" or cells.dim() == 1 else cells.any(-1)


def _cells(name: str, units: Tensor, like: Tensor) -> Tensor:
    """Units as a mask of an output's cells."""
    return units if units.dim() == like.dim() else units[..., None].expand(like.shape)
