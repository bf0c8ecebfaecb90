"""What production runs: the implementation that vLLM picks for each op on each target, and what a record shows of it.

`ROWS` is data, read from the published wheels. A row that m3check cannot run says what it needs, so that a green report
does not pass for one about kernels that nobody ran. Chains are no rows: they are made of these ops.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from m3check.types import OPS, Result, Status

SOURCE = (
    "vLLM 0.24.0 … 0.33.0, models/minimax_m3/common/indexer.py (select_indexer_impl_cls) and common/sparse_attention.py "
    "(select_main_backend_and_impl_cls)"
)

LATEST = (0, 33)
"""The newest vLLM that the rows were read from; a newer one is taken for it, and told so."""

OLDEST = (0, 24)

Axes = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One implementation of some ops on some targets."""

    ops: tuple[str, ...]
    archs: tuple[str, ...]
    name: str
    """Words for it, as reports have them."""
    file: str
    """Where it is, below vllm/ in the wheel."""
    when: str = "always"
    takes: Callable[[Axes], bool] = lambda axes: True
    """Whether results on a case with these axes are about it: `when`, as far as the op's own answer depends on it."""
    needs: str = ""
    """What running it takes; empty where the provider `vllm` runs it; `{}` stands for the target."""
    since: tuple[int, int] = OLDEST
    until: tuple[int, int] = (99, 0)
    """The last version with it."""


_CUDA = ("sm80", "sm89", "sm90", "sm120", "sm121")
_SM100 = ("sm100", "sm103")
_AMD = ("gfx942", "gfx950")
_ALL = (*_CUDA, *_SM100, *_AMD)
_INDEX = ("index_score", "index_topk", "index_decode")
_COMMON = "models/minimax_m3/common/ops/index_topk.py"
_COMMON_ATTN = "models/minimax_m3/common/ops/sparse_attn.py"
_FMHA = "third_party/fmha_sm100"
_AMD_INDEX = "models/minimax_m3/amd/ops/index_topk.py"
_FAMILY = "needs {}"
_AITER = "needs an AMD GPU with AITER, which is not in the wheel"


def _not_topk(*sizes: int) -> Callable[[Axes], bool]:
    return lambda axes: axes.get("topk") not in sizes


def _attends_in_msa(axes: Axes) -> bool:
    return axes.get("topk") in (4, 8, 16, 32) and axes.get("cache_dtype") != "fp8_e5m2"


