"""Probe fills: right kernels of every style pass, wrong ones are named in tokens."""

import math
from dataclasses import replace

import pytest
import simulate
import torch
from simulate import RIGHT, Edit, Style, inputs, judge, red

from m3check.cases import complaint, make_inputs, parse_id
from m3check.cases.marks import marks
from m3check.cases.scorefills import ODD_KINDS
from m3check.types import BLOCK, M3CheckError, Status

STYLES = {
    "whole": (Style(), {}),
    "split, partials rounded": (
        Style(splits=4, partials=torch.bfloat16, lse=True),
        {"partials": "query", "normaliser": "lse"},
    ),
    "small tiles backwards": (Style(tile=32, reverse=True, rounded_sum=True), {"partials": "fp32"}),
    "natural exp": (Style(natural=True, splits=2, lse=True, tile=64), {"normaliser": "lse", "partials": "fp32"}),
}
RIGHT_CASES = (
    "sparse_attn/q=3+1,kv=1409+300,h=2,g=4,topk=4,fill={}",
    "sparse_attn_decode/q=1x3,kv=2305+0+640,g=2,d=64,fill={}",
    "sparse_attn_decode/q=2x2,kv=1409+1,h=2,g=4,topk=4,dtype=fp16,cache=fp16,ids=short,fill={}",
    "sparse_attn/q=2,kv=900,h=1,g=2,topk=3,dtype=fp32,cache=fp32,fill={}",
    "sparse_attn_decode/q=1,kv=9000,g=1,topk=64,cache=fp8_e4m3fn,ids=holes,fill={}",
)
PROBES = ("membership", "needle", "two_keys")
SPLIT = Style(splits=4, partials=torch.bfloat16, lse=True)


WHOLE = Style()


def attend(text, edit=RIGHT, style=WHOLE, ids=None, **options):
    """Findings on a simulated kernel, red ones by check."""
    problem = inputs(text)
    out = simulate.attention(problem, problem.topk_idx if ids is None else ids(problem), style, edit)
    return red(judge(problem, {"out": out}, **options))


@pytest.mark.parametrize("fill", PROBES)
@pytest.mark.parametrize("style", STYLES)
def test_right_kernels_pass(fill, style):
    how, options = STYLES[style]
    for text in RIGHT_CASES:
        if how.partials is torch.bfloat16 and ("fp16" in text or "fp32" in text):
            continue
        assert not attend(text.format(fill), style=how, **options), text


@pytest.mark.parametrize("fill", PROBES)
def test_a_kernel_that_normalises_weights_before_it_rounds_them_passes(fill):
    problem = inputs(f"sparse_attn/q=1,kv=2222,h=2,g=4,topk=8,fill={fill}")
    out = []
    for head in range(2):
        weights = _logits(problem, head, 0).softmax(-1).bfloat16().float()
        out.append((weights @ problem.v[_tokens(problem, head, 0), head].float()).bfloat16())
    assert not red(judge(problem, {"out": torch.cat(out)[None]}, partials="fp32"))


@pytest.mark.parametrize("fill", PROBES)
def test_a_probe_is_judged_by_its_own_check_alone(fill):
    problem = inputs(f"sparse_attn/q=2,kv=900,h=1,g=2,topk=3,fill={fill}")
    findings = judge(problem, {"out": simulate.attention(problem, problem.topk_idx)})
    assert {f.check for f in findings} & {*PROBES, "edges"} == {fill}
    plain = inputs("sparse_attn/q=2,kv=900,h=1,g=2,topk=3")
    findings = judge(plain, {"out": simulate.attention(plain, plain.topk_idx)})
    assert not {f.check for f in findings} & {*PROBES, "edges"}


@pytest.mark.parametrize("scale", ["scalar", "token"])
def test_a_needle_outweighs_scaled_keys(scale):
    text = f"sparse_attn/q=3,kv=1409,h=2,g=8,topk=4,cache=fp8_e4m3fn,scale={scale},fill=needle"
    problem = inputs(text)
    logits = _logits(problem, head=0, row=1)
    best = logits.topk(2, dim=-1).values
    assert ((best[:, 0] - best[:, 1]) > 160 * math.log(2)).all()
    assert not attend(text)


def _tokens(problem, head, row):
    """Tokens that one row of the first request attends to."""
    token = (problem.topk_idx[head, row][:, None] * BLOCK + torch.arange(BLOCK)).flatten()
    return token[(token >= 0) & (token <= next(problem.case.requests()).position(row))]


