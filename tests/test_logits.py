"""mqa_logits and paged_mqa_logits: wrong kernels are refused, with what they look like, and right ones pass."""

import pytest
import torch

from m3check import cases, checks, reference, runner
from m3check.arch import ARCHS, FP32
from m3check.kernels import contract
from m3check.types import Kernel, Profile, Status

E4M3 = "dtype=fp8_e4m3fn,cache=fp8_e4m3fn"
MQA = f"mqa_logits/q=5+3,kv=70+9,h=1,g=4,d=32,{E4M3}"
EMPTY = f"mqa_logits/q=3+2+4,kv=1+0+70,h=1,g=4,d=32,{E4M3}"
PAGED = f"paged_mqa_logits/q=2x4,kv=131+64+0+65,h=1,g=4,d=32,{E4M3}"


def tile(q, k, scale, weight, *, relu=True, scaled=True, weighted=True, order=1, dtype=torch.float32):
    """Logits [n] of one query [H, D]."""
    dots = q.to(dtype)[::order] @ k.to(dtype).T if order > 0 else (q.flip(0).to(dtype) @ k.to(dtype).T)
    weight = weight[::order] if order > 0 else weight.flip(0)
    dots = dots.float() * scale if scaled else dots.float()
    dots = dots.clamp(min=0) if relu else dots
    return (dots * weight[:, None] if weighted else dots).sum(0)


def windowed(*, shift=0, fill=float("-inf"), **how):
    def mqa_logits(q, k, k_scale, weights, starts, ends):
        out = torch.full((len(q), len(k)), fill)
        for t in range(len(q)):
            window = slice(int(starts[t]), min(int(ends[t]) + shift, len(k)))
            out[t, window] = tile(q[t].float(), k[window].float(), k_scale[window], weights[t], **how)
        return out

    return mqa_logits


def paged(*, shift=0, interleaved=False, last=0, fill=float("-inf"), **how):
    def paged_mqa_logits(q, kv_cache, weights, context_lens, block_table, max_model_len):
        requests, next_n, _, dim = q.shape
        out = torch.full((requests * next_n, max_model_len), fill)
        size = kv_cache.shape[1]
        for r in range(requests):
            pages = kv_cache[block_table[r].long()].flatten(1)
            if interleaved:
                rows = pages.view(-1, dim + 4)
                keys, scale = rows[:, :dim].contiguous(), rows[:, dim:].contiguous().view(torch.float32)[:, 0]
            else:
                keys = pages[:, : size * dim].reshape(-1, dim)
                scale = pages[:, size * dim :].contiguous().view(torch.float32).flatten()
            for i in range(next_n):
                seen = min(int(context_lens[r]) - next_n + i + 1 + last, max_model_len)
                if seen > 0:
                    row, source = r * next_n + i, r * next_n + (i + shift) % next_n
                    k = keys[:seen].contiguous().view(q.dtype).float()
                    out[row, :seen] = tile(q.flatten(0, 1)[source].float(), k, scale[:seen], weights[source], **how)
        return out

    return paged_mqa_logits


def judged(case_id, function):
    case = cases.parse_id(case_id)
    inputs = cases.make_inputs(case)
    run = contract.call(Kernel("t", case.op, "mine", Profile(), function), inputs)
    setting = checks.Setting(profile=Profile(), evidence="interpreted", arch=ARCHS["sm80"], dot=FP32)
    judge = runner.Judge(inputs, setting)
    return {f.check: f for f in judge.named(judge(inputs, run)) if f.status is Status.FAILED}


@pytest.mark.parametrize("how", [{}, {"order": -1}, {"dtype": torch.float64}])
def test_right_kernels_pass_in_any_order(how):
    assert not judged(MQA, windowed(**how))
    assert not judged(PAGED, paged(**how))