ROWS: tuple[Row, ...] = (
    # NVIDIA but for family 100: the Triton kernels of common/ops.
    Row(ops=_INDEX, archs=_CUDA, name="Triton (common)", file=_COMMON),
    Row(ops=("index_decode_score",), archs=_CUDA, name="Triton (common)", file=_COMMON, since=(0, 25)),
    Row(ops=("sparse_attn", "sparse_attn_decode"), archs=_CUDA, name="Triton (common)", file=_COMMON_ATTN),
    # Family 100: MSA where the list length allows it, else Triton.
    Row(ops=("index_score",), archs=_SM100, name="fmha_sm100 OnlyScore", file=_FMHA, needs=_FAMILY, since=(0, 27),
        when="topk 16, bf16 or fp8 index"),
    Row(ops=("index_score",), archs=_SM100, name="fmha_sm100 OnlyScore", file=_FMHA, needs=_FAMILY, until=(0, 26),
        when="topk 4, 8, 16 or 32"),
    Row(ops=("index_topk",), archs=_SM100, name="fmha_sm100 sparse_topk_select", file=_FMHA, needs=_FAMILY, since=(0, 27),
        when="topk 16"),
    Row(ops=("index_topk",), archs=_SM100, name="fmha_sm100 sparse_topk_select", file=_FMHA, needs=_FAMILY,
        since=(0, 25), until=(0, 26), when="topk 16 (4, 8 and 32 are admitted and fail)"),
    Row(ops=("index_topk",), archs=_SM100, name="Triton (common)", file=_COMMON, until=(0, 24)),
    Row(ops=("index_decode_score",), archs=_SM100, name="CuteDSL score", needs=_FAMILY, since=(0, 26),
        file="models/minimax_m3/nvidia/ops/index_decode_score.py",
        when="topk 16, index heads × queries ≤ 32"),
    Row(ops=("index_decode_score",), archs=_SM100, name="Triton (common)", file=_COMMON, since=(0, 26),
        when="topk other than 16, or index heads × queries > 32"),
    Row(ops=("index_decode_score",), archs=_SM100, name="Triton (common)", file=_COMMON, since=(0, 25), until=(0, 25)),
    Row(ops=("index_decode",), archs=_SM100, name="score, then fmha_sm100 sparse_topk_select", file=_FMHA, needs=_FAMILY,
        since=(0, 25), when="topk 16"),
    Row(ops=("index_decode",), archs=_SM100, name="Triton (common)", file=_COMMON, since=(0, 25),
        when="topk other than 16", takes=_not_topk(16)),
    Row(ops=("index_decode",), archs=_SM100, name="Triton (common)", file=_COMMON, until=(0, 24)),
    Row(ops=("index_score",), archs=_SM100, name="Triton (common)", file=_COMMON, since=(0, 27), when="topk other than 16"),
    Row(ops=("index_topk",), archs=_SM100, name="Triton (common)", file=_COMMON, since=(0, 27),
        when="topk other than 16", takes=_not_topk(16)),
    Row(ops=("index_score",), archs=_SM100, name="Triton (common)", file=_COMMON, until=(0, 26),
        when="topk other than 4, 8, 16, 32"),
    Row(ops=("index_topk",), archs=_SM100, name="Triton (common)", file=_COMMON, since=(0, 25), until=(0, 26),
        when="topk other than 4, 8, 16, 32", takes=_not_topk(4, 8, 16, 32)),
    Row(ops=("sparse_attn",), archs=_SM100, name="fmha_sm100 sparse_atten_func", file=_FMHA, needs=_FAMILY,
        when="topk 4, 8, 16 or 32, cache not fp8_e5m2"),
    Row(ops=("sparse_attn",), archs=_SM100, name="Triton (common)", file=_COMMON_ATTN,
        when="other topk, or an fp8_e5m2 cache", takes=lambda axes: not _attends_in_msa(axes)),
    Row(ops=("sparse_attn",), archs=_SM100, name="fmha_sm100 sparse_atten_nvfp4_kv_func", file=_FMHA, since=(0, 32),
        needs=_FAMILY, when="NVFP4 cache, which no case has"),
    Row(ops=("sparse_attn_decode",), archs=_SM100, name="Triton (common)", file=_COMMON_ATTN),
    Row(ops=("sparse_attn_decode",), archs=_SM100, name="CUTLASS msa_cutlass_sparse_decode", needs=_FAMILY, since=(0, 27),
        file="models/minimax_m3/nvidia/msa_cutlass_sparse_decode.py",
        when="on request (minimax_m3_msa_decode_backend), fp8 cache, 16 requests or more"),
    # AMD: kernels of its own since 0.25, AITER's on request.
    Row(ops=_INDEX, archs=_AMD, name="Triton (common)", file=_COMMON, until=(0, 24)),
    Row(ops=("sparse_attn",), archs=_AMD, name="Triton (common)", file=_COMMON_ATTN, until=(0, 24)),
    Row(ops=("index_score", "index_topk"), archs=_AMD, name="Triton (amd)", file=_AMD_INDEX, since=(0, 25)),
    Row(ops=("index_decode",), archs=_AMD, name="Triton (amd), score and selector", file=_AMD_INDEX, since=(0, 25),
        until=(0, 29)),
    Row(ops=("index_decode",), archs=_AMD, name="Triton (amd), fused selector", file=_AMD_INDEX, since=(0, 30)),
    Row(ops=("index_decode_score",), archs=_AMD, name="inside index_decode", file=_AMD_INDEX, since=(0, 25),
        needs="no function of its own there: index_decode runs it"),
    Row(ops=("sparse_attn",), archs=("gfx942",), name="Triton (amd), tiles of 32 keys", since=(0, 25),
        file="models/minimax_m3/amd/ops/sparse_attn.py"),
    Row(ops=("sparse_attn",), archs=("gfx950",), name="Triton (amd), tiles of 64 keys", since=(0, 25),
        file="models/minimax_m3/amd/ops/sparse_attn.py"),
    Row(ops=("sparse_attn_decode",), archs=_AMD, name="Triton (common)", file=_COMMON_ATTN),
    Row(ops=("index_score", "index_decode"), archs=("gfx950",), name="AITER indexer", needs=_AITER,
        file="models/minimax_m3/amd/indexer_aiter.py", since=(0, 30), until=(0, 32),
        when="AITER on, fp8 index, topk 16"),
    Row(ops=("index_score", "index_decode"), archs=("gfx950",), name="AITER MSA indexer", needs=_AITER,
        file="models/minimax_m3/amd/indexer_msa.py", since=(0, 33),
        when="AITER on, fp8_e4m3fn index, topk 16, at most 8,192 blocks"),
    Row(ops=("index_score", "index_decode"), archs=_AMD, name="Triton (amd), context parallel", since=(0, 33),
        file="models/minimax_m3/amd/ops/indexer_context_parallel.py", needs="needs a group of two processes or more",
        when="on request (minimax_m3_indexer_cp), bf16 index"),
    Row(ops=("sparse_attn", "sparse_attn_decode"), archs=_AMD, name="AITER sparse paged attention", needs=_AITER,
        file="models/minimax_m3/amd/ops/sparse_pa.py", since=(0, 26), when="AITER and its shuffled cache layout on"),
)  # fmt: skip


