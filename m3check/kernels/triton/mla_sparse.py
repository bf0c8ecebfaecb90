"""mla_sparse: attention to listed tokens of a latent cache, the list split into parts whose results are merged."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from m3check.kernels.triton import tiles, tuning
from m3check.kernels.triton.attention import normalised
from m3check.kernels.triton.profile import PROFILE
from m3check.kernels.triton.sparse_attn_decode import merge_kernel
from m3check.types import ROPE

__all__ = ["PROFILE", "mla_sparse", "warm_up"]

LN2 = tl.constexpr(math.log(2))


@triton.autotune(
    tuning.LATENT,
    key=["heads", "topk", "SPLIT"],
    prune_configs_by={"early_config_prune": tuning.latent},
    do_bench=tuning.timed,
)
@triton.jit(do_not_specialize=["rows", "share", "stride_sp"])
def mla_sparse_kernel(
    q, stride_qt, stride_qh, stride_qd,
    kv, stride_ks, stride_kd,
    indices, stride_it, stride_ik,
    output, stride_op, stride_ot, stride_oh, stride_od,
    tops, totals, stride_sp, lse, stride_lt, stride_lh,
    heads, rows, topk, share, scale_log2,
    V: tl.constexpr, R: tl.constexpr, SPLIT: tl.constexpr, DTYPE: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Grid: query tokens × tiles of heads × parts of `share` ids; where SPLIT, `output` takes unnormalised fp32 parts."""
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(2).to(tl.int64)
    head = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = head < heads
    d = tl.arange(0, V).to(tl.int64)
    r = V + tl.arange(0, R).to(tl.int64)
    at = q + token * stride_qt + (head * stride_qh)[:, None]
    latent = tl.load(at + (d * stride_qd)[None, :], mask=live[:, None], other=0)
    rotary = tl.load(at + (r * stride_qd)[None, :], mask=live[:, None], other=0)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.full([ROWS], 0.0, tl.float32)
    acc = tl.full([ROWS, V], 0.0, tl.float32)
    for start in range(part * share, tl.minimum(part * share + share, topk), KEYS):
        slot = start + tl.arange(0, KEYS).to(tl.int64)
        row = tl.load(
            indices + token * stride_it + slot * stride_ik, mask=slot < tl.minimum(part * share + share, topk), other=-1
        ).to(tl.int64)
        listed = (row >= 0) & (row < rows)
        key = kv + (row * stride_ks)[:, None]
        k = tl.load(key + (d * stride_kd)[None, :], mask=listed[:, None], other=0)
        k_rotary = tl.load(key + (r * stride_kd)[None, :], mask=listed[:, None], other=0)
        logit = tl.dot(latent, tl.trans(k), input_precision="ieee", out_dtype=tl.float32)
        logit = tl.dot(rotary, tl.trans(k_rotary), logit, input_precision="ieee", out_dtype=tl.float32) * scale_log2
        logit = tl.where(listed[None, :], logit, float("-inf"))
        new_top = tl.maximum(top, tl.max(logit, 1))
        # Where nothing was listed yet, subtract 0 rather than -inf: every weight is then exactly 0, not NaN.
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        p = tl.exp2(logit - base[:, None])
        decay = tl.exp2(top - base)
        total = total * decay + tl.sum(p, 1)
        acc = tl.dot(p.to(DTYPE), k, acc * decay[:, None], input_precision="ieee", out_dtype=tl.float32)
        top = new_top
    if SPLIT:
        tl.store(tops + part * stride_sp + token * heads + head, top, mask=live)
        tl.store(totals + part * stride_sp + token * heads + head, total, mask=live)
    else:
        acc = normalised(acc, total)
        tl.store(lse + token * stride_lt + head * stride_lh, (top + tl.log2(total)) * LN2, mask=live)
    at = part * stride_op + token * stride_ot + (head * stride_oh)[:, None] + (d * stride_od)[None, :]
    tl.store(output + at, acc.to(output.dtype.element_ty), mask=live[:, None])


