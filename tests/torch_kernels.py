"""All six ops in plain torch on physical tensors, right in themselves; wrong kernels are made of them by small changes."""

from __future__ import annotations

import itertools
import math

import torch

BLOCK = 128


def prefill_rows(cu_seqlens_q, prefix_lens):
    """(request, position) of each query row."""
    starts = cu_seqlens_q.tolist()
    return [
        (r, int(prefix_lens[r]) + i)
        for r, (start, stop) in enumerate(itertools.pairwise(starts))
        for i in range(stop - start)
    ]


def decode_rows(seq_lens, query_len):
    """(request, position) of each query row; the position is negative in a row that sees nothing."""
    return [(r, int(n) - query_len + i) for r, n in enumerate(seq_lens.tolist()) for i in range(query_len)]


def blocks(position):
    """Blocks that a row sees."""
    return max(0, position // BLOCK + 1)


def gather(cache, table, request, count):
    """Pages [count, ...] of the first logical blocks of a request."""
    return cache[table[request, :count].long()]


def score_rows(idx_q, cache, table, rows, columns, gather=gather, mask=True):
    """[H, T, columns] fp32, -inf where a row sees nothing; `mask=False` leaves keys past the position in."""
    result = torch.full((idx_q.shape[1], idx_q.shape[0], columns), -math.inf)
    for row, (request, position) in enumerate(rows):
        count = blocks(position)
        if not count:
            continue
        keys = gather(cache, table, request, count).float().flatten(0, 1)  # [tokens, D]
        dots = idx_q[row].float() @ keys.T
        if mask:
            dots[:, position + 1 :] = -math.inf
        dots = dots.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)
        result[:, row, :count] = dots.unflatten(1, (count, BLOCK)).amax(-1)
    return result


def force(score, rows, init_blocks, local_blocks):
    """Scores with forced cells."""
    score = score.clone()
    for row, (_, position) in enumerate(rows):
        n = blocks(position)
        score[:, row, : min(init_blocks, n)] = 1e30
        score[:, row, max(0, n - local_blocks) : n] = 1e29
    return score


def select_rows(score, rows, topk, init_blocks, local_blocks):
    """[H, T, topk] int32: forced first, then by score, smaller ids first."""
    ids = torch.full((score.shape[0], score.shape[1], topk), -1, dtype=torch.int32)
    marked = force(score, rows, init_blocks, local_blocks)
    for row, (_, position) in enumerate(rows):
        n = blocks(position)
        best = marked[:, row, :n].nan_to_num(nan=-math.inf).argsort(dim=-1, descending=True, stable=True)
        ids[:, row, : min(topk, n)] = best[:, :topk].int()
    return ids


def attend_rows(q, cache, ids, table, rows, sm_scale, output, k_scale=None, v_scale=None, top=None, gather=gather):
    """Softmax attention into `output`; `top(logits, row, head)` gives what is subtracted from the logits."""
    heads, dim = cache.shape[1], q.shape[-1]
    group = q.shape[1] // heads
    for row, (request, position) in enumerate(rows):
        for head in range(heads):
            lanes = slice(head * group, (head + 1) * group)
            listed = [int(b) for b in ids[head, row].tolist() if 0 <= b < blocks(position)]
            if not listed:
                output[row, lanes] = 0
                continue
            pages = gather(cache, table, request, max(listed) + 1)
            token = (torch.tensor(listed)[:, None] * BLOCK + torch.arange(BLOCK)).flatten()
            token = token[token <= position]
            kv = pages[token // BLOCK, head, token % BLOCK]
            slot = table[request, token // BLOCK].long() * BLOCK + token % BLOCK
            k = dequantised(kv[:, :dim], k_scale, head, slot, q.dtype)
            v = dequantised(kv[:, dim:], v_scale, head, slot, q.dtype)
            logits = q[row, lanes].float() @ k.T * sm_scale
            peak = logits.amax(-1, keepdim=True) if top is None else top(logits, row, head)
            p = (logits - peak).exp()
            output[row, lanes] = (p @ v / p.sum(-1, keepdim=True)).to(output.dtype)


def dequantised(stored, scale, head, slot, dtype):
    """Cache entries in fp32, rounded to the queries' dtype first."""
    if scale is None:
        return stored.to(dtype).float()
    factor = scale if scale.numel() == 1 else scale[head, slot][:, None]
    return (stored.float() * factor).to(dtype).float()


def columns_of(max_seq_len):
    """Columns of a score tensor."""
    return -(-max_seq_len // BLOCK)


def index_score(idx_q, index_kv_cache, block_table, cu_seqlens_q, seq_lens, prefix_lens, max_seq_len):
    rows = prefill_rows(cu_seqlens_q, prefix_lens)
    return score_rows(idx_q, index_kv_cache, block_table, rows, columns_of(max_seq_len))


def index_topk(score, cu_seqlens_q, prefix_lens, topk, init_blocks, local_blocks):
    return select_rows(score, prefill_rows(cu_seqlens_q, prefix_lens), topk, init_blocks, local_blocks)


def index_decode_score(
    idx_q, index_kv_cache, block_table, seq_lens, max_seq_len, init_blocks, local_blocks, decode_query_len
):
    rows = decode_rows(seq_lens, decode_query_len)
    plain = score_rows(idx_q, index_kv_cache, block_table, rows, columns_of(max_seq_len))
    return force(plain, rows, init_blocks, local_blocks)


def index_decode(
    idx_q, index_kv_cache, block_table, seq_lens, max_seq_len, topk, init_blocks, local_blocks, decode_query_len
):
    rows = decode_rows(seq_lens, decode_query_len)
    plain = score_rows(idx_q, index_kv_cache, block_table, rows, columns_of(max_seq_len))
    return select_rows(plain, rows, topk, init_blocks, local_blocks)


def sparse_attn(
    q, kv_cache, topk_idx, block_table, cu_seqlens_q, seq_lens, prefix_lens, sm_scale, output, k_scale=None, v_scale=None
):
    rows = prefill_rows(cu_seqlens_q, prefix_lens)
    attend_rows(q, kv_cache, topk_idx, block_table, rows, sm_scale, output, k_scale, v_scale)


def sparse_attn_decode(
    q, kv_cache, topk_idx, block_table, seq_lens, sm_scale, output, decode_query_len, k_scale=None, v_scale=None
):
    rows = decode_rows(seq_lens, decode_query_len)
    attend_rows(q, kv_cache, topk_idx, block_table, rows, sm_scale, output, k_scale, v_scale)


RIGHT = {
    function.__name__: function
    for function in (index_score, index_topk, index_decode_score, index_decode, sparse_attn, sparse_attn_decode)
}
