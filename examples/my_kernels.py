"""Two kernels of a user, in plain torch: what m3check calls, and how a kernel finds its keys through pages.

    m3check run --arch sm90 --kernels ./examples/my_kernels.py --tier smoke

Functions are named like the ops and take the keywords that `m3check kernels --signatures` prints. Ops that are not here
are reported as skipped. Replace the bodies by calls of your own kernels.
"""

from __future__ import annotations

import torch

from m3check import Profile

BLOCK = 128  # tokens of a page, which is also the unit of selection

# Only what differs from m3check's defaults: this softmax works on RN(code · scale) of an fp8 cache.
PROFILE = Profile(dequantise="rounded")


def index_score(
    idx_q,  # [T, H, D]            index queries of all requests, one after the other
    index_kv_cache,  # [pages, 128, D]      one key for each token, shared by all heads
    block_table,  # [R, columns]         page of each logical block
    cu_seqlens_q,  # [R + 1]              where each request's queries start
    seq_lens,  # [R]                  visible tokens, the queries' own included
    prefix_lens,  # [R]                  tokens before the first query
    max_seq_len,
):
    """Score of a block: the largest q·k of its visible tokens. Returns [H, T, K] fp32, -inf where a query sees nothing."""
    tokens, heads, _ = idx_q.shape
    columns = -(-max_seq_len // BLOCK)
    score = torch.full((heads, tokens, columns), float("-inf"), device=idx_q.device)
    for request, (start, stop) in enumerate(zip(cu_seqlens_q[:-1].tolist(), cu_seqlens_q[1:].tolist(), strict=True)):
        visible, prefix = int(seq_lens[request]), int(prefix_lens[request])
        for block in range(-(-visible // BLOCK)):
            keys = index_kv_cache[block_table[request, block]].float()  # [128, D]
            dots = torch.einsum("thd,kd->htk", idx_q[start:stop].float(), keys)
            position = block * BLOCK + torch.arange(BLOCK, device=keys.device)
            own = prefix + torch.arange(stop - start, device=keys.device)
            # Masked after the product: what lies behind the last token of a page is undefined, NaN included.
            dots = dots.masked_fill(position > own[:, None], float("-inf"))
            score[:, start:stop, block] = dots.amax(-1)
    return score


def sparse_attn_decode(
    q,  # [T, Hq, D]               query tokens, `decode_query_len` of each request
    kv_cache,  # [pages, Hkv, 128, 2D]    keys in the first D channels, values in the others
    topk_idx,  # [Hkv, T, topk]           logical blocks to attend to, -1 where there is none
    block_table,  # [R, columns]
    seq_lens,  # [R]                      0 for a padded row
    sm_scale,
    output,  # [T, Hq, D]               written here
    decode_query_len,
    k_scale=None,  # None, [1] or [Hkv, pages * 128] for an fp8 cache
    v_scale=None,
):
    """Softmax attention of each query over the visible tokens of its blocks; a row without any gives zeros."""
    kv_heads, head_dim = kv_cache.shape[1], q.shape[-1]
    group = q.shape[1] // kv_heads
    offset = torch.arange(BLOCK, device=q.device)
    for row in range(q.shape[0]):
        request, step = divmod(row, decode_query_len)
        visible = int(seq_lens[request]) - decode_query_len + step + 1  # tokens that this query sees
        for head in range(kv_heads):
            blocks = topk_idx[head, row].long()
            blocks = blocks[(blocks >= 0) & (blocks * BLOCK < visible)]
            position = (blocks[:, None] * BLOCK + offset).flatten()
            slot = (block_table[request, blocks].long()[:, None] * BLOCK + offset).flatten()
            slot = slot[position < visible]  # [tokens]
            heads = slice(head * group, (head + 1) * group)
            if len(slot) == 0:
                output[row, heads] = 0
                continue
            stored = kv_cache[slot // BLOCK, head, slot % BLOCK]  # [tokens, 2D]
            keys = _dequantised(stored[:, :head_dim], k_scale, head, slot, q.dtype)
            values = _dequantised(stored[:, head_dim:], v_scale, head, slot, q.dtype)
            weights = torch.softmax(q[row, heads].float() @ keys.T * sm_scale, dim=-1)  # [group, tokens]
            output[row, heads] = (weights @ values).to(output.dtype)


def _dequantised(stored, scale, head, slot, dtype):
    """Cache entries [tokens, D] in fp32, as a kernel sees them that multiplies in the queries' dtype."""
    if scale is None:
        return stored.to(dtype).float()
    factor = scale if scale.numel() == 1 else scale[head, slot][:, None]
    return (stored.float() * factor).to(dtype).float()