def rows(arch: str, version: tuple[int, int] = LATEST) -> list[tuple[str, Row]]:
    """(op, row) of a target, in the order of OPS; an op that a version has no function for has no row."""
    version = min(max(version, OLDEST), LATEST)
    return [
        (op, row) for op in OPS for row in ROWS if op in row.ops and arch in row.archs and row.since <= version <= row.until
    ]


def version_of(text: str) -> tuple[int, int] | None:
    """0.33.0 → (0, 33); None where it is no version."""
    found = re.match(r"(\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else None


def _named(results: Iterable[Result]) -> list[str]:
    return list(dict.fromkeys(r.provider for r in results if re.match(r"vllm(==|:|$)", r.provider)))


def _version(provider: str, providers: Mapping[str, Any]) -> str:
    """The version that a provider's name or its worker says; empty for none."""
    said = providers.get(provider)
    text = str(said.get("version", "")) if isinstance(said, Mapping) else ""
    return next((word for word in (provider.partition("==")[2], text) if version_of(word)), "")


def not_run(row: Row, arch: str) -> str:
    """Why m3check has no result of an implementation."""
    return f"not run here, {row.needs.format(arch.upper())}"


def summary(arch: str, results: Iterable[Result], providers: Mapping[str, Any]) -> list[dict[str, str]]:
    """What production runs and what the results show of it: one entry for each version, op and implementation.

    `providers` is what the workers said of themselves, by provider. Where none of them is vLLM's, the entries are those of
    the latest, and say that no result is about them.
    """
    results = list(results)
    versions = {name: _version(name, providers) for name in _named(results)}
    told = []
    latest = ".".join(map(str, LATEST))
    for provider, text in versions.items() or [("", f"{latest}.0")]:
        version = version_of(text) or (99, 0)
        shown = text if version <= LATEST else f"{text or 'of unknown version'} (taken for {latest})"
        for op, row in rows(arch, version):
            about = [r for r in results if r.op == op and r.provider == provider and row.takes(r.axes)]
            told.append(
                {
                    "version": shown,
                    "op": op,
                    "implementation": row.name,
                    "file": row.file,
                    "when": row.when,
                    "evidence": not_run(row, arch) if row.needs else _evidence(about, provider),
                }
            )
    return told


def _evidence(results: Iterable[Result], provider: str) -> str:
    """Counts by evidence, or the sentence why there are none."""
    if not provider:
        return "not run here: no provider vllm was named"
    ran = [r for r in results if r.status is not Status.SKIPPED]
    if not ran:
        reasons = Counter(r.reason for r in results).most_common(1)
        return f"not run here: {reasons[0][0]}" if reasons else "not run here: no case of this run has it"
    parts = []
    for kind in ("device", "interpreted", "compiled"):
        counts = Counter(r.status.value for r in ran if r.evidence == kind)
        if counts:
            parts.append(f"{kind}: " + ", ".join(f"{n} {status}" for status, n in counts.items()))
    return "; ".join(parts)
