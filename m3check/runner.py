"""plan() and run_one(): the only place where cases, references, kernels and checks meet."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar

from m3check import arch as arches
from m3check import cases, invariants, kernels, power, rerun
from m3check.arch import Arch, Arithmetic
from m3check.compiled import evidence as compiled
from m3check.expression import matcher
from m3check.types import (
    DTYPES,
    OPS,
    Case,
    Evidence,
    Finding,
    Heat,
    Inputs,
    Kernel,
    M3CheckError,
    Outputs,
    PlanLine,
    Result,
    Status,
    Sums,
)

if TYPE_CHECKING:
    import torch

    from m3check import checks
    from m3check.config import RunOptions
    from m3check.device import Launches
    from m3check.kernels.contract import Observe
    from m3check.paging import Run, World

Answer = TypeVar("Answer")
Moved = TypeVar("Moved", Inputs, "Run")
Rule: TypeAlias = Literal["rounded", "folded"]


def evidence_for(arch: Arch) -> tuple[Evidence, int, str]:
    """Which evidence this machine can give for a target, on which device, and the sentence that says why."""
    found = arches.present()
    for index, name in found:
        if name == arch.name:
            return "device", index, f"ran on this machine's {name} (device {index})"
    if found:
        others = ", ".join(sorted({name for _, name in found}))
        return "interpreted", -1, f"this machine's GPU is {others}, not {arch.name}: it was not used"
    return "interpreted", -1, f"this machine has no {arch.name} GPU: Triton's interpreter ran the kernels on the CPU"


def chosen_cases(options: RunOptions) -> list[Case]:
    """The cases that the options name, in plan order; raises M3CheckError for what is unknown."""
    chosen = [cases.parse_id(text) for text in options.cases] or list(cases.tier(options.tier))
    if options.ops:
        chosen = [case for case in chosen if case.op in options.ops]
    if options.expr:
        matches = matcher(options.expr)
        chosen = [case for case in chosen if matches(described(case))]
    if options.seed:
        chosen = [replace(case, seed=options.seed) for case in chosen]
    if options.shard != (1, 1):
        chosen = cases.shard(chosen, *options.shard)
    return chosen


def described(case: Case) -> str:
    """What `-k` looks at: the id and every axis as `word=value`."""
    return " ".join([cases.case_id(case), *(f"{word}={value}" for word, value in case.axes().items())])


def plan(options: RunOptions) -> list[PlanLine]:
    """Every (case, provider) of a run with the reason where it is skipped. No kernel code runs."""
    arch = arches.find_arch(options.arch)
    evidence, _, why = evidence_for(arch)
    lines = []
    due = chosen_cases(options)
    for text in options.kernels:
        spec = kernels.parse_spec(text)
        shown = _invariants(options, spec, arch, evidence)
        for case in due:
            skip = kernels.refuses(spec, case, arch, evidence)
            if skip is None and options.tier == "production" and not options.cases and evidence != "device":
                skip = f"needs a device ({why}); {cases.case_cost(case)}"
            names = shown(case) if skip is None else ()
            lines.append(PlanLine(cases.case_id(case), case.op, text, evidence, skip, names))
        if evidence != "device" and kernels.compiles(spec):
            lines += _compiled(options, spec, arch, due)
    return lines


def _compiled(options: RunOptions, spec: kernels.Spec, arch: Arch, due: Sequence[Case]) -> Iterator[PlanLine]:
    """What is cross-compiled beside being interpreted; variants are counted on one case of each op, and on named ones.

    The cases of `smoke` reach every kernel, dtype and layout. Another tier's compile as well where --require asks for it:
    each has variants of its own, and a whole tier of them takes an hour.
    """
    swept: set[str] = set()
    every = bool(options.cases) or options.require == "compiled"
    few = () if every else frozenset(cases.tier("smoke"))
    for case in due:
        if options.tier == "production" and not options.cases:
            continue  # what a plan skips is said once
        if not every and replace(case, seed=0) not in few:
            continue
        skip = kernels.refuses(spec, case, arch, "compiled")
        if not every and OPS[case.op].phase == "mixed":
            skip = skip or "a mixed batch is host code: its kernels compile as ops of their own"
        sweep = skip is None and (bool(options.cases) or case.op not in swept)
        swept |= {case.op} if sweep else set()
        yield PlanLine(cases.case_id(case), case.op, spec.text, "compiled", skip, ("recompiles",) if sweep else ())


def _invariants(
    options: RunOptions, spec: kernels.Spec, arch: Arch, evidence: Evidence
) -> Callable[[Case], tuple[str, ...]]:
    """Which invariants a case shows on one provider: the same in every run of a tier, whatever else was asked for.

    A case that was named shows what any tier asks of it, and all that fit unless that takes long.
    """

    def suits(invariant: str, case: Case) -> bool:
        return kernels.suits(spec, invariant, case, arch, evidence)

    def assigned(tier: str) -> dict[str, tuple[str, ...]]:
        able = [case for case in cases.tier(tier) if kernels.refuses(spec, case, arch, evidence) is None]
        seconds = [(cases.case_id(case), case, cases.cost(case, evidence)) for case in able]
        return invariants.assign(seconds, evidence, tier, suits)

    given = [assigned(tier) for tier in (("smoke", "ci", "full") if options.cases else (options.tier,))]

    def shown(case: Case) -> tuple[str, ...]:
        name = cases.case_id(replace(case, seed=0))
        names = [each for tier in given for each in tier.get(name, ())]
        if options.cases:
            names += invariants.affordable(case, evidence, cases.cost(case, evidence))
        return tuple(entry.name for entry in invariants.chosen(names))

    return shown


def repro(line: PlanLine, options: RunOptions) -> str:
    """The command that reruns exactly this case on this kernel; known before the launch."""
    return f"m3check run --arch {options.arch} --kernels {line.provider} --case {line.case}"


@dataclass
class Session:
    """What one worker holds for life: a provider's kernels on one target by one kind of evidence."""

    arch: Arch
    evidence: Evidence
    device: str
    loaded: Any  # kernels.Loaded
    unrepaired: Sequence[str] = ()
    """Why results of this process cannot be trusted, e.g. an interpreter repair that could not be installed."""
    compiling: Callable[[bool], None] = lambda began: None
    """Hears when cross-compilation begins and ends, which stops the clock of a case."""
    judged_on: str = ""
    """The device of references and checks, which then are no invariants; empty: where the kernel ran."""
    heat: bool = False
    """Whether a result whose comparisons are red says cell by cell where, for the report."""


