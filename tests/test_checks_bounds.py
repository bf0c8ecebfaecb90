"""Bounds by themselves: half ulps against neighbours, sums against the orders tried, λ against its promise."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import simulate
import torch

from m3check.arch import Accumulator
from m3check.checks import Setting
from m3check.checks.bounds import FORMATS, dot_error, half_ulp
from m3check.checks.noise import ranks
from m3check.types import Profile

TF32 = Accumulator(fraction_bits=23, inner=8, operand_bits=11)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_half_ulp_is_half_the_distance_of_neighbours(dtype):
    bits = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    x = torch.tensor([0.0, 1e-40, 6e-8, 6.2e-5, 0.75, 1.0, 1.5, 1.9921875, 3e4]).to(dtype)
    above = (x.view(bits) + 1).view(dtype)
    assert torch.equal(half_ulp(x, dtype), (above.double() - x.double()) / 2)


@pytest.mark.parametrize("dtype", [d for d in FORMATS if d.itemsize == 1])
def test_every_fp8_number_rounds_within_half_an_ulp(dtype):
    x = torch.linspace(-40, 40, 4001).double()
    error = (x.float().to(dtype).double() - x).abs()
    assert (error <= half_ulp(x, dtype)).all()
    assert (error > 0.9 * half_ulp(x, dtype)).any()


@pytest.mark.parametrize("scale", ["even", "wide"])
def test_fp32_sums_in_any_order_stay_inside(scale):
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randn(64, 128, generator=generator) for _ in range(2))
    if scale == "wide":
        a = a * torch.exp2(torch.randint(-6, 7, a.shape, generator=generator))
    a, b = a.bfloat16().float(), b.bfloat16().float()
    sums = dot_error(a, b, Accumulator())
    exact = a.double() @ b.double().T
    limit = sums.limit(7.5)
    for _ in range(4):
        order = torch.randperm(128, generator=generator)
        one_by_one = torch.zeros(64, 64)
        for i in order:
            one_by_one += a[:, i, None] * b[:, i]
        error = (one_by_one.double() - exact).abs()
        assert (error <= limit).all()
        assert (error <= sums.worst).all()
    assert (limit < sums.worst).all()


def test_integer_sums_that_fit_have_no_slack():
    a = torch.randint(-16, 17, (4, 128)).float()
    assert dot_error(a, a, Accumulator(), whole=True).limit(8).max() == 0
    assert dot_error(a * 1024, a * 1024, Accumulator(), whole=True).limit(8).min() > 0
    assert dot_error(a, a, Accumulator(fraction_bits=13, inner=32), whole=True).limit(8).max() > 0  # |a·a| passes 2^12


def test_cut_operands_pass_as_tf32_and_not_as_ieee():
    problem = simulate.inputs("sparse_attn_decode/q=1x2,kv=2048+700,h=2,g=4,topk=8,dtype=fp32,cache=fp32")

    def cut(x: torch.Tensor) -> torch.Tensor:
        return (x.view(torch.int32) & ~0x1FFF).view(torch.float32)

    rough = replace(problem, q=cut(problem.q), k=cut(problem.k), v=cut(problem.v))
    out = simulate.attention(rough, problem.topk_idx)
    assert not simulate.red(simulate.judge(problem, {"out": out}, dot=TF32, pv=TF32))
    assert "element" in simulate.red(simulate.judge(problem, {"out": out}))


def test_lambda_keeps_its_promise():
    setting = Setting(profile=Profile(), evidence="device", alarms=0.01)
    for count in (1, 10**3, 10**9):
        chance = 2 * math.exp(-(setting.deviations(count) ** 2) / 2)
        assert chance * count * 4096 == pytest.approx(0.01)
    assert 7 < setting.deviations(64 * 16 * 128) < 8


def test_ranks_number_equal_bins_alike():
    bins = torch.tensor([[5, -3, 5, 7, -3], [1, 1, 1, 1, 1]], dtype=torch.int32)
    assert ranks(bins).tolist() == [[1, 0, 1, 2, 0], [0, 0, 0, 0, 0]]
