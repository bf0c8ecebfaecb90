"""Every configuration of an autotuned kernel is pinned in turn, also those that were not chosen."""

from __future__ import annotations

import pytest
import torch
import torch_kernels as right
import triton
import triton.language as tl
from test_invariants import run

from m3check import cases, interpret, kernels, paging, runner
from m3check.arch import ARCHS, present
from m3check.kernels import contract
from m3check.types import M3CheckError, PlanLine, Status

pytestmark = pytest.mark.skipif(bool(present()), reason="the interpreter is off where there is a GPU")

CASE = "index_topk/q=2,kv=1305,h=2,topk=4"


@triton.jit
def _copy(source, to, n, wrong, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(source + at, mask=at < n, other=0)
    if BLOCK == 128:
        value += wrong
    tl.store(to + at, value, mask=at < n)


_tuned = triton.autotune(configs=[triton.Config({"BLOCK": 64}), triton.Config({"BLOCK": 128})], key=["n"])(_copy)


def _launch(score, cu_seqlens_q, prefix_lens, topk, init_blocks, local_blocks, wrong):
    interpret.install()
    ids = right.index_topk(score, cu_seqlens_q, prefix_lens, topk, init_blocks, local_blocks)
    out = torch.empty_like(ids)
    _tuned[(triton.cdiv(ids.numel(), 64),)](ids, out, ids.numel(), wrong)
    return out


def sound(score, cu_seqlens_q, prefix_lens, topk, init_blocks, local_blocks):
    return _launch(score, cu_seqlens_q, prefix_lens, topk, init_blocks, local_blocks, 0)


def broken(score, cu_seqlens_q, prefix_lens, topk, init_blocks, local_blocks):
    return _launch(score, cu_seqlens_q, prefix_lens, topk, init_blocks, local_blocks, 1)


def test_a_configuration_that_is_wrong_is_red_by_its_number():
    assert run({"index_topk": broken}, CASE, ()).status is Status.PASSED
    result = run({"index_topk": broken}, CASE, ("autotune",))
    assert result.status is Status.FAILED
    assert "configuration 1 of _tuned" in result.reason
    assert run({"index_topk": broken}, CASE, ()).status is Status.PASSED, "the pin is taken out again"


def test_right_configurations_pass():
    result = run({"index_topk": sound}, CASE, ("autotune",))
    assert result.status is Status.PASSED
    assert "autotune" in {f.check for f in result.findings}


def test_vllm_holds_its_configurations_and_other_invariants():
    spec = kernels.parse_spec("vllm==0.33.0")
    try:
        kernels.prepare(spec, True)
    except M3CheckError as error:
        pytest.skip(f"vLLM's wheel is not in the cache: {error}")
    interpret.install()
    session = runner.Session(ARCHS["sm90"], "interpreted", "cpu", kernels.load(spec, ARCHS["sm90"], "interpreted", True))
    for case, names in (
        ("index_topk/q=1,kv=1305,h=1,topk=4", ("poison", "strides", "autotune", "other_topk", "repeat")),
        ("sparse_attn_decode/q=2x2,kv=300+200,h=1,g=2,d=64,topk=2",
         ("poison", "pages", "strides", "far_pages", "future", "batch_order", "padded", "verify", "same_as_prefill")),
    ):  # fmt: skip
        line = PlanLine(case, case.split("/")[0], "vllm", "interpreted", None, names)
        result = runner.run_one(cases.parse_id(case), session, line, "")
        assert result.status is Status.PASSED, result.reason
        assert set(names) <= {f.check for f in result.findings}


def test_our_latent_attention_holds_its_configurations_and_warms_up():
    interpret.install()
    loaded = kernels.load(kernels.parse_spec("triton"), ARCHS["sm90"], "interpreted", True)
    session = runner.Session(ARCHS["sm90"], "interpreted", "cpu", loaded)
    text = "mla_sparse/q=1+1,kv=50+70,h=1,g=20,d=192,topk=48"
    case = cases.parse_id(text)
    kernel = loaded.kernels["mla_sparse"]
    inputs = cases.make_inputs(case)
    kernel.warm_up(**contract.prepare(kernel, inputs, paging.World()).arguments)
    with pytest.raises(ValueError, match="needs a query"):
        kernel.warm_up(inputs.q[:0], inputs.k, inputs.topk_idx[0, :0, None], 1.0, 128)
    result = runner.run_one(case, session, PlanLine(text, "mla_sparse", "triton", "interpreted", None, ("autotune",)), "")
    assert result.status is Status.PASSED, result.reason
    assert "autotune" in {f.check for f in result.findings}
