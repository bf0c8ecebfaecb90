"""Would a wrong answer have passed? Every hypothesis is seen somewhere, counts for nothing where it changes nothing."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
import torch

from m3check import api, cases, power, reference
from m3check.hypotheses import BLOCKS, HYPOTHESES, named, touching
from m3check.hypotheses.geometry import EARLIER, LATER, UNMASKED
from m3check.types import SPARSE, Inputs, Result, Status

ATTEND = "sparse_attn_decode/q=3x2,kv=700+514,h=2,g=2,d=64,topk=3,cache=fp8_e4m3fn,scale=token,ids=short"
SCORE = "index_decode_score/q=3x2,kv=514+385,h=2,d=64,init=1,dtype=fp8_e4m3fn,cache=fp8_e4m3fn"
SELECT = "index_topk/q=130,kv=1100,h=2,topk=4,init=1"
E4M3 = "dtype=fp8_e4m3fn,cache=fp8_e4m3fn"
INSERT = "qknorm_rope_insert/q=6,kv=1025,h=2,g=2"
LISTED = sorted({name.partition("/")[0] for name in power.table()})
"""Ops that have a table: of those each case of smoke and ci is in it."""

SHOWN = [h for h in HYPOTHESES if any(h in touching(op) for op in LISTED)]

OTHERS = {  # of ops that have no stages: cases that show all hypotheses between them
    "latent": (
        "mla_sparse/q=3+2,kv=150+70,h=1,g=4,d=80,topk=80,ids=holes",
        "mla_sparse/q=4,kv=400,h=1,g=1,d=80,topk=288,ids=late",
        "mla_sparse/q=4,kv=300,h=1,g=1,d=80,topk=208,ids=empty",
    ),
    "logits": (f"mqa_logits/q=5+3,kv=70+9,h=1,g=4,d=32,{E4M3}", f"paged_mqa_logits/q=2,kv=131,h=1,g=2,d=32,{E4M3}"),
    "insert": (
        f"{INSERT},cache=fp8_e4m3fn,icache=fp8_e4m3fn,ids=skip_some,queries=both,fill=wide",
        f"{INSERT},fill=wide,eps=1e-5",
    ),
    "table": ("sparse_pa_table_decode/q=4x2,kv=2+700,h=1,topk=3,ids=future",),
    "keys": ("index_insert/q=5,kv=261,cache=fp8_e4m3fn,layout=pool",),
}
SEEN_IN = {"attend": (ATTEND,), "score": (SCORE,), "select": (SELECT,), **OTHERS}


def side(text: str, **changed: torch.Tensor) -> power.Side:
    return power.side_of(replace(cases.make_inputs(cases.parse_id(text)), **changed))


@pytest.fixture(scope="module")
def sides() -> dict[str, list[power.Side]]:
    return {stage: [side(text) for text in texts] for stage, texts in SEEN_IN.items()}


@pytest.mark.parametrize(
    "text",
    [
        ATTEND,
        SCORE,
        SELECT,
        *(text for texts in OTHERS.values() for text in texts),
        "decode/q=2x2,kv=300+513,h=2,g=2,d=64,topk=3",
        "prefill/q=3,kv=513,g=1",
    ],
)
def test_the_right_answer_is_not_refused(text):
    one = side(text)

    assert not one.refused(one.right_answer())


@pytest.mark.parametrize("name", [h.name for h in HYPOTHESES])
def test_a_hypothesis_is_seen_in_a_small_case(sides, name):
    assert any(one.state(named(name)) == "seen" for one in sides[named(name).stage])


def alike(text: str) -> Inputs:
    """Inputs of a case with nothing to tell: every token, head and block is like every other."""
    inputs = cases.make_inputs(cases.parse_id(text))
    one = {n: torch.ones_like(x.float()).to(x.dtype) for n in ("k", "v", "q") if (x := getattr(inputs, n)) is not None}
    if inputs.k_scale is not None:
        one |= {"k_scale": torch.ones_like(inputs.k_scale), "v_scale": torch.ones_like(inputs.v_scale)}
    if inputs.idx_q is not None:
        one |= {"idx_q": torch.zeros_like(inputs.idx_q.float()).to(inputs.idx_q.dtype)}
    if inputs.scores is not None:
        one |= {"scores": inputs.scores.where(inputs.scores.isinf(), 0.75)}
    return replace(inputs, **one)


NOTHING = {
    "attend": "sparse_attn_decode/q=3x2,kv=700+520,h=2,g=2,d=64,topk=3,cache=fp8_e4m3fn,scale=token",
    "score": "index_decode_score/q=3x2,kv=520+396,h=2,d=64,local=0",
    "select": "index_topk/q=2,kv=1030,h=2,topk=2,local=0",
    "select_one_less": "index_topk/q=2,kv=300,h=2,topk=8,local=0",
    "dialect": "sparse_attn_decode/q=1,kv=300,h=1,g=2,d=64,topk=3",
}


@pytest.mark.parametrize("name", [h.name for h in BLOCKS])
def test_what_equals_the_right_answer_is_not_counted(name):
    inputs = alike(NOTHING.get(name, NOTHING[named(name).stage]))

    assert power.side_of(inputs).state(named(name)) in ("equal", "absent")


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("mla_sparse/q=1,kv=1,h=1,g=1,d=80", "heads row_before requests half_lost cut_at_hole tail_lost_32"),
        (f"mqa_logits/q=1,kv=1,h=1,g=1,d=32,{E4M3}", "weights_heads scale_before scale_first queries requests unmasked"),
        ("qknorm_rope_insert/q=1,kv=1,h=1,g=1", "head_before token_before rotation_lost pairs rotation_back q_scale_lost"),
        ("sparse_pa_table/q=1,kv=128,h=1,topk=1", "own_whole own_unlisted order dead_one unfiltered replaced clamped"),
        ("index_insert/q=1,kv=1,d=64", "token_before token_after token_first cut"),
    ],
)
def test_what_equals_the_right_answer_of_another_family_is_not_counted(text, names):
    one = side(text)
    stage = touching(one.inputs.case.op)[0].stage
    assert {one.state(named(f"{stage}_{name}")) for name in names.split()} <= {"equal", "absent"}


def test_a_case_with_nothing_to_tell_is_inconclusive():
    found = power.gross(power.side_of(alike(NOTHING["dialect"])))

    status, reason = power.judged(found)
    assert status is Status.INCONCLUSIVE
    assert "no named defect" in reason


def test_a_case_that_cannot_tell_a_gross_defect_is_mistrusted():
    """Keys of nearly one direction: twice the scale moves every weight by less than the output's rounding."""
    inputs = cases.make_inputs(cases.parse_id("sparse_attn/q=2,kv=600,h=1,g=1,topk=3"))
    faint = power.side_of(replace(inputs, k=(inputs.k.float() * 2.0**-10).bfloat16()))

    assert faint.state(named("scale_double")) == "unseen"
    status, reason = power.judged(power.gross(faint))
    assert status is Status.MISTRUSTED
    assert "twice the softmax scale" in reason


