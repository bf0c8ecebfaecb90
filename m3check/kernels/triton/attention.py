"""Online softmax over the tokens of listed blocks, for all query heads of one KV head: prefill and decode share it."""

from __future__ import annotations

import triton
import triton.language as tl

from m3check.kernels.triton.dequantise import decoded


@triton.jit
def attend(
    q, kv_len, kv_head,
    ids, stride_ik, first_slot, end_slot,
    cache, stride_cp, stride_ch, stride_ct, stride_cd,
    table, stride_tc,
    k_scale, stride_kh, v_scale, stride_vh,
    scale_log2,
    D: tl.constexpr, KEYS: tl.constexpr, SLOTS: tl.constexpr,
    FORM: tl.constexpr, SCALES: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Attend from q [rows, D] to tokens 0 … kv_len - 1 of the blocks listed in slots first_slot … end_slot - 1.

    `ids` and `table` point at this query's list and this request's row of the block table. Ids that are negative or name
    no visible block are neutral wherever they stand. Returns the unnormalised sum [rows, D], the largest base-2 logit
    [rows] (-inf without any key) and the sum of weights [rows], all fp32.
    """
    ROWS: tl.constexpr = q.shape[0]
    kv_len = kv_len.to(tl.int64)
    slots = tl.arange(0, SLOTS).to(tl.int64)
    listed = tl.load(ids + slots * stride_ik, mask=(slots >= first_slot) & (slots < end_slot), other=-1).to(tl.int64)
    used = tl.max(tl.where((listed >= 0) & (listed * 128 < kv_len), slots + 1, 0), 0)  # past the last valid id

    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.full([ROWS], 0.0, tl.float32)
    acc = tl.full([ROWS, D], 0.0, tl.float32)
    d = tl.arange(0, D).to(tl.int64)
    j = tl.arange(0, KEYS).to(tl.int64)
    if SCALES == "scalar":
        k_one = tl.load(k_scale)
        v_one = tl.load(v_scale)
    for start in range(first_slot * 128, used * 128, KEYS):
        at = start + j  # counts the tokens of the listed blocks; a step lies within a block or spans whole ones
        slot = at // 128
        block = tl.load(ids + slot * stride_ik, mask=slot < used, other=-1).to(tl.int64)
        key = block * 128 + at % 128
        seen = (block >= 0) & (key < kv_len)
        page = tl.load(table + block * stride_tc, mask=seen, other=0).to(tl.int64)
        k_at = page * stride_cp + kv_head * stride_ch + (at % 128) * stride_ct
        pointers = cache + k_at[:, None] + (d * stride_cd)[None, :]
        k = tl.load(pointers, mask=seen[:, None], other=0)
        v = tl.load(pointers + D * stride_cd, mask=seen[:, None], other=0)
        if FORM == "plain":
            k, v = k.to(DTYPE), v.to(DTYPE)
        elif SCALES == "token":
            place = page * 128 + at % 128
            k_by = tl.load(k_scale + kv_head * stride_kh + place, mask=seen, other=0.0)[:, None]
            v_by = tl.load(v_scale + kv_head * stride_vh + place, mask=seen, other=0.0)[:, None]
            k, v = (decoded(k, FORM) * k_by).to(DTYPE), (decoded(v, FORM) * v_by).to(DTYPE)
        elif SCALES == "scalar":
            k, v = (decoded(k, FORM) * k_one).to(DTYPE), (decoded(v, FORM) * v_one).to(DTYPE)
        else:
            k, v = decoded(k, FORM).to(DTYPE), decoded(v, FORM).to(DTYPE)
        logit = tl.dot(q, tl.trans(k), input_precision="ieee", out_dtype=tl.float32) * scale_log2
        logit = tl.where(seen[None, :], logit, float("-inf"))
        new_top = tl.maximum(top, tl.max(logit, 1))
        # Where nothing was seen yet, subtract 0 rather than -inf: every weight is then exactly 0, not NaN.
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        p = tl.exp2(logit - base[:, None])
        decay = tl.exp2(top - base)
        total = total * decay + tl.sum(p, 1)
        acc = tl.dot(p.to(DTYPE), v, acc * decay[:, None], input_precision="ieee", out_dtype=tl.float32)
        top = new_top
    return acc, top, total


@triton.jit
def normalised(acc, total):
    """acc / total by row; zeros where no key was seen."""
    return acc / tl.where(total == 0, 1.0, total)[:, None]
