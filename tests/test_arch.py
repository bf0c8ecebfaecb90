"""The targets' table: every figure has a source, instructions are told apart, and bounds hold for what the table says."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from itertools import pairwise

import pytest
import torch

from m3check.arch import ARCHS, FP32, Accumulator, find_arch, operands_of
from m3check.checks.bounds import dot_error
from m3check.device import Launches
from m3check.numerics import added_up
from m3check.types import Kernel, Profile

ROWS = [(arch.name, row) for arch in ARCHS.values() for row in arch.mma if row.accumulator.fraction_bits is not None]


def test_every_figure_of_every_target_has_a_source():
    told = {"name", "vendor", "product", "mma", "sources"}
    under = {"shared_memory_unit": "shared_memory", "registers_unit": "registers", "blocks": "warps"}
    for arch in ARCHS.values():
        for field in fields(arch):
            if field.name not in told:
                assert arch.sources[under.get(field.name, field.name)], f"{arch.name} {field.name}"
        assert all(row.source for row in arch.mma)


def test_nothing_that_is_not_published_is_more_precise_than_what_is():
    published = {}
    for _, row in ROWS:
        if not row.source.startswith("not published"):
            bits = published.setdefault(row.operands, [])
            bits.append(row.accumulator.fraction_bits)
    for name, row in ROWS:
        if row.source.startswith("not published"):
            assert row.accumulator.fraction_bits <= min(published[row.operands]), name


@pytest.mark.parametrize(
    ("instruction", "operands"),
    [
        ("wgmma.mma_async.sync.aligned.m64n64k32.f32.e4m3.e4m3", "fp8"),
        ("mma.sync.aligned.m16n8k32.row.col.f32.e5m2.e5m2.f32", "fp8"),
        ("tcgen05.mma.cta_group::1.kind::f8f6f4", "fp8"),
        ("tcgen05.mma.cta_group::1.kind::f16", "16"),
        ("tcgen05.mma.cta_group::1.kind::tf32", "tf32"),
        ("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32", "16"),
        ("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32", "tf32"),
        ("v_mfma_f32_16x16x32_fp8_fp8", "fp8"),
        ("v_mfma_f32_16x16x128_f8f6f4", "fp8"),
        ("v_mfma_f32_32x32x16_bf8_bf8", "fp8"),
        ("v_mfma_f32_16x16x16_bf16", "16"),
        ("v_mfma_f32_32x32x8_f16", "16"),
        ("v_mfma_f32_16x16x8_xf32", "tf32"),
        ("v_mfma_f32_16x16x4_f32", "fp32"),
        ("v_mfma_f32_32x32x1_2b_f32", "fp32"),
    ],
)
def test_the_operands_of_an_instruction_are_read_from_its_name(instruction, operands):
    assert operands_of(instruction) == operands


@pytest.mark.parametrize(
    ("arch", "ran", "operand_bits"),
    [
        ("gfx942", "v_mfma_f32_16x16x8_xf32", 11),
        ("gfx942", "v_mfma_f32_16x16x4_f32", None),
        ("gfx942", "", 11),
        ("gfx950", "v_mfma_f32_16x16x4_f32", None),
        ("gfx950", "", None),
        ("sm90", "", 11),
    ],
)
def test_fp32_operands_are_bounded_by_what_was_emitted_and_by_the_worst_where_nothing_is_known(arch, ran, operand_bits):
    """A kernel's error at TF32's level is explained where TF32 ran, and refused where fp32 did."""
    target = find_arch(arch)
    launches = Launches({"index_score": {ran}} if ran else {})
    how = launches.accumulator("index_score", target, target.kind("fp32"))
    assert how.operand_bits == operand_bits
    draw = torch.Generator().manual_seed(7)
    a, b = (torch.randn(64, 128, generator=draw) for _ in range(2))
    coarse, fine = (a.view(torch.int32) & -8192).view(torch.float32), a.flip(-1)  # 11 bits kept; other order of sums
    limit = dot_error(a, b, how).limit(8.0)
    assert bool(((coarse @ b.mT - a @ b.mT).abs() <= limit).all()) == (operand_bits is not None)
    assert ((fine @ b.flip(-1).mT - a @ b.mT).abs() <= limit).all()


def test_an_instruction_gets_its_own_row_and_an_unknown_one_the_least_precise():
    sm90 = find_arch("sm90")
    assert sm90.accumulator("16", "wgmma.mma_async.sync").fraction_bits == 25
    assert sm90.accumulator("fp8", "wgmma.mma_async.sync").fraction_bits == 13
    assert sm90.accumulator("fp8", "something.new").fraction_bits == 13
    assert find_arch("sm80").accumulator("fp8") == find_arch("sm80").accumulator("16"), "widened before the product"


def test_each_op_of_a_chain_is_judged_by_its_own_instructions():
    sm90 = find_arch("sm90")
    launches = Launches()

    def part(op, instruction):
        def function():
            launches.instructions.setdefault(launches.op, set()).add(instruction)

        return Kernel("x", op, op, Profile(), function)

    parts = {
        "index_score": part("index_score", "wgmma.mma_async.sync.aligned.m64n64k32.f32.e4m3.e4m3"),
        "sparse_attn": part("sparse_attn", "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"),
    }
    chain = launches.following(Kernel("x", "prefill", "prefill", Profile(), print, parts))
    for op in parts:
        chain.parts[op].function()
    assert launches.accumulator("index_score", sm90, "fp8").fraction_bits == 13
    assert launches.accumulator("sparse_attn", sm90, "16").fraction_bits == 25
    launches.instructions["sparse_attn"] = set()
    assert launches.accumulator("sparse_attn", sm90, "16") == FP32, "a Triton kernel without such an instruction"
    assert launches.accumulator("nothing", sm90, "fp8").fraction_bits == 13, "a library: what the target has at worst"


def test_what_a_library_launches_of_tritons_beside_says_nothing_of_its_sums():
    sm90, launches = find_arch("sm90"), Launches()

    def function():
        launches.instructions.setdefault(launches.op, set())  # a launch without matrix instructions

    kernel = Kernel("x", "sparse_attn_decode", "x", Profile(), function)
    launches.following(replace(kernel, library=True)).function()
    assert launches.accumulator("sparse_attn_decode", sm90, "fp8").fraction_bits == 13
    launches.following(kernel).function()
    assert launches.accumulator("sparse_attn_decode", sm90, "fp8") == FP32


def operands(name, shape, generator):
    x = torch.randn(*shape, generator=generator, dtype=torch.float64)
    x = x * torch.exp2(torch.randint(-3, 4, x.shape, generator=generator).double())
    dtype = {"16": torch.bfloat16, "tf32": torch.float32, "fp8": torch.float8_e4m3fn}[name]
    return x.to(dtype).double()


@pytest.mark.parametrize("row", [row for _, row in ROWS], ids=[f"{name}-{r.instruction}-{r.operands}" for name, r in ROWS])
@pytest.mark.parametrize("start", ["even", "cancelling"])
def test_the_bound_holds_for_an_instruction_that_adds_as_its_row_says(row, start):
    generator = torch.Generator().manual_seed(3)
    a, b = operands(row.operands, (48, 128), generator), operands(row.operands, (40, 128), generator)
    if start == "cancelling":
        a[:, 64:], b[:, 64:] = -a[:, :64], b[:, :64]
    error = (added_up(a, b, row.accumulator) - a @ b.T).abs()
    limit = dot_error(a.float(), b.float(), row.accumulator).limit(8.0).double()
    assert (error <= limit).all()


@pytest.mark.parametrize(("bits", "seen"), [(25, False), (13, True)])
def test_an_instruction_with_fewer_bits_than_its_row_says_is_seen(bits, seen):
    generator = torch.Generator().manual_seed(4)
    a, b = operands("16", (48, 128), generator), operands("16", (40, 128), generator)
    told = find_arch("sm90").accumulator("16")
    error = (added_up(a, b, replace(told, fraction_bits=bits)) - a @ b.T).abs()
    limit = dot_error(a.float(), b.float(), told).limit(8.0).double()
    assert bool((error > limit).any()) is seen


def test_the_published_models_explain_what_an_h200_was_measured_at():
    """2^-10.4 of Σ|q·k| for fp8 `wgmma`, 2^-21 to 2^-22.8 for bf16 (docs/numerics.md); the rest depends on the numbers."""
    generator = torch.Generator().manual_seed(5)
    sm90 = find_arch("sm90")
    worst = {}
    for operand in ("fp8", "16"):
        a, b = operands(operand, (256, 128), generator), operands(operand, (256, 128), generator)
        error = (added_up(a, b, sm90.accumulator(operand)) - a @ b.T).abs()
        worst[operand] = math.log2((error / (a.abs() @ b.abs().T)).max())
    assert -11.5 < worst["fp8"] < -9.5
    assert -23 < worst["16"] < -20.5


def test_more_products_a_step_or_fewer_bits_never_tighten_a_bound():
    generator = torch.Generator().manual_seed(6)
    a, b = (torch.randn(16, 128, generator=generator) for _ in range(2))
    limits = [dot_error(a, b, Accumulator(bits, 16)).limit(8.0) for bits in (25, 24, 23, 13)]
    assert all((few >= many).all() for many, few in pairwise(limits))


def test_a_gpu_that_is_not_the_target_is_not_used_and_the_report_says_so(monkeypatch):
    from records import record, result

    from m3check import runner
    from m3check.report import markdown

    monkeypatch.setattr("m3check.arch.present", lambda: [(0, "sm89"), (1, "sm90")])
    evidence, device, why = runner.evidence_for(find_arch("sm100"))
    assert (evidence, device) == ("interpreted", -1)
    assert why == "this machine's GPU is sm89, sm90, not sm100: it was not used"
    told = markdown.head(record(result(), environment={"evidence_reason": why, "host": "x86_64"}))
    assert "Nothing here ran on sm100 hardware" in told
    assert why in told
    assert runner.evidence_for(find_arch("sm90"))[:2] == ("device", 1)
