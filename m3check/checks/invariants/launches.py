"""How a kernel is launched on a device changes no bit: out of a graph, many at once, dependent on earlier ones or not."""

from __future__ import annotations

from m3check.checks.invariants.batch import reordered
from m3check.checks.invariants.trial import Trial, damage, difference
from m3check.paging import SPARE_PAGES, World
from m3check.types import Finding, Inputs, Status, blocks

LAUNCHES = 20


def graph(trial: Trial) -> list[Finding]:
    """One graph replayed with requests that shrank, grew and died, and other block tables: as if each were called."""
    assert trial.replay is not None
    inputs = trial.inputs
    case = inputs.case
    world = World(
        max_seq_len=max(case.context, 1),
        columns=case.block_columns + 2,
        pages=sum(blocks(n) for n in case.kv_lens) + SPARE_PAGES,
    )
    later: list[tuple[str, Inputs]] = [("other lengths and pages", reordered(inputs))]
    if case.op != "index_topk":
        later.append(("other lengths and fewer live rows", reordered(inputs, dead=True)))
    later.append(("the lengths of its capture", inputs))
    runs = trial.replay([inputs, *(each for _, each in later)], world)
    if isinstance(runs, str):
        promised = "graph" in trial.setting.profile.bitwise
        hint = runs if promised else f"{runs}; this kernel does not promise that it can"
        return [Finding("graph", Status.FAILED if promised else Status.NOTED, 1.0, 0.0, "", hint)]
    for (words, each), run in zip(later, runs, strict=True):
        broken = damage(run)
        if broken is not None:
            return [Finding("graph", Status.FAILED, broken.measured, 0.0, broken.where, f"replayed: {broken.hint}")]
        eager = trial.call(each, world)
        found = difference(trial.view(each, eager), eager.outputs, run.outputs)
        if found is not None:
            count, where, values = found
            hint = f"a graph replayed with {words} differs from a call in {count} cells: called {values} replayed"
            return [Finding("graph", Status.FAILED, float(count), 0.0, where, hint)]
    return [trial.passed("graph")]


def load(trial: Trial) -> list[Finding]:
    """Many launches in flight at once, on two streams, each like the first."""
    assert trial.launches is not None
    for number, run in enumerate(trial.launches(trial.inputs, LAUNCHES)):
        finding = trial.same("load", f"launch {number + 1} of {LAUNCHES} in flight on two streams", run)
        if finding.status is not Status.PASSED:
            return [finding]
    return [trial.passed("load")]


def dependent(trial: Trial) -> list[Finding]:
    """Without programmatic dependent launch the result is the same."""
    if trial.without_dependent_launch is None:
        return []
    run = trial.without_dependent_launch(trial.inputs)
    return [trial.same("dependent_launch", "without programmatic dependent launch", run)]
