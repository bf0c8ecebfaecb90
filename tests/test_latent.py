"""mla_sparse: its reference, and that its checks refuse wrong kernels by name and pass right ones that add up otherwise."""

import math

import pytest
import torch

from m3check import cases, checks, reference, runner
from m3check.arch import ARCHS
from m3check.kernels import contract
from m3check.types import Kernel, Profile, Status

CASES = {
    "full": "mla_sparse/q=2+3,kv=150+70,h=1,g=4,d=192,topk=64",
    "late": "mla_sparse/q=3,kv=200,h=1,g=4,d=192,topk=64,ids=late",
    "holes": "mla_sparse/q=5,kv=300,h=1,g=4,d=192,topk=128,ids=holes",
    "empty": "mla_sparse/q=5,kv=90,h=1,g=4,d=192,topk=64,layout=pool,ids=empty",
    "long": "mla_sparse/q=1,kv=2100,h=1,g=2,d=192,topk=2048",
    "odd": "mla_sparse/q=2,kv=150,h=1,g=128,d=192,topk=80",
    "fp32": "mla_sparse/q=3,kv=140,h=1,g=4,d=192,topk=64,dtype=fp32,cache=fp32,ids=holes",
    "beyond": "mla_sparse/q=3,kv=200,h=1,g=4,d=192,topk=64,ids=beyond",
}


def kernel(
    tile=16, splits=1, *, reverse=False, base=1.0, mask=True, lost=None, start=-1e30, rope=True, lse_base=1.0, rounded=False
):
    """Online softmax over tiles of the list, in parts that are merged; keywords make it another one."""

    def part(q, kv, row, sm_scale, d_v):
        top = torch.full((q.shape[0], 1), start)
        total, acc = torch.zeros(q.shape[0], 1), torch.zeros(q.shape[0], d_v)
        tiles = list(row.split(tile))
        for ids in reversed(tiles) if reverse else tiles:
            listed = (ids >= 0) & (ids < len(kv)) if mask else torch.ones_like(ids, dtype=torch.bool)
            k = kv[ids.clamp(0, len(kv) - 1).long(), 0].float().masked_fill(~listed[:, None], 0)
            if mask == 0 and mask is not False:  # counts, as a token of zeros
                k = k.masked_fill((ids < 0)[:, None], 0)
            if mask is None:
                k = kv[ids.clamp(0, len(kv) - 1).long(), 0].float()
            width = kv.shape[-1] if rope else d_v
            logit = q[:, :width].float() @ k[:, :width].T * sm_scale * base
            logit = logit.masked_fill(~listed, -math.inf if start == -math.inf else -1e30)
            new = torch.maximum(top, logit.amax(1, keepdim=True))
            p = (logit - new).exp()
            if start != -math.inf:
                p = p.masked_fill(~listed, 0)
            decay = (top - new).exp()
            total = total * decay + p.sum(1, keepdim=True)
            acc = acc * decay + p.to(q.dtype).float() @ k[:, :d_v]
            top = new
        return top, total, acc

    def mla_sparse(q, kv, indices, sm_scale, d_v):
        out = torch.empty(*q.shape[:2], d_v, dtype=q.dtype)
        lse = torch.empty(q.shape[:2])
        for t in range(len(q)):
            parts = [part(q[t], kv, ids, sm_scale, d_v) for ids in indices[t, 0].chunk(splits)]
            parts = [each for i, each in enumerate(parts) if i != lost]
            if rounded:  # part outputs that are stored in the queries' dtype before they are merged
                parts = [(m, n, (acc / n.clamp(min=1e-30)).to(q.dtype).float() * n) for m, n, acc in parts]
            top = torch.stack([p[0] for p in parts]).amax(0)
            weights = [(p[0] - top).exp() for p in parts]
            total = sum(p[1] * w for p, w in zip(parts, weights, strict=True))
            acc = sum(p[2] * w for p, w in zip(parts, weights, strict=True))
            safe = total if start == -math.inf else total.masked_fill(total == 0, 1)
            out[t] = (acc / safe).to(q.dtype)
            lse[t] = ((top + total.log()) * lse_base)[:, 0]
        return out, lse

    return mla_sparse


