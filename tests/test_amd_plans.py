"""Where the pieces of AMD run, what a version lacks of them, and cases that make no sense."""

from __future__ import annotations

import pytest
import torch
from amd_models import (
    HOLES,
)

from m3check import cases, reference
from m3check.arch import ARCHS
from m3check.cases import families
from m3check.kernels import vllm_amd
from m3check.types import OPS, M3CheckError


def test_a_function_is_lifted_out_of_a_file_that_cannot_be_imported(tmp_path):
    file = tmp_path / "file.py"
    file.write_text("import vllm_of_nowhere\n\ndef twice(x: vllm_of_nowhere.Tensor):\n    return torch.add(x, x)\n")
    assert vllm_amd._lifted(file, "twice", {})(torch.tensor(3)) == 6


def test_only_amd_has_the_pieces_and_a_version_says_what_it_lacks(tmp_path):
    ops = tmp_path / "ops"
    ops.mkdir()
    (ops / "sparse_pa.py").write_text("def minimax_m3_build_sparse_block_table_prefill(topk_idx, block_table): ...\n")
    assert "production does not use it" in vllm_amd.missing("sparse_pa_table", ops, ARCHS["sm90"], "9.9")
    assert vllm_amd.missing("sparse_pa_table", ops, ARCHS["gfx942"], "9.9") is None
    assert "no minimax_m3_build_sparse_block_table_decode" in vllm_amd.missing(
        "sparse_pa_table_decode", ops, ARCHS["gfx942"], "9.9"
    )
    assert "takes no block_page_stride" in vllm_amd.refusal("sparse_pa_table", cases.parse_id(HOLES), ops)
    assert vllm_amd.refusal("sparse_pa_table", cases.parse_id("sparse_pa_table/q=1,kv=1,h=1"), ops) is None
    wide = cases.parse_id("index_decode_cp/q=1,kv=300,d=64")
    assert "head_dim 64" in vllm_amd.refusal("index_decode_cp", wide, ops)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("sparse_pa_table/q=1,kv=1", "for one KV head"),
        ("index_decode_cp/q=1,kv=1,layout=nhd", "known here: hnd, pool"),
        ("index_decode_cp/q=1,kv=1,fill=odd", "known here: gauss"),
        ("index_topk_cp/q=1,kv=1,d=64", "does not read d"),
    ],
)
def test_a_case_that_makes_no_sense_says_so(text, sentence):
    with pytest.raises(M3CheckError, match=sentence):
        cases.parse_id(text)


def test_every_listed_case_can_be_made_and_judged_by_its_reference():
    for tier in ("smoke", "ci"):
        for case in (cases.parse_id(line) for line in families.listed(tier)):
            if OPS[case.op].family == "amd" and case.context < 9_000:
                assert set(OPS[case.op].outputs) & set(reference.expected(cases.make_inputs(case)))
