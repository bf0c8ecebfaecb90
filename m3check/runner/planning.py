"""What a run does: every case on every provider, by which evidence, with the sentence of each skip."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from m3check import arch as arches
from m3check import cases, invariants, kernels
from m3check.arch import Arch
from m3check.expression import matcher
from m3check.types import OPS, Case, Evidence, PlanLine

if TYPE_CHECKING:
    from m3check.config import RunOptions


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
    return _narrowed(options)[-1][1]


def why_none(options: RunOptions) -> str:
    """The sentence where nothing is left to run: how many cases there were, and what each flag left of them."""
    first, *steps = _narrowed(options)
    emptied = next((i for i, (_, found) in enumerate(steps, 1) if not found), len(steps))
    left = ", ".join(f"{flag} leaves {len(found) or 'none'}" for flag, found in steps[:emptied])
    there = len(first[1])
    return f"no case was selected: of {there} case{'s' if there != 1 else ''} ({first[0]}) {left}"


def _narrowed(options: RunOptions) -> list[tuple[str, list[Case]]]:
    """What the options name first, then what each further flag leaves of it: (the flag as typed, cases)."""
    chosen = [cases.parse_id(text) for text in options.cases] or list(cases.tier(options.tier))
    steps = [("--case" if options.cases else f"tier {options.tier}", chosen)]
    if options.ops:
        chosen = [case for case in chosen if case.op in options.ops]
        steps.append((f"--op {' '.join(options.ops)}", chosen))
    if options.expr:
        matches = matcher(options.expr)
        chosen = [case for case in chosen if matches(described(case))]
        steps.append((f"-k {options.expr!r}", chosen))
    if options.seed:
        chosen = [replace(case, seed=options.seed) for case in chosen]
        steps.append((f"--seed {options.seed}", chosen))
    if options.shard != (1, 1):
        chosen = cases.shard(chosen, *options.shard)
        steps.append(("--shard {}/{}".format(*options.shard), chosen))
    return steps


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