@pytest.mark.parametrize(
    ("found", "status"),
    [
        ({"scale_double": "unseen", "group": "seen"}, Status.MISTRUSTED),
        ({"scale_double": "equal", "group": "equal"}, Status.INCONCLUSIVE),
        ({"scale_percent": "unseen"}, Status.INCONCLUSIVE),
        ({"scale_percent": "unseen", "group": "seen"}, None),
    ],
)
def test_the_rule(found, status):
    doubt = power.judged(found)

    assert (doubt and doubt[0]) == status


def test_a_result_that_agreed_says_that_it_could_not_have_failed(monkeypatch):
    monkeypatch.setattr(power, "known", lambda case: {"select_swapped": "unseen"})
    problem = cases.make_inputs(cases.parse_id("index_topk/q=2,kv=300,h=1,topk=4"))
    right = reference.expected(problem)["ids"]

    result = api.verify(problem.case, lambda **arguments: right.clone(), invariants=False)

    assert result.status is Status.MISTRUSTED, result
    assert "agreed, but could not have failed" in result.reason


def test_a_hidden_token_is_what_a_sum_without_it_gives(sides):
    problem = sides["attend"][0].problem
    case, h = problem.case, named("token_lost")
    right, wrong = sides["attend"][0].right["out"], reference.expected(h.change(sides["attend"][0].reads("attend")))["out"]
    changed = ((right - wrong[..., : case.head_dim]).abs() > 1e-9).any(-1).any(-1).nonzero().flatten().tolist()
    assert changed == [2, 5]  # the last row of each request
    row, head, request = 5, 1, list(case.requests())[1]
    ids = problem.topk_idx[head, row]
    token = torch.cat([torch.arange(128) + 128 * int(b) for b in ids if 0 <= b <= request.kv_len // 128])
    token = token[token < request.kv_len]
    q, k, v = (x.double() for x in (problem.q[row, 2:4], problem.k[request.tokens, head], problem.v[request.tokens, head]))
    weight = (q @ k[token].T * problem.sm_scale).softmax(-1)
    lost = weight.mean(0).median(0).indices
    without = (weight @ v[token] - weight[:, [lost]] * v[token[lost]]) / (1 - weight[:, [lost]])
    torch.testing.assert_close(wrong[row, 2:4, : case.head_dim], without, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("change", "shift"), [(EARLIER, -1), (LATER, 1), (UNMASKED, None)])
def test_moved_rows_see_what_a_plain_loop_sees(change, shift):
    problem = cases.make_inputs(cases.parse_id("index_score/q=4+3,kv=130+260,h=1,d=64"))
    score = reference.expected(change(problem))["score"][0]
    for request in problem.case.requests():
        for i in range(request.query_len):
            end = request.kv_len if shift is None else min(request.position(i) + 1 + shift, request.kv_len)
            dots = problem.idx_k[request.tokens][:end].double() @ problem.idx_q[request.query_start + i, 0].double()
            wanted = [float(dots[b : b + 128].max()) for b in range(0, end, 128)]
            got = score[request.query_start + i].tolist()
            assert got[: len(wanted)] == pytest.approx(wanted)
            assert all(x == -math.inf for x in got[len(wanted) :])


def test_choosing_among_equals_is_no_defect():
    """In `ties` many selections are right: none of them may be called a wrong answer that passed."""
    one = side("index_topk/q=6,kv=2690,h=2,topk=8,fill=ties")
    states = power.power(one)

    assert states["select_swapped"] == "seen"
    assert "unseen" not in states.values()


def test_smoke_and_ci_are_listed_and_conclusive():
    listed = power.table()
    missing = [case for tier in ("smoke", "ci") for case in cases.tier(tier, LISTED) if cases.case_id(case) not in listed]
    assert not missing, f"{len(missing)} cases are not in the table: python -m m3check.power"
    doubts = {name: doubt for name, states in listed.items() if (doubt := power.judged(states))}
    assert not doubts


@pytest.mark.parametrize(("tier", "hypotheses"), [("smoke", BLOCKS), ("ci", SHOWN)])
def test_the_table_has_every_hypothesis_seen_by_a_case(tier, hypotheses):
    states = [found for case in cases.tier(tier) if (found := power.known(case))]

    for h in hypotheses:
        assert any(found.get(h.name) == "seen" for found in states), h.name


@pytest.mark.parametrize("op", LISTED)
def test_the_table_says_what_is_worked_out_anew(op):
    listed = sorted(name for name in power.table() if name.startswith(f"{op}/"))
    small = [name for name in listed if power.work(cases.parse_id(name)) < (1.5e6 if op in SPARSE else 3e5)]
    for name in random.Random(op).sample(small, 2 if op in SPARSE else 1):
        assert dict(power.power(side(name))) == dict(power.table()[name]), name


def test_a_case_that_is_not_listed_is_asked_when_it_runs(monkeypatch):
    case = cases.parse_id("sparse_attn/q=2,kv=301,h=1,g=2,topk=3")
    assert power.known(case) is None

    assert power.doubt(case) is None
    monkeypatch.setattr(power, "gross", lambda side: {"group": "unseen"})
    assert power.doubt(case)[0] is Status.MISTRUSTED
    monkeypatch.setattr(power, "LARGEST", 1.0)
    assert power.doubt(case) is None


def test_another_seed_has_the_power_of_the_first():
    case = cases.tier("smoke")[0]

    assert power.known(replace(case, seed=7)) == power.table()[cases.case_id(case)]


def test_a_records_table_counts_each_case_once_whoever_ran_it():
    name = cases.case_id(next(case for case in cases.tier("smoke") if case.op == "sparse_attn"))

    def ran(provider: str, status: Status = Status.PASSED, case: str = name) -> Result:
        return Result(case, "sparse_attn", provider, "k", "interpreted", {}, status)

    facts = power.summary(
        [ran("a"), ran("b"), ran("a", Status.SKIPPED, "sparse_attn/q=1,kv=1"), ran("a", case="sparse_attn/q=1,kv=77")]
    )

    assert (facts["cases"], facts["unlisted"]) == (1, 1)
    assert [row[0] for row in facts["defects"]] == ["attend"] * len(touching("sparse_attn"))
    assert all(0 <= seen <= changed <= 1 for _, _, seen, changed in facts["defects"])


def test_outputs_are_red_only_where_every_rule_of_dequantisation_refuses_them():
    one = side(ATTEND)
    folded = reference.expected(reference.dequantised(one.inputs, "folded"))["out"].to(one.problem.q.dtype)

    assert not torch.equal(folded, one.right_answer()["out"])
    assert not one.refused({"out": folded})
