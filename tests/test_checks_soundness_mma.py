"""No right kernel is red that multiplies as a target's matrix instructions do: attention simulated step by step."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import simulate
import torch
from torch import Tensor

from m3check.arch import Accumulator, find_arch
from m3check.numerics import added_up
from m3check.types import BLOCK, Status

LOG2E = 1.4426950408889634
CASES = (
    "sparse_attn/q=3,kv=700,h=1,g=4,d=64,topk=3",
    "sparse_attn/q=2,kv=1500,h=1,g=2,topk=8,fill=wide",
    "sparse_attn/q=2,kv=1500,h=1,g=3,topk=8,dtype=fp16,cache=fp16",
    "sparse_attn/q=2,kv=1100,h=1,g=3,d=64,topk=6,fill=ties",
)


def attention(problem, how: Accumulator, tile: int) -> Tensor:
    """[T, Hq, D] in the queries' dtype: online softmax in tiles, both products added up as `how` says, one KV head."""
    case, dtype = problem.case, problem.q.dtype
    position, start, _ = simulate.rows_of(case)
    out = torch.zeros(case.total_queries, case.heads, case.head_dim, dtype=dtype)
    for t in range(case.total_queries):
        q = problem.q[t]
        m = torch.full((case.heads,), -math.inf)
        total, acc = torch.zeros(case.heads), torch.zeros(case.heads, case.head_dim)
        for block in problem.topk_idx[0, t].tolist():
            tokens = torch.arange(block * BLOCK, min((block + 1) * BLOCK, int(position[t]) + 1)) if block >= 0 else []
            for part in torch.as_tensor(tokens, dtype=torch.long).split(tile):
                if not len(part):
                    continue
                k, v = (x[int(start[t]) + part, 0] for x in (problem.k, problem.v))
                logit = added_up(q, k, how).float() * torch.tensor(problem.sm_scale * LOG2E, dtype=torch.float32)
                larger = torch.maximum(m, logit.amax(1))
                p, decay = torch.exp2(logit - larger[:, None]), torch.exp2(m - larger)
                total = total * decay + p.sum(1)
                acc = added_up(p.to(dtype), v.T, how, (acc * decay[:, None]).double()).float()
                m = larger
        out[t] = (acc / total[:, None]).to(dtype)
    return out


def judged(case: str, how: Accumulator, told: Accumulator, tile: int = 64):
    problem = simulate.inputs(case)
    return simulate.judge(problem, {"out": attention(problem, how, tile)}, dot=told, pv=told)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("arch", ["sm80", "sm90", "gfx942"])
def test_attention_by_a_targets_instructions_is_inside_its_bounds(arch, case):
    how = find_arch(arch).accumulator("16")
    findings = judged(case, how, how, tile=32 if arch == "gfx942" else 64)
    assert {f.status for f in findings} == {Status.PASSED}, simulate.red(findings)


def test_fewer_bits_than_the_instruction_keeps_are_seen():
    how = find_arch("sm90").accumulator("16")
    coarse = replace(how, fraction_bits=7, output_bits=7)
    findings = judged(CASES[2], coarse, how)
    assert simulate.red(findings)
    assert {f.status for f in judged(CASES[2], how, how)} == {Status.PASSED}
