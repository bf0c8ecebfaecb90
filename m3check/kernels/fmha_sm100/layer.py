"""What vLLM's MSA classes of one layer import of fmha_sm100 and CuteDSL, put into the modules that those classes see.

The functions are an `Interface`'s, so that a model of it can stand in for the package. They run with the modules that are
there outside, since the package imports more of itself when it is called. Plans and CSRs are compared with what they must
hold before a kernel reads them.
"""

from __future__ import annotations

import functools
from typing import Any

from m3check.kernels.calls import BrokenContract
from m3check.kernels.fmha_sm100 import data
from m3check.kernels.fmha_sm100.interface import Function, Interface
from m3check.kernels.layer_standin import M3, LayerWorld

NEEDS = ("plan", "run", "select", "build_csr", "attend", "decode_score")
"""The functions of `Interface` that a layer calls."""

_PACKAGE = "vllm.third_party.fmha_sm100"


def put_in(world: LayerWorld, interface: Interface) -> None:
    """Let a world's MSA classes call the functions of an interface, which has all of `NEEDS`."""

    def outside(name: str) -> Function:
        function = getattr(interface, name)

        @functools.wraps(function)
        def call(*args: Any, **options: Any) -> Any:
            with world.left():
                return function(*args, **options)

        return call

    for package in ("vllm.third_party", _PACKAGE):
        world.add(package)
    world.add(
        f"{_PACKAGE}.api",
        _fmha_sm100_plan=_planned(outside("plan")),
        _fmha_sm100=outside("run"),
        sparse_topk_select=outside("select"),
    )
    world.add(
        f"{_PACKAGE}.sparse",
        build_k2q_csr=_turned(outside("build_csr")),
        sparse_atten_func=outside("attend"),
        sparse_atten_nvfp4_kv_func=None,  # no case has its cache
    )
    world.add(f"{M3}.nvidia.ops", minimax_m3_index_decode_score_cutedsl=outside("decode_score"))


def _planned(plan: Function) -> Function:
    """`_fmha_sm100_plan` whose result was read."""

    def call(query_lens: Any, kv_lens: Any, heads: int, **options: Any) -> Any:
        made = plan(query_lens, kv_lens, heads, **options)
        _raised(data.plan_fault(made, query_lens.tolist(), kv_lens.tolist(), heads))
        return made

    return call


def _turned(build: Function) -> Function:
    """`build_k2q_csr` whose result was read."""

    def call(topk_idx: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, *args: Any, **options: Any) -> Any:
        made = build(topk_idx, cu_seqlens_q, cu_seqlens_k, *args, **options)
        _raised(data.csr_fault(made[0], made[1], topk_idx, cu_seqlens_q, cu_seqlens_k))
        return made

    return call


def _raised(fault: str | None) -> None:
    if fault is not None:
        raise BrokenContract(fault)
