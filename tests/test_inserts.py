"""Inserts: reference, bound, checks on right and wrong kernels, our own kernel, and the adapter to vLLM's compiled op."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch_insert as steps
import torch_kernels as right

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from m3check import arch, cases, checks, interpret, paging, reference, runner  # noqa: E402
from m3check.cases.families import insert as family  # noqa: E402
from m3check.cases.families import listed  # noqa: E402
from m3check.checks import inserted  # noqa: E402
from m3check.checks.inserted import expected as bounded  # noqa: E402
from m3check.checks.turning import Stored, Turned, nearest, turned  # noqa: E402
from m3check.checks.view import View  # noqa: E402
from m3check.kernels import contract, vllm_insert  # noqa: E402
from m3check.kernels.provider import Loaded, Spec  # noqa: E402
from m3check.types import OPS, Kernel, M3CheckError, PlanLine, Profile, Status  # noqa: E402

if triton.knobs.runtime.interpret:
    interpret.install()

from m3check.kernels.triton import dequantise, qknorm_rope_insert, quantise  # noqa: E402

OP = "qknorm_rope_insert"
SMALL = f"{OP}/q=1+5,kv=300+130,h=2,g=2"
FP8 = f"{OP}/q=6,kv=1025,h=2,g=2,cache=fp8_e4m3fn,icache=fp8_e4m3fn,ids=skip_some,queries=both"
WIDE = f"{OP}/q=31,kv=200,h=1,g=2,fill=wide"
DENSE = f"{OP}/q=3,kv=70,h=2,g=2,layer=dense,queries=place"
SKIPS = f"{OP}/q=2+1,kv=129+40,h=2,g=1,dtype=fp16,cache=fp8_e5m2,layout=pool,ids=skip_first,layer=skip_index,queries=fp8"
MANY = next(line for line in listed("ci") if line.startswith(f"{OP}/q=300+1"))
OTHER = f"{OP}/q=3+2,kv=200+129,h=2,g=2,rotary=32,ih=3,eps=1e-2"
APART = f"{OP}/q=5+3,kv=130+70,h=1,g=2,icache=fp8_e4m3fn,ids=skip_apart"
CASES = (SMALL, FP8, WIDE, DENSE, SKIPS, OTHER)

_made: dict[str, object] = {}


def inputs(text):
    if text not in _made:
        _made[text] = cases.make_inputs(cases.parse_id(text))
    return _made[text]


PLAIN = Profile()


def judge(text, function, world=None, profile=PLAIN):
    """Red findings of a kernel on a case, by check."""
    problem = inputs(text)
    run = contract.call(Kernel("mine", OP, "mine", profile, function), problem, world)
    if (text, profile) not in _judges:
        _judges[text, profile] = runner.Judge(problem, checks.Setting(profile=profile, evidence="interpreted"))
    judged = _judges[text, profile]
    found = judged.named(judged(problem, run))
    return {finding.check: finding for finding in found if finding.status is Status.FAILED}


_judges: dict[object, runner.Judge] = {}


# ---- the reference


def test_the_reference_says_what_a_second_formulation_says():
    """Channel by channel, in numpy."""
    problem = inputs(FP8)
    more = {name: tensor.double().numpy() for name, tensor in problem.more.items()}
    found = reference.expected(problem)
    for kind in ("q", "k", "idx_q", "idx_k"):
        x, weight = more[f"x_{kind}"], more[f"w_{kind}"]
        wanted = np.empty_like(x)
        for token, head in np.ndindex(x.shape[:2]):
            size = math.sqrt(sum(value * value for value in x[token, head]) / 128 + 1e-6)
            unit = [value / size * (1 + gain) for value, gain in zip(x[token, head], weight, strict=True)]
            angle = more["cos_sin"][int(more["positions"][token])]
            for channel in range(128):
                pair = complex(unit[channel % 32], unit[channel % 32 + 32]) if channel < 64 else 0
                turned = pair * complex(angle[channel % 32], angle[channel % 32 + 32])
                wanted[token, head, channel] = (turned.real, turned.imag, unit[channel], unit[channel])[channel // 32]
        np.testing.assert_allclose(found[kind].numpy(), wanted, rtol=1e-12, atol=1e-13)
    assert torch.equal(found["v"], problem.more["x_v"].double())


def test_figures_that_are_not_m3s_reach_the_kernel_and_the_inputs():
    """Defaults are left out of ids, so that ids of before name what they did."""
    case = cases.parse_id(OTHER)
    assert (case.rotary_dim, case.index_width, case.eps) == (32, 3, "1e-2")
    assert cases.case_id(case) == OTHER
    assert cases.case_id(replace(case, rotary_dim=64, index_heads=0, eps="1e-6")) == f"{OP}/q=3+2,kv=200+129,h=2,g=2"
    given = contract.prepare(Kernel("mine", OP, "mine", Profile(), steps.kernel()), inputs(OTHER), paging.World()).arguments
    assert (given["rotary_dim"], given["num_index_heads"], given["eps"]) == (32, 3, 1e-2)
    assert given["cos_sin_cache"].shape[1] == 32
    assert given["qkv"].shape[1] == (4 + 2 + 2 + 3 + 1) * 128
    step = family.OTHER_THETA ** (-2 * 3 / 32)
    assert given["cos_sin_cache"][200 - 1, 3].item() == pytest.approx(math.cos(199 * step), abs=4e-3)


def test_angles_are_those_of_m3_and_beside_them_is_nan():
    table = family.table(torch.tensor([5, 1_048_575]), torch.float16)
    assert table.shape == (1_048_577, 64)
    step = family.THETA ** (-2 * 3 / 64)
    assert table[5, 3].item() == pytest.approx(math.cos(5 * step), abs=6e-4)
    assert table[5, 35].item() == pytest.approx(math.sin(5 * step), abs=6e-4)
    assert table[[4, 6, 1_048_574, 1_048_576]].isfinite().all()
    assert table[[3, 7, 1000]].isnan().all()


# ---- cases


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("q=1,kv=1,dtype=fp32,cache=fp32", "bf16 or fp16, got fp32"),
        ("q=1,kv=1,fill=ties", "gauss, wide"),
        ("q=1,kv=1,ids=holes", "skip_all"),
        ("q=1,kv=1,layer=dense,cache=fp8_e5m2", "inserts nothing"),
        ("q=1,kv=1,layer=skip_index,icache=fp8_e4m3fn", "no index cache"),
        ("q=1,kv=1,layer=skip_index,ids=skip_apart", "no index cache"),
        ("q=1,kv=1,cache=fp16", "dtype of the keys, bf16"),
        ("q=1,kv=1,icache=fp8_e5m2", "fp8_e4m3"),
        ("q=1,kv=1,topk=3", "does not read topk"),
        ("q=1,kv=1,layer=thin", "sparse, dense, skip_index"),
        ("q=1,kv=1,layer=dense,ih=2", "has no index branch"),
        ("q=1,kv=1,rotary=60", "multiple of 8"),
        ("q=1,kv=1,rotary=136", "8 to 128; got rotary=136"),
        ("q=1,kv=1,eps=0.1", "1e-1, 1e-2"),
    ],
)
def test_cases_that_make_no_sense_are_refused(text, words):
    with pytest.raises(M3CheckError, match=words):
        cases.parse_id(f"{OP}/{text}")


def test_other_ops_have_no_slots():
    with pytest.raises(M3CheckError, match="sparse_attn"):
        cases.parse_id("sparse_attn/q=1,kv=1,ids=skip_some")


# ---- right kernels


def unweighted_first(x, weight, eps):
    """The factors in another order, the squares summed from the last channel to the first."""
    total = torch.zeros_like(x[..., :1])
    for channel in reversed(range(x.shape[-1])):
        total = total + x[..., channel : channel + 1].square()
    return (1 + weight) * torch.rsqrt(total * (1 / x.shape[-1]) + eps) * x


def by_division(x, weight, eps):
    return x / torch.sqrt(steps.power(x) + eps) * (1 + weight)


def through_the_model(x, dtype, model):
    return steps.stored(x.to(torch.bfloat16 if model == torch.float32 else model).float(), dtype, model)


RIGHT = {
    "as it is": {},
    "another order of sums and factors": {"normed": unweighted_first},
    "a division by the root": {"normed": by_division},
    "in fp64": {
        "normed": lambda x, weight, eps: steps.normed(x.double(), weight.double(), eps),
        "stored": lambda x, dtype, model: steps.stored(x.float(), dtype, model),
    },
}


@pytest.mark.parametrize("text", CASES)
@pytest.mark.parametrize("how", RIGHT)
def test_right_kernels_pass(how, text):
    assert judge(text, steps.kernel(**RIGHT[how])) == {}


@pytest.mark.parametrize(
    "world", [paging.World(poison="garbage"), paging.World(far=True), paging.World(salt="a", layout="nhd")]
)
def test_right_kernels_pass_whatever_the_memory(world):
    assert judge(SMALL, steps.kernel(), world) == {}


def test_codes_of_rounded_numbers_pass_unless_a_profile_promises_otherwise():
    """fp8 numbers that went through bf16 are another rule of emission."""
    kernel = steps.kernel(stored=through_the_model)
    text = f"{OP}/q=40,kv=1025,h=2,g=2,cache=fp8_e4m3fn,icache=fp8_e4m3fn"
    assert judge(text, kernel) == {}
    assert judge(text, kernel, profile=Profile(emits="rounded")) == {}
    assert judge(text, kernel, profile=Profile(emits="direct")).keys() & {"turned", "inserted"}
    assert judge(text, steps.kernel(), profile=Profile(emits="rounded")).keys() & {"turned", "inserted"}


# ---- wrong kernels


def interleaved(x, cos, sin):
    out = x.clone()
    first, second = x[..., 0:64:2], x[..., 1:64:2]
    out[..., 0:64:2], out[..., 1:64:2] = first * cos - second * sin, second * cos + first * sin
    return out


def on_all(x, cos, sin):
    return steps.rotated(x, torch.cat([cos, cos], -1), torch.cat([sin, sin], -1))


def first_64(x, cos, sin):
    """M3's half of a head, whatever was asked for."""
    return steps.rotated(x, cos[..., :32], sin[..., :32])


