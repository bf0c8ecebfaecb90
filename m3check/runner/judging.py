"""A run against what the reference says, and the status that its findings add up to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from m3check import power
from m3check.runner.calling import summed
from m3check.types import OPS, SPARSE, Finding, Heat, Inputs, Outputs, Status, Sums

if TYPE_CHECKING:
    import torch

    from m3check import checks
    from m3check.explain import likeness
    from m3check.paging import Run, World

Rule: TypeAlias = Literal["rounded", "folded"]


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
        setting = summed(self._setting, run)  # another route or shape may have been compiled to other instructions
        best: list[Finding] | None = None
        for rule in rules:
            problem, expected = self._reference(inputs, rule)

            def attend(ids: torch.Tensor, problem: Inputs = problem) -> Outputs:
                this = OPS[problem.case.op]
                op = this.on_ids or ("sparse_attn" if this.phase == "prefill" else "sparse_attn_decode")
                return reference.expected(replace(problem, case=replace(problem.case, op=op), topk_idx=ids))

            findings = checks.compare(problem, run, expected, setting, attend)
            if best is None or red(findings) < red(best):
                best, self._latest = findings, (problem, run, expected, setting, attend)
            if not red(best):
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

    def call(self, world: World) -> likeness.Call:
        """The run that was judged last, to look for what it resembles."""
        from m3check.explain import likeness

        problem, run, expected, setting, attend = self._latest
        return likeness.Call(problem, run, expected, setting, world, attend)

    def named(self, findings: list[Finding]) -> list[Finding]:
        """The findings of the run that was judged last; a red one of an op beside block-sparse attention tells what the
        outputs resemble, unless trying takes long. A cause that cannot be found costs no verdict.
        """
        if not red(findings) or self._own.case.op in SPARSE or not power.asked(self._own.case):
            return findings
        from m3check.explain import likeness
        from m3check.paging import World

        try:
            return likeness.named(findings, likeness.matches(self.call(World())))
        except Exception:
            return findings

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


def red(findings: Sequence[Finding]) -> int:
    """How many of the findings failed."""
    return sum(finding.status is Status.FAILED for finding in findings)


def verdict(findings: Sequence[Finding]) -> tuple[Status, str]:
    """The status that a result's findings add up to, and the first finding that decided it."""
    for status in (Status.FAILED, Status.ERROR, Status.MISTRUSTED, Status.INCONCLUSIVE):
        for finding in findings:
            if finding.status is status:
                return status, f"{finding.check}: {finding.hint or finding.where}"
    if not findings:
        return Status.MISTRUSTED, "no check applied to this case"
    return Status.PASSED, ""