def _logits(problem, head, row):
    """[G, n] over the attended tokens of one row."""
    case = problem.case
    keys = problem.k[_tokens(problem, head, row), head].double()
    query = problem.q[row, head * case.gqa : (head + 1) * case.gqa].double()
    return query @ keys.T * problem.sm_scale


@pytest.mark.parametrize("dim", [64, 128])
def test_two_keys_stand_four_to_ten_nats_apart_in_same_and_different_blocks(dim):
    problem = inputs(f"sparse_attn_decode/q=2,kv=2305,h=2,g=16,d={dim},topk=8,fill=two_keys")
    best = _logits(problem, 1, 1).topk(3, dim=-1)
    gap = best.values[:, 0] - best.values[:, 1]
    assert {round(float(g)) for g in gap} == {4, 8, 10}
    assert (best.values[:, 1] - best.values[:, 2] > 100).all()
    blocks = best.indices[:, :2] // BLOCK
    same = blocks[:, 0] == blocks[:, 1]
    assert same.any()
    assert not same.all()


MEMBERS = "sparse_attn/q=1,kv=2432,h=2,g=2,topk=8,fill=membership"


def listed(slot, offset=0, head=0):
    """The token at an offset of the block in a slot."""
    return int(inputs(MEMBERS).topk_idx[head, 0, slot]) * BLOCK + offset


def at(slots, value=-math.inf):
    """Edit the logits at some places of the gathered tokens."""

    def edit(logits):
        logits = logits.clone()
        logits[:, :, :, slots] = value if value == -math.inf else logits[:, :, :, slots] + value
        return logits

    return Edit(logits=edit)


def test_a_lost_and_a_doubled_token_are_named():
    found = attend(MEMBERS, at([3 * BLOCK + 40]))["membership"]
    assert f"token {listed(3, 40)} missing" in found.hint
    assert found.where.startswith("request 0, query 0")
    doubled = attend(MEMBERS, at([5 * BLOCK + 127], 1.0))["membership"]  # +1 is a factor 2 to an exp2 kernel
    assert f"token {listed(5, 127)} attended twice" in doubled.hint


def test_lost_blocks_and_runs_are_named():
    block = attend(MEMBERS, at(list(range(2 * BLOCK, 3 * BLOCK))))["membership"]
    assert f"tokens {listed(2)}–{listed(2, 127)} missing" in block.hint
    half = attend(MEMBERS, at(list(range(2 * BLOCK + 64, 3 * BLOCK))))["membership"]
    assert f"tokens {listed(2, 64)}–{listed(2, 127)} missing" in half.hint
    two = attend(MEMBERS, at([*range(BLOCK), *range(4 * BLOCK, 5 * BLOCK)]))["membership"]
    assert f"tokens {listed(0)}–{listed(0, 127)} missing" in two.hint
    assert f"tokens {listed(4)}–{listed(4, 127)} missing" in two.hint


@pytest.mark.parametrize("offset", [0, 127])
def test_the_first_or_last_token_of_every_block_lost(offset):
    found = attend(MEMBERS, at([slot * BLOCK + offset for slot in range(8)]))["membership"]
    named = [f"token {listed(slot, offset)} missing" in found.hint for slot in range(8)]
    assert sum(named) == 4  # a sentence lists four
    assert "and 4 more" in found.hint


def test_another_block_in_place_of_a_listed_one():
    def other(problem):
        ids = problem.topk_idx.clone()
        ids[1, 0, 3] = next(b for b in range(19) if b not in ids[1, 0].tolist())
        return ids

    found = attend(MEMBERS, ids=other)["membership"]
    assert f"tokens {listed(3, 0, 1)}–{listed(3, 127, 1)} missing" in found.hint
    assert "not listed" in found.hint
    assert "kv head 1" in found.where


def test_a_block_taken_twice_and_another_lost():
    def twice(problem):
        ids = problem.topk_idx.clone()
        ids[0, 0, 6] = ids[0, 0, 1]
        return ids

    found = attend(MEMBERS, ids=twice)["membership"]
    assert f"tokens {listed(6)}–{listed(6, 127)} missing" in found.hint
    assert f"tokens {listed(1)}–{listed(1, 127)} attended twice" in found.hint


def test_a_future_token_is_told_from_a_doubled_one():
    problem = inputs("sparse_attn/q=2,kv=2300,h=1,g=2,topk=24,fill=membership")
    early = replace(problem, case=replace(problem.case, kv_lens=(2301,)), k=_longer(problem.k), v=_longer(problem.v))
    out = simulate.attention(early, problem.topk_idx)  # every query one position further: its mask is off by one
    found = red(judge(problem, {"out": out}))["membership"]
    assert "token 2299 attended, 1 past the query (causal mask)" in found.hint