def own_angles(table, positions):
    """Not those of the table: M3's theta, rounded as a table is."""
    pair = torch.arange(table.shape[1] // 2)
    turn = positions[:, None, None] * family.THETA ** (-2 * pair.double() / table.shape[1])
    return turn.cos().to(table.dtype).float(), turn.sin().to(table.dtype).float()


def layer_norm(x, weight, eps):
    return steps.normed(x - x.mean(-1, keepdim=True), weight, eps)


def shifted(by):
    return lambda table, positions: steps.angles(table, (positions + by).clamp(min=0))


def skipping(where):
    """Tokens without a slot written to another one."""

    def insert(cache, slots, rows, dim=slice(None), stored=steps.stored):
        for token, slot in enumerate(slots.tolist()):
            if slot >= 0:
                steps.put(cache, slot, rows[token], dim, stored, rows.dtype)
            else:
                flat = cache.as_strided((2,), (1,), cache.storage_offset() + where)
                steps.bits(flat).fill_(7)

    return insert


def first_tile(cache, slots, rows, dim=slice(None), stored=steps.stored):
    """The first 256 tokens alone."""
    steps.insert(cache, slots[:256], rows, dim, stored)


def swapped(cache, slots, rows, dim=slice(None), stored=steps.stored):
    side = {0: slice(128, 256), 128: slice(0, 128)}.get(dim.start, dim)
    steps.insert(cache, slots, rows, side, stored)


def late(cache, slots, rows, dim=slice(None), stored=steps.stored):
    """The slot beside a token's own."""
    steps.insert(cache, torch.where(slots >= 0, slots ^ 1, slots), rows, dim, stored)


def not_normed_index_key(x, weight, eps):
    return x if x.shape[1] == 1 else steps.normed(x, weight, eps)


def unsaturated(x, dtype, model):
    """Past the largest code, NaN."""
    if dtype.itemsize > 1:
        return x.to(dtype)
    return torch.where(x.abs() > torch.finfo(dtype).max, torch.nan, x).to(dtype)


def signed_zero(x, dtype, model):
    """A sign on every 0, which is NaN in the fnuz dialects."""
    found = steps.stored(x, dtype, model)
    if dtype.itemsize == 1:
        steps.bits(found)[(found.float() == 0) & (x < 0)] = 0x80
    return found


def scaled(factor):
    def insert(cache, slots, rows, dim=slice(None), stored=steps.stored):
        steps.insert(cache, slots, rows * factor if cache.element_size() == 1 else rows, dim, stored)

    return insert


def cut(x, dtype, model):
    """Towards zero instead of to nearest."""
    if dtype != torch.bfloat16:
        return steps.stored(x, dtype, model)
    return (x.view(torch.int32) & -65536).view(torch.float32).to(dtype)


WRONG = {  # steps changed, the case that shows it, the check that is red, words of its hint
    "w": (SMALL, {"normed": lambda x, w, e: steps.normed(x, w - 1, e)}, "turned", "instead of 1 + weight"),
    "no weight": (SMALL, {"normed": lambda x, w, e: steps.normed(x, w * 0, e)}, "turned", "no norm weight"),
    "eps outside": (WIDE, {"normed": lambda x, w, e: x / (steps.power(x).sqrt() + e) * (1 + w)}, "turned", "eps outside"),
    "eps forgotten": (WIDE, {"normed": lambda x, w, e: steps.normed(x, w, 0)}, "turned", "no eps"),
    "layer norm": (SMALL, {"normed": layer_norm}, "turned", "layer norm"),
    "sum for mean": (SMALL, {"normed": lambda x, w, e: steps.normed(x, w, e) / 128**0.5}, "turned", "sum of squares"),
    "interleaved": (SMALL, {"rotated": interleaved}, "turned", "GPT-J"),
    "all channels": (SMALL, {"rotated": on_all}, "turned", "all channels"),
    "the other way": (SMALL, {"rotated": lambda x, c, s: steps.rotated(x, c, -s)}, "turned", "the other way"),
    "not rotated": (SMALL, {"rotated": lambda x, c, s: x}, "turned", "no rotation"),
    "a position late": (SMALL, {"angles": shifted(1)}, "turned", "position after"),
    "a position early": (SMALL, {"angles": shifted(-1)}, "turned", "position before"),
    "rounded between": (SMALL, {"rotated": lambda x, c, s: steps.rotated(x.bfloat16().float(), c, s)}, "turned", "between"),
    "cut": (SMALL, {"stored": cut}, "turned", ""),
    "key and value swapped": (SMALL, {"insert": swapped}, "inserted", "instead of"),
    "index key not normed": (SMALL, {"normed": not_normed_index_key}, "turned", "no norm"),
    "the first 256 tokens": (MANY, {"insert": first_tile}, "inserted", "[insert_unwritten]"),
    "the slot beside": (SMALL, {"insert": late}, "guards", "which no token of the batch has"),
    "skipped into slot 0": (FP8, {"insert": skipping(0)}, "guards", "slot 0"),
    "skipped before the cache": (FP8, {"insert": skipping(-2)}, "guards", "before its first"),
    "a scale": (FP8, {"insert": scaled(1 / 1.07)}, "identity", "times what it should"),
    "not saturated": (f"{OP}/q=31,kv=200,h=2,g=2,cache=fp8_e4m3fn,fill=wide", {"stored": unsaturated}, "inserted", ""),
    "index key not saturated": (f"{WIDE},icache=fp8_e4m3fn", {"stored": unsaturated}, "inserted", ""),
    "negative zero": (f"{OP}/q=20,kv=300,h=1,g=2,cache=fp8_e5m2fnuz,fill=wide", {"stored": signed_zero}, "inserted", ""),
}  # fmt: skip


# Kernels that know M3's figures and do not ask for their own.
WRONG |= {
    "M3's eps": (OTHER, {"normed": lambda x, w, e: steps.normed(x, w, 1e-6)}, "turned", ""),
    "M3's eps, tiny rows": (f"{WIDE},eps=1e-5", {"normed": lambda x, w, e: steps.normed(x, w, 1e-6)}, "turned", "1e-06"),
    "64 channels of 128": (f"{SMALL},rotary=128", {"rotated": first_64}, "turned", ""),
    "64 channels of 32": (OTHER, {"rotated": on_all}, "turned", ""),
    "M3's angles": (OTHER, {"angles": own_angles}, "turned", ""),
    "M3's angles, rotary 64": (SMALL, {"angles": own_angles}, "turned", ""),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_kernels_are_red_and_told_what_they_resemble(name):
    text, changed, check, words = WRONG[name]
    found = judge(text, steps.kernel(**changed))
    assert check in found, f"{name}: red were {sorted(found)}"
    assert words in found[check].hint


def around(change):
    """The right kernel on keywords that are changed first, or with more done afterwards."""

    def kernel(qkv, q_norm_weight, k_norm_weight, cos_sin_cache, positions, num_heads, num_kv_heads, rotary_dim, eps,
               index_q_norm_weight, index_k_norm_weight, num_index_heads, slot_mapping, index_slot_mapping, kv_cache,
               index_cache, q_out, index_q_out, skip_index_branch, q_fp8_out, q_fp8_scale):  # fmt: skip
        keywords = dict(locals())
        keywords.pop("keywords", None)
        after = change(keywords)
        steps.kernel()(**{name: keywords[name] for name in keywords if name != "change"})
        if after:
            after(keywords)

    return kernel


def q_weight_for_k(keywords):
    keywords["k_norm_weight"] = keywords["q_norm_weight"]


def main_slots_for_index(keywords):
    keywords["index_slot_mapping"] = keywords["slot_mapping"]


def index_keys_skip_by_main_slots(keywords):
    slots = keywords["index_slot_mapping"]
    keywords["index_slot_mapping"] = torch.where(keywords["slot_mapping"] < 0, -1, slots)


def forgets_scale(keywords):
    keywords["q_fp8_scale"] = 1.0


def q_in_place_too(keywords):
    def after(k):
        k["qkv"][:, : k["q_out"].shape[1]] = k["q_out"]

    return after


def does_not_skip(keywords):
    weights = keywords["q_norm_weight"], keywords["k_norm_weight"]
    keywords.update(skip_index_branch=False, index_q_norm_weight=weights[0], index_k_norm_weight=weights[1])


def keys_not_in_place(keywords):
    before = keywords["qkv"].clone()
    heads, kv = keywords["num_heads"] * 128, keywords["num_kv_heads"] * 128

    def after(k):
        k["qkv"][:, heads : heads + kv] = before[:, heads : heads + kv]

    return after


def index_heads_as_kv_heads(keywords):
    keywords["num_index_heads"] = keywords["num_kv_heads"]


@pytest.mark.parametrize(
    ("text", "change", "check", "words"),
    [
        (f"{SMALL},queries=place,ih=3", index_heads_as_kv_heads, "turned", "some of idx_q"),
        (SMALL, q_weight_for_k, "turned", "the norm weight of q"),
        (SMALL, main_slots_for_index, "guards", ""),
        (APART, index_keys_skip_by_main_slots, "inserted", "`cached_idx_k`"),
        (FP8, forgets_scale, "turned", ""),
        (SMALL, q_in_place_too, "guards", "q head 0, channel 0 of token 0"),
        (SKIPS, does_not_skip, "guards", "idx_q head 0"),
        (SMALL, keys_not_in_place, "turned", "before the norm"),
    ],
)
def test_a_wrong_caller_or_place_is_red(text, change, check, words):
    found = judge(text, around(change))
    assert check in found
    assert words in f"{found[check].where} {found[check].hint}"


def test_an_index_key_that_skips_by_the_main_slots_shows_only_where_slots_differ():
    assert judge(FP8, around(index_keys_skip_by_main_slots)) == {}
    assert judge(APART, steps.kernel()) == {}


def test_nothing_written_is_red_everywhere():
    found = judge(SMALL, around(lambda keywords: keywords.update(positions=keywords["positions"] * 0)))
    assert "turned" in found
    problem = inputs(SMALL)
    empty = contract.prepare(Kernel("mine", OP, "mine", Profile(), steps.kernel()), problem, paging.World())
    run = empty.take(None)
    expected = reference.expected(problem)
    found = checks.compare(problem, run, expected, checks.Setting(profile=Profile(), evidence="interpreted"))
    red = {f.check for f in found if f.status is Status.FAILED}
    assert {"turned", "inserted"} <= red


# ---- readers


def read_by(**readers):
    """The readers of a stored cache, by name of their op, on a right insert."""
    made = {op: Kernel("user", op, op, PLAIN, function) for op, function in {**right.RIGHT, **readers}.items()}
    made[OP] = Kernel("user", OP, OP, PLAIN, steps.kernel())
    session = runner.Session(arch.find_arch("sm90"), "interpreted", "cpu", Loaded(Spec("user", "user"), made))
    result = runner.run_one(cases.parse_id(FP8), session, PlanLine(FP8, OP, "user", "interpreted", None, ("readers",)), "")
    return {finding.check: finding for finding in result.findings}["readers"]


def test_a_reader_that_multiplies_what_was_stored_is_red():
    """By a scale of its own where it is given none, or not by 1."""

    def loud(q, kv_cache, topk_idx, block_table, seq_lens, sm_scale, output, decode_query_len, k_scale=None, v_scale=None):
        scales = k_scale, v_scale
        right.sparse_attn_decode(q, kv_cache, topk_idx, block_table, seq_lens, sm_scale, output, decode_query_len, *scales)
        output.mul_(1.25)

    assert read_by().status is Status.PASSED
    found = read_by(sparse_attn_decode=loud)
    assert found.status is Status.FAILED
    assert "sparse_attn_decode read what was inserted" in found.hint


# ---- the bound


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_nearest_rounds_as_the_formats_do(dtype):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4000, generator=generator) * torch.exp2(torch.randint(-12, 12, (4000,), generator=generator).float())
    largest = torch.finfo(dtype).max
    wanted = x.clamp(-largest, largest).to(dtype) if dtype.itemsize == 1 else x.to(dtype)
    assert torch.equal(nearest(x.double(), dtype), wanted.double())


def test_a_neighbour_is_right_only_where_the_bound_reaches_it():
    """The exact number passes, the next one does not, unless the bound lies over the middle between them."""
    value = torch.tensor([[[1.0, 1.0 + 2**-8 - 2**-30, 1.0 + 2**-8 - 2**-18, 447.0, 460.0]]], dtype=torch.float64)
    bound = torch.full_like(value, 2.0**-29)
    up = torch.tensor([[[1.0 + 2**-7, 1.0 + 2**-7, 1.0 + 2**-7, 448.0, 448.0]]], dtype=torch.bfloat16)
    shares = Stored(up, Turned(value, bound), torch.bfloat16, torch.bfloat16).shares("direct").flatten().tolist()
    assert shares[0] > 1.0
    assert 0.4 < shares[1] <= 0.6  # half of the bound is needed
    assert shares[2] > 1.0
    codes = Stored(up[..., 3:], Turned(value[..., 3:], bound[..., 3:]), torch.float8_e4m3fn, torch.bfloat16)
    assert codes.shares("direct").flatten().tolist() == [0.0, 0.0]  # 448 is the largest


def test_the_bound_holds_for_any_order_of_sums_and_is_not_wasted():
    """fp32 heads with sums in random orders stay inside; the worst uses a good part of what is left for the rest."""
    problem = inputs(WIDE)
    view = View(OPS[OP], problem, paging.Run({"k": problem.more["x_k"]}), reference.expected(problem), None)
    bound = bounded(view)["q"]
    x, weight = problem.more["x_q"].float(), problem.more["w_q"].float()
    cos, sin = steps.angles(problem.more["cos_sin"], problem.more["positions"])
    worst = 0.0
    for seed in range(10):
        order = torch.randperm(128, generator=torch.Generator().manual_seed(seed))
        total = x[..., order].square().cumsum(-1)[..., -1:]
        got = steps.rotated(x * torch.rsqrt(total / 128 + 1e-6) * (1 + weight), cos, sin)
        worst = max(worst, float(((got.double() - bound.value).abs() / bound.bound).max()))
    assert 0.05 < worst < 1.0


def test_a_division_by_channel_and_a_weight_that_is_added_are_inside_the_bound():
    """Each channel divided by the root with the largest error of div.full, and x + x · w near w = -1."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(200, 1, 128, generator=generator)
    weight = (-1 + torch.randn(128, generator=generator) * 2**-6).bfloat16().float()
    weight[32:64] = torch.randn(32, generator=generator)
    turn = torch.rand(200, 32, generator=generator) * 6
    table = torch.cat([turn.cos(), turn.sin()], -1).bfloat16()
    cos, sin = table.float()[:, None].chunk(2, -1)
    exact = x.double() * (x.double().square().mean(-1, keepdim=True) + 1e-6).rsqrt() * (1 + weight.double())
    bound = turned(x, weight, table, 1e-6, steps.rotated(exact, cos.double(), sin.double()))
    error = torch.randint(-1, 2, x.shape, generator=generator) * 2.0**-22
    divided = (x.double() / torch.sqrt(steps.power(x) + 1e-6).double() * (1 + error)).float()
    for got in (divided * (1 + weight), divided + divided * weight):
        assert float(((steps.rotated(got, cos, sin).double() - bound.value).abs() / bound.bound).max()) < 1.0
    rounded = steps.rotated(exact.bfloat16().float(), cos, sin).double()
    assert float(((rounded - bound.value).abs() / bound.bound).max()) > 10.0


# ---- the identity


def identity(actual, value, bound):
    """What the check says of codes [T, heads, D] of a cache, by the numbers before their rounding."""
    problem, setting = inputs(FP8), checks.Setting(profile=Profile(emits="direct"), evidence="interpreted")
    view = View(OPS[OP], problem, paging.Run({}), {}, setting)
    view.memo["stored"] = {"cached_k": Stored(actual, Turned(value, bound), torch.float8_e4m3fn, torch.bfloat16)}
    return inserted.check_identity(view)


def test_the_identity_of_many_codes_is_exact_and_a_scale_is_told():
    """2,000 tokens of 4 heads, whose rounding errors have a mean; arithmetic at its bound; one code that is wrong."""
    value = torch.randn(2000, 4, 128, generator=torch.Generator().manual_seed(5), dtype=torch.float64) * 1.3
    bound = value.abs() * 2.0**-17.6

    def codes(x):
        return x.float().to(torch.float8_e4m3fn).float()

    for near in (value, value + bound * 0.99, value - bound * 0.99):
        [found] = identity(codes(near), value, bound)
        assert found.status is Status.PASSED
        assert found.limit < 1e-5
    for factor in (1.003, 1 / 1.003, 0.5):
        [found] = identity(codes(value * factor), value, bound)
        assert found.status is Status.FAILED
        assert found.measured == pytest.approx(abs(factor - 1), rel=0.1)
        assert "times what it should" in found.hint
    other = codes(value)
    other[7:9] = other[[8, 7]]
    assert identity(other, value, bound) == [], "`inserted` tells what these are"
    other[7, 1, 5] = math.nan
    assert identity(other, value, bound) == []


# ---- our own kernel


interpreted = pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="its tensors are on the CPU")


@triton.jit
def encode(source, target, N: tl.constexpr, FORM: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(target + at, quantise.encoded(tl.load(source + at), FORM))


@interpreted
@pytest.mark.parametrize("text", CASES)
def test_our_kernel_passes(text):
    assert judge(text, qknorm_rope_insert.qknorm_rope_insert, profile=qknorm_rope_insert.PROFILE) == {}


@interpreted
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz])
def test_codes_made_by_integers_are_those_of_torch(dtype):
    """All numbers between two codes, every tie, subnormals, what is too large, and NaN."""
    codes = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    codes = codes[codes.isfinite()].sort().values
    ties = (codes[1:] + codes[:-1]) / 2
    near = torch.cat([ties, torch.nextafter(ties, codes[1:]), torch.nextafter(ties, codes[:-1])])
    x = torch.cat([codes, near, torch.tensor([0.0, -0.0, 1e30, -1e30, math.inf, 2.0**-30])])
    x = torch.nn.functional.pad(x, (0, 2048 - len(x)))
    got = torch.zeros(2048, dtype=torch.uint8)

    encode[(1,)](x, got, 2048, dequantise.FORMATS[dtype])
    largest = torch.finfo(dtype).max
    assert torch.equal(got, x.clamp(-largest, largest).to(dtype).view(torch.uint8))
    encode[(1,)](torch.full((2048,), math.nan), got, 2048, dequantise.FORMATS[dtype])
    assert got.view(dtype).float().isnan().all()


def test_our_kernel_refuses_rows_of_another_width():
    function = qknorm_rope_insert.qknorm_rope_insert
    prepared = contract.prepare(Kernel("triton", OP, OP, Profile(), function), inputs(SMALL), paging.World())
    with pytest.raises(ValueError, match="wanted"):
        function(**{**prepared.arguments, "num_index_heads": 1})


# ---- vLLM's compiled op

SCHEMA = (
    "(Tensor! qkv, Tensor q_norm_weight, Tensor k_norm_weight, Tensor cos_sin_cache, Tensor positions, int num_heads, "
    "int num_kv_heads, int rotary_dim, float eps, Tensor? index_q_norm_weight=None, Tensor? index_k_norm_weight=None, "
    "int num_index_heads=0, Tensor? slot_mapping=None, Tensor? index_slot_mapping=None, Tensor(a!)? kv_cache=None, "
    "Tensor(b!)? index_cache=None, int block_size=0, Tensor(c!)? q_out=None, Tensor(d!)? index_q_out=None, "
    'str kv_cache_dtype="auto"{more}) -> ()'
)
NEWER = (
    ", bool skip_index_branch=False, Tensor(e!)? q_fp8_out=None, float q_fp8_scale=1.0, Tensor? kv_k_scale=None, "
    "Tensor? kv_v_scale=None"
)


@pytest.fixture(scope="module")
def standins():
    """Two torch ops with the interface of vLLM's: as in 0.33, and as in 0.24."""
    library = torch.library.Library("m3check_standin", "DEF")
    library.define("newer" + SCHEMA.format(more=NEWER))
    library.define("older" + SCHEMA.format(more=""))

    def compiled(qkv, *positional, **keywords):
        names = [a.name for a in torch.ops.m3check_standin.newer.default._schema.arguments]
        given = {a.name: a.default_value for a in torch.ops.m3check_standin.newer.default._schema.arguments}
        given |= dict(zip(names[1:], positional, strict=False)) | keywords
        for name in ("qkv", "kv_k_scale", "kv_v_scale"):
            given.pop(name)
        assert qkv.is_contiguous()
        assert qkv.dtype in (torch.bfloat16, torch.float16)
        word, size = given.pop("kv_cache_dtype"), given.pop("block_size")
        for name in ("positions", "slot_mapping", "index_slot_mapping"):
            assert given[name] is None or given[name].dtype == torch.int64
        cache = given["kv_cache"]
        assert (cache is None) == (size == 0)
        if cache is not None:
            assert (cache.dim(), cache.stride(3), cache.shape[2], size) == (4, 1, 128, 128)
            assert cache.dtype == (qkv.dtype if word == "auto" else torch.uint8)
            if word != "auto":
                given["kv_cache"] = cache.view({"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}[word])
        for name in ("q_out", "index_q_out", "q_fp8_out", "index_cache"):
            assert given[name] is None or given[name].is_contiguous()
        steps.kernel()(qkv=qkv, **given)

    library.impl("newer", compiled, "CPU")
    library.impl("older", compiled, "CPU")
    yield torch.ops.m3check_standin
    library._destroy()


@pytest.mark.parametrize("text", CASES)
def test_the_adapter_speaks_the_interface_of_the_compiled_op(standins, text):
    assert judge(text, vllm_insert.adapted(standins.newer)) == {}


def test_what_an_older_version_does_not_take_is_refused(standins):
    older = Kernel("vllm", OP, "compiled", Profile(), vllm_insert.adapted(standins.older))
    newer = replace(older, function=vllm_insert.adapted(standins.newer))
    sm90 = arch.find_arch("sm90")

    def refusal(text, kernel=older, layout="packed", evidence="device", target=sm90):
        return vllm_insert.refusal(cases.parse_id(text), target, evidence, kernel, layout)

    assert judge(SMALL, older.function) == {}
    assert refusal(SMALL) is None
    assert "takes no q_fp8_out" in refusal(FP8)
    assert "takes no skip_index_branch" in refusal(SKIPS)
    assert refusal(SKIPS, newer) is None
    assert "another layout" in refusal(SMALL, newer, "split")
    assert refusal(DENSE, newer, "split") is None
    assert "GPU only" in refusal(SMALL, newer, evidence="interpreted")
    assert "no fp8_e4m3fn on gfx942" in refusal(FP8, newer, target=arch.find_arch("gfx942"))


def test_a_vllm_without_compiled_libraries_says_what_it_needs(tmp_path):
    assert "installed vLLM" in vllm_insert.missing(tmp_path)
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "_C_stable_libtorch.abi3.so").write_bytes(b"no library")
    assert vllm_insert.missing(tmp_path) is None
    with pytest.raises(M3CheckError, match="cannot be loaded"):
        vllm_insert.kernel("vllm", tmp_path)