def run_one(case: Case, session: Session, line: PlanLine, command: str) -> Result:
    """Make the inputs, run the kernel, judge its outputs. Never raises for what a kernel does."""
    started = time.perf_counter()
    kernel: Kernel | None = session.loaded.kernel(case.op, case)
    name = kernel.name if kernel else case.op

    def result(status: Status, reason: str = "", findings: Sequence[Finding] = ()) -> Result:
        return Result(
            line.case,
            case.op,
            line.provider,
            name,
            session.evidence,
            case.axes(),
            status,
            reason,
            tuple(findings),
            round(time.perf_counter() - started, 3),
            command,
        )

    if kernel is None:
        return result(Status.SKIPPED, session.loaded.missing.get(case.op, f"{line.provider} has no {case.op}"))
    refusal = session.loaded.refuses(case)
    if refusal is not None:
        return result(Status.SKIPPED, refusal)
    try:
        if session.evidence == "compiled":
            found = compiled.findings(case, kernel, session.arch, bool(line.invariants), session.compiling)
            return result(*verdict(found), found)
        findings, sums, heat = _judge(case, kernel, session, line.invariants)
    except compiled.NothingToCompile as error:
        return result(Status.SKIPPED, str(error))
    except KernelRaised as error:
        return result(Status.ERROR, str(error))
    except M3CheckError as error:
        return result(Status.ERROR, str(error))
    except Exception as error:  # a defect of m3check must cost this case alone, and say whose it is
        return result(Status.ERROR, f"m3check itself failed, not the kernel: {_where(error)}")
    status, reason = verdict(findings)
    if session.unrepaired and status is not Status.SKIPPED:
        return result(Status.INCONCLUSIVE, "; ".join(session.unrepaired), findings)
    if status is Status.PASSED:  # agreed; but would a wrong answer have passed, too?
        status, reason = power.doubt(case, session.device) or (status, reason)
    return replace(result(status, reason, findings), sums=sums, heat=heat)


