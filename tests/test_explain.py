"""From red to the cause: stages, hypotheses, patterns, toggles; every suspect knows its own answer."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch_kernels

from m3check import arch, cases, kernels, reference, runner
from m3check.checks import Setting
from m3check.explain import Explanation, diagnose, explain, pattern
from m3check.explain.stages import Trouble, stands
from m3check.explain.text import render
from m3check.hypotheses.scene import Suspect
from m3check.hypotheses.suspects import SUSPECTS, touching
from m3check.kernels.provider import with_chains
from m3check.mutants import wrappers as w
from m3check.mutants.sources import wrapped
from m3check.mutants.wrappers import caches, scores
from m3check.paging import Run, World
from m3check.types import Kernel, PlanLine, Profile, shade

PROMISES = Profile(dequantise="rounded")


def session(profile: Profile = PROMISES, **wrong) -> runner.Session:
    """Torch kernels, those named in `wrong` with a wrapper around them (or replaced by a function)."""
    made = {}
    for op, function in torch_kernels.RIGHT.items():
        change = wrong.get(op)
        made[op] = Kernel("user", op, op, profile, wrapped(function, change) if change else function)
    return runner.Session(arch.find_arch("sm90"), "interpreted", "cpu", kernels.Loaded.of(with_chains(made, {})[0]))


def explained(text: str, *invariants: str, toggled: bool = False, **wrong) -> Explanation:
    case = cases.parse_id(text)
    return explain(
        case, session(**wrong), PlanLine(text, case.op, "user", "interpreted", None, invariants), toggled=toggled
    )


ATTEND = "sparse_attn_decode/q=1x3,kv=641+513+700,h=2,g=2,d=64,topk=3"


def test_a_right_kernel_has_nothing_to_explain():
    found = explained(ATTEND)

    assert (found.status, found.stage, found.explained) == ("passed", "", [])
    assert "nothing to explain" in render(vars(found), "x", colour=False)


def test_a_cause_with_the_rows_that_it_strikes():
    """The own block is lost where it holds one token only: the sentence names the block and the requests."""

    def lists(k):
        ids = k["topk_idx"].clone()
        for row, n in enumerate(k["seq_lens"].tolist()):
            if n % 128 == 1:
                ids[:, row][ids[:, row] == (n - 1) // 128] = -1
        return ids

    found = explained(ATTEND, sparse_attn_decode=w.given(topk_idx=lists))

    assert found.stage == "attend"
    assert found.pattern == "all requests with context % 128 == 1"
    assert ("block_own_lost", "every row loses its own block", found.pattern) in found.explained[0]
    assert len(found.explained) == 1
    text = render(vars(found), "headline", colour=False)
    assert "every row loses its own block (all requests with context % 128 == 1)" in text
    assert "block 5 (page " in text  # of request 0, whose token 640 stands alone in block 5
    assert "off by" in text
    assert "bound" in text


@pytest.mark.parametrize(
    ("text", "stage", "name", "wrong"),
    [
        ("index_score/q=3,kv=700,h=2,d=64", "score", "score_top_left",
         {"index_score": w.given(prefix_lens=lambda k: k["prefix_lens"] * 0)}),
        ("index_topk/q=2,kv=1300,h=2,topk=4,init=1,local=2", "select", "select_none_forced",
         {"index_topk": w.given(init_blocks=lambda k: 0, local_blocks=lambda k: 0)}),
        ("sparse_attn/q=3,kv=900,h=2,g=2,d=64,topk=4", "attend", "scale_dropped",
         {"sparse_attn": w.given(sm_scale=lambda k: 1.0)}),
        ("prefill/q=3,kv=900,h=2,g=2,d=64,topk=3", "score", "score_pages_halved",
         {"index_score": w.given(block_table=caches.repeated_pages)}),
        ("prefill/q=3,kv=900,h=2,g=2,d=64,topk=3", "select", "select_first_head",
         {"index_topk": w.after(scores.shared_over_heads)}),
        ("prefill/q=3,kv=900,h=2,g=2,d=64,topk=3", "attend", "output_halved",
         {"sparse_attn": w.after(lambda result, k: result.mul_(0.5))}),
    ],
)  # fmt: skip
def test_the_first_guilty_stage_and_its_cause(text, stage, name, wrong):
    found = explained(text, **wrong)

    assert found.stage == stage
    assert name in found.names
    assert len(found.explained) == 1
    after = [words for s, words in found.stages if s != stage]
    assert all(words.startswith("right") for words in after)


def test_what_no_hypothesis_explains_is_not_explained():
    generator = torch.Generator().manual_seed(1)

    def noise(result, k):
        result.add_((torch.randn(result.shape, generator=generator) * 0.01).to(result.dtype))

    found = explained(ATTEND, sparse_attn_decode=w.after(noise))

    assert found.status == "failed"
    assert found.explained == []
    assert "none of the known mistakes" in render(vars(found), "x", colour=False)


def test_a_figure_kept_from_the_first_call():
    first: list[float] = []

    def scale(k):
        first.append(k["sm_scale"])
        return first[0]

    found = explained(ATTEND, "repeat", "other_scale", sparse_attn_decode=w.given(sm_scale=scale))

    assert found.check == "other_scale"
    assert "kept_sm_scale" in found.names
    assert "sm_scale times 0.75" in found.how


def test_the_split_of_a_slot_is_known_of_our_own_kernel_alone():
    from m3check.explain.places import share_of
    from m3check.kernels.triton.sparse_attn_decode import sparse_attn_decode

    ours = Kernel("triton", "sparse_attn_decode", "k", PROMISES, sparse_attn_decode)
    assert share_of(ours, 4, 8) == 1  # few rows: every slot is a split of its own
    assert share_of(ours, 10**6, 8) == 8
    assert share_of(replace(ours, function=torch_kernels.sparse_attn_decode), 4, 8) == 0


def test_a_kernel_that_raises():
    def broken(function, keywords):
        raise IndexError("page 7 of 5")

    found = explained(ATTEND, sparse_attn_decode=broken)

    assert (found.status, found.stage) == ("error", "attend")
    assert "page 7 of 5" in found.findings[0]


def test_toggles_say_what_makes_it_go_away():
    """A kernel that is wrong in batches of fewer than 32 rows only, and with shuffled pages only."""

    def split(function, keywords):
        function(**keywords)
        table = keywords["block_table"][0]
        if keywords["q"].shape[0] < 32 and (table[1:5] != table[:4] + 1).any():
            keywords["output"].mul_(2)

    found = explained(ATTEND, toggled=True, sparse_attn_decode=split)

    told = {name: clears for name, clears, _ in found.toggles}
    assert told["one split"] is True
    assert told["contiguous pages"] is True
    assert told["called again, eagerly"] is False
    assert told["topk >= blocks"] is False
    assert told["cache in the queries' dtype"] is None
    assert found.stage == "merge"


# Each suspect ------------------------------------------------------------------------------------------------------------

SCENES = (
    "index_score/q=3+2,kv=700+514,h=2,d=64",
    "index_score/q=2,kv=514,h=2,d=64,dtype=fp8_e4m3fn,cache=fp8_e4m3fn,layout=pool",
    "index_score/q=2,kv=514,h=2,d=64 garbage",
    "index_decode_score/q=2x2,kv=700+513,h=2,d=64,init=1,local=2",
    "index_topk/q=2+1,kv=1500+1100,h=2,topk=3,init=2,local=2",
    "index_topk/q=3+2,kv=1500+1151,h=2,topk=5",
    "index_topk/q=6,kv=2690,h=2,topk=8,fill=ties",
    "index_topk/q=2,kv=33000,h=1,topk=48",
    "index_topk/q=2+2,kv=900+200,h=2,topk=5",
    "index_topk/q=7,kv=1409,h=1,topk=4,fill=odd",
    "sparse_attn_decode/q=2x2,kv=700+514,h=2,g=2,d=64,topk=6,cache=fp8_e4m3fn,scale=token,ids=short",
    "sparse_attn_decode/q=2x2,kv=900+514,h=2,g=2,d=64,topk=4,layout=pool",
    "sparse_attn_decode/q=1x2,kv=900+0,h=2,g=2,d=64,topk=4,ids=holes",
    "sparse_attn/q=3,kv=2500,h=1,g=2,d=64,topk=18",
    "sparse_attn/q=2,kv=5000,h=1,g=1,d=64,topk=36",
    "sparse_attn/q=2,kv=2500,h=1,g=1,d=64,topk=18,ids=holes late",
)


FEW = "index_topk/q=2+1,kv=1500+1100,h=2,topk=3,init=2,local=2"


def scene(text: str):
    """The one stage of a case, with the right answer for the kernel's; `late` lists begin with 16 unused slots."""
    text, _, how = text.partition(" ")
    case = cases.parse_id(text)
    inputs = cases.make_inputs(case)
    if how == "late":
        inputs = replace(inputs, topk_idx=torch.tensor([-1] * 16 + [3, 19]).int().expand(1, 2, -1).contiguous())
    right = reference.expected(reference.dequantised(inputs, "rounded"))
    name = {"index_topk": "ids"}.get(case.op, "score" if "score" in case.op else "out")
    dtype = {"ids": torch.int32, "score": torch.float32}.get(name, inputs.q.dtype if inputs.q is not None else None)
    return spoiled(inputs, name, right[name].to(dtype), World(poison="garbage") if how == "garbage" else World())


