"""The plans of OnlyScore and of CUTLASS decode and the CSR of prefill attention as data: what they must hold.

The adapters compare each plan and each CSR with this before they are used, so that a wrong one is told by its field and not
by what a kernel makes of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from m3check.types import BLOCK, blocks

if TYPE_CHECKING:
    from torch import Tensor

LARGEST = 2**31
"""Cells of a score buffer beyond which a plan gives up scores: max_k_tiles is -1."""


def natural_tiles(query_lens: Sequence[int], kv_lens: Sequence[int], heads: int) -> int:
    """max_k_tiles of a plan: the blocks of the longest context, rounded up to 128; -1 for a buffer past LARGEST cells."""
    tiles = -(-blocks(max(kv_lens)) // BLOCK) * BLOCK
    return tiles if heads * tiles * sum(query_lens) <= LARGEST else -1


def plan_fault(plan: Mapping[str, Any], query_lens: Sequence[int], kv_lens: Sequence[int], heads: int) -> str | None:
    """What is wrong with a plan of OnlyScore, as a sentence. Short queries may be packed: `pack_factor` heads in a row."""
    pack = int(plan.get("pack_factor", 1))
    if pack < 1 or heads % pack:
        return f"plan: pack_factor {pack} does not divide {heads} heads"
    packed = [n * pack for n in query_lens]
    wanted = {
        "qo_segment_lens": packed,
        "qo_segment_offsets": [0, *accumulate(packed)],
        "kv_segment_lens": list(kv_lens),
        "kv_segment_offsets": [0, *accumulate(kv_lens)],
        "kv_page_indptr": [0, *accumulate(blocks(n) for n in kv_lens)],
        "qo_offset": [kv - q for q, kv in zip(query_lens, kv_lens, strict=True)],
        "max_k_tiles": [natural_tiles(query_lens, kv_lens, heads)],
    }
    for field, values in wanted.items():
        if field in plan:
            found = _numbers(plan[field])
            if found != values:
                return f"plan: {field} is {_short(found)}, wanted {_short(values)}"
    return None


def decode_fault(held: Any, before: Any, block_table: Tensor, seq_lens: Tensor, decode_query_len: int) -> str | None:
    """What is wrong with the metadata of a CUTLASS decode, as a sentence; `before` are those of a step of the same shape.

    A captured graph reads the plan of the step before, so it must be the same object, with this step's lengths in it.
    """
    if held.plan is not before.plan:
        return "decode plan: another object than for the step before, which has the same shape"
    if held.page_table.data_ptr() != block_table.data_ptr():
        return "decode plan: its page table is not the batch's block table"
    rows = [(r, n, i) for r, n in enumerate(seq_lens.tolist()) for i in range(decode_query_len)]
    width, plan = block_table.stride(0), held.plan[3]
    wanted = {
        "kv_segment_lens": [n for _, n, _ in rows],
        "qo_offset": [n - decode_query_len + i for _, n, i in rows],
        "kv_page_indptr": [r * width for r, _, _ in rows] + [len(seq_lens) * width],
    }
    for field, values in wanted.items():
        found = _numbers(plan[field])[: len(values)] if field in plan else values
        if found != values:
            return f"decode plan: {field} is {_short(found)}, wanted {_short(values)}"
    return None


def csr(topk_idx: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> tuple[Tensor, list[Tensor]]:
    """(row_ptr [H, rows + 1] int64, the query indices of each head) of id lists [H, T, topk].

    A row is a block of a request: first the first blocks of all requests, then their second ones, and so on. A row's
    queries are counted from the start of their request, and ascend. Ids that name no block of the request are left out.
    """
    import torch

    heads, rows, slots = topk_idx.shape
    device = topk_idx.device
    starts, counts = cu_seqlens_q.long(), (cu_seqlens_k.diff().long() + BLOCK - 1) // BLOCK
    most = int(counts.max()) if counts.numel() else 0
    there = torch.arange(most, device=device)[:, None] < counts  # [blocks, R]
    number = (there.flatten().cumsum(0) - 1).view(most, len(counts))
    request = torch.arange(len(counts), device=device).repeat_interleave(starts.diff())
    ids = topk_idx.long()
    valid = (ids >= 0) & (ids < counts[request][None, :, None])
    row = number[ids.clamp(0, max(most - 1, 0)), request[None, :, None].expand(heads, rows, slots)]
    query = torch.arange(rows, device=device)[:, None].expand(rows, slots)
    total = int(counts.sum())
    ends, queries = [], []
    for head in range(heads):
        mine = valid[head]
        order = (row[head][mine] * max(rows, 1) + query[mine]).sort().values
        queries.append(order % max(rows, 1) - starts[request[order % max(rows, 1)]])
        ends.append(torch.bincount(order // max(rows, 1), minlength=total).cumsum(0))
    row_ptr = torch.nn.functional.pad(torch.stack(ends), (1, 0)) if ends else torch.zeros(0, total + 1)
    return row_ptr, queries


def csr_fault(row_ptr: Tensor, queries: Tensor, topk_idx: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> str | None:
    """What is wrong with a CSR of build_k2q_csr, as a sentence. It may have further rows, which are empty.

    The order of a row's queries is free: nothing reads it, and MSA's builder has it from the order in which the lanes of a
    warp are served.
    """
    import torch

    wanted, lists = csr(topk_idx, cu_seqlens_q, cu_seqlens_k)
    rows = wanted.shape[1]
    if row_ptr.shape[1] < rows:
        return f"CSR: {row_ptr.shape[1] - 1} rows, wanted {rows - 1}"
    if bool(row_ptr[:, 0].any()):
        return f"CSR: row_ptr begins with {row_ptr[:, 0].tolist()}, wanted zeros"
    wrong = row_ptr[:, :rows].long() != wanted
    if bool(wrong.any()):
        head, row = (int(i) for i in wrong.nonzero()[0])
        return f"CSR: row {row - 1} of head {head} ends at {int(row_ptr[head, row])}, wanted {int(wanted[head, row])}"
    for head, listed in enumerate(lists):
        of_row = torch.arange(rows - 1, device=listed.device).repeat_interleave(wanted[head].diff())
        found = queries[head, : len(listed)].long()
        found = found[(of_row * LARGEST + found).argsort()]
        differ = found != listed
        if bool(differ.any()):
            at = int(differ.nonzero()[0])
            return f"CSR: entry {at} of head {head} is query {int(found[at])}, wanted {int(listed[at])}"
    return None


def _numbers(values: Any) -> list[int]:
    if hasattr(values, "tolist"):
        values = values.tolist()
    return [int(v) for v in values] if isinstance(values, Sequence) else [int(values)]


def _short(values: list[int]) -> str:
    return str(values) if len(values) <= 8 else f"{values[:8]} …"