@triton.jit(do_not_specialize=["rows", "parts"])
def merge_lse_kernel(tops, totals, rows, lse, stride_lt, stride_lh, heads, parts, ROWS: tl.constexpr):
    """The logsumexp of rows (token, head) from that of their parts: tops and totals [parts, rows], contiguous fp32."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = row < rows
    top = tl.full([ROWS], float("-inf"), tl.float32)
    for part in range(parts):
        top = tl.maximum(top, tl.load(tops + part * rows + row, mask=live, other=float("-inf")))
    base = tl.where(top == float("-inf"), 0.0, top)
    total = tl.full([ROWS], 0.0, tl.float32)
    for part in range(parts):
        weight = tl.exp2(tl.load(tops + part * rows + row, mask=live, other=float("-inf")) - base)
        total += tl.load(totals + part * rows + row, mask=live, other=0.0) * weight
    tl.store(lse + (row // heads) * stride_lt + (row % heads) * stride_lh, (base + tl.log2(total)) * LN2, mask=live)


def mla_sparse(
    q: Tensor,
    kv: Tensor,
    indices: Tensor,
    sm_scale: float,
    d_v: int,
    output: Tensor | None = None,
    lse_out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(out [T, Hq, d_v], natural logsumexp [T, Hq] fp32); a row that lists no token has zeros, and -inf.

    q [T, Hq, d_v + 64], kv [S, 1, d_v + 64], indices [T, 1, topk] int32: rows of kv, those outside it are left out.
    """
    tokens, heads, dim = q.shape
    topk = indices.shape[2]
    if dim != d_v + ROPE or kv.shape[1:] != (1, dim):
        raise ValueError(f"q has {dim} channels, kv [S, {kv.shape[1]}, {kv.shape[2]}], wanted one head of {d_v + ROPE}")
    out = torch.empty(tokens, heads, d_v, dtype=q.dtype, device=q.device) if output is None else output
    lse = torch.empty(tokens, heads, dtype=torch.float32, device=q.device) if lse_out is None else lse_out
    if tokens:
        programs = tokens * triton.cdiv(heads, tiles.latent_heads(heads))
        _launch(q, kv, indices, sm_scale, out, lse, tiles.splits(programs, max(1, topk // tiles.latent_keys(q.dtype))))
    return out, lse


def _launch(q: Tensor, kv: Tensor, indices: Tensor, sm_scale: float, out: Tensor, lse: Tensor, most: int) -> None:
    """Fill `out` and `lse`, each list in `most` parts at most."""
    tokens, heads, dim = q.shape
    topk, d_v = indices.shape[2], dim - ROPE
    keys = tiles.latent_keys(q.dtype)
    share = keys * triton.cdiv(topk, keys * most)
    parts = triton.cdiv(topk, share)
    rows = tokens * heads
    if parts > 1:
        sums = torch.empty(parts, tokens, heads, d_v, dtype=torch.float32, device=q.device)
        # Not one tensor: a pointer into it would be aligned by the number of rows, which is compiled for.
        tops, totals = (torch.empty(parts, rows, dtype=torch.float32, device=q.device) for _ in range(2))
        to, to_strides = sums, sums.stride()
    else:
        tops = totals = lse
        to, to_strides = out, (0, *out.stride())
    mla_sparse_kernel[lambda meta: (tokens, triton.cdiv(heads, meta["ROWS"]), parts)](
        q, *q.stride(), kv, kv.stride(0), kv.stride(2), indices, indices.stride(0), indices.stride(2),
        to, *to_strides, tops, totals, rows, lse, *lse.stride(), heads, kv.shape[0], topk, share,
        sm_scale * math.log2(math.e), d_v, ROPE, parts > 1, tiles.TL_DTYPES[q.dtype],
    )  # fmt: skip
    if parts > 1:
        tile = 64 if tiles.interpreted() else 4
        merge_kernel[(triton.cdiv(rows, tile),)](
            sums, tops, totals, rows, out, *out.stride(), heads, parts, tile, d_v, num_warps=4
        )
        merge_lse_kernel[(triton.cdiv(rows, 64),)](tops, totals, rows, lse, *lse.stride(), heads, parts, 64, num_warps=1)


warm_up = tuning.warm_up(mla_sparse, _launch, mla_sparse_kernel)
"""For a server, before it serves; see there."""
