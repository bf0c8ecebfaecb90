"""One case by compiled evidence: its launches captured, each variant compiled for the target, and the findings."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from m3check import warm
from m3check.arch import Arch
from m3check.types import DTYPES, OPS, Case, Finding, Kernel, M3CheckError, Status

if TYPE_CHECKING:
    from m3check.compiled.build import Built
    from m3check.compiled.capture import Launch
    from m3check.paging import World


class NothingToCompile(M3CheckError):
    """A kernel that launches nothing of Triton's, or whose fp8 dtype this Triton does not have on the target."""


def findings(case: Case, kernel: Kernel, arch: Arch, sweep: bool, compiling: Callable[[bool], None]) -> list[Finding]:
    """What compiling a case's launches shows. Raises NothingToCompile with the sentence why there is nothing to say.

    With `sweep`, which one case of each op has, every candidate of an autotuner is compiled, lengths and batch sizes are
    varied, and variants counted. Elsewhere one candidate stands for an autotuner's: large sorts take half a minute each.
    """
    from m3check.compiled import build, target
    from m3check.compiled import sweep as sweeping
    from m3check.compiled.findings import judge, loads

    launches, raised = launches_of(case, kernel)
    if sweep and kernel.warm_up is not None:
        launches = [*launches, *launches_of(case, kernel, warming=True)[0]]
    if not launches and not raised:
        raise NothingToCompile(f"{kernel.name} launches no Triton kernel, so there is nothing to compile")
    goal = target.gpu_target(arch)
    wanted = [each for launch in launches if sweep or not launch.tuned for each in launch.candidates]
    outcomes = dict(zip(map(id, wanted), build.build_all(wanted, goal, compiling), strict=True))
    for launch in launches:
        if launch.tuned and not sweep:
            tried = []
            for candidate in reversed(launch.candidates):  # by custom the smallest tile comes last
                [outcome] = build.build_all([candidate], goal, compiling)
                outcomes[id(candidate)] = outcome
                tried.append(candidate)
                if loads(candidate, outcome, arch, case):
                    break
            launch.candidates = tried
    for outcome in outcomes.values():
        missing = missing_dialect(case, arch, outcome)
        if missing:
            raise NothingToCompile(missing)
    found = judge(launches, outcomes, arch, case)
    if raised:
        found.append(Finding("captured", Status.INCONCLUSIVE, hint=raised))
    elif sweep:
        found += sweeping.storms(case, lambda other: launches_of(other, kernel)[0])
        found += [] if kernel.parts else warmth(case, kernel)  # a chain's kernels are asked each for itself
    return found


def warmth(case: Case, kernel: Kernel) -> list[Finding]:
    """What batches of other sizes would compile anew after the kernel's warm-up, or after a call of the case."""
    world = warm.server(case)

    def heard(other: Case, warming: bool = False) -> warm.Heard:
        launches, _ = launches_of(other, kernel, world, warming)
        return warm.Heard([each.variant for launch in launches for each in launch.candidates])

    first = heard(case, kernel.warm_up is not None)
    return warm.judged(first, [(words, heard(other)) for words, other in warm.batches(case)], kernel.profile.bitwise)


def launches_of(
    case: Case, kernel: Kernel, world: World | None = None, warming: bool = False
) -> tuple[Sequence[Launch], str]:
    """The launches of a case, and the sentence of what its wrapper raised after them: captured kernels compute nothing.

    Where it is `warming`, the kernel's warm-up is called in its place.
    """
    from m3check import cases
    from m3check.compiled.capture import capturing
    from m3check.kernels import contract
    from m3check.paging import World

    inputs = cases.make_inputs(case)
    raised = ""
    with capturing() as launches:
        try:
            if warming and kernel.warm_up is not None:
                kernel.warm_up(**contract.prepare(kernel, inputs, world or World()).arguments)
            else:
                contract.call(kernel, inputs, world)
        except Exception as error:
            own = [f for f in traceback.extract_tb(error.__traceback__) if "site-packages/t" not in f.filename]
            place = f" at {Path(own[-1].filename).name}:{own[-1].lineno}" if own else ""
            text = " ".join(str(error).split())[:200]
            raised = (
                f"{kernel.name} raised after {len(launches)} captured launches, which compute nothing: "
                f"{type(error).__name__}: {text}{place}"
            )
    return launches, raised


def missing_dialect(case: Case, arch: Arch, outcome: Built) -> str:
    """The sentence that Triton has no such fp8 type on the target, where that is why a variant does not compile."""
    if outcome.figures is not None or "not supported in this architecture" not in outcome.error:
        return ""
    words = [case.dtype, case.cache_dtype, *([case.index_cache_dtype] if OPS[case.op].chain else [])]
    for word in words:
        if word in DTYPES and word.startswith("fp8") and word not in arch.fp8:
            return f"Triton compiles no {word} for {arch.name}, only {', '.join(sorted(arch.fp8))}"
    return ""