PROFILE = Profile()


def judged(case_id, function, profile=PROFILE):
    case = cases.parse_id(case_id)
    inputs = cases.make_inputs(case)
    run = contract.call(Kernel("t", case.op, "mine", profile, function), inputs)
    setting = checks.Setting(profile=profile, evidence="interpreted", arch=ARCHS["sm80"])
    judge = runner.Judge(inputs, setting)
    return run, {f.check: f for f in judge.named(judge(inputs, run)) if f.status is Status.FAILED}


RIGHT = {
    "as it comes": kernel(),
    "one tile": kernel(tile=128),
    "tiles in reverse": kernel(tile=32, reverse=True),
    "four parts": kernel(splits=4),
    "parts of one tile": kernel(tile=16, splits=8),
    "parts of one tile, rounded": kernel(tile=16, splits=8, rounded=True),
}


@pytest.mark.parametrize("how", RIGHT)
def test_right_kernels_pass_in_any_order_and_split(how):
    for case in CASES.values():
        _, red = judged(case, RIGHT[how])
        assert not red, (case, red)


WRONG = {
    "a mask dropped": ("holes", kernel(mask=False), {"lse"}, "padded_row"),
    "-1 read as a row": ("holes", kernel(mask=None), {"lse"}, "padded_row"),
    "-1 read as a token of zeros": ("holes", kernel(mask=0), {"lse"}, "padded_zero"),
    "a part lost": ("full", kernel(splits=4, lost=1), {"element", "lse"}, "part_lost_2_of_4"),
    "base e taken for 2": ("full", kernel(base=math.log(2)), {"scale", "lse"}, "scale_base"),
    "rotary channels left out": ("full", kernel(rope=False), {"element", "lse"}, "rope_lost"),
    "nothing listed in the first tile": ("late", kernel(start=-math.inf), {"finite", "lse"}, "empty_first_16"),
    "a logsumexp of the other base": ("full", kernel(lse_base=1 / math.log(2)), {"lse"}, "lse_base"),
    "a softmax scale off by two percent": ("full", kernel(base=1.02), {"lse"}, ""),
}
"""How, and what is known of it: the case that shows it, checks that are red, the hypothesis that names it."""


@pytest.mark.parametrize("how", WRONG)
def test_wrong_kernels_are_refused(how):
    case, function, names, like = WRONG[how]
    _, red = judged(CASES[case], function)
    assert names <= set(red), (names, red)
    first = next(iter(red.values())).hint
    assert f"[latent_{like}]" in first if like else "[latent_" not in first
    assert names == {"lse"} or {"finite", "element", "scale"} & set(red)


def test_a_lost_token_is_named():
    def drops_one(q, kv, indices, sm_scale, d_v):
        indices = indices.clone()
        indices[1, 0, 5] = -1
        return kernel()(q, kv, indices, sm_scale, d_v)

    case = cases.parse_id(CASES["full"])
    _, red = judged(CASES["full"], drops_one)
    token = int(cases.make_inputs(case).topk_idx[0, 1, 5])
    assert f"token {token} lost" in red["token"].hint
    assert "request 0, query 1" in red["token"].where


def changed(ids=None, heads=None):
    """A right kernel that is given other ids, or whose heads are exchanged."""

    def mla_sparse(q, kv, indices, sm_scale, d_v):
        out, lse = kernel()(q, kv, indices if ids is None else ids(indices.clone()), sm_scale, d_v)
        return (out if heads is None else heads(out)), lse

    return mla_sparse


def without_last(indices):
    indices[..., -1] = -1
    return indices


def past_the_end_is_the_last(q, kv, indices, sm_scale, d_v):
    return kernel()(q, kv, indices.clamp(max=len(kv) - 1), sm_scale, d_v)


