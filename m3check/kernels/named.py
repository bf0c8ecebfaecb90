"""Kernels of latent attention and its indexer by the names that vLLM gives them, brought to m3check's own keywords.

The same functions are in vLLM's wheels, in open pull requests of vLLM and in files of users who took them from there; they
differ in the order of arguments and in what they return. Sources are told in docs/sources.md.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from m3check.types import OPS, ROPE, Case, Kernel, Profile

if TYPE_CHECKING:
    from torch import Tensor

Function = Callable[..., Any]


@dataclass(frozen=True)
class Named:
    """One function by its published name."""

    name: str
    op: str
    adapted: Callable[[Function], Function]
    """From the function to one with the op's keywords."""
    refusal: Callable[[Case], str | None]
    """Why it cannot run a case, as the end of a sentence that begins with its name; None where it can."""
    vendor: str = ""
    """Whose compiler its launch options are for; empty where they are anybody's."""
    decodes: bool = False
    """Reads fp8 codes as bytes, so that it runs where Triton does not have the dialect."""
    warm_up: str = ""
    """What its file calls before it serves, if it has that."""
    warmed: Callable[[Function], Function] | None = None
    """From that to a function with the keywords of a call."""
    profile: Profile = field(default_factory=lambda: Profile(partials="fp32"))

    def warm_up_of(self, module: Any, inside: Callable[[Function], Function] = lambda same: same) -> Function | None:
        """What the function's file has for a server to call first, put `inside`; it takes the keywords of a call."""
        found = getattr(module, self.warm_up, None) if self.warmed else None
        return self.warmed(inside(found)) if self.warmed and found else None


def _xpu(function: Function) -> Function:
    def mla_sparse(q: Tensor, kv: Tensor, indices: Tensor, sm_scale: float, d_v: int) -> tuple[Tensor, Tensor]:
        out, _, lse = function(q, kv, indices, sm_scale, d_v)
        return out, lse

    return mla_sparse


def _plain(function: Function) -> Function:
    def mla_sparse(q: Tensor, kv: Tensor, indices: Tensor, sm_scale: float) -> Any:
        return function(q, kv, indices, sm_scale)

    return mla_sparse


def _paired(function: Function) -> Function:
    fixed = _clean(function)

    def mqa_logits(q: Tensor, k: Tensor, k_scale: Tensor, weights: Tensor, starts: Tensor, ends: Tensor) -> Any:
        return function(q, (k, k_scale), weights, starts, ends, **fixed)

    return mqa_logits


def _flat(function: Function) -> Function:
    def mqa_logits(q: Tensor, k: Tensor, k_scale: Tensor, weights: Tensor, starts: Tensor, ends: Tensor) -> Any:
        return function(q, k, k_scale, weights, starts, ends)

    return mqa_logits


def _paged(function: Function) -> Function:
    fixed = _clean(function)

    def paged_mqa_logits(
        q: Tensor, kv_cache: Tensor, weights: Tensor, context_lens: Tensor, block_table: Tensor, max_model_len: int
    ) -> Any:
        return function(q, kv_cache, weights, context_lens, block_table, max_model_len, **fixed)

    return paged_mqa_logits


def _clean(function: Function) -> dict[str, bool]:
    """Asks for -inf outside each window of those versions that leave it to the caller."""
    return {"clean_logits": True} if "clean_logits" in inspect.signature(function).parameters else {}


def _warmed(function: Function) -> Function:
    def warm_up(q: Tensor, **_: Any) -> Any:
        return function(*q.shape[-2:], q.device)

    return warm_up


def _warmed_pages(function: Function) -> Function:
    def warm_up(q: Tensor, kv_cache: Tensor, **_: Any) -> Any:
        return function(*q.shape[-2:], kv_cache.shape[1], q.device)

    return warm_up


def _latent(case: Case) -> str | None:
    if case.head_dim != 512 + ROPE:
        return f"takes latent keys of {512 + ROPE} channels, got {case.head_dim}"
    return None if case.dtype == "bf16" else f"gives bf16, got {case.dtype} queries"


def _powers(case: Case) -> str | None:
    if case.gqa & (case.gqa - 1) or case.head_dim & (case.head_dim - 1):
        return f"needs powers of two of heads and channels, got {case.gqa} and {case.head_dim}"
    return None


def _e4m3fn(case: Case) -> str | None:
    wanted = {case.dtype, case.cache_dtype} == {"fp8_e4m3fn"}
    return None if wanted else f"decodes e4m3fn only, got {case.dtype} and {case.cache_dtype}"


NAMED: tuple[Named, ...] = (
    Named("triton_mla_sparse_attention", "mla_sparse", _plain, _latent),
    Named("triton_bf16_mla_sparse_interface", "mla_sparse", _xpu, _latent),
    Named(
        "fp8_mqa_logits_triton",
        "mqa_logits",
        _paired,
        _e4m3fn,
        decodes=True,
        warm_up="warmup_fp8_mqa_logits_triton",
        warmed=_warmed,
    ),
    Named("fp8_mqa_logits_gfx942", "mqa_logits", _flat, _powers, "amd"),
    Named(
        "fp8_paged_mqa_logits_triton",
        "paged_mqa_logits",
        _paged,
        _e4m3fn,
        decodes=True,
        warm_up="warmup_fp8_paged_mqa_logits_triton",
        warmed=_warmed_pages,
    ),
)
"""In the order in which they are looked for."""


def of(op: str) -> Mapping[str, Named]:
    """The published functions of an op, by name."""
    return {named.name: named for named in NAMED if named.op == op}


def refusal(kernel: Kernel, case: Case) -> str | None:
    """Why a kernel of a published name cannot run a case; None for any other kernel."""
    function = _BY_NAME.get(kernel.name)
    sentence = function.refusal(case) if function else None
    return f"{kernel.name} {sentence}" if sentence else None


_BY_NAME = {named.name: named for named in NAMED}
OPS_WITH_NAMES = tuple(dict.fromkeys(named.op for named in NAMED if named.op in OPS))
