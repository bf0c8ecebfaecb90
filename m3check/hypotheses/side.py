"""The reference side of one case, and what a hypothesis makes of it: the wrong answer, and whether the checks refuse it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from m3check.hypotheses import insert
from m3check.hypotheses.hypothesis import Ground, Hypothesis, Stage, State
from m3check.hypotheses.scores import merits
from m3check.types import OPS, SPARSE, Inputs, Outputs, Profile

if TYPE_CHECKING:
    from torch import Tensor

STAGES: Mapping[str, Mapping[Stage, str]] = {  # which reference answers for which stage of an op
    "index_score": {"score": "index_score"},
    "index_topk": {"select": "index_topk"},
    "index_decode_score": {"score": "index_decode_score"},
    "index_decode": {"score": "index_decode", "select": "index_topk"},
    "sparse_attn": {"attend": "sparse_attn"},
    "sparse_attn_decode": {"attend": "sparse_attn_decode"},
    "prefill": {"score": "index_score", "select": "index_topk", "attend": "sparse_attn"},
    "decode": {"score": "index_decode", "select": "index_topk", "attend": "sparse_attn_decode"},
    "mla_sparse": {"latent": "mla_sparse"},
    "mqa_logits": {"logits": "mqa_logits"},
    "paged_mqa_logits": {"logits": "paged_mqa_logits"},
    "qknorm_rope_insert": {"insert": "qknorm_rope_insert"},
    "sparse_pa_table": {"table": "sparse_pa_table"},
    "sparse_pa_table_decode": {"table": "sparse_pa_table_decode"},
    "index_insert": {"keys": "index_insert"},
}


@dataclass(frozen=True)
class Side:
    """The reference side of one case."""

    inputs: Inputs
    """As they were generated, with codes and scales."""
    problem: Inputs
    """The same, dequantised."""
    right: Outputs
    """The reference's answer to `problem`."""
    answer: Callable[[Inputs], Outputs]
    """Dequantises by the same rule and asks the reference of `inputs.case.op`."""
    refused: Callable[[Mapping[str, Tensor]], bool]
    """Whether the checks are red on given outputs."""

    def reads(
        self, stage: Stage, *, codes: bool = False, scores: Tensor | None = None, ids: Tensor | None = None
    ) -> Inputs:
        """What one stage of the op reads: of the stages before it the right answers, or those given."""
        given = self.inputs if codes else self.problem
        case = replace(given.case, op=STAGES[given.case.op][stage])
        if stage == "score":
            return replace(given, case=case, q=None, k=None, v=None, k_scale=None, v_scale=None)
        if stage == "select":
            right = self.right.get("plain_score", self.right.get("score"))
            first = (scores, given.scores, right)
            return Inputs(case, given.sm_scale, scores=next(x for x in first if x is not None))
        first = (ids, given.topk_idx, self.right.get("ids"))
        return replace(given, case=case, idx_q=None, idx_k=None, topk_idx=next(x for x in first if x is not None))

    def right_answer(self) -> dict[str, Tensor]:
        """What a kernel without any error but the last rounding gives."""
        return rounded(self.problem, self.right, Profile())

    def wrong_answer(self, defect: Hypothesis) -> dict[str, Tensor] | None:
        """What a kernel that is wrong in one way gives; None where the defect has nothing to act on."""
        if self.inputs.case.op not in SPARSE:
            from m3check.paging import World

            made = defect.applied(Ground(self.problem, self.right, self.answer, Profile(), World()))
            return None if made is None else rounded(made[0], fitted(made[1], self.right), Profile())
        assert defect.change is not None
        op = OPS[self.inputs.case.op]
        changed = defect.change(self.reads(defect.stage, codes=defect.codes))
        if changed is None:
            return None
        answer = fitted(self.answer(changed), self.right)
        if op.chain and defect.stage != "attend":  # the stages that follow work on what this one gave
            if defect.stage == "score" and "ids" not in answer:
                answer |= {"ids": self.answer(self.reads("select", scores=answer["score"]))["ids"]}
            answer |= {"out": self.answer(self.reads("attend", ids=answer["ids"]))["out"]}
        return rounded(self.problem, {**self.right, **answer}, Profile())

    def state(self, defect: Hypothesis) -> State:
        """Whether this case could have seen a defect."""
        wrong = self.wrong_answer(defect)
        if wrong is None:
            return "absent"
        if self._as_right(wrong, defect.stage):
            return "equal"
        return "seen" if self.refused(wrong) else "unseen"

    def _as_right(self, answer: dict[str, Tensor], stage: Stage) -> bool:
        """Whether an answer is the right one bit for bit, or selects blocks of the same scores."""
        import torch

        right, alike = self.right_answer(), True
        if "ids" in right:
            alike = torch.equal(*(merits(self.reads("select"), x["ids"]) for x in (answer, right)))
        if stage in ("score", "select"):  # attention on another selection is right if the selection is
            right.pop("out", None)
        return alike and all(torch.equal(_bits(answer[n]), _bits(right[n])) for n in right if n != "ids")


def rounded(problem: Inputs, outputs: Outputs, profile: Profile) -> dict[str, Tensor]:
    """The outputs of the op as a kernel gives them that only rounds once: fp32 scores and logits, int32 ids, attention in
    the queries' dtype, a logsumexp of the promised base, inserts in the dtypes of their buffers.
    """
    import torch

    op, query = OPS[problem.case.op], problem.q
    if op.family == "insert":
        return insert.given(problem, outputs, profile.emits)
    fp32 = torch.float32
    to = {"score": fp32, "logits": fp32, "lse": fp32, "ids": torch.int32, "out": query.dtype if query is not None else fp32}
    found = {name: outputs[name] for name in op.outputs}
    if "lse" in found and profile.lse == "natural":
        found["lse"] = found["lse"] * math.log(2)
    return {name: x.to(to.get(name, x.dtype)) for name, x in found.items()}


def fitted(answer: Outputs, like: Outputs) -> dict[str, Tensor]:
    """An answer with the columns, slots or channels of another one."""
    return {name: _fitted(name, x, like[name]) for name, x in answer.items() if name in like}


def _fitted(name: str, x: Tensor, like: Tensor) -> Tensor:
    import torch

    missing = like.shape[-1] - x.shape[-1] if x.dim() else 0
    if missing < 0:
        return x[..., :missing]
    return torch.nn.functional.pad(x, (0, missing), value=-1 if name == "ids" else -torch.inf) if missing else x


def _bits(x: Tensor) -> Tensor:
    from m3check.paging import words

    return words(x.contiguous())
