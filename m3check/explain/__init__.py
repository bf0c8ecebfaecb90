"""From red to the cause: one failing case taken apart, its guilty stage named, its output held against known mistakes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from m3check import invariants
from m3check.types import OPS, SPARSE, Case, Finding, Inputs, Kernel, M3CheckError, PlanLine, Status

if TYPE_CHECKING:
    from m3check.explain.stages import Stand, Trouble
    from m3check.runner import Rule, Session

__all__ = ["Explanation", "explain"]

ABOUT_MEMORY = frozenset({"memory", "guards", "inputs", "padding"})

STAGE_OF = {"index_score": "score", "index_decode_score": "score", "index_topk": "select", "index_decode": "select"}


@dataclass
class Explanation:
    """What is known of one failing case; every field is JSON-ready."""

    case: str
    provider: str
    status: str
    check: str = ""
    """The first failed check."""
    stage: str = ""
    """score, select, attend, merge or memory: the first guilty one; the op itself where it has no stages; empty where
    nothing fails."""
    stages: list[tuple[str, str]] = field(default_factory=list)
    """(stage, what is to be said of it), in order."""
    findings: list[str] = field(default_factory=list)
    how: str = ""
    """What was changed, where the first call is right and a later one is not."""
    worst: list[str] = field(default_factory=list)
    heat: list[str] = field(default_factory=list)
    places: list[str] = field(default_factory=list)
    pattern: str = ""
    """Which rows fail."""
    explained: list[list[tuple[str, str, str]]] = field(default_factory=list)
    """(name, words, pattern) of each hypothesis that explains the output; what this case cannot tell apart is together."""
    toggles: list[tuple[str, bool | None, str]] = field(default_factory=list)
    """(name, whether the failure is gone, remark)."""

    @property
    def names(self) -> list[str]:
        """The hypotheses that explain it."""
        return [name for group in self.explained for name, _, _ in group]


def explain(
    case: Case,
    session: Session,
    line: PlanLine,
    *,
    width: int = 100,
    toggled: bool = True,
    told: Callable[[str], None] = lambda text: None,
) -> Explanation:
    """Run a case, judge it, and where it is red say why; never raises for what a kernel does."""
    from m3check import runner

    found = Explanation(line.case, line.provider, "passed")
    kernel: Kernel | None = session.loaded.kernel(case.op, case)
    refusal = session.loaded.refuses(case)
    if kernel is None or refusal is not None:
        raise M3CheckError(refusal or f"{line.provider} has no {case.op}")
    inputs = runner.inputs_for(kernel, case, session.device)
    told("calling the kernel")
    try:
        trouble = trouble_of(kernel, inputs, session, line.invariants, told)
    except runner.KernelRaised as error:
        found.status, found.check = "error", "error"
        found.findings, found.stage = [str(error)], _stage_of(case.op)
        return found
    if trouble is None:
        return found
    red = [finding for finding in trouble.findings if finding.status is Status.FAILED]
    found.status, found.check, found.how = "failed", red[0].check, trouble.how
    found.findings = [_sentence(finding) for finding in red]
    if case.op in SPARSE:
        _stages(found, trouble, width, told)
    else:
        from m3check.explain import outputs

        outputs.fill(found, trouble, width, told)
        if not found.explained or any(f.check in ABOUT_MEMORY for f in red):
            _by_invariant(found, trouble)
    if toggled:
        from m3check.explain import toggles

        told("what clears it")
        found.toggles = [(t.name, t.clears, t.words) for t in toggles.tried(trouble, session)]
        if trouble.before is None and found.stage == "attend" and any(t[0] == "one split" and t[1] for t in found.toggles):
            found.stage = "merge"
            found.stages = [("merge" if s == "attend" else s, w) for s, w in found.stages]
    return found


def _sentence(finding: Finding) -> str:
    figures = "" if finding.measured is None else f"{finding.measured:.6g} > {finding.limit:.6g}"
    return f"{finding.check}: {figures} at {finding.where}" + (f" ({finding.hint})" if finding.hint else "")


def _stage_of(op: str) -> str:
    if op not in SPARSE:
        return op
    return STAGE_OF.get(OPS[op].chain[0] if OPS[op].chain else op, "attend")


def trouble_of(
    kernel: Kernel,
    inputs: Inputs,
    session: Session,
    names: Sequence[str],
    told: Callable[[str], None] = lambda text: None,
) -> Trouble | None:
    """The call to explain: the first one where it is red, else the first red one that the invariants make; None if green.

    Raises runner.KernelRaised where the first call raises.
    """
    from m3check import rerun, runner
    from m3check.explain.stages import Trouble
    from m3check.paging import Run, World

    run, setting = runner.first_call(kernel, inputs, session)
    judge = runner.Judge(inputs, setting)
    findings = judge(inputs, run)
    if _red(findings):
        return Trouble(inputs, run, World(), kernel, setting, findings)
    for name in names:
        told(f"invariant {name}")
        heard: list[tuple[Inputs, World, Run]] = []

        def hear(changed: Inputs, world: World, made: Run, heard: list[tuple[Inputs, World, Run]] = heard) -> None:
            heard.append((changed, world, made))

        broken = rerun.findings([name], kernel, session, inputs, run, setting, judge, hear)
        if not _red(broken):
            continue
        for changed, world, made in heard:
            why = _red(runner.Judge(changed, setting)(changed, made))
            if why:
                how = next(f.hint for f in broken if f.status is Status.FAILED)
                return Trouble(changed, made, world, kernel, setting, [*_red(broken), *why], inputs, how)
        return Trouble(inputs, run, World(), kernel, setting, broken, inputs, _red(broken)[0].hint)
    return None


def _red(findings: Sequence[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding.status is Status.FAILED]


def _stages(found: Explanation, trouble: Trouble, width: int, told: Callable[[str], None]) -> None:
    """Judge stage by stage and diagnose the first guilty one."""
    from m3check.explain.stages import stands

    profile = trouble.kernel.profile
    rules: tuple[Rule, ...] = (profile.dequantise,) if profile.dequantise != "either" else ("rounded", "folded")
    if trouble.inputs.k_scale is None:
        rules = rules[:1]
    guilty: Stand | None = None
    for rule in rules:
        made = stands(trouble, rule)
        guilty = next((stand for stand in made if stand.findings), None)
        if guilty is None:
            break
        _diagnose(found, trouble, guilty, told)
        if found.explained:
            break
    after = False
    for stand in made:
        if stand is guilty:
            words, after = "; ".join(dict.fromkeys(finding.check for finding in stand.findings)), True
            found.stages.append((stand.scene.stage, f"guilty: {words}"))
        elif after and not stand.findings:
            found.stages.append((stand.scene.stage, "right on what it was given"))
        else:
            found.stages.append((stand.scene.stage, "wrong on what it was given, too" if stand.findings else "right"))
    if guilty is None:
        found.stage = found.stage or (made[-1].scene.stage if made else _stage_of(trouble.inputs.case.op))
        _by_invariant(found, trouble)
        return
    found.stage = found.stage or guilty.scene.stage
    _show(found, trouble, guilty, width)


def _diagnose(found: Explanation, trouble: Trouble, guilty: Stand, told: Callable[[str], None]) -> None:
    from m3check.explain import diagnose, pattern

    wrong = diagnose.wrong_rows(guilty)
    case = trouble.inputs.case
    found.pattern = pattern.described(case, wrong)
    extra = diagnose.kept(trouble.before, trouble.inputs, guilty.scene.stage) if trouble.before is not None else []
    matches = diagnose.matches(guilty, extra, lambda name: told(f"hypothesis {name}"))
    found.explained = [
        [(m.suspect.name, m.suspect.words, pattern.described(case, wrong & m.rows)) for m in group]
        for group in diagnose.classes(matches, guilty)
    ]
    misused = any(f.check == "memory" for f in _red(trouble.findings))
    if misused or not found.explained:
        _by_invariant(found, trouble)
    if matches and not misused and all(m.suspect.merge for m in matches):
        found.stage = "merge"


def _by_invariant(found: Explanation, trouble: Trouble) -> None:
    """Where no inputs explain it: an invariant is itself the name of a cause; memory misuse is named by address."""
    names = {finding.check for finding in trouble.findings if finding.status is Status.FAILED}
    for entry in invariants.INVARIANTS:
        if entry.name in names:
            found.explained.insert(0, [(entry.name, entry.catches, "")])
    for finding in trouble.findings:
        if finding.status is Status.FAILED and finding.check in ABOUT_MEMORY:
            found.explained.insert(0, [(finding.check, f"memory: {finding.hint}", "")])


def _show(found: Explanation, trouble: Trouble, guilty: Stand, width: int) -> None:
    from m3check import paging
    from m3check.explain import places

    table = None
    if guilty.scene.stage != "select":
        salted = replace(trouble.inputs.case, op=trouble.world.salt)
        which = "index" if guilty.scene.stage == "score" else "main"
        table = paging.Pages.shuffled(salted, which, guilty.scene.actual.device, trouble.world).table
    found.worst = places.worst(guilty, table)
    found.heat = places.heat(guilty, width)
    case, kernel = trouble.inputs.case, trouble.kernel.parts.get("sparse_attn_decode", trouble.kernel)
    share = places.share_of(kernel, case.total_queries * case.kv_heads, case.topk)
    found.places = places.blocks_of(guilty, table, share)


def as_data(found: Explanation) -> dict[str, Any]:
    """An explanation as JSON-ready data."""
    return dict(vars(found))
