"""A mixed batch through one layer: decoded requests as `decode`, the others as `prefill`, each on its own rows.

    rows [0, nd)   ids and out of `index_decode` and `sparse_attn_decode`,  nd the query tokens of the decoded requests
    rows [nd, T)   ids and out of `index_score`, `index_topk` and `sparse_attn`

The rule that tells them apart is that of `batch`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from m3check.reference.batch import batch
from m3check.reference.chains import decode, prefill
from m3check.types import Request, blocks


def indexer(
    idx_q: Tensor,
    idx_k: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    requests: Sequence[Request],
    max_query_len: int,
    topk: int,
    init_blocks: int,
    local_blocks: int,
    sm_scale: float,
    dtype: torch.dtype,
) -> tuple[Tensor, ...]:
    """(score, plain score, ids, out, lse) of all T rows, then the entries of `batch` as int64 tensors."""
    known = batch([r.query_len for r in requests], [r.kv_len for r in requests], max_query_len)
    [decodes], [rows] = known["num_decodes"], known["num_decode_tokens"]
    columns = blocks(max((request.kv_len for request in requests), default=0))
    parts = []
    if decodes:
        first = requests[:decodes]
        parts.append(decode(idx_q[:rows], idx_k, q[:rows], k, v, first, topk, init_blocks, local_blocks, sm_scale, dtype))
    rest = [replace(request, query_start=request.query_start - rows) for request in requests[decodes:]]
    if rest:
        score, ids, out, lse = prefill(
            idx_q[rows:], idx_k, q[rows:], k, v, rest, topk, init_blocks, local_blocks, sm_scale, dtype
        )
        parts.append((score, score, ids, out, lse))
    score, plain = (torch.cat([_widened(part[i], columns) for part in parts], dim=1) for i in (0, 1))
    ids = torch.cat([part[2] for part in parts], dim=1)
    out, lse = (torch.cat([part[i] for part in parts]) for i in (3, 4))
    told = (torch.tensor(entry, dtype=torch.int64, device=q.device) for entry in known.values())
    return score, plain, ids, out, lse, *told


def _widened(score: Tensor, columns: int) -> Tensor:
    """Scores of a part with the columns of the longest request, -inf in those that the part has no block for."""
    return torch.nn.functional.pad(score, (0, columns - score.shape[-1]), value=-torch.inf)
