"""MSA's plan and CSR as data: by hand, wrong ones told by their field, and against MSA's own Python where that is.

`MSA_FOLDER=PATH pytest tests/test_msa_data.py` compares with the fmha_sm100 in a folder: a checkout of MSA, or what a
wheel of vLLM holds in vllm/third_party. It needs no GPU: the host's part of the planner runs, and CSR's torch reference.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from fake_fmha_sm100 import Model

from m3check.kernels.fmha_sm100 import data
from m3check.kernels.fmha_sm100.locate import locate
from m3check.kernels.provider import Spec
from m3check.types import M3CheckError

QUERIES, CONTEXTS = [3, 1, 140], [300, 129, 2177]


def planned(query_lens=QUERIES, kv_lens=CONTEXTS, heads=4):
    q, kv = (torch.tensor(n, dtype=torch.int32) for n in (query_lens, kv_lens))
    options = {"num_kv_heads": 1, "qo_offset": kv - q, "page_size": 128, "output_maxscore": True}
    return Model()._fmha_sm100_plan(q, kv, heads, **options)


def lists(seed=0, heads=2, topk=8):
    """Id lists of the batch, ascending, -1 at the end, with starts of queries and keys."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for query_len, kv_len in zip(QUERIES, CONTEXTS, strict=True):
        for i in range(query_len):
            seen = (kv_len - query_len + i) // 128 + 1
            for _ in range(heads):
                chosen = torch.randperm(seen, generator=generator)[:topk].sort().values
                rows.append(torch.nn.functional.pad(chosen, (0, topk - len(chosen)), value=-1))
    ids = torch.stack(rows).view(-1, heads, topk).transpose(0, 1).contiguous().int()
    starts = [torch.tensor([0, *n]).cumsum(0).int() for n in (QUERIES, CONTEXTS)]
    return ids, *starts


def built(ids, starts_q, starts_k):
    rows = sum(-(-n // 128) for n in CONTEXTS)
    options = {"total_k": 0, "max_seqlen_k": max(CONTEXTS), "max_seqlen_q": max(QUERIES), "total_rows": rows + 2}
    return Model().build_k2q_csr(ids, starts_q, starts_k, 128, **options)[:2]


@pytest.mark.parametrize(
    ("query_lens", "kv_lens", "heads", "tiles"),
    [
        ([1], [1], 4, 128),
        ([1], [128 * 128], 4, 128),
        ([1], [128 * 128 + 1], 4, 256),
        ([512], [2**20], 4, 8192),
        ([2**16], [2**20], 4, 8192),  # 2^31 cells, and not one more
        ([2**16 + 1], [2**20], 4, -1),
        ([2**16, 1], [2**20, 5], 4, -1),
    ],
)
def test_a_plan_has_as_many_tiles_as_the_longest_context_and_gives_up_past_2_31_cells(query_lens, kv_lens, heads, tiles):
    assert data.natural_tiles(query_lens, kv_lens, heads) == tiles


def test_a_right_plan_has_no_fault_packed_or_not():
    assert data.plan_fault(planned(), QUERIES, CONTEXTS, 4) is None
    packed = planned()
    packed["pack_factor"] = 4
    packed["qo_segment_lens"] = torch.tensor([12, 4, 560])
    packed["qo_segment_offsets"] = torch.tensor([0, 12, 16, 576])
    assert data.plan_fault(packed, QUERIES, CONTEXTS, 4) is None


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("qo_segment_offsets", [0, 3, 4, 143]),
        ("kv_page_indptr", [0, 3, 4, 21]),  # the last page, of one token, forgotten
        ("kv_segment_lens", [300, 129, 2176]),
        ("qo_offset", [297, 128, 0]),
        ("max_k_tiles", 18),
        ("max_k_tiles", -1),
        ("pack_factor", 3),
    ],
)
def test_a_wrong_plan_is_told_by_its_field(field, values):
    plan = planned()
    plan[field] = values
    assert field in (data.plan_fault(plan, QUERIES, CONTEXTS, 4) or "")


def test_a_small_csr_by_hand():
    """Two requests of 2 and 1 blocks: rows are (first, 0), (second, 0), (first, 1)."""
    ids = torch.tensor([[[0, 1], [1, -1], [0, -1]]], dtype=torch.int32)
    row_ptr, queries = data.csr(ids, torch.tensor([0, 2, 3]), torch.tensor([0, 200, 300]))
    assert row_ptr.tolist() == [[0, 1, 2, 4]]
    assert queries[0].tolist() == [0, 0, 0, 1]


def test_the_models_csr_has_no_fault():
    ids, starts_q, starts_k = lists()
    assert data.csr_fault(*built(ids, starts_q, starts_k), ids, starts_q, starts_k) is None