def _longer(tensor):
    return torch.cat([tensor, tensor[-1:]])


def test_a_page_table_off_by_one_and_a_row_of_another_head():
    shifted = attend(MEMBERS, Edit(inputs=lambda p: replace(p, v=p.v.roll(BLOCK, 0))))
    assert "missing" in shifted["membership"].hint
    one_head = attend(MEMBERS, ids=lambda p: p.topk_idx[:1].expand(2, -1, -1))
    assert "kv head 1" in one_head["membership"].where


def test_values_that_do_not_count_whole_tokens_are_said_to():
    heavier = attend(MEMBERS, Edit(logits=lambda x: x + torch.linspace(0, 1, x.shape[-1])))
    assert "do not weigh the same" in heavier["membership"].hint
    assert "the row is zero" in attend(MEMBERS, Edit(inputs=lambda p: replace(p, v=p.v * 0)))["membership"].hint


@pytest.mark.parametrize("topk", [17, 33, 64])
def test_long_lists_are_counted_in_parts_by_head(topk):
    """No channel counts more than 32 tokens; among the heads every slot is marked somewhere."""
    problem = inputs(f"sparse_attn/q=1,kv={BLOCK * 90},h=4,g=1,topk={topk},fill=membership")
    counted = torch.zeros(topk, dtype=torch.bool)
    for head in range(4):
        ids = problem.topk_idx[head, 0].long()
        values = problem.v[:, head].view(90, BLOCK, -1)[ids].double()  # [topk, 128, D]
        position_of = ids * BLOCK
        assert (position_of < BLOCK * 90).all()
        assert values.sum((0, 1)).max() <= 32
        counted |= values.any(-1).any(-1)
    assert counted.all()


def test_marks_differ_within_every_row():
    chance = torch.Generator().manual_seed(3)
    lists = [torch.randperm(30, generator=chance)[:12].tolist() for _ in range(3)]
    found = marks(lists, 30, 40, part=1)
    for row in lists:
        assert len({found[b] for b in row}) == len(row)
        assert all(found[b] >= 0 for b in row)
    assert -1 in marks([list(range(20))], 8, 20, part=0)


def test_an_unaccepted_list_is_noted():
    problem = inputs("sparse_attn/q=2,kv=2305,h=1,g=2,topk=4,ids=short,fill=membership")
    out = simulate.attention(problem, problem.topk_idx, edit=at([5]))
    findings = judge(problem, {"out": out}, id_lists=frozenset({"full"}))
    noted = [f for f in findings if f.check == "membership" and f.status is Status.NOTED]
    assert "does not accept" in noted[0].hint


NEEDLE = "sparse_attn_decode/q=2,kv=2305,h=2,g=8,topk=8,fill=needle"


@pytest.mark.parametrize("offset", [0, 127])
def test_a_needle_at_the_edge_of_a_block_is_not_lost(offset):
    found = attend(NEEDLE, at([slot * BLOCK + offset for slot in range(8)]))["needle"]
    assert f"offset {offset}) was not attended" in found.hint


def test_a_needle_of_another_page_head_or_chunk():
    page = attend(NEEDLE, Edit(inputs=lambda p: replace(p, v=p.v.roll(BLOCK, 0))))["needle"]
    assert "holds the value of token" in page.hint
    head = attend(NEEDLE, Edit(inputs=lambda p: replace(p, v=p.v.flip(1))))["needle"]
    assert "of kv head 1" in head.hint

    def lost(out, lse):
        lse[2] = -math.inf
        return out, lse

    assert "needle" in attend(NEEDLE, Edit(split=lost), SPLIT)
    factor = attend(NEEDLE, Edit(inputs=lambda p: replace(p, v=p.v * 1.01)))["needle"]
    assert "times 1.0" in factor.hint


def test_needles_stand_at_every_edge_of_every_listed_block():
    problem = inputs("sparse_attn/q=2,kv=2305,h=2,g=16,topk=4,fill=needle")
    seen = set()
    for head in range(2):
        for row in range(2):
            best = _logits(problem, head, row).argmax(-1)
            seen |= {int(i) % BLOCK for i in best}
    assert {0, 127, 63, 64} <= seen


KEYS = "sparse_attn_decode/q=2,kv=2305,h=2,g=8,topk=8,fill=two_keys"