ONLY_SOME_SHAPES = {
    "a row past the cache taken for its last": ("beyond", past_the_end_is_the_last, "lse"),
    "one token of 2048 left out": ("long", changed(ids=without_last), "token"),
    "a last tile of 16 left out": ("odd", changed(ids=lambda ids: ids[..., : ids.shape[-1] // 32 * 32]), "element"),
    "the heads past the 64th exchanged": (
        "odd",
        changed(heads=lambda out: out[:, [*range(64), *range(127, 63, -1)]]),
        "row",
    ),
}


@pytest.mark.parametrize("how", ONLY_SOME_SHAPES)
def test_what_goes_wrong_with_some_shapes_only_is_refused(how):
    case, function, check = ONLY_SOME_SHAPES[how]
    assert check in judged(CASES[case], function)[1]


def test_ci_has_the_shapes_that_show_it():
    shapes = [case for case in cases.tier("ci") if case.op == "mla_sparse"]
    assert any(case.topk == 2048 and case.ids == "full" and case.context > 2048 for case in shapes)
    assert any(case.topk == 2048 and case.ids == "late" for case in shapes), "parts of which half are empty"
    assert any(case.topk % 32 == 16 and case.context > case.topk for case in shapes)
    sunk = {case.ids for case in shapes if case.fill == "sunk" and case.topk == 256}
    assert sunk >= {"empty", "short", "late"}, "a merge that forgets the largest logit is right while logits are small"
    assert any(case.ids == "beyond" for case in shapes), "rows that the cache does not have"
    several = [case for case in shapes if case.topk > 256 and case.total_queries * case.heads > 64]
    assert any(case.gqa > 64 for case in several), "parts of more rows than one program merges"
    whole = [case for case in shapes if case.total_queries > 32 and case.topk >= 256 and case.ids == "late"]
    assert whole, "lists that are not split: an empty tile before others, in one loop"


def test_a_promised_base_is_what_is_compared():
    _, red = judged(CASES["full"], kernel(lse_base=1 / math.log(2)), Profile(lse="base2"))
    assert not red
    _, red = judged(CASES["full"], kernel(), Profile(lse="base2"))
    assert "other base" in red["lse"].hint


def test_rows_that_list_nothing_are_zero_and_weigh_nothing():
    run, red = judged(CASES["empty"], kernel())
    assert not red
    assert not run.outputs["out"][1].any()
    wrong = lambda **given: (out := kernel()(**given))[0].index_fill_(0, torch.tensor([1]), 1.0) is None or out  # noqa: E731
    assert "dead_row" in judged(CASES["empty"], lambda q, kv, indices, sm_scale, d_v: wrong(
        q=q, kv=kv, indices=indices, sm_scale=sm_scale, d_v=d_v))[1]  # fmt: skip

    def heavy(q, kv, indices, sm_scale, d_v):
        out, lse = kernel()(q, kv, indices, sm_scale, d_v)
        return out, lse.clamp(min=0)

    assert "weigh nothing" in judged(CASES["empty"], heavy)[1]["lse"].hint


def test_the_reference_is_a_softmax_over_the_listed_tokens_alone():
    case = cases.parse_id(CASES["holes"])
    inputs = cases.make_inputs(case)
    expected = reference.expected(inputs)
    for row in range(case.total_queries):
        listed = [int(i) for i in inputs.topk_idx[0, row] if i >= 0]
        keys = torch.stack([inputs.k[i, 0] for i in listed]).double()
        logits = keys @ inputs.q[row, 2].double() * inputs.sm_scale
        torch.testing.assert_close(expected["out"][row, 2], logits.softmax(0) @ keys[:, :128])
        torch.testing.assert_close(expected["lse"][row, 2], torch.logsumexp(logits, 0) / math.log(2))


def test_lists_are_what_their_words_say():
    ids = {word: cases.make_inputs(cases.parse_id(case)).topk_idx[0] for word, case in CASES.items()}
    assert (ids["late"][:, :32] == -1).all()
    assert (ids["late"][:, 32:] >= 0).all()
    assert (ids["empty"][1] == -1).all()
    assert (ids["empty"][0] >= 0).any()
    inner = (ids["holes"][:, :-1] == -1) & (ids["holes"][:, 1:] >= 0)
    assert inner.any()
    for rows in ids.values():
        for row in rows.tolist():
            listed = [i for i in row if i >= 0]
            assert len(set(listed)) == len(listed)
