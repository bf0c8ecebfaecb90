"""What production runs: the implementation that vLLM picks for each op on each target.

`ROWS` is data, read from the published wheels. A row that m3check cannot run says what it needs, so that a green report
does not pass for one about kernels that nobody ran. Chains are no rows: they are made of these ops.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from m3check.types import OPS

SOURCE = (
    "vLLM 0.24.0 … 0.33.0, models/minimax_m3/common/indexer.py (select_indexer_impl_cls) and common/sparse_attention.py "
    "(select_main_backend_and_impl_cls); sparse MLA and MQA logits by the wheels' files: their selectors were not read"
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
    """What running it takes; `{}` stands for the target. Empty where the results of `provider` are about it in any case."""
    provider: str = "vllm"
    """Whose results are about it; of another than vllm only where there are any, else `needs` is told."""
    kernel: str = ""
    """The function whose results alone are about it, where vLLM has others of the same op; else `needs` is told."""
    since: tuple[int, int] = OLDEST
    until: tuple[int, int] = (99, 0)
    """The last version with it."""


_CUDA = ("sm80", "sm89", "sm90", "sm120", "sm121")
_CUDA_FP8 = _CUDA[1:]
_SM100 = ("sm100", "sm103")
_AMD = ("gfx942", "gfx950")
_ALL = (*_CUDA, *_SM100, *_AMD)
_INDEX = ("index_score", "index_topk", "index_decode")
_COMMON = "models/minimax_m3/common/ops/index_topk.py"
_COMMON_ATTN = "models/minimax_m3/common/ops/sparse_attn.py"
_FMHA = "third_party/fmha_sm100"
_AMD_INDEX = "models/minimax_m3/amd/ops/index_topk.py"
_AMD_PAGES = "models/minimax_m3/amd/ops/sparse_pa.py"
_LOGITS = ("mqa_logits", "paged_mqa_logits")
_UNPUBLISHED = "Triton, of pull requests 38476 and 47629"
_MLA = "v1/attention/backends/mla"
_CHECKOUT = "needs a checkout that has them (--kernels vllm:PATH)"
_AITER = "needs an AMD GPU with AITER, which is not in the wheel"


def _msa(**fields: Any) -> Row:
    """An implementation of family 100, which the provider fmha_sm100 runs there, and an installed vLLM as well."""
    needs = "needs {} and vLLM installed there (--kernels vllm, or fmha_sm100)"
    return Row(archs=_SM100, needs=needs, provider="fmha_sm100", **fields)


def _layer(index: str, attend: str, **fields: Any) -> Row:
    """A layer of family 100 with a class that calls MSA, which an installed vLLM has there."""
    names = [f"MiniMaxM3Indexer{index}Impl", f"MiniMaxM3Sparse{attend}Impl"]
    folder = "models/minimax_m3/nvidia"
    file = f"{folder}/indexer_msa.py" if index == "MSA" else f"{folder}/sparse_attention_msa.py"
    needs = "needs {} and vLLM installed there (--kernels vllm)"
    return Row(ops=("indexer",), archs=_SM100, name=", ".join(names), file=file, needs=needs, kernel=" + ".join(names),
               **fields)  # fmt: skip


def _not_topk(*sizes: int) -> Callable[[Axes], bool]:
    return lambda axes: axes.get("topk") not in sizes


def _plain_index(axes: Axes) -> bool:
    """Of an op that scores: neither its queries nor its keys are fp8."""
    return not any(str(axes.get(name, "")).startswith("fp8") for name in ("dtype", "cache_dtype"))


def _fp8_index(axes: Axes) -> bool:
    return axes.get("cache_dtype") == "fp8_e4m3fn" and axes.get("dtype") in ("bf16", "fp8_e4m3fn")


def _attends_in_msa(axes: Axes) -> bool:
    return axes.get("topk") in (4, 8, 16, 32) and axes.get("cache_dtype") != "fp8_e5m2"


ROWS: tuple[Row, ...] = (
    # NVIDIA but for family 100: the Triton kernels of common/ops.
    Row(ops=_INDEX, archs=_CUDA, name="Triton (common)", file=_COMMON, when="bf16 index", takes=_plain_index),
    Row(ops=("index_decode_score",), archs=_CUDA, name="Triton (common)", file=_COMMON, since=(0, 25), when="bf16 index",
        takes=_plain_index),
    Row(ops=("index_score", "index_decode_score", "index_decode"), archs=_CUDA_FP8, name="Triton (common), fp8",
        file=_COMMON, since=(0, 32), when="fp8_e4m3fn index", takes=_fp8_index),
    Row(ops=("sparse_attn", "sparse_attn_decode"), archs=_CUDA, name="Triton (common)", file=_COMMON_ATTN),
    # Family 100: MSA where the list length allows it, else Triton.
    _msa(ops=("index_score",), name="fmha_sm100 OnlyScore", file=_FMHA, since=(0, 27),
        when="topk 16, bf16 or fp8 index"),
    _msa(ops=("index_score",), name="fmha_sm100 OnlyScore", file=_FMHA, until=(0, 26),
        when="topk 4, 8, 16 or 32"),
    _msa(ops=("index_topk",), name="fmha_sm100 sparse_topk_select", file=_FMHA, since=(0, 27),
        when="topk 16"),
    _msa(ops=("index_topk",), name="fmha_sm100 sparse_topk_select", file=_FMHA,
        since=(0, 25), until=(0, 26), when="topk 16 (4, 8 and 32 are admitted and fail)"),
    Row(ops=("index_topk",), archs=_SM100, name="Triton (common)", file=_COMMON, until=(0, 24)),
    _msa(ops=("index_decode_score",), name="CuteDSL score", since=(0, 26),
        file="models/minimax_m3/nvidia/ops/index_decode_score.py",
        when="topk 16, index heads × queries ≤ 32"),
    Row(ops=("index_decode_score",), archs=_SM100, name="Triton (common)", file=_COMMON, since=(0, 26),
        when="topk other than 16, or index heads × queries > 32"),
    Row(ops=("index_decode_score",), archs=_SM100, name="Triton (common)", file=_COMMON, since=(0, 25), until=(0, 25)),
    _msa(ops=("index_decode",), name="score, then fmha_sm100 sparse_topk_select", file=_FMHA,
        since=(0, 25), when="topk 16"),
    Row(ops=("index_decode",), archs=_SM100, name="Triton (common)", file=_COMMON, since=(0, 25),
        when="topk other than 16", takes=_not_topk(16)),
    Row(ops=("index_decode",), archs=_SM100, name="Triton (common)", file=_COMMON, until=(0, 24)),
    Row(ops=("index_score",), archs=_SM100, name="Triton (common)", file=_COMMON, since=(0, 27),
        when="topk other than 16 (an fp8 index since 0.32)"),
    Row(ops=("index_topk",), archs=_SM100, name="Triton (common)", file=_COMMON, since=(0, 27),
        when="topk other than 16", takes=_not_topk(16)),
    Row(ops=("index_score",), archs=_SM100, name="Triton (common)", file=_COMMON, until=(0, 26),
        when="topk other than 4, 8, 16, 32"),
    Row(ops=("index_topk",), archs=_SM100, name="Triton (common)", file=_COMMON, since=(0, 25), until=(0, 26),
        when="topk other than 4, 8, 16, 32", takes=_not_topk(4, 8, 16, 32)),
    _msa(ops=("sparse_attn",), name="fmha_sm100 sparse_atten_func", file=_FMHA,
        when="topk 4, 8, 16 or 32, cache not fp8_e5m2"),
    Row(ops=("sparse_attn",), archs=_SM100, name="Triton (common)", file=_COMMON_ATTN,
        when="other topk, or an fp8_e5m2 cache", takes=lambda axes: not _attends_in_msa(axes)),
    Row(ops=("sparse_attn",), archs=_SM100, name="fmha_sm100 sparse_atten_nvfp4_kv_func", file=_FMHA, since=(0, 32),
        needs="needs {} and NVFP4 caches", when="NVFP4 cache, which no case has"),
    Row(ops=("sparse_attn_decode",), archs=_SM100, name="Triton (common)", file=_COMMON_ATTN),
    _msa(ops=("sparse_attn_decode",), name="CUTLASS msa_cutlass_sparse_decode", since=(0, 27),
        file="models/minimax_m3/nvidia/msa_cutlass_sparse_decode.py",
        when="on request (minimax_m3_msa_decode_backend), fp8 cache, 16 requests or more (SM103 since 0.33, M3's heads: "
             "1,024 rows of query heads)"),
    # AMD: kernels of its own since 0.25, AITER's on request.
    Row(ops=_INDEX, archs=_AMD, name="Triton (common)", file=_COMMON, until=(0, 24), when="bf16 index",
        takes=_plain_index),
    Row(ops=("sparse_attn",), archs=_AMD, name="Triton (common)", file=_COMMON_ATTN, until=(0, 24)),
    Row(ops=("index_score", "index_topk"), archs=_AMD, name="Triton (amd)", file=_AMD_INDEX, since=(0, 25),
        when="bf16 index", takes=_plain_index),
    Row(ops=("index_decode",), archs=_AMD, name="Triton (amd), score and selector", file=_AMD_INDEX, since=(0, 25),
        until=(0, 29), when="bf16 index", takes=_plain_index),
    Row(ops=("index_decode",), archs=_AMD, name="Triton (amd), fused selector", file=_AMD_INDEX, since=(0, 30),
        when="bf16 index", takes=_plain_index),
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
    Row(ops=("index_decode_cp", "index_topk_cp"), archs=_AMD, name="Triton (amd), context parallel", since=(0, 33),
        file="models/minimax_m3/amd/ops/indexer_cp_exchange.py", when="on request (minimax_m3_indexer_cp), bf16 index"),
    Row(ops=("index_topk_cp_table",), archs=_AMD, name="Triton (amd), context parallel, the table as well", since=(0, 33),
        file="models/minimax_m3/amd/ops/indexer_cp_exchange.py",
        when="on request (minimax_m3_indexer_cp), for AITER sparse paged attention"),
    Row(ops=("sparse_attn", "sparse_attn_decode"), archs=_AMD, name="AITER sparse paged attention", needs=_AITER,
        file=_AMD_PAGES, since=(0, 26), when="AITER and its shuffled cache layout on"),
    Row(ops=("sparse_pa_table", "sparse_pa_table_decode"), archs=_AMD, name="Triton (amd), table of 16-token pages",
        file=_AMD_PAGES, since=(0, 26), when="for AITER sparse paged attention"),
    Row(ops=("index_insert",), archs=_AMD, name="Triton (amd)", file=_AMD_PAGES, since=(0, 26),
        when="for AITER sparse paged attention, without AITER's fused insert"),
    Row(ops=("page16_rebase",), archs=_AMD, name="torch (amd)", file=_AMD_PAGES, since=(0, 30),
        when="keys and values share a block"),
    Row(ops=("index_decode_table",), archs=_AMD, name="Triton (amd), fused selector that writes the table", since=(0, 30),
        file=_AMD_INDEX, when="for AITER sparse paged attention, one KV head"),
    # A batch through one layer: the implementation classes around the kernels above.
    Row(ops=("indexer",), archs=(*_CUDA, *_AMD), name="MiniMaxM3IndexerTritonImpl, MiniMaxM3SparseTritonImpl",
        file="models/minimax_m3/common/indexer.py", since=(0, 25)),
    _layer("MSA", "MSA", when="topk 16, cache not fp8_e5m2", since=(0, 25)),
    _layer("MSA", "Triton", when="topk 16, an fp8_e5m2 cache", since=(0, 25)),
    _layer("Triton", "MSA", when="topk 4, 8 or 32, cache not fp8_e5m2", since=(0, 27)),
    Row(ops=("indexer",), archs=_SM100, name="MiniMaxM3IndexerTritonImpl, MiniMaxM3SparseTritonImpl",
        file="models/minimax_m3/common/indexer.py", since=(0, 25), when="other topk, or 4, 8 or 32 with an fp8_e5m2 cache",
        takes=lambda axes: axes.get("topk") != 16 and not _attends_in_msa(axes)),
    Row(ops=("indexer",), archs=_ALL, name="the classes of 0.24", file="models/minimax_m3/common/indexer.py", until=(0, 24),
        needs="needs stand-ins for the classes of 0.24, which m3check does not have"),
    # Norm, rotation and insertion: one compiled op everywhere, AITER's on request.
    Row(ops=("qknorm_rope_insert",), archs=_ALL, name="compiled fused_minimax_m3_qknorm_rope_kv_insert",
        file="_custom_ops.py"),
    Row(ops=("qknorm_rope_insert",), archs=_AMD, name="AITER fused_qknorm_idxrqknorm", needs=_AITER, file="_aiter_ops.py",
        since=(0, 26), when="AITER and its shuffled cache layout on"),
    # Sparse MLA and MQA logits, of other models.
    Row(ops=("mla_sparse",), archs=("sm90", *_SM100), name="FlashMLA sparse", file=f"{_MLA}/flashmla_sparse.py",
        needs="needs {} and FlashMLA, compiled with vLLM"),
    Row(ops=("mla_sparse",), archs=_SM100, name="FlashInfer sparse MLA", file=f"{_MLA}/flashinfer_mla_sparse.py",
        needs="needs {} and FlashInfer", when="on request, or fp8 caches"),
    Row(ops=("mla_sparse",), archs=("sm120", "sm121"), name="FlashInfer sparse MLA",
        file=f"{_MLA}/flashinfer_mla_sparse_sm120.py", needs="needs {} and FlashInfer", since=(0, 26)),
    Row(ops=("mla_sparse",), archs=("sm80", "sm89", "sm120", "sm121"), name=_UNPUBLISHED,
        file="v1/attention/ops/triton_mla_sparse.py", when="in no wheel", needs=_CHECKOUT,
        kernel="triton_mla_sparse_attention"),
    Row(ops=("mla_sparse",), archs=_AMD, name="AITER sparse MLA", file=f"{_MLA}/rocm_aiter_mla_sparse.py", needs=_AITER),
    Row(ops=_LOGITS, archs=("sm90", *_SM100), name="DeepGEMM", file="utils/deep_gemm.py",
        needs="needs {} and DeepGEMM, compiled with vLLM"),
    Row(ops=("mqa_logits",), archs=("sm80", "sm89", "sm120", "sm121"), name=_UNPUBLISHED, when="in no wheel",
        file="v1/attention/ops/mqa_logits_triton.py", needs=_CHECKOUT, kernel="fp8_mqa_logits_triton"),
    Row(ops=("paged_mqa_logits",), archs=("sm80", "sm89", "sm120", "sm121"), name=_UNPUBLISHED, when="in no wheel",
        file="v1/attention/ops/mqa_logits_triton.py", needs=_CHECKOUT, kernel="fp8_paged_mqa_logits_triton"),
    Row(ops=("mqa_logits",), archs=("gfx942",), name="Triton fp8_mqa_logits_gfx942", until=(0, 29),
        file="v1/attention/ops/triton_fp8_mqa_logits.py"),
    Row(ops=("mqa_logits",), archs=("gfx942",), name="AITER MQA logits", needs=_AITER, since=(0, 30),
        file="v1/attention/ops/rocm_aiter_mla_sparse.py"),
    Row(ops=("mqa_logits",), archs=("gfx950",), name="AITER MQA logits", needs=_AITER,
        file="v1/attention/ops/rocm_aiter_mla_sparse.py"),
    Row(ops=("paged_mqa_logits",), archs=_AMD, name="AITER MQA logits", needs=_AITER,
        file="v1/attention/ops/rocm_aiter_mla_sparse.py"),
)  # fmt: skip


def rows(arch: str, version: tuple[int, int] = LATEST) -> list[tuple[str, Row]]:
    """(op, row) of a target, in the order of OPS; an op that a version or a target has no function for has no row."""
    version = min(max(version, OLDEST), LATEST)
    return [
        (op, row)
        for op in _ops()
        for row in ROWS
        if op in row.ops and arch in row.archs and row.since <= version <= row.until
    ]


def _ops() -> list[str]:
    """All ops, then those that production has and m3check has not."""
    return list(dict.fromkeys([*OPS, *(op for row in ROWS for op in row.ops)]))


def version_of(text: str) -> tuple[int, int] | None:
    """0.33.0 → (0, 33); None where it is no version."""
    found = re.match(r"(\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else None


def not_run(row: Row, arch: str) -> str:
    """Why m3check has no result of an implementation."""
    return f"not run here, {row.needs.format(arch.upper())}"
