"""What production runs where, as dispatch.py has it, against vLLM's own choice of an implementation, version by version."""

from __future__ import annotations

import inspect
import itertools
import re
from types import SimpleNamespace

import pytest

from m3check import dispatch
from m3check.arch import ARCHS
from m3check.kernels import parse_spec
from m3check.kernels.layer_standin import FILES, M3, LayerWorld
from m3check.kernels.locate import locate
from m3check.types import M3CheckError

VERSIONS = ("0.24.0", "0.25.1", "0.26.0", "0.27.0", "0.28.0", "0.32.0", "0.33.0")
TARGETS = ("sm80", "sm90", "sm100", "sm103", "sm121", "gfx942")
TOPKS = (1, 4, 8, 15, 16, 32)
INDEX_DTYPES = ("bf16", "fp8", "fp8_e4m3", "mxfp4", "nvfp4")
CACHE_DTYPES = ("auto", "fp8_e4m3", "fp8_e5m2")


def chosen(version: str, arch: str) -> tuple[dict, dict]:
    """((topk, index dtype) -> class, (topk, cache dtype) -> class), None for a refusal; skips what is not cached."""
    try:
        source = locate(parse_spec(f"vllm=={version}"), offline=True)
    except M3CheckError as error:
        pytest.skip(str(error))
    world = LayerWorld(source.folder, ARCHS[arch], pdl=False)
    world.config = SimpleNamespace(attention_config=SimpleNamespace(minimax_m3_indexer_cp=False))
    world.only_named(f"{M3}.nvidia.indexer_msa", f"{M3}.nvidia.sparse_attention_msa")
    index_file, attend_file = (world.load(name) for name in FILES)
    attend = attend_file.select_main_impl_cls
    heads = {"num_kv_heads": 4} if "num_kv_heads" in inspect.signature(attend).parameters else {}
    index, main = {}, {}
    with world.entered():
        for topk, dtype in itertools.product(TOPKS, INDEX_DTYPES):
            try:
                index[topk, dtype] = index_file.select_indexer_impl_cls(topk_blocks=topk, indexer_kv_dtype=dtype).__name__
            except NotImplementedError:
                index[topk, dtype] = None
        for topk, dtype in itertools.product(TOPKS, CACHE_DTYPES):
            main[topk, dtype] = attend(topk_blocks=topk, kv_cache_dtype=dtype, **heads).__name__
    return index, main


def in_msa(op: str, version: str, arch: str, topk: int, cache: str = "") -> bool:
    """Whether ROWS gives an op to fmha_sm100, by what `when` says of topk and of the cache."""
    told = [
        row
        for name, row in dispatch.rows(arch, dispatch.version_of(version) or dispatch.LATEST)
        if name == op and row.name.startswith("fmha_sm100") and "NVFP4" not in row.when
    ]
    return any(topk in map(int, re.findall(r"\b\d+\b", row.when)) and f"not {cache}" not in row.when for row in told)


@pytest.mark.parametrize("arch", TARGETS)
@pytest.mark.parametrize("version", VERSIONS)
def test_vllms_own_selector_agrees_with_the_rows(version, arch):
    index, main = chosen(version, arch)
    for (topk, dtype), name in index.items():
        if name is None:
            assert dtype != "bf16", f"bf16 has an indexer everywhere, topk {topk} has none"
            continue
        assert name in ("MiniMaxM3IndexerMSAImpl", "MiniMaxM3IndexerTritonImpl")
        assert in_msa("index_score", version, arch, topk) == (name == "MiniMaxM3IndexerMSAImpl"), (topk, dtype)
    for (topk, dtype), name in main.items():
        cache = {"auto": "bf16", "fp8_e4m3": "fp8_e4m3fn", "fp8_e5m2": "fp8_e5m2"}[dtype]
        assert in_msa("sparse_attn", version, arch, topk, cache) == (name == "MiniMaxM3SparseMSAImpl"), (topk, dtype)


@pytest.mark.parametrize(
    ("version", "arch", "wanted"),
    [("0.31.0", "sm90", None), ("0.32.0", "sm90", "MiniMaxM3IndexerTritonImpl"), ("0.33.0", "sm80", None),
     ("0.33.0", "sm100", "MiniMaxM3IndexerMSAImpl"), ("0.33.0", "gfx942", None)],
)  # fmt: skip
def test_where_an_fp8_index_cache_is_served(version, arch, wanted):
    assert chosen(version, arch)[0][16, "fp8"] == wanted
