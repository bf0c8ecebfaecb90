"""What is right: one pure-torch reference for each op, on logical tokens, in fp64 or fp32.

No page table, no split, no switch: each op is the formula at the top of its file. All of them run on any device and in
chunks, so that a 1M-token decode or a 16,384-query prefill fits in 8 GB (in fp32).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from m3check.reference.batch import NAMES
from m3check.reference.chains import decode, prefill
from m3check.reference.dequantise import dequantised
from m3check.reference.index_decode import index_decode
from m3check.reference.index_decode_score import index_decode_score
from m3check.reference.index_score import index_score
from m3check.reference.index_topk import index_topk
from m3check.reference.indexer import indexer
from m3check.reference.mla_sparse import mla_sparse
from m3check.reference.mqa_logits import mqa_logits
from m3check.reference.page16 import index_insert, page16_rebase
from m3check.reference.qknorm_rope_insert import qknorm_rope_insert
from m3check.reference.sparse_attn import sparse_attn
from m3check.reference.sparse_attn_decode import sparse_attn_decode
from m3check.reference.sparse_pa_table import sparse_pa_table
from m3check.types import Inputs, M3CheckError, Outputs

__all__ = [
    "REFERENCES",
    "decode",
    "dequantised",
    "expected",
    "index_decode",
    "index_decode_score",
    "index_score",
    "index_topk",
    "indexer",
    "mla_sparse",
    "mqa_logits",
    "prefill",
    "qknorm_rope_insert",
    "sparse_attn",
    "sparse_attn_decode",
    "sparse_pa_table",
]

# Each op's function, what it reads (fields of Inputs, then of Case; `requests` and `dtype` besides), what it gives.
REFERENCES: Mapping[str, tuple[Callable[..., Any], str, str]] = {
    "index_score": (index_score, "idx_q idx_k requests dtype", "score"),
    "index_topk": (index_topk, "scores requests topk init_blocks local_blocks", "ids"),
    "index_decode_score": (index_decode_score, "idx_q idx_k requests init_blocks local_blocks dtype", "score plain_score"),
    "index_decode": (index_decode, "idx_q idx_k requests topk init_blocks local_blocks dtype", "ids score plain_score"),
    "sparse_attn": (sparse_attn, "q k v topk_idx requests sm_scale dtype", "out lse"),
    "sparse_attn_decode": (sparse_attn_decode, "q k v topk_idx requests sm_scale dtype", "out lse"),
    "sparse_pa_table": (sparse_pa_table, "topk_idx requests", "pages context"),
    "sparse_pa_table_decode": (sparse_pa_table, "topk_idx requests", "pages context"),
    "index_decode_table": (
        index_decode,
        "idx_q idx_k requests topk init_blocks local_blocks dtype",
        "ids score plain_score",
    ),
    "index_decode_cp": (
        index_decode,
        "idx_q idx_k requests topk init_blocks local_blocks dtype",
        "ids score plain_score",
    ),
    "index_insert": (index_insert, "index_k cached", "index_keys"),
    "page16_rebase": (page16_rebase, "requests", "slots blocks"),
    "index_topk_cp": (index_topk, "scores requests topk init_blocks local_blocks", "ids"),
    "index_topk_cp_table": (index_topk, "scores requests topk init_blocks local_blocks", "ids"),
    "mqa_logits": (mqa_logits, "idx_q idx_k key_scale weights requests dtype", "logits"),
    "paged_mqa_logits": (mqa_logits, "idx_q idx_k key_scale weights requests dtype", "logits"),
    "mla_sparse": (mla_sparse, "q k topk_idx requests sm_scale dtype", "out lse"),
    "qknorm_rope_insert": (
        qknorm_rope_insert,
        "x_q x_k x_v x_idx_q x_idx_k w_q w_k w_idx_q w_idx_k cos_sin positions eps dtype",
        "q k v idx_q idx_k",
    ),
    "prefill": (prefill, "idx_q idx_k q k v requests topk init_blocks local_blocks sm_scale dtype", "score ids out lse"),
    "decode": (
        decode,
        "idx_q idx_k q k v requests topk init_blocks local_blocks sm_scale dtype",
        "score plain_score ids out lse",
    ),
    "indexer": (
        indexer,
        "idx_q idx_k q k v requests max_query_len topk init_blocks local_blocks sm_scale dtype",
        f"score plain_score ids out lse {' '.join(NAMES)}",
    ),
}


def expected(inputs: Inputs, dtype: torch.dtype = torch.float64) -> Outputs:
    """What the op of `inputs.case` must give, computed in `dtype` (fp64 or fp32) and not rounded any further.

    `inputs` have been through `dequantised`. Beside the op's own outputs stands what checks need to judge them:
    `plain_score`, the decode scores before forcing, and `lse` [T, Hq], the log2 of each row's sum of exponentials.
    """
    if inputs.k_scale is not None or inputs.v_scale is not None:
        raise M3CheckError("a reference reads dequantised inputs; call dequantised(inputs, rule) first")
    function, reads, gives = REFERENCES[inputs.case.op]
    given = {"requests": tuple(inputs.case.requests()), "dtype": dtype}
    arguments = [given[name] if name in given else _read(inputs, name) for name in reads.split()]
    results = function(*arguments)
    names = gives.split()
    return dict(zip(names, results if len(names) > 1 else (results,), strict=True))


def _read(inputs: Inputs, name: str) -> Any:
    """A field of the inputs, `more` of them included, or of their case."""
    if name in inputs.more:
        return inputs.more[name]
    value = getattr(inputs, name) if hasattr(inputs, name) else getattr(inputs.case, name)
    if value is None:
        raise M3CheckError(f"{inputs.case.op} reads {name}, which these inputs lack")
    return value
