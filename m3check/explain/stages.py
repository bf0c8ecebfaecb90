"""A failing call taken apart into its stages: score, select, attend; each judged on what the one before really gave."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from m3check.hypotheses.geometry import positions
from m3check.hypotheses.hypothesis import Stage
from m3check.hypotheses.scene import Scene
from m3check.types import OPS, Finding, Inputs, Kernel, Outputs, Status, blocks

if TYPE_CHECKING:
    from torch import Tensor

    from m3check.checks import Setting
    from m3check.checks.view import View
    from m3check.paging import Run, World
    from m3check.runner import Rule

JUDGES: Mapping[Stage, tuple[str, ...]] = {  # the checks that hold an output against any answer, by name
    "score": ("finite_score", "score", "invisible_score"),
    "select": ("ids", "selection"),
    "attend": ("finite", "dead_row", "element", "row", "token", "scale"),
}


@dataclass(frozen=True, eq=False)
class Trouble:
    """One call whose outcome is to be explained."""

    inputs: Inputs
    run: Run
    world: World
    kernel: Kernel
    setting: Setting
    findings: Sequence[Finding]
    """What a run says of it."""
    before: Inputs | None = None
    """The inputs of the first call, where this is a later one with others."""
    how: str = ""
    """What was changed in the later call."""


@dataclass(frozen=True, eq=False)
class Stand:
    """One stage of a call: its scene and how it is judged."""

    scene: Scene
    setting: Setting
    forced_apart: bool = False
    """Scores that a selection kernel keeps to itself: what their forced cells hold is not looked at."""

    def shown(self, problem: Inputs, expected: Outputs, actual: Tensor) -> Tensor:
        """The output as it is judged: forced cells that nobody looks at hold what they should."""
        if not self.forced_apart:
            return actual
        from m3check.checks.selection import forced_blocks
        from m3check.checks.view import View
        from m3check.paging import Run

        view = View(OPS[problem.case.op], problem, Run({"score": actual}), expected, self.setting)
        _, init, local = forced_blocks(view)
        return actual.where(~(init | local), expected["score"].to(actual.dtype))

    def view(self, problem: Inputs, expected: Outputs, actual: Tensor | None = None) -> View:
        """An output (the kernel's own by default) against an answer."""
        from m3check.checks.view import View
        from m3check.paging import Run

        shown = self.shown(problem, expected, self.scene.actual if actual is None else actual)
        return View(OPS[problem.case.op], problem, Run({self.scene.name: shown}), expected, self.setting)

    def chart(self, problem: Inputs, expected: Outputs) -> Tensor:
        """|error| / limit: [H, T, K] of scores, [H, T] of selections, [T, Hq, D] of attention."""
        from m3check.checks import charts

        made = {"score": charts.score_chart, "select": charts.ids_chart, "attend": charts.out_chart}
        return made[self.scene.stage](self.view(problem, expected))

    def failures(self, problem: Inputs, expected: Outputs, actual: Tensor | None = None) -> list[Finding]:
        """What the checks of this stage refuse."""
        from m3check import checks

        view, found = self.view(problem, expected, actual), list[Finding]()
        for check in checks.CHECKS:
            if check.name in JUDGES[self.scene.stage]:
                found += check.run(view)
        return [finding for finding in found if finding.status is Status.FAILED]

    @cached_property
    def expected(self) -> Outputs:
        """The reference's answer on what the stage read."""
        return self.scene.answer(self.scene.problem)

    @cached_property
    def wrong(self) -> Tensor:
        """The chart of the kernel's output against the right answer."""
        return self.chart(self.scene.problem, self.expected)

    @cached_property
    def findings(self) -> list[Finding]:
        """What is wrong with it."""
        return self.failures(self.scene.problem, self.expected)


def stands(trouble: Trouble, rule: Rule) -> list[Stand]:
    """The stages of a call in order, as far as their outputs are there to be seen."""
    op = trouble.inputs.case.op
    outputs = trouble.run.outputs
    scores = outputs.get("score")
    found: list[Stand] = []
    if op in ("index_decode", "decode") and scores is None:
        scores = _kept_scores(trouble)
    if OPS[op].chain or op in ("index_score", "index_decode_score", "index_decode"):
        apart = op in ("index_decode", "decode")
        if scores is not None:
            name = "index_decode_score" if op == "index_decode_score" else "index_score"
            found.append(_stand(trouble, rule, "score", name, scores, apart))
    if "ids" in outputs:
        if op == "index_topk":
            found.append(_stand(trouble, rule, "select", op, outputs["ids"]))
        else:
            found.append(_stand(trouble, rule, "select", "index_topk", outputs["ids"], scores=scores))
    if "out" in outputs:
        name = "sparse_attn" if OPS[op].phase == "prefill" else "sparse_attn_decode"
        found.append(_stand(trouble, rule, "attend", name, outputs["out"], ids=outputs.get("ids")))
    return found


def _kept_scores(trouble: Trouble) -> Tensor | None:
    """The scores that a decode selection left in its buffer, [H, T, K]."""
    guard = next((guard for guard in trouble.run.guards if guard.name == "score_out"), None)
    return None if guard is None else guard.view[..., : trouble.inputs.case.block_columns].clone()


def _stand(
    trouble: Trouble,
    rule: Rule,
    stage: Stage,
    op: str,
    actual: Tensor,
    forced_apart: bool = False,
    scores: Tensor | None = None,
    ids: Tensor | None = None,
) -> Stand:
    from m3check import reference

    def dequantised(changed: Inputs) -> Inputs:
        return reference.dequantised(changed, rule)

    def answer(changed: Inputs) -> Outputs:
        return reference.expected(dequantised(changed))

    given = trouble.inputs
    case = replace(given.case, op=op)
    if stage == "score":
        given = replace(given, case=case, q=None, k=None, v=None, k_scale=None, v_scale=None, scores=None)
        problem = given
    elif stage == "select":
        own = given.scores
        if own is None:
            own = scores if scores is not None else _right_scores(trouble)
            own = _hidden(own, given)
        given = Inputs(case, given.sm_scale, scores=own)
        problem = given
    else:
        lists = given.topk_idx if given.topk_idx is not None else ids
        given = replace(given, case=case, idx_q=None, idx_k=None, scores=None, topk_idx=lists)
        problem = dequantised(given)
    profile = trouble.kernel.profile
    return Stand(
        Scene(stage, given, problem, actual, profile, trouble.world, dequantised, answer), trouble.setting, forced_apart
    )


def _right_scores(trouble: Trouble) -> Tensor:
    """The reference's scores, where a kernel shows its selection only."""
    from m3check import reference

    given = trouble.inputs
    score = reference.expected(replace(given, case=replace(given.case, op="index_score")))["score"]
    return score.float()


def _hidden(scores: Tensor, given: Inputs) -> Tensor:
    """-inf in the cells of blocks that a query does not see."""
    import torch

    visible = torch.tensor([blocks(p + 1) for p in positions(given.case)], device=scores.device)[:, None]
    block = torch.arange(scores.shape[-1], device=scores.device)
    return scores.masked_fill(block >= visible, -torch.inf)