def spoiled(inputs, name: str, output: torch.Tensor, world: World | None = None):
    profile = replace(PROMISES, id_order="score", tie_rule="smaller_id")
    kernel = Kernel("user", inputs.case.op, "k", profile, lambda: None)
    setting = Setting(profile=profile, evidence="interpreted")
    return stands(Trouble(inputs, Run({name: output}), world or World(), kernel, setting, []), "rounded")[0]


@pytest.fixture(scope="module")
def scenes():
    return {text: scene(text) for text in SCENES}


def own_answer(suspect: Suspect, stand):
    """What a kernel gives that is wrong in this one way; None where it has nothing to act on, or is right."""
    seen = stand.scene
    if suspect.result is not None:
        answer = suspect.result(seen)
    else:
        changed = suspect.inputs(seen)
        answer = None if changed is None else diagnose._asked(seen, changed)[1][seen.name]
    if answer is None:
        return None
    return answer[..., : seen.actual.shape[-1]].to(seen.actual.dtype)


@pytest.mark.parametrize("suspect", SUSPECTS, ids=lambda s: s.name)
def test_a_suspect_knows_its_own_answer(scenes, suspect):
    if suspect.name == "score_columns_cut":  # it reads the number of columns off the output
        inputs = scenes[SCENES[0]].scene.given
        output = scenes[SCENES[0]].scene.actual.clone()
        output[..., 2:] = math.nan
        assert suspect in [m.suspect for m in diagnose.matches(spoiled(inputs, "score", output))]
        return
    if suspect.name == "select_slots_cut":
        output = scenes[FEW].scene.actual.clone()
        output[..., 2:] = -1
        stand = spoiled(scenes[FEW].scene.given, "ids", output)
        assert suspect in [m.suspect for m in diagnose.matches(stand)]
        return
    tried = 0
    for stand in scenes.values():
        if stand.scene.stage != suspect.stage:
            continue
        answer = own_answer(suspect, stand)
        if answer is None:
            continue
        wrong = spoiled(stand.scene.given, stand.scene.name, answer, stand.scene.world)
        if not wrong.findings:
            continue  # as right as the right answer here
        tried += 1
        one = diagnose._tried(wrong, suspect, diagnose.wrong_rows(wrong))
        assert one is not None
        assert one.everywhere
        return
    assert tried, f"no case of SCENES shows {suspect.name}"


