"""What an invariant needs from a runner: the kernel called again with something changed, and the outcome judged."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from m3check import invariants
from m3check.types import Finding, Inputs, Kernel, M3CheckError, Status

if TYPE_CHECKING:
    from m3check.checks import Setting
    from m3check.checks.invariants.trial import Trial
    from m3check.paging import Run, World
    from m3check.runner import Session

Judge = Callable[[Inputs, "Run"], list[Finding]]


def findings(
    names: Sequence[str],
    kernel: Kernel,
    session: Session,
    inputs: Inputs,
    first: Run,
    setting: Setting,
    judge: Judge,
    heard: Callable[[Inputs, World, Run], None] | None = None,
) -> list[Finding]:
    """What the named invariants find on one result; `heard` is told of every further call."""
    from m3check.checks.invariants import memory, state

    trial = _trial(kernel, session, inputs, first, setting, judge)
    if heard is not None:
        call = trial.call

        def told(changed: Inputs, world: World) -> Run:
            run = call(changed, world)
            heard(changed, world, run)
            return run

        trial.call = told
    chosen = invariants.chosen(names)
    found: list[Finding] = []
    worlds = {entry.name: entry.world for entry in chosen if entry.world is not None}
    if worlds:
        found += _tried(trial, next(iter(worlds)), lambda: memory.physical(trial, worlds))
    for entry in chosen:
        if entry.world is None and entry.run != "state.sequence":
            found += _tried(trial, entry.name, lambda entry=entry: _carried_out(entry.run, trial))  # type: ignore[misc]
    calls = [entry.name for entry in chosen if entry.run == "state.sequence"]
    if calls:
        found += _tried(trial, calls[0], lambda: state.sequence(trial, calls))
    return found


def _carried_out(run: str, trial: Trial) -> list[Finding]:
    import importlib

    module, _, function = run.partition(".")
    carried: list[Finding] = getattr(importlib.import_module(f"m3check.checks.invariants.{module}"), function)(trial)
    return carried


def _tried(trial: Trial, name: str, carry_out: Callable[[], list[Finding]]) -> list[Finding]:
    """The findings of one invariant; a kernel that raises on a changed call, or misuses memory in it, does not hold it."""
    from m3check.kernels.calls import BrokenContract
    from m3check.runner import KernelRaised

    trial.misuse = None
    try:
        found = carry_out()
    except (KernelRaised, BrokenContract) as error:
        found = [Finding(name, Status.FAILED, 1.0, 0.0, "", f"the changed call did not return: {error}")]
    except M3CheckError:
        return []  # refused, or no memory for it: nothing was shown, so nothing is said
    enough = {Status.FAILED, Status.NOTED} if name in invariants.PROMISES else {Status.FAILED}
    if trial.misuse is not None and not any(finding.status in enough for finding in found):
        found = [finding for finding in found if finding.check != name]
        found.append(replace(trial.misuse, check=name, hint=f"a changed call {trial.misuse.hint}"))
    return [trial.unless_promised(f) if f.check in invariants.PROMISES else f for f in found]


def _trial(kernel: Kernel, session: Session, inputs: Inputs, first: Run, setting: Setting, judge: Judge) -> Trial:
    from m3check import runner
    from m3check.checks import accesses
    from m3check.checks.invariants.trial import Trial
    from m3check.kernels import overlap, replay
    from m3check.paging import World

    def call(changed: Inputs, world: World) -> Run:
        refusal = session.loaded.refuses(changed.case)
        if refusal is not None:
            raise M3CheckError(refusal)
        run = runner.call(kernel, changed, session, world)
        trial.misuse = trial.misuse or accesses.misuse(trial.view(changed, run))
        return run

    def other(op: str, changed: Inputs) -> tuple[Run, list[Finding]]:
        refusal = session.loaded.refuses(changed.case)
        if refusal is not None:
            raise M3CheckError(refusal)
        served = session.loaded.kernel(op, changed.case)
        assert served is not None
        run = runner.call(served, changed, session, World())
        return run, runner.Judge(changed, replace(setting, profile=served.profile))(changed, run)

    def launched(way: Callable[[], Any]) -> Any:
        return runner.guarded(kernel, way)

    trial = Trial(inputs, first, setting, call, judge, other)
    trial.refuses = session.loaded.refuses
    trial.configurations, trial.unpin = _configurations(kernel, session)
    trial.tiles = session.loaded.tiles
    trial.watched = lambda same: runner.call(kernel, same, session)
    if session.evidence == "device":

        def replayed(several: Sequence[Inputs], world: World) -> list[Run] | str:
            try:
                runs: list[Run] = launched(lambda: replay.replayed(kernel, several, world))
            except replay.CannotCapture as error:
                return str(error)
            return runs

        def captured() -> Run | str:
            try:
                return trial.call(inputs, World(earlier="captured"))
            except replay.CannotCapture as error:
                return str(error)

        trial.replay, trial.captured = replayed, captured
        trial.warm = lambda: _warmed(kernel, trial)
        trial.launches = lambda lanes, count: launched(lambda: overlap.in_flight(kernel, lanes, count))
        if session.arch.pdl:
            trial.behind = lambda same, count: launched(lambda: overlap.behind_producer(kernel, same, count))
        switch = session.loaded.dependent_launch
        if switch is not None:

            def without(same: Inputs) -> Run:
                switch(False)
                try:
                    return call(same, World())
                finally:
                    switch(True)

            trial.without_dependent_launch = without
    return trial


def _warmed(kernel: Kernel, trial: Trial) -> list[Finding]:
    """The kernel warmed up as its server would, then given batches of other sizes: what those compiled or timed."""
    from m3check import runner, warm
    from m3check.kernels import contract

    if kernel.library:
        raise M3CheckError(f"nothing tells what {kernel.name} compiles")
    inputs, world, warm_up = trial.inputs, warm.server(trial.inputs.case), kernel.warm_up
    with warm.listening() as heard:
        if warm_up is None:
            trial.call(inputs, world)
        else:
            runner.guarded(kernel, lambda: warm_up(**contract.prepare(kernel, inputs, world).arguments))
        first, later = heard.taken(), []
        for words, case in warm.batches(inputs.case):
            trial.call(runner.inputs_for(kernel, case, str(inputs.device)), world)
            later.append((words, heard.taken()))
    return warm.judged(first, later, kernel.profile.bitwise)


def _configurations(kernel: Kernel, session: Session) -> tuple[list[tuple[str, Callable[[], Any]]], Callable[[], Any]]:
    """Each configuration of each autotuned kernel in the file of a function (with what pins it), and what undoes it."""
    if session.evidence != "interpreted" or "triton" not in sys.modules:
        return [], lambda: None
    from m3check import interpret

    function: Any = kernel.function
    while hasattr(function, "__wrapped__") or hasattr(function, "func"):
        function = getattr(function, "__wrapped__", None) or function.func
    namespace: Mapping[str, Any] = getattr(function, "__globals__", {})
    names = getattr(getattr(function, "__code__", None), "co_names", ())
    reached = {name: namespace[name] for name in names if name in namespace}
    for value in list(reached.values()):  # one step further: a helper that launches
        inner = getattr(getattr(value, "__code__", None), "co_names", ())
        reached |= {name: namespace[name] for name in inner if name in namespace}
    tuned = interpret.autotuned(reached)
    entries: list[tuple[str, Callable[[], Any]]] = [
        (f"{index} of {name}", functools.partial(interpret.pin_autotune, reached[name], index))
        for name, count in tuned.items()
        for index in range(count)
    ]

    def unpin() -> None:
        for name in tuned:
            interpret.pin_autotune(reached[name], None)

    return entries, unpin
