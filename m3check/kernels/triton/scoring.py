"""Block scores of a tile of (query, head) pairs: what prefill and decode scoring share."""

from __future__ import annotations

import triton
import triton.language as tl

from m3check.kernels.triton.dequantise import operand


@triton.jit
def score_tile(
    idx_q, stride_qt, stride_qh, stride_qd,
    cache, stride_cp, stride_ct, stride_cd,
    table, stride_tr, stride_tc,
    score, stride_st, stride_sh, stride_sk,
    request, first_token, query_len, prefix, seq_len, columns, init_blocks, local_blocks,
    split, parts,
    H: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    Q_FORM: tl.constexpr, K_FORM: tl.constexpr, DTYPE: tl.constexpr, FORCE: tl.constexpr,
):  # fmt: skip
    """Write the scores of rows program_id(0) · ROWS … of one request against part `split` of its blocks.

    A row is one query and one index head; all heads share the keys, so a tile reads each key once. Cells of blocks that a
    row does not see but another row of the tile does become -inf; no other cell is written.
    """
    begin = tl.program_id(0) * ROWS
    row = begin + tl.arange(0, ROWS)
    query = row // H
    head = (row % H).to(tl.int64)
    live = query < query_len
    position = (prefix + query).to(tl.int64)
    token = (first_token + query).to(tl.int64)
    limit = tl.minimum(position, seq_len - 1)  # the last key that each row sees

    # Blocks that any row of this tile sees, never more than the score buffer or the block table has.
    last_query = tl.minimum((begin + ROWS - 1) // H, query_len - 1)
    visible = tl.minimum(prefix + last_query + 1, seq_len)
    count = tl.minimum((tl.maximum(visible, 0) + 127) // 128, columns)
    count = tl.where(begin < query_len * H, count, 0)
    share = (count + parts - 1) // parts
    first_block = split * share
    last_block = tl.minimum(first_block + share, count)
    if first_block < last_block:
        d = tl.arange(0, D).to(tl.int64)
        q_at = token * stride_qt + head * stride_qh
        q = tl.load(idx_q + q_at[:, None] + (d * stride_qd)[None, :], mask=live[:, None], other=0)
        q = operand(q, Q_FORM, DTYPE)
        row_score = score + token * stride_st + head * stride_sh
        row_blocks = (limit + 128) // 128  # 0 for a row that sees nothing: its limit is negative
        row_blocks = tl.where(limit < 0, 0, row_blocks)
        offset = tl.arange(0, KEYS).to(tl.int64)
        for block in range(first_block.to(tl.int64), last_block.to(tl.int64)):
            page = tl.load(table + request.to(tl.int64) * stride_tr + block * stride_tc).to(tl.int64)
            # The maximum ignores NaN, so what hides keys is NaN: a block whose visible dots are all NaN scores NaN.
            hidden = tl.where(block < row_blocks, float("nan"), float("-inf"))
            best = tl.full([ROWS], float("nan"), tl.float32)
            for part in range(128 // KEYS):  # not unrolled: fp32 tiles would spill
                slot = part * KEYS + offset
                key = block * 128 + slot
                k_at = page * stride_cp + slot * stride_ct
                k = tl.load(cache + k_at[:, None] + (d * stride_cd)[None, :], mask=(key < seq_len)[:, None], other=0)
                k = operand(k, K_FORM, DTYPE)
                s = tl.dot(q, tl.trans(k), input_precision="ieee", out_dtype=tl.float32)
                s = tl.where(key[None, :] <= limit[:, None], s, hidden[:, None])
                best = tl.maximum(best, tl.max(s, 1))
            if FORCE:
                seen = block < row_blocks
                best = tl.where(seen & (block < init_blocks), 1e30, best)
                best = tl.where(seen & (block >= row_blocks - local_blocks), 1e29, best)
            tl.store(row_score + block * stride_sk, best, mask=live)