def verdict(findings: Sequence[Finding]) -> tuple[Status, str]:
    """The status that a result's findings add up to, and the first finding that decided it."""
    for status in (Status.FAILED, Status.ERROR, Status.MISTRUSTED, Status.INCONCLUSIVE):
        for finding in findings:
            if finding.status is status:
                return status, f"{finding.check}: {finding.hint or finding.where}"
    if not findings:
        return Status.MISTRUSTED, "no check applied to this case"
    return Status.PASSED, ""


class KernelRaised(Exception):
    """A kernel raised instead of answering."""


def _judge(
    case: Case, kernel: Kernel, session: Session, names: Sequence[str]
) -> tuple[list[Finding], Sums | None, Heat | None]:
    inputs = inputs_for(kernel, case, session.judged_on or session.device)
    run, setting = first_call(kernel, _moved(inputs, session.device) if session.judged_on else inputs, session)
    if session.judged_on:
        names, run = (), _moved(run, session.judged_on)
    judge = Judge(inputs, setting)
    findings = judge(inputs, run)
    heat = judge.heat() if session.heat and _red(findings) else None
    if names and not _red(findings):  # a result that is red already needs no further cause
        findings += rerun.findings(names, kernel, session, inputs, run, setting, judge)
    return findings, judge.sums(run) if session.evidence == "device" and not kernel.parts else None, heat


def inputs_for(kernel: Kernel, case: Case, device: str) -> Inputs:
    """A case's inputs; attention queries that a kernel rounds first are rounded before anybody sees them."""
    inputs = cases.make_inputs(case, device)
    if not kernel.profile.queries or inputs.q is None:
        return inputs
    import torch

    return replace(inputs, q=inputs.q.to(getattr(torch, DTYPES[kernel.profile.queries])).to(inputs.q.dtype))


def _moved(value: Moved, device: str) -> Moved:
    """Inputs, or a run, with its tensors on another device; watched memory stays where it is."""
    import torch

    def there(held: Any) -> Any:
        if isinstance(held, dict):
            return {name: there(each) for name, each in held.items()}
        return held.to(device) if isinstance(held, torch.Tensor) else held

    return replace(value, **{name: there(held) for name, held in vars(value).items()})


def setting_of(kernel: Kernel, session: Session) -> checks.Setting:
    """How a kernel is judged as long as nothing is known of how it summed."""
    from m3check import checks

    return checks.Setting(profile=kernel.profile, arch=session.arch, evidence=session.evidence)


def first_call(kernel: Kernel, inputs: Inputs, session: Session) -> tuple[Run, checks.Setting]:
    """A call in a world of NaN poison, and how it is to be judged; cells read unwritten are weighed by a second call."""
    from m3check.checks import accesses
    from m3check.checks.view import View
    from m3check.paging import World

    run = call(kernel, inputs, session)
    setting = _summed(setting_of(kernel, session), run)
    if any(access.misuse == "unwritten" for access in run.accesses or ()):
        again = call(kernel, inputs, session, World(poison="garbage"))
        accesses.weigh(View(OPS[inputs.case.op], inputs, run, {}, setting), again)
    return run, setting


class Judge:
    """All comparisons of a run with the reference; what the reference says of the case's own inputs is worked out once."""

    def __init__(self, inputs: Inputs, setting: checks.Setting) -> None:
        self._own = inputs
        self._setting = setting
        self._known: dict[str, tuple[Inputs, Outputs]] = {}
        self._latest: tuple[Any, ...] = ()

    def __call__(self, inputs: Inputs, run: Run) -> list[Finding]:
        """Findings by the rule of dequantisation that the profile promises, or the one that explains the run best."""
        from m3check import checks, reference

        rules: tuple[Rule, ...] = ("rounded", "folded") if inputs.k_scale is not None else ("rounded",)
        if self._setting.profile.dequantise != "either":
            rules = (self._setting.profile.dequantise,)
        setting = _summed(self._setting, run)  # another route or shape may have been compiled to other instructions
        best: list[Finding] | None = None
        for rule in rules:
            problem, expected = self._reference(inputs, rule)

            def attend(ids: torch.Tensor, problem: Inputs = problem) -> Outputs:
                this = OPS[problem.case.op]
                op = this.on_ids or ("sparse_attn" if this.phase == "prefill" else "sparse_attn_decode")
                return reference.expected(replace(problem, case=replace(problem.case, op=op), topk_idx=ids))

            findings = checks.compare(problem, run, expected, setting, attend)
            if best is None or _red(findings) < _red(best):
                best, self._latest = findings, (problem, run, expected, setting, attend)
            if not _red(best):
                break
        assert best is not None
        return best

    def heat(self) -> Heat | None:
        """Where the run that was judged last is wrong. A picture that cannot be made costs no verdict."""
        from m3check.checks import heat

        try:
            return heat.drawn(*self._latest)
        except Exception:
            return None

    def sums(self, run: Run) -> Sums | None:
        """How a call on the case's own inputs added up, which only ops that multiply say."""
        from m3check.checks.sums import effective_bits

        if run.arithmetic is None or (self._own.idx_q is None and self._own.q is None):
            return None
        problem, expected = self._reference(self._own, "rounded")
        score = run.outputs.get("score")
        bits = None if score is None else effective_bits(problem, score, expected)
        return Sums(run.arithmetic.score.origin, None if bits is None else round(bits, 1))

    def _reference(self, inputs: Inputs, rule: Rule) -> tuple[Inputs, Outputs]:
        from m3check import reference

        if inputs is self._own and rule in self._known:
            return self._known[rule]
        problem = reference.dequantised(inputs, rule)
        answer = problem, reference.expected(problem)
        if inputs is self._own:
            self._known[rule] = answer
        return answer


