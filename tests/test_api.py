"""The public Python interface: what `import m3check` gives."""

from __future__ import annotations

import json

import pytest
import torch

import m3check
from m3check.report import jsonfile
from m3check.types import M3CheckError, Status

CASE = "index_topk/q=3,kv=700,h=2,topk=3"


def index_topk(score, cu_seqlens_q, prefix_lens, topk, init_blocks, local_blocks):
    """A right selection for one request, in torch."""
    heads, rows, _ = score.shape
    ids = torch.full((heads, rows, topk), -1, dtype=torch.int32)
    for t in range(rows):
        visible = (int(prefix_lens[0]) + t) // 128 + 1
        ranked = score[:, t, :visible].clone()
        ranked[:, max(0, visible - local_blocks) :] = torch.inf
        ranked[:, :init_blocks] = torch.inf
        count = min(topk, visible)
        ids[:, t, :count] = ranked.topk(count).indices.int()
    return ids


def test_everything_public_is_there():
    for name in m3check.__all__:
        assert getattr(m3check, name) is not None


def test_verify_says_what_comes_first():
    with pytest.raises(M3CheckError, match="wants a Case or its id first, then the kernel; got function"):
        m3check.verify(lambda: None, CASE)


def test_cases_are_those_of_the_tier_and_ops():
    chosen = m3check.cases(tier="smoke", op="index_topk")
    assert chosen
    assert {case.op for case in chosen} == {"index_topk"}
    assert {case.op for case in m3check.cases("smoke", ("index_topk", "decode"))} == {"index_topk", "decode"}
    with pytest.raises(M3CheckError, match="unknown op 'topk'; known ops: index_score"):
        m3check.cases(op="topk")
    with pytest.raises(M3CheckError, match=r"\(did you mean index_topk\?\); known ops"):
        m3check.cases(op="index_topkk")


def test_verify_passes_a_right_kernel_and_raises_for_a_wrong_one():
    profile = m3check.Profile(odd_scores=frozenset())
    right = m3check.verify(CASE, index_topk, profile)
    assert right.status is Status.PASSED, right
    right.check()

    def first_blocks(score, cu_seqlens_q, prefix_lens, topk, init_blocks, local_blocks):
        return index_topk(torch.zeros_like(score), cu_seqlens_q, prefix_lens, topk, init_blocks, local_blocks)

    with pytest.raises(AssertionError, match="selection"):
        m3check.verify(CASE, first_blocks, profile).check()


def test_verify_calls_the_kernel_again_with_what_must_not_matter_changed():
    first = {}

    def remembers(score, cu_seqlens_q, prefix_lens, topk, init_blocks, local_blocks):
        return index_topk(score, cu_seqlens_q, prefix_lens, first.setdefault("topk", topk), init_blocks, local_blocks)

    profile = m3check.Profile(odd_scores=frozenset())
    assert m3check.verify(CASE, remembers, profile, invariants=False).status is Status.PASSED
    result = m3check.verify(CASE, remembers, profile)
    assert result.status is Status.FAILED
    assert "other_topk" in {f.check for f in result.findings if f.status is Status.FAILED}


def test_plan_takes_the_flags_of_a_run_and_refuses_unknown_names():
    lines = m3check.plan(arch="sm100", kernels=("triton",), cases=(CASE,))
    assert [(line.case, line.evidence) for line in lines if line.evidence != "device"] == [
        (CASE, "interpreted"),
        (CASE, "compiled"),
    ]
    with pytest.raises(M3CheckError, match="sm90"):
        m3check.plan(arch="sm91")


def test_a_written_record_is_read_back(tmp_path):
    record = m3check.run(arch="sm100", cases=(CASE,), out=tmp_path, jobs=1)
    assert any(entry["evidence"].startswith("not run here, needs SM100") for entry in record.environment["dispatch"])
    path = tmp_path / "report.json"
    path.write_text(jsonfile.dumps(record))
    told = [(r.case, r.provider, r.status, r.axes) for r in m3check.load_record(path).results]
    assert told == [(r.case, r.provider, r.status, r.axes) for r in record.results]
    assert json.loads(path.read_text())["exit"]["code"] == 0