WRONG = {
    "relu missing": ({"relu": False}, "logits", "[logits_relu_lost]"),
    "scales dropped": ({"scaled": False}, "logits", "[logits_scale_lost]"),
    "weights dropped": ({"weighted": False}, "logits", "[logits_weights_lost]"),
    "a window too long": ({"shift": 1}, "outside", "off by one?); like the window is one token long [logits_next_seen]"),
    "a window too short": ({"shift": -1}, "logits", "[logits_own_lost]"),
    "cells left unwritten": ({"fill": float("nan")}, "outside", "[logits_unwritten]"),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_kernels_over_windows_are_refused_and_named(what):
    how, check, hint = WRONG[what]
    red = judged(MQA, windowed(**how))
    assert hint in red[check].hint


def test_a_window_may_be_empty():
    inputs = cases.make_inputs(cases.parse_id(EMPTY))
    seen = {}

    def spy(**arguments):
        seen.update(arguments)
        return windowed()(**arguments)

    contract.call(Kernel("t", "mqa_logits", "mine", Profile(), spy), inputs)
    assert seen["starts"].tolist() == [0, 0, 0, 1, 1, 1, 1, 1, 1]
    assert seen["ends"].tolist() == [0, 0, 1, 1, 1, 68, 69, 70, 71]
    assert not judged(EMPTY, windowed())

    def at_least_one(q, k, k_scale, weights, starts, ends):
        return windowed()(q, k, k_scale, weights, starts, torch.maximum(ends, starts + 1))

    assert not judged(MQA, at_least_one), "only an empty window shows it"
    assert "4 cells hold" in judged(EMPTY, at_least_one)["outside"].hint


def test_a_result_has_as_many_columns_as_were_asked_for():
    for pad in (-1, 64):

        def other(pad=pad, **arguments):
            return torch.nn.functional.pad(paged()(**arguments), (0, pad), value=float("-inf"))

        with pytest.raises(contract.BrokenContract, match=r"logits of shape \[8, \d+\]"):
            judged(PAGED, other)


def test_ci_has_contexts_of_several_tiles_and_empty_windows():
    shapes = [case for case in cases.tier("ci") if "mqa_logits" in case.op]
    for op in ("mqa_logits", "paged_mqa_logits"):
        assert any(case.op == op and case.context > 1024 for case in shapes)
    assert any(r.query_len > r.kv_len for c in shapes if c.op == "mqa_logits" for r in c.requests())


WRONG_PAGED = {
    "rows of next_n shifted": ({"shift": 1}, "logits", "[logits_queries]"),
    "scales between the keys": ({"interleaved": True}, "logits", "of"),
    "the draft tokens forgotten": ({"last": 1}, "outside", "off by one"),
    "scales dropped": ({"scaled": False}, "logits", "[logits_scale_lost]"),
    "relu missing": ({"relu": False}, "logits", "[logits_relu_lost]"),
    "padded rows left unwritten": ({"fill": 0.0}, "outside", "-inf"),
}


@pytest.mark.parametrize("what", WRONG_PAGED)
def test_wrong_kernels_over_pages_are_refused(what):
    how, check, hint = WRONG_PAGED[what]
    red = judged(PAGED, paged(**how))
    assert hint in red[check].hint


def test_a_last_page_that_is_written_whole_is_refused():
    """vLLM's limit is any number, so that a row may end within a page: what follows is the next row."""

    def pages(**arguments):
        rows, columns = len(arguments["weights"]), arguments["max_model_len"]
        out = paged()(**arguments).flatten()
        for row in range(rows):
            seen = int(arguments["context_lens"][row // arguments["q"].shape[1]])
            out[row * columns + seen : row * columns + -(-seen // 64) * 64] = float("-inf")
        return out.view(rows, columns)

    assert judged(PAGED, pages).keys() == {"logits"}
    assert not judged(PAGED.replace("2x4,kv=131+64+0+65", "2,kv=131"), pages), "only a row that ends within a page shows it"


def test_a_logit_that_a_bf16_sum_would_give_is_refused():
    def rounded(q, k, k_scale, weights, starts, ends):
        return windowed()(q, k, k_scale, weights, starts, ends).bfloat16().float()

    assert "logits" in judged(MQA, rounded)


def test_the_reference_is_the_formula():
    inputs = cases.make_inputs(cases.parse_id(MQA))
    logits = reference.expected(inputs)["logits"]
    q, k = inputs.idx_q.double(), inputs.idx_k.double()
    row, token = 6, 4  # the second request's second query stands at position 7
    dots = torch.tensor([float(q[row, h] @ k[70 + token]) for h in range(4)], dtype=torch.float64)
    wanted = (
        inputs.more["weights"][row].double() * (dots * inputs.more["key_scale"][70 + token].double()).clamp(min=0)
    ).sum()
    torch.testing.assert_close(logits[row, token], wanted)
    assert torch.isinf(logits[row, 8:]).all()
    assert torch.isfinite(logits[row, :8]).all()


def test_a_page_holds_keys_and_then_scales():
    case = cases.parse_id(PAGED)
    inputs = cases.make_inputs(case)
    seen = {}

    def spy(**arguments):
        seen.update(arguments)
        return paged()(**arguments)

    contract.call(Kernel("t", case.op, "mine", Profile(), spy), inputs)
    page = seen["kv_cache"][int(seen["block_table"][0, 1])].flatten()
    assert torch.equal(page[:32], inputs.idx_k[64].view(torch.uint8))
    assert torch.equal(page[64 * 32 : 64 * 32 + 4].view(torch.float32)[0], inputs.more["key_scale"][64])
    assert seen["kv_cache"].shape[1:] == (64, 1, 36)
