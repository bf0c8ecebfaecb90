"""Earlier calls change nothing: repetition, calls with one scalar argument changed in between, and configurations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from m3check.checks.invariants.trial import Trial, damage, difference
from m3check.paging import World
from m3check.types import Finding, Inputs, Status


def _scale(inputs: Inputs) -> tuple[str, Inputs]:
    return "sm_scale times 0.75", replace(inputs, sm_scale=inputs.sm_scale * 0.75)


def _field(name: str, change: Callable[[int], int]) -> Callable[[Inputs], tuple[str, Inputs]]:
    def changed(inputs: Inputs) -> tuple[str, Inputs]:
        value = change(getattr(inputs.case, name))
        fields: dict[str, Any] = {name: value}
        return f"{name} = {value}", replace(inputs, case=replace(inputs.case, **fields))

    return changed


CHANGES: Mapping[str, Callable[[Inputs], tuple[str, Inputs]]] = {
    "other_scale": _scale,
    "other_topk": _field("topk", lambda n: n - 1),
    "other_init": _field("init_blocks", lambda n: n + 1),
    "other_local": _field("local_blocks", lambda n: n + 1),
}


def sequence(trial: Trial, names: Sequence[str]) -> list[Finding]:
    """A, then a call for each change of one scalar, each judged, then A again: the same bits as at first.

    A change that the kernel refuses is left out, and nothing is said of it.
    """
    findings, between = [], []
    for name in names:
        if name not in CHANGES:
            continue
        words, inputs = CHANGES[name](trial.inputs)
        if trial.refuses(inputs.case) is not None:
            continue
        run = trial.call(inputs, World())
        between.append(words)
        change = f"a call with {words}, after one with the case's own value"
        broken = damage(run)
        if broken is not None:
            findings.append(replace(broken, check=name, hint=f"{change}: {broken.hint}"))
        else:
            findings.append(trial.judged(name, change, inputs, run))
    again = trial.call(trial.inputs, World())
    found = difference(trial.view(), trial.first.outputs, again.outputs)
    words = f"called again after calls with {', '.join(between)}" if between else "called twice with the same arguments"
    last = names[-1]
    if found is not None:
        findings = [f for f in findings if f.check != last]
        findings.append(_unlike(trial, last, words, again, found))
    elif last not in CHANGES:
        findings.append(trial.passed(last))
    return findings


def _unlike(trial: Trial, name: str, words: str, again: Any, found: tuple[int, str, str]) -> Finding:
    """A second outcome that is not the first: red where bits were promised or it is wrong, else worth a note."""
    count, where, values = found
    hint = f"{words}, {count} cells changed: {values}"
    if "repeat" in trial.setting.profile.bitwise:
        return Finding(name, Status.FAILED, float(count), 0.0, where, hint)
    judged = trial.judged(name, words, trial.inputs, again)
    if judged.status is Status.FAILED:
        return judged
    return Finding(name, Status.NOTED, float(count), 0.0, where, f"{hint}; this kernel does not promise to repeat its bits")


def configurations(trial: Trial) -> list[Finding]:
    """Every configuration of the autotuner, pinned in turn: the result may differ by rounding and between ties only."""
    findings = []
    try:
        for words, pin in trial.configurations:
            pin()
            try:
                run = trial.call(trial.inputs, World())
            except Exception as error:
                if _does_not_compile(error):
                    continue
                raise
            finding = trial.same("autotune", f"with configuration {words}", run, bitwise=False)
            if finding.status is not Status.PASSED:
                findings.append(finding)
    finally:
        trial.unpin()
    tried = len(trial.configurations)
    return findings or ([trial.passed("autotune")] if tried else [])


def tiles(trial: Trial) -> list[Finding]:
    """Tile sizes and split counts, set in turn, memory watched: the result may differ by rounding alone."""
    assert trial.watched is not None
    findings = []
    for words, pinned in trial.tiles:
        with pinned():
            run = trial.watched(trial.inputs)
        finding = trial.judged("tiles", f"with {words}", trial.inputs, run)
        if finding.status is not Status.PASSED:
            findings.append(finding)
    return findings or ([trial.passed("tiles")] if trial.tiles else [])


def warm(trial: Trial) -> list[Finding]:
    """Once the kernel is warm, batches of other sizes compile and time nothing."""
    assert trial.warm is not None
    return trial.warm()


def _does_not_compile(error: BaseException | None) -> bool:
    """Whether a static assertion ruled a configuration out, which the autotuner would skip too."""
    while error is not None:
        if type(error).__name__ in ("StaticAssertionFailed", "CompileTimeAssertionFailure"):
            return True
        error = error.__cause__
    return False