@pytest.mark.parametrize("text", SCENES)
def test_a_right_answer_has_no_findings_at_any_stage(scenes, text):
    stand = scenes[text]

    assert not stand.findings
    assert not (stand.wrong > 1).any()


def test_names_are_unique():
    assert len({s.name for s in SUSPECTS}) == len(SUSPECTS)
    assert {s.stage for s in SUSPECTS} == {"score", "select", "attend"}
    assert len(touching("attend")) > 60


def test_a_gross_mistake_is_told_from_its_neighbours(scenes):
    """Twice the scale: one class of answers explains it, not a dozen."""
    stand = scenes["sparse_attn/q=3,kv=2500,h=1,g=2,d=64,topk=18"]
    suspect = next(s for s in SUSPECTS if s.name == "scale_double")
    wrong = spoiled(stand.scene.given, "out", own_answer(suspect, stand))

    found = list(diagnose.classes(diagnose.matches(wrong), wrong))

    assert [[m.suspect.name for m in group] for group in found] == [["scale_double"]]


# Patterns and shades ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "bad", "words"),
    [
        ("sparse_attn/q=2+2,kv=300+513", [0, 1, 2, 3], "all rows"),
        ("sparse_attn/q=2+2,kv=300+513", [2, 3], "all requests with context % 128 == 1"),
        ("sparse_attn/q=2+2,kv=300+428", [2, 3], "request 1 alone"),
        ("sparse_attn/q=2+3,kv=300+428", [1, 4], "the last query of each request"),
        ("sparse_attn/q=2+3,kv=300+428", [0, 2, 3], "every query but a request's last"),
        ("sparse_attn/q=3+3,kv=300+428", [0, 3, 4], "3 of 6 rows"),
        ("sparse_attn/q=1+1,kv=300+2428,topk=4", [1], "all requests with context % 128 == 124"),
    ],
)
def test_a_pattern(text, bad, words):
    case = cases.parse_id(text)
    wrong = torch.zeros(case.kv_heads, case.total_queries, dtype=torch.bool)
    wrong[:, bad] = True

    assert pattern.described(case, wrong) == words


def test_a_pattern_of_heads():
    case = cases.parse_id("sparse_attn/q=2,kv=300,h=4")
    wrong = torch.zeros(4, 2, dtype=torch.bool)
    wrong[2] = True

    assert pattern.described(case, wrong) == "all rows; head 2 of 4"


@pytest.mark.parametrize(
    ("ratio", "mark"), [(0.5, "·"), (1.5, "1"), (3, "2"), (1e9, "#"), (math.inf, "N"), (math.nan, "N")]
)
def test_a_shade(ratio, mark):
    assert shade(ratio) == mark