@pytest.mark.parametrize(
    ("factor", "words"),
    [
        (math.log(2), "2^x where e^x belongs"),
        (1 / math.log(2), "log2 e applied twice"),
        (1.01, "1.0"),
        (0.99, "0.9"),
        (1.005, "1.00"),
    ],
)
def test_another_scale_is_named(factor, words):
    found = attend(KEYS, Edit(scale=factor))["two_keys"]
    assert words in found.hint
    assert "joins blocks" not in found.hint


@pytest.mark.parametrize(
    ("split", "words"),
    [
        (lambda out, lse: (out, lse * math.log(2)), "2^x where e^x belongs"),
        (lambda out, lse: (out, lse / math.log(2)), "log2 e applied twice"),
    ],
)
def test_a_wrong_base_in_the_merge_alone_is_placed_there(split, words):
    found = attend(KEYS, Edit(split=split), SPLIT)["two_keys"]
    assert words in found.hint
    assert "look at what joins blocks and chunks" in found.hint


def test_chunk_weights_lost():
    equal = attend(KEYS, Edit(split=lambda out, lse: (out, torch.zeros_like(lse))), SPLIT)["two_keys"]
    assert "a weight of the merge is lost" in equal.hint

    def first(out, lse):
        lse[0] = -math.inf
        return out, lse

    assert "no weight at all" in attend(KEYS, Edit(split=first), SPLIT)["two_keys"].hint


DTYPES = ("bf16", "fp16", "fp32", "fp8_e4m3fn", "fp8_e5m2", "fp8_e4m3fnuz", "fp8_e5m2fnuz")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fill", ["edge_up", "edge_down"])
def test_edges_are_exact_in_every_dtype(dtype, fill):
    problem = inputs(f"index_score/q=3+70,kv=4500+200,h=3,d=64,dtype={dtype},cache={dtype},fill={fill}")
    q, k = problem.idx_q.double(), problem.idx_k.double()
    assert torch.einsum("thd,nd->thn", q.abs(), k.abs()).max() < (2**12 if dtype.startswith("fp8") else 2**23)
    start = 0
    for length in (4500, 200):  # a block's scores rise or fall from token to token
        score = k[start : start + length] @ q[0, 0]
        steps = score.diff()[torch.arange(1, length) % BLOCK > 0]
        assert (steps == (1 if fill == "edge_up" else -1)).all()
        assert (score != 0).all()
        start += length
    assert not red(judge(problem, {"score": simulate.scores(problem, reverse=True)}))


def late(problem, by):
    """Scores with the causal mask off by some positions."""
    case, result = problem.case, simulate.scores(problem)
    for r in case.requests():
        for i in range(r.query_len):
            keys = problem.idx_k[r.kv_start : r.kv_start + min(r.position(i) + 1 + by, r.kv_len)].float()
            score = problem.idx_q[r.query_start + i].float() @ keys.T
            score = torch.nn.functional.pad(score, (0, -score.shape[-1] % BLOCK), value=-math.inf)
            score = score.unflatten(-1, (-1, BLOCK)).amax(-1)
            result[:, r.query_start + i, : score.shape[-1]] = score
    return result


def test_a_causal_mask_off_by_one_is_told_in_tokens():
    problem = inputs("index_score/q=2+3,kv=387+1000,h=2,fill=edge_up")
    found = red(judge(problem, {"score": late(problem, 1)}))["edges"]
    assert "block 3's maximum is token 386, 1 past the query, wanted 385 (its last visible token)" in found.hint
    found = red(judge(problem, {"score": late(problem, -1)}))["edges"]
    assert "block 3's maximum is token 384, wanted 385" in found.hint


def test_a_first_token_lost_and_a_zero_in_place_of_minus_infinity():
    problem = inputs("index_score/q=2,kv=387,h=2,fill=edge_down")
    right = simulate.scores(problem)
    lost = right.clone()
    lost[..., 1] -= 1  # the score of token 129 in place of that of 128
    assert (
        "block 1's maximum is token 129, wanted 128 (its first token)" in red(judge(problem, {"score": lost}))["edges"].hint
    )
    zeros = red(judge(problem, {"score": right.clamp(min=0)}))["edges"]
    assert "a masked key counts as 0" in zeros.hint
    heads = red(judge(problem, {"score": right.flip(0)}))["edges"]
    assert "the row holds the scores of index head 1" in heads.hint