def _red(findings: Sequence[Finding]) -> int:
    return sum(finding.status is Status.FAILED for finding in findings)


def call(kernel: Kernel, inputs: Inputs, session: Session, world: World | None = None) -> Run:
    """Run the kernel in filled memory; whatever it raises becomes KernelRaised with the place."""
    from m3check import device
    from m3check.kernels import contract

    def run() -> Run:
        if session.evidence != "device":
            result = contract.call(kernel, inputs, world, _observe())
            result.arithmetic = Arithmetic()
            return result
        with device.recording() as launches:
            result = contract.call(launches.following(kernel), inputs, world)
        import torch

        torch.cuda.synchronize(session.device)
        result.arithmetic = _arithmetic(inputs.case, launches, session.arch)
        return result

    if world is not None and world.poison == "garbage":
        with rerun.fresh_garbage():
            return guarded(kernel, run)
    return guarded(kernel, run)


def _observe() -> Observe:
    """What watches the memory of an interpreted call."""
    from m3check.interpret import addresses

    return addresses.observed


def guarded(kernel: Kernel, run: Callable[[], Answer]) -> Answer:
    """`run()` in filled memory; whatever a kernel raises in it becomes KernelRaised with the place."""
    try:
        with filled_memory():
            return run()
    except M3CheckError:
        raise
    except Exception as error:
        raise KernelRaised(f"{kernel.name} raised {_where(error)}") from error


def _where(error: BaseException) -> str:
    """An exception in one sentence, with the innermost source line that is not inside a library."""
    chain = error
    while chain.__cause__ is not None:
        chain = chain.__cause__
    text = " ".join(str(chain).split())
    frames = [f for e in (error, chain) for f in traceback.extract_tb(e.__traceback__)]
    own = [f for f in frames if "site-packages/t" not in f.filename and "contract.py" not in f.filename]
    place = f" at {Path(own[-1].filename).name}:{own[-1].lineno}" if own else ""
    return f"{type(chain).__name__}: {text[:400]}{place}"


def _arithmetic(case: Case, launches: Launches, arch: Arch) -> Arithmetic:
    """How a call summed on a device: by the matrix instructions in the variants that ran, each op of a chain by its own."""
    chain = OPS[case.op].chain or (case.op,)
    queries = case.index_cache_dtype if OPS[case.op].chain and case.index_cache_dtype.startswith("fp8") else case.dtype
    attended = launches.accumulator(chain[-1], arch, arch.kind(case.dtype))
    return Arithmetic(launches.accumulator(chain[0], arch, arch.kind(queries)), attended, attended)


def _summed(setting: checks.Setting, run: Run) -> checks.Setting:
    """The setting with the arithmetic of a call, where that is known."""
    if run.arithmetic is None:
        return setting
    return replace(setting, scoring=run.arithmetic.score, dot=run.arithmetic.dot, pv=run.arithmetic.pv)


@contextmanager
def filled_memory() -> Iterator[None]:
    """torch.empty inside the block gives NaN (floats) or the largest integer, so that an unwritten cell is seen."""
    import torch

    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