def test_a_wrong_csr_is_told_by_its_place():
    ids, starts_q, starts_k = lists()
    row_ptr, queries = built(ids, starts_q, starts_k)
    lost = row_ptr.clone()
    lost[1, 5:] -= 1
    assert "row 4 of head 1" in (data.csr_fault(lost, queries, ids, starts_q, starts_k) or "")
    swapped = queries.clone()
    swapped[0, [2, 70]] = swapped[0, [70, 2]]  # of rows 0 and 2
    assert "of head 0 is query" in (data.csr_fault(row_ptr, swapped, ids, starts_q, starts_k) or "")
    turned = queries.clone()
    turned[0, :3] = queries[0, :3].flip(0)
    assert data.csr_fault(row_ptr, turned, ids, starts_q, starts_k) is None, "the order of one row's queries is free"
    fewer = data.csr_fault(row_ptr[:, :9], queries, ids, starts_q, starts_k)
    assert "rows, wanted 23" in (fewer or "")
    request_major = ids.clone()
    request_major[:, :3] = -1
    assert data.csr_fault(*built(request_major, starts_q, starts_k), ids, starts_q, starts_k) is not None


# MSA's own Python.


@pytest.fixture(scope="module")
def msa():
    """The folder of fmha_sm100's files: named, or in an installed vLLM."""
    named = os.environ.get("MSA_FOLDER", "")
    try:
        found = locate(Spec("fmha_sm100", "fmha_sm100", path=named))
    except M3CheckError as error:
        pytest.skip(str(error))
    for top in [found.path] if found.path else sys.path:
        folder = Path(top).joinpath(*found.package.split("."))
        if (folder / "api.py").is_file():
            return folder
    pytest.skip("fmha_sm100 is not in a folder")


@pytest.fixture
def planner(msa, monkeypatch):
    """api.py with stand-ins for what compiles kernels: the host's part of `_fmha_sm100_plan`."""
    shells = {
        "jit": {"_PACK_FACTORS": [1, 2, 4, 6, 8, 16], "get_plan_fn": lambda: SimpleNamespace(plan=lambda *a: None)},
        "nvfp4_kv": {"nvfp4_head_slot_views": None},
        "sparse_fmha_adapter": {"sparse_fmha": None, "sparse_fmha_plan": None},
        "q8kv4_decode_adapter": {},
        "q8kv4_prefill_adapter": {},
    }
    package = ModuleType("m3check_msa")
    package.__path__ = []
    monkeypatch.setitem(sys.modules, "m3check_msa", package)
    for name, held in shells.items():
        shell = ModuleType(f"m3check_msa.{name}")
        unused = ("_dlpack_dtype_code", "get_fmha_variant", "get_reduction_module", "get_sparse_topk_module")
        shell.__dict__.update({**dict.fromkeys(unused), **held})
        setattr(package, name, shell)
        monkeypatch.setitem(sys.modules, f"m3check_msa.{name}", shell)
    spec = importlib.util.spec_from_file_location("m3check_msa.api", msa / "api.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module._NUM_CTA = 148
    return module._fmha_sm100_plan


@pytest.mark.parametrize(
    ("query_lens", "kv_lens", "heads"),
    [(QUERIES, CONTEXTS, 4), ([1, 5, 2], [128, 129, 16385], 4), ([1, 1], [1, 127], 1), ([200, 3], [300, 3], 2)],
)
def test_msas_own_plan_has_no_fault(planner, query_lens, kv_lens, heads):
    q, kv = (torch.tensor(n, dtype=torch.int32) for n in (query_lens, kv_lens))
    options = {"num_kv_heads": 1, "qo_offset": kv - q, "page_size": 128, "output_maxscore": True, "num_kv_splits": 1}
    plan = planner(q, kv, heads, **options, device=torch.device("cpu", 0), stream=1)
    assert data.plan_fault(plan, query_lens, kv_lens, heads) is None


def test_msas_own_csr_reference_agrees(msa, monkeypatch):
    shells = {"src": {}, "src.sm100": {}, "src.sm100.prepare_k2q_csr": {"SparseK2qCsrBuilderSm100": lambda: None}}
    for name, held in shells.items():
        shell = ModuleType(name)
        shell.__path__ = []
        shell.__dict__.update(held)
        monkeypatch.setitem(sys.modules, name, shell)
    spec = importlib.util.spec_from_file_location("m3check_msa_csr", msa / "cute/sparse_index_utils.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for seed in range(3):
        ids, starts_q, starts_k = lists(seed)
        row_ptr, queries = module.build_k2q_csr_torch_reference(ids, starts_q, starts_k, 128)
        assert data.csr_fault(row_ptr, queries, ids, starts_q, starts_k) is None
