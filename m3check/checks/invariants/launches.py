"""How a kernel is launched on a device changes no bit: out of a graph, many at once, dependent on earlier ones or not."""

from __future__ import annotations

from dataclasses import replace

from m3check.checks.invariants.batch import reordered
from m3check.checks.invariants.regroup import Part, assembled
from m3check.checks.invariants.trial import Trial, damage, difference
from m3check.paging import SPARE_PAGES, Run, World
from m3check.types import OPS, Finding, Inputs, Status, blocks

LAUNCHES = 20
BEHIND = 4


def graph(trial: Trial) -> list[Finding]:
    """One graph replayed with requests that shrank, grew and died, and other block tables: as if each were called."""
    assert trial.replay is not None
    inputs = trial.inputs
    case = inputs.case
    world = World(
        max_seq_len=max(case.context, 1),
        columns=case.block_columns + 2,
        pages=sum(blocks(n) for n in case.kv_lens) + SPARE_PAGES if OPS[case.op].phase == "decode" else 0,
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
    """Many launches in flight at once: two streams, each with lengths, pages and buffers of its own, on a busy GPU."""
    assert trial.launches is not None
    other, world = _elsewhere(trial)
    eager = trial.call(other, world)
    for number, (lane, run) in enumerate(trial.launches([(trial.inputs, World()), (other, world)], LAUNCHES)):
        change = f"launch {number + 1} of {LAUNCHES} in flight on two streams"
        finding = _like(trial, change, other, eager, run) if lane else trial.same("load", change, run)
        if finding.status is not Status.PASSED:
            return [finding]
    return [trial.passed("load")]


def _elsewhere(trial: Trial) -> tuple[Inputs, World]:
    """Inputs of the same shapes with other lengths where there can be, fewer ids where they may be, and other pages."""
    inputs = trial.inputs
    case = inputs.case
    if len(set(zip(case.query_lens, case.kv_lens, strict=True))) > 1:
        inputs = reordered(inputs)
    elif inputs.topk_idx is None:
        shorter = [Part(r, 0, r.query_len, max(r.query_len, r.kv_len // 2)) for r in case.requests()]
        inputs = assembled(inputs, shorter)[0]
    if inputs.topk_idx is not None and OPS[case.op].phase == "decode" and "short" in trial.setting.profile.id_lists:
        ids = inputs.topk_idx.clone()
        ids[..., (case.topk + 1) // 2 :] = -1
        inputs = replace(inputs, topk_idx=ids)
    if "positions" in inputs.more:
        inputs = replace(inputs, more={**inputs.more, "positions": inputs.more["positions"] + 1})
    return inputs, World(salt="in flight")


def _like(trial: Trial, change: str, inputs: Inputs, eager: Run, run: Run) -> Finding:
    """A launch in flight held against a call with the same inputs."""
    broken = damage(run)
    if broken is not None:
        return replace(broken, check="load", hint=f"{change}: {broken.hint}")
    found = difference(trial.view(inputs, eager), eager.outputs, run.outputs)
    if found is None:
        return trial.passed("load")
    if not trial.repeatable():
        return trial.judged("load", change, inputs, run)
    count, where, values = found
    hint = f"{change} differs from a call in {count} cells: called {values} in flight"
    return Finding("load", Status.FAILED, float(count), 0.0, where, hint)


def dependent(trial: Trial) -> list[Finding]:
    """Without programmatic dependent launch the result is the same, and so it is where ids and lengths come late."""
    tried = False
    if trial.without_dependent_launch is not None:
        tried = True
        run = trial.without_dependent_launch(trial.inputs)
        finding = trial.same("dependent_launch", "without programmatic dependent launch", run)
        if finding.status is not Status.PASSED:
            return [finding]
    if trial.behind is not None:
        tried = True
        for run in trial.behind(trial.inputs, BEHIND):
            change = "launched right behind a slow kernel that writes lengths, ids or fresh rows"
            finding = trial.same("dependent_launch", change, run)
            if finding.status is not Status.PASSED:
                return [finding]
    return [trial.passed("dependent_launch")] if tried else []
