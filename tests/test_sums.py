"""Effective bits of a score kernel: simulated instructions are told apart, and what says nothing is left out."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from m3check import cases, reference, runner
from m3check.arch import Arithmetic, find_arch
from m3check.checks import Setting
from m3check.checks.sums import effective_bits
from m3check.numerics import added_up
from m3check.paging import Run
from m3check.report import jsonfile
from m3check.types import Profile, Record, Sums

CASE = "index_score/q=70+3,kv=700+260,h=2,dtype={0},cache={0},fill={1}"


def made(dtype="bf16", fill="wide"):
    inputs = cases.make_inputs(cases.parse_id(CASE.format(dtype, fill)), "cpu")
    problem = reference.dequantised(inputs, "rounded")
    return problem, reference.expected(problem)


def scores(problem, how):
    """Block scores [H, T, K] of a kernel that sums as `how` says; fp32 in channel order where it is None."""
    case = problem.case
    result = torch.full((case.kv_heads, case.total_queries, case.block_columns), -torch.inf)
    for request in case.requests():
        keys = problem.idx_k[request.tokens].double()
        for head in range(case.kv_heads):
            queries = problem.idx_q[request.queries, head].double()
            sums = (queries.float() @ keys.float().T).double() if how is None else added_up(queries, keys, how)
            for i in range(request.query_len):
                seen = sums[i, : request.position(i) + 1]
                for block, part in enumerate(seen.split(128)):
                    result[head, request.query_start + i, block] = part.max()
    return result


@pytest.mark.parametrize(
    ("arch", "dtype", "least", "most"),
    [
        ("sm90", "fp8_e4m3fn", 9.5, 13.5),
        ("sm90", "bf16", 20.5, 23.5),
        ("sm100", "fp8_e4m3fn", 20.5, 23.5),
        (None, "bf16", 22, 26),
    ],
)
def test_an_accumulator_is_known_by_its_effective_bits(arch, dtype, least, most):
    problem, expected = made(dtype)
    how = find_arch(arch).accumulator("fp8" if dtype.startswith("fp8") else "16") if arch else None
    assert least < effective_bits(problem, scores(problem, how), expected) < most


def test_cells_that_are_unseen_or_not_finite_do_not_count():
    problem, expected = made()
    score = scores(problem, None)
    told = effective_bits(problem, score, expected)
    score[~expected["score"].isfinite()] = 5.0
    score[:, 0, 0] = torch.nan
    assert effective_bits(problem, score, expected) == pytest.approx(told, abs=0.5)
    score[0, 40, 1] += 1.0
    assert effective_bits(problem, score, expected) < 14


def test_nothing_is_said_of_whole_numbers_and_of_no_error():
    problem, expected = made(fill="integer")
    assert effective_bits(problem, scores(problem, None), expected) is None
    problem, expected = made()
    assert effective_bits(problem, expected["score"].double(), expected) is None
    blind = dataclasses.replace(problem, idx_q=None)
    assert effective_bits(blind, expected["score"], expected) is None


def test_a_record_keeps_sums_and_leaves_them_out_where_there_are_none():
    from records import record, result

    wanted = record(result(sums=Sums("wgmma fp8, 13 bits", 10.4)), result(op="index_topk"), result(sums=Sums("fp32")))
    text = jsonfile.dumps(wanted)
    assert text.count('"sums"') == 2
    assert '"sums":{"by":"fp32"}' in text
    read = jsonfile.loads(text)
    assert isinstance(read, Record)
    assert [r.sums for r in read.results] == [r.sums for r in wanted.results]


def test_a_call_on_a_device_says_by_what_and_to_how_many_bits_it_summed():
    problem, expected = made()
    sm90 = find_arch("sm90")
    setting = Setting(profile=Profile(), evidence="device", arch=sm90)
    run = Run({"score": scores(problem, sm90.accumulator("16"))}, arithmetic=Arithmetic(score=sm90.accumulator("16")))
    sums = runner.Judge(problem, setting).sums(run)
    assert sums == Sums("wgmma 16, 25 bits", round(effective_bits(problem, run.outputs["score"], expected), 1))
    assert runner.Judge(problem, setting).sums(Run({})) is None, "nobody knows how it summed"
    topk = cases.make_inputs(cases.parse_id("index_topk/q=3,kv=700,h=2,topk=3"), "cpu")
    assert runner.Judge(topk, setting).sums(Run({}, arithmetic=Arithmetic())) is None, "it multiplies nothing"
