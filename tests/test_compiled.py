"""Compiled evidence: what is planted is found, and named; what is right passes. No GPU, a compilation or two each."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from m3check import cases, isolate, kernels, parent, runner
from m3check.arch import ARCHS, present
from m3check.compiled import figures, findings
from m3check.compiled.figures import Figures
from m3check.compiled.report import told_once
from m3check.compiled.sweep import sweeps
from m3check.config import RunOptions
from m3check.kernels import contract
from m3check.types import Finding, PlanLine, Result, Status

PLANTED = Path(__file__).with_name("planted.py")


@pytest.fixture(scope="session")
def compiled():
    """compiled(arch, case, spec, sweep): the result of one case, by a worker of its own."""

    def one(arch: str, case: str, spec: str = str(PLANTED), sweep: bool = False) -> Result:
        line = PlanLine(case, cases.parse_id(case).op, spec, "compiled", None, ("recompiles",) if sweep else ())
        command = {"spec": spec, "arch": arch, "evidence": "compiled", "device": -1, "offline": True}

        def make(group: str) -> isolate.Worker:
            return isolate.Worker(command, parent.worker_environment("compiled"))

        with isolate.Pool(1, make, 120.0) as pool:
            [(_, answer)] = pool.run({spec: [line]}, lambda line: {"line": msgspec.to_builtins(line), "repro": ""})
        assert not isinstance(answer, isolate.Death), answer
        return msgspec.convert(answer, Result)

    return one


def of(result: Result, check: str) -> list[Finding]:
    return [f for f in result.findings if f.check == check]


def test_attention_that_double_buffers_its_tiles_does_not_launch_on_gfx942_and_does_on_sm90(compiled):
    case = "sparse_attn/q=16,kv=2500,h=1,g=1"
    red = compiled("gfx942", case)
    [found] = of(red, "shared_memory")
    assert red.status is Status.FAILED
    assert found.limit == 65_536
    assert f"needs {int(found.measured):,} bytes of shared memory, gfx942 allows 65,536" in found.hint
    green = compiled("sm90", case)
    assert green.status is Status.PASSED, green.reason
    assert of(green, "shared_memory")[0].measured > 65_536
    assert "bf16" in of(green, "matrix")[0].hint


def test_a_kernel_that_keeps_more_outside_its_registers_than_inside_is_red(compiled):
    red = compiled("sm90", "index_topk/q=3,kv=700,h=2,topk=3")
    [found] = of(red, "spills")
    assert found.status is Status.FAILED
    assert found.measured > found.limit == 4 * 255
    assert "do not fit into its registers" in found.hint


def test_a_length_among_the_constants_is_a_recompile_storm(compiled):
    case = "index_score/q=9,kv=300"
    assert compiled("sm90", case).status is Status.PASSED
    red = compiled("sm90", case, sweep=True)
    [storm] = [f for f in of(red, "recompiles") if f.status is Status.FAILED]
    assert storm.where == "storming, context lengths"
    assert "the constant CONTEXT took 11 values" in storm.hint
    assert storm.measured == 11 > storm.limit
    [cold] = of(red, "warm")
    assert cold.status is Status.NOTED
    assert "up to 131 tokens long, compiled it again: CONTEXT is the constant 131, was the constant 300" in cold.hint
    calm = [f for f in of(red, "recompiles") if f.status is Status.PASSED]
    assert {f.where for f in calm} == {"batch sizes", "query lengths"}


def test_a_kernel_that_does_not_compile_names_its_line_also_in_a_function_that_it_calls(compiled):
    red = compiled("sm90", "index_decode_score/q=1x3,kv=129+300+700")
    [found] = of(red, "compiles")
    line = 1 + PLANTED.read_text().splitlines().index(
        "    return tl.no_such_function(x)  # the line that a finding must name"
    )
    assert found.where == f"broken at planted.py:{line}"
    assert "no_such_function" in found.hint
    assert red.status is Status.FAILED


def test_a_candidate_that_the_autotuner_leaves_out_is_no_failure(compiled):
    green = compiled("sm90", "index_decode/q=1x3,kv=129+300+700", sweep=True)
    assert green.status is Status.PASSED, green.reason
    assert [f.where for f in of(green, "compiles")] == ["tuned ×3"]
    assert len(of(green, "registers")) == 1


def test_without_a_sweep_one_candidate_stands_for_all(compiled):
    green = compiled("sm90", "index_decode/q=1x3,kv=129+300+700")
    assert green.status is Status.PASSED, green.reason
    assert len(of(green, "registers")) == 1


def test_a_wrapper_that_reads_what_was_not_computed_says_nothing_about_its_kernels(compiled):
    doubtful = compiled("sm90", "sparse_attn_decode/q=1x3,kv=129+300+700,topk=4")
    assert doubtful.status is Status.INCONCLUSIVE
    assert "raised after 1 captured launches, which compute nothing: AssertionError" in doubtful.reason


def test_kernels_that_decode_fp8_themselves_compile_where_triton_has_no_such_type(compiled):
    """A dialect of sm90 on sm80, and of AMD on NVIDIA."""
    green = compiled("sm80", "index_score/q=9,kv=300,dtype=fp8_e4m3fnuz,cache=fp8_e4m3fnuz", "triton")
    assert green.status is Status.PASSED, green.reason
    assert "(fp8 upcast)" in of(green, "matrix")[0].hint


def test_a_kernel_without_triton_has_nothing_to_compile(compiled, tmp_path):
    (tmp_path / "plainer.py").write_text("")
    (tmp_path / "plain.py").write_text(
        "import torch, plainer\n"
        "def index_topk(score, cu_seqlens_q, prefix_lens, topk, init_blocks, local_blocks):\n"
        "    return torch.zeros(score.shape[0], score.shape[1], topk, dtype=torch.int32)\n"
    )
    skipped = compiled("sm90", "index_topk/q=3,kv=700,h=2,topk=3", str(tmp_path / "plain.py"))
    assert skipped.status is Status.SKIPPED
    assert "launches no Triton kernel" in skipped.reason


@pytest.mark.gpu
@pytest.mark.parametrize(
    "case", ["index_score/q=70,kv=2500", "sparse_attn_decode/q=3,kv=1664,h=2,g=5,topk=6,dtype=fp32,cache=fp32"]
)
def test_what_is_cross_compiled_is_what_the_driver_loads(compiled, case, monkeypatch):
    import torch
    from triton.runtime.jit import JITFunction

    index, name = next((index, name) for index, name in present() if name in ARCHS)
    launch, loaded = JITFunction.run, {}

    def recorded(self, *args, **kwargs):
        made = launch(self, *args, **kwargs)
        loaded[self.__name__] = made
        return made

    monkeypatch.setattr(JITFunction, "run", recorded)
    parsed = cases.parse_id(case)
    kernel = kernels.load(kernels.parse_spec("triton"), ARCHS[name], "device", True).kernels[parsed.op]
    contract.call(kernel, cases.make_inputs(parsed, f"cuda:{index}"))
    torch.cuda.synchronize(index)
    result = compiled(name, case, "triton")
    assert result.status is Status.PASSED, result.reason
    assert loaded
    for function, made in loaded.items():
        told = {f.check: f for f in result.findings if f.where.startswith(f"{function} #")}
        assert told["shared_memory"].measured == made.metadata.shared
        assert told["registers"].measured == made.n_regs  # as the driver has it
        assert told["spills"].measured == 4 * made.n_spills
        assert figures.read(made).registers == made.n_regs
        assert told["matrix"].hint.partition(" (")[0] == " ".join(figures.read(made).matrix)


# Without a compiler.


def test_a_plan_compiles_what_it_interprets_and_counts_variants_once_for_each_op():
    lines = [line for line in runner.plan(RunOptions(arch="gfx942")) if line.evidence != "device"]
    interpreted, compiled = ([x for x in lines if x.evidence == kind] for kind in ("interpreted", "compiled"))
    assert [line.case for line in interpreted] == [line.case for line in compiled]
    assert {line.op for line in compiled if line.skip and "ops of their own" in line.skip} == {"indexer"}
    swept = [line.op for line in compiled if line.invariants]
    assert len(swept) == len(set(swept)) == len({line.op for line in compiled if line.skip is None})


def test_a_file_in_plain_torch_is_not_compiled(tmp_path):
    def kinds(body: str) -> set[str]:
        file = tmp_path / "mine.py"
        file.write_text(body)
        return {line.evidence for line in runner.plan(RunOptions(arch="gfx942", kernels=(str(file),)))}

    assert kinds("import math, torch\nfrom m3check import Profile\n") == {"interpreted"}
    assert kinds("import torch, helpers_of_mine\n") == {"interpreted", "compiled"}
    assert kinds("from triton import jit\n") == {"interpreted", "compiled"}


def test_a_sweep_has_nothing_that_legitimate_specialisation_could_tell_apart():
    for name in ("index_score/q=9,kv=300", "index_decode/q=1x3,kv=129+300+700"):
        for what, several in sweeps(cases.parse_id(name)).items():
            assert len(several) > 2 * 4, what
            for figure in ("context", "total_queries", "total_tokens"):
                values = [getattr(case, figure) for case in several]
                if len(set(values)) > 1:
                    assert all(value % 16 for value in values), (what, figure)
                    assert len({value.bit_length() for value in values}) == 1 or figure == "total_tokens"


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {%r1}", "wgmma.m64n128k16.f32.bf16.bf16"),
        ("mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 {%r1}", "mma.m16n8k32.f32.e4m3.e4m3.f32"),
        ("@%p tcgen05.mma.cta_group::1.kind::f16 [%r1]", "tcgen05.mma.kind::f16"),
        ("\tv_mfma_f32_32x32x8_bf16_1k a[0:15]", "v_mfma_f32_32x32x8_bf16_1k"),
        ("\tv_smfmac_f32_16x16x32_bf16 v[0:3]", "v_smfmac_f32_16x16x32_bf16"),
        ("mov.b32 %r1, 0;", None),
    ],
)
def test_matrix_instructions_are_read_from_the_assembly(text, named):
    assert figures.matrix_instructions(text) == ((named,) if named else ())


@pytest.mark.parametrize(
    ("arch", "needs", "blocks"),
    [
        ("sm90", Figures(4, 232_448, 32, 0), 1),  # shared memory of one whole multiprocessor
        ("sm90", Figures(4, 0, 255, 0), 2),  # 65,536 registers, 8,192 for each warp
        ("sm90", Figures(4, 0, 16, 0), 16),  # 64 warps
        ("sm90", Figures(1, 0, 16, 0), 32),  # 32 blocks
        ("sm89", Figures(4, 0, 16, 0), 12),  # 48 warps
        ("gfx942", Figures(4, 65_536, 64, 0), 1),
        ("gfx942", Figures(4, 0, 512, 0), 1),  # one wave on each SIMD
        ("gfx942", Figures(8, 0, 512, 0), 0),
        ("gfx942", Figures(4, 0, 128, 0), 4),
    ],
)
def test_resident_blocks(arch, needs, blocks):
    assert findings.resident_blocks(needs, ARCHS[arch]) == blocks


def test_a_record_tells_each_variant_once():
    def result(case: str, *found: Finding) -> Result:
        return Result(case, "index_score", "triton", "k", "compiled", {}, Status.PASSED, findings=found)

    same = Finding("registers", Status.PASSED, 32.0, 255.0, "k #1")
    where = Finding("compiles", Status.PASSED, where="k")
    bad = Finding("spills", Status.FAILED, 2000.0, 1020.0, "k #1")
    first, second = told_once([result("a", where, same, bad), result("b", where, same, bad)])
    assert first.findings == (where, same, bad)
    assert second.findings == (where, bad)


def test_a_larger_tier_compiles_the_cases_of_smoke_and_all_of_them_where_asked():
    def compiled(**options) -> int:
        lines = runner.plan(RunOptions(arch="sm80", kernels=("triton",), ops=("index_topk",), **options))
        return sum(line.evidence == "compiled" for line in lines)

    few = compiled(tier="smoke")
    assert 0 < few == compiled(tier="ci") < compiled(tier="ci", require="compiled")
    assert compiled(tier="ci", require="compiled") == len(cases.tier("ci", ("index_topk",)))