def test_forced_cells_are_left_to_their_own_check():
    problem = inputs("index_decode_score/q=2,kv=900,h=2,init=1,local=2,fill=edge_up")
    score = simulate.forced(problem.case, simulate.scores(problem))
    assert not red(judge(problem, {"score": score}))
    score[0, 0, 3] += 1
    assert {"edges", "score"} <= set(red(judge(problem, {"score": score})))


@pytest.mark.parametrize("fill", ["edge_up", "edge_down"])
def test_edge_scores_make_one_selection_right(fill):
    problem = inputs(f"index_decode/q=1,kv=2305,h=2,topk=4,fill={fill}")
    plain = simulate.scores(problem)
    ids = simulate.select(problem.case, plain)
    assert not red(judge(problem, {"ids": ids}))
    ids[0, 0, ids[0, 0] == (16 if fill == "edge_up" else 1)] = 8
    assert "selection" in red(judge(problem, {"ids": ids}))


ODD = f"index_topk/q={len(ODD_KINDS)},kv=3330,h=1,topk=8,init=1,local=2,fill=odd"


def test_odd_rows_are_what_they_are_called():
    scores = make_inputs(parse_id(f"index_topk/q=7,kv={128 * 300},h=1,fill=odd")).scores[0]
    rows = {kind: scores[i, :299] for i, kind in enumerate(ODD_KINDS)}
    assert 0.4 < rows["half_nan"].isnan().double().mean() < 0.6
    assert 0.75 < rows["most_nan"].isnan().double().mean() < 0.9
    assert rows["all_nan"].isnan().all()
    assert {math.inf, -math.inf} <= set(rows["infinities"].tolist())
    assert (rows["most_minus_inf"] == -math.inf).double().mean() > 0.7
    zeros = rows["signed_zeros"]
    assert (zeros[zeros == 0].signbit()).any()
    assert (~zeros[zeros == 0].signbit()).any()
    assert (rows["huge"] >= 1e29).any()
    assert (rows["huge"] <= -1e38).any()


def selected(problem):
    """A right selection of odd scores: forced blocks, then by score with NaN last."""
    from m3check.reference import expected

    return expected(problem)["ids"].clone()


def test_odd_scores_are_selected_rightly_with_nan_lowest():
    problem = inputs(ODD)
    assert not red(judge(problem, {"ids": selected(problem)}))


@pytest.mark.parametrize("row", range(len(ODD_KINDS)))
def test_an_odd_row_selected_wrongly_is_red_or_noted_by_promise(row):
    problem = inputs(ODD)
    ids = selected(problem)
    ids[0, row, 2] = -1  # before the end
    assert "ids" in red(judge(problem, {"ids": ids}))
    findings = judge(problem, {"ids": ids}, odd_scores=frozenset())
    assert not red(findings)
    assert any(f.check == "ids" and f.status is Status.NOTED for f in findings)
    ids = selected(problem)
    ids[0, row, ids[0, row] == 0] = 20  # the forced init block is left out for another
    if ids[0, row].unique().numel() == 8:
        assert "forced" in red(judge(problem, {"ids": ids}))


def test_a_nan_taken_before_a_number_is_red():
    problem = inputs(ODD)
    ids, scores = selected(problem), problem.scores[0, 0]
    visible = next(problem.case.requests()).visible_blocks(0)
    nan = next(b for b in range(1, visible - 2) if scores[b].isnan() and b not in ids[0, 0].tolist())
    ids[0, 0, 7] = nan
    assert "selection" in red(judge(problem, {"ids": ids}))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("index_score/q=1,kv=1,fill=needle", "fill=needle asks attention"),
        ("decode/q=1,kv=1,fill=membership", "fill=membership asks attention"),
        ("sparse_attn/q=1,kv=1,d=96,fill=membership", "d=64 and d=128"),
        ("sparse_attn/q=1,kv=1,cache=fp8_e4m3fn,scale=token,fill=two_keys", "scale=token does not go with it"),
        ("sparse_attn/q=1,kv=1,cache=fp8_e4m3fn,scale=scalar,fill=membership", "scale=scalar does not go with it"),
        ("sparse_attn/q=1,kv=1,fill=edge_up", "asks block scores"),
        ("index_decode/q=1,kv=1,fill=odd", "goes with index_topk"),
    ],
)
def test_a_fill_refuses_what_it_does_not_go_with(text, words):
    with pytest.raises(M3CheckError, match=words):
        parse_id(text)


def test_the_other_fills_refuse_nothing():
    assert complaint(parse_id("sparse_attn/q=1,kv=1,d=96,fill=ties")) is None
