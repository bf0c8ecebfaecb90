"""No right kernel is red: simulated kernels of several styles over a tier. M3CHECK_SEED and M3CHECK_TIER choose which.

`pytest tests/test_checks_soundness.py -m slow -s` prints the worst measured/limit of each test.
"""

from __future__ import annotations

import os
from collections import defaultdict
from dataclasses import replace

import pytest
import simulate
import torch
from simulate import Style

from m3check import cases
from m3check.types import OPS, SPARSE, Status

STYLES = (
    Style(),
    Style(splits=4),
    Style(splits=16, lse=True),
    Style(lse=True, tile=32),
    Style(natural=True, reverse=True),
    Style(rounded_sum=True, tile=64),
    Style(fp32_p=True),
)


def outputs(problem, style: Style, turn: int) -> dict[str, torch.Tensor]:
    """What a right kernel of this style gives for the problem's op."""
    case, made = problem.case, {}
    score = None if problem.idx_q is None else simulate.scores(problem, reverse=turn % 2 == 0)
    op = OPS[case.op]
    if "score" in op.outputs:
        made["score"] = simulate.forced(case, score) if op.name == "index_decode_score" else score
    if "ids" in op.outputs:
        made["ids"] = simulate.select(case, problem.scores if op.name == "index_topk" else score)
    if "out" in op.outputs:
        style = replace(style, partials=problem.q.dtype) if style.splits > 1 else style
        ids = made["ids"] if problem.topk_idx is None else problem.topk_idx
        made["out"] = simulate.attention(problem, ids, style)
    return made


@pytest.mark.slow
@pytest.mark.parametrize("op", SPARSE)
def test_right_kernels_pass_a_whole_tier(op):
    seed = int(os.environ.get("M3CHECK_SEED", "1"))
    worst: dict[str, tuple[float, str]] = defaultdict(lambda: (0.0, ""))
    count = 0
    for turn, case in enumerate(c for c in cases.tier(os.environ.get("M3CHECK_TIER", "ci")) if c.op == op):
        style = STYLES[turn % len(STYLES)]
        problem = simulate.inputs(replace(case, seed=seed))
        findings = simulate.judge(problem, outputs(problem, style, turn), normaliser="lse" if style.lse else "sum")
        name = cases.case_id(problem.case)
        assert {f.status for f in findings} == {Status.PASSED}, (name, style, simulate.red(findings))
        count += 1
        for finding in findings:
            if finding.limit:
                worst[finding.check] = max(worst[finding.check], (finding.measured / finding.limit, name))
    print(f"\n{op}, {count} cases, seed {seed}: " + ", ".join(f"{k} {v:.2f} ({n})" for k, (v, n) in sorted(worst.items())))
