"""qknorm_rope_insert: norm and rotate fresh queries and keys, insert keys and values into the caches, in one launch."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from m3check.kernels.triton import tiles
from m3check.kernels.triton.dequantise import codes
from m3check.kernels.triton.profile import PROFILE
from m3check.kernels.triton.quantise import encoded
from m3check.types import BLOCK

__all__ = ["PROFILE", "qknorm_rope_insert"]


@triton.jit
def heads_of(
    qkv, stride_t, tile, tokens, FIRST: tl.constexpr, HEADS: tl.constexpr,
    D: tl.constexpr, ROTARY: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """(token, head) rows of one tile, which rows are live, the channels of both halves, where they stand, and their values.

    A pair of channels that turn into each other is in one lane: it is read before it is written in its place.
    """
    row = tile * ROWS + tl.arange(0, ROWS)
    live = row < tokens * HEADS
    token = tl.where(live, row // HEADS, 0).to(tl.int64)
    head = row % HEADS
    pair = tl.arange(0, D // 2)
    low = tl.where(pair < ROTARY // 2, pair, ROTARY // 2 + pair)
    high = tl.where(pair < ROTARY // 2, ROTARY // 2 + pair, D // 2 + pair)
    at = qkv + token * stride_t + (FIRST + head) * D
    here = live[:, None]
    x_low = tl.load(at[:, None] + low[None, :], mask=here, other=0.0).to(tl.float32)
    x_high = tl.load(at[:, None] + high[None, :], mask=here, other=0.0).to(tl.float32)
    return token, head, here, low[None, :], high[None, :], at[:, None], x_low, x_high


@triton.jit
def turned(
    x_low, x_high, weight, cos_sin, stride_p, positions, token, here, low, high, eps,
    D: tl.constexpr, ROTARY: tl.constexpr,
):  # fmt: skip
    """Both halves after norm and rotation, in fp32; cos and sin are 1 and 0 past the rotated channels."""
    scale = tl.rsqrt((tl.sum(x_low * x_low, 1) + tl.sum(x_high * x_high, 1)) / D + eps)[:, None]
    x_low = x_low * scale * (1.0 + tl.load(weight + low).to(tl.float32))
    x_high = x_high * scale * (1.0 + tl.load(weight + high).to(tl.float32))
    angle = cos_sin + tl.load(positions + token)[:, None] * stride_p + low
    rotates = here & (low < ROTARY // 2)
    cos = tl.load(angle, mask=rotates, other=1.0).to(tl.float32)
    sin = tl.load(angle + ROTARY // 2, mask=rotates, other=0.0).to(tl.float32)
    return x_low * cos - x_high * sin, x_high * cos + x_low * sin


@triton.jit
def put(at, low, high, here, y_low, y_high, FORM: tl.constexpr):
    """Store both halves of some rows, rounded once: as numbers of the memory's dtype, or as fp8 codes."""
    if FORM == "plain":
        tl.store(at + low, y_low, mask=here)
        tl.store(at + high, y_high, mask=here)
    else:
        tl.store(at + low, encoded(y_low, FORM), mask=here)
        tl.store(at + high, encoded(y_high, FORM), mask=here)


@triton.jit
def cell(cache, stride_cp, stride_ch, stride_cs, slots, token, head, PAGE: tl.constexpr):
    """Where the cache keeps each row, and whether it keeps it at all: a negative slot is none."""
    slot = tl.load(slots + token)
    page = tl.maximum(slot, 0) // PAGE
    at = cache + page * stride_cp + head.to(tl.int64) * stride_ch + tl.maximum(slot, 0) % PAGE * stride_cs
    return at[:, None], (slot >= 0)[:, None]


@triton.jit(do_not_specialize=["tokens"])
def qknorm_rope_insert_kernel(
    qkv, stride_t, cos_sin, stride_p, positions, tokens, eps,
    q_weight, k_weight, iq_weight, ik_weight,
    q_out, stride_qt, q_codes, stride_qct, q_scale, iq_out, stride_it,
    cache, stride_cp, stride_ch, stride_cs, slots, index_cache, stride_ip, stride_is, index_slots,
    HQ: tl.constexpr, HKV: tl.constexpr, HI: tl.constexpr, D: tl.constexpr, ROTARY: tl.constexpr,
    PAGE: tl.constexpr, ROWS: tl.constexpr, QUERIES: tl.constexpr, CACHED: tl.constexpr,
    Q_FORM: tl.constexpr, IQ_FORM: tl.constexpr, C_FORM: tl.constexpr, I_FORM: tl.constexpr,
):  # fmt: skip
    """Grid: tiles of (token, head) rows of queries, then of keys, values, index queries and index keys.

    QUERIES says where queries go: 1 into `q_out` (which may be qkv itself), 2 into `q_codes`, 3 both. HI is 0 where no
    index branch is worked on.
    """
    tile = tl.program_id(0)
    q_tiles, kv_tiles, iq_tiles = tl.cdiv(tokens * HQ, ROWS), tl.cdiv(tokens * HKV, ROWS), tl.cdiv(tokens * HI, ROWS)
    if tile < q_tiles:
        token, head, here, low, high, _, x_low, x_high = heads_of(
            qkv, stride_t, tile, tokens, 0, HQ, D, ROTARY, ROWS
        )  # fmt: skip
        y_low, y_high = turned(
            x_low, x_high, q_weight, cos_sin, stride_p, positions, token, here, low, high, eps, D, ROTARY
        )  # fmt: skip
        if QUERIES != 2:
            put(q_out + (token * stride_qt + head * D)[:, None], low, high, here, y_low, y_high, "plain")
        if QUERIES != 1:
            at = q_codes + (token * stride_qct + head * D)[:, None]
            put(at, low, high, here, y_low / q_scale, y_high / q_scale, Q_FORM)
    elif tile < q_tiles + kv_tiles:
        token, head, here, low, high, at, x_low, x_high = heads_of(
            qkv, stride_t, tile - q_tiles, tokens, HQ, HKV, D, ROTARY, ROWS
        )  # fmt: skip
        y_low, y_high = turned(
            x_low, x_high, k_weight, cos_sin, stride_p, positions, token, here, low, high, eps, D, ROTARY
        )  # fmt: skip
        put(at, low, high, here, y_low, y_high, "plain")
        if CACHED:
            at, kept = cell(cache, stride_cp, stride_ch, stride_cs, slots, token, head, PAGE)
            put(at, low, high, here & kept, y_low, y_high, C_FORM)
    elif CACHED and tile < q_tiles + 2 * kv_tiles:
        token, head, here, low, high, _, x_low, x_high = heads_of(
            qkv, stride_t, tile - q_tiles - kv_tiles, tokens, HQ + HKV, HKV, D, ROTARY, ROWS
        )  # fmt: skip
        at, kept = cell(cache, stride_cp, stride_ch, stride_cs, slots, token, head, PAGE)
        put(at + D, low, high, here & kept, x_low, x_high, C_FORM)
    elif HI > 0:
        first = q_tiles + (2 * kv_tiles if CACHED else kv_tiles)
        if tile < first + iq_tiles:
            token, head, here, low, high, _, x_low, x_high = heads_of(
                qkv, stride_t, tile - first, tokens, HQ + 2 * HKV, HI, D, ROTARY, ROWS
            )  # fmt: skip
            y_low, y_high = turned(
                x_low, x_high, iq_weight, cos_sin, stride_p, positions, token, here, low, high, eps, D, ROTARY
            )  # fmt: skip
            put(iq_out + (token * stride_it + head * D)[:, None], low, high, here, y_low, y_high, IQ_FORM)
        else:
            token, head, here, low, high, at, x_low, x_high = heads_of(
                qkv, stride_t, tile - first - iq_tiles, tokens, HQ + 2 * HKV + HI, 1, D, ROTARY, ROWS
            )  # fmt: skip
            y_low, y_high = turned(
                x_low, x_high, ik_weight, cos_sin, stride_p, positions, token, here, low, high, eps, D, ROTARY
            )  # fmt: skip
            put(at, low, high, here, y_low, y_high, "plain")
            if CACHED:
                at, kept = cell(index_cache, stride_ip, 0, stride_is, index_slots, token, head, PAGE)
                put(at, low, high, here & kept, y_low, y_high, I_FORM)


def qknorm_rope_insert(
    qkv: Tensor,
    q_norm_weight: Tensor,
    k_norm_weight: Tensor,
    cos_sin_cache: Tensor,
    positions: Tensor,
    num_heads: int,
    num_kv_heads: int,
    rotary_dim: int,
    eps: float,
    index_q_norm_weight: Tensor | None = None,
    index_k_norm_weight: Tensor | None = None,
    num_index_heads: int = 0,
    slot_mapping: Tensor | None = None,
    index_slot_mapping: Tensor | None = None,
    kv_cache: Tensor | None = None,
    index_cache: Tensor | None = None,
    q_out: Tensor | None = None,
    index_q_out: Tensor | None = None,
    skip_index_branch: bool = False,
    q_fp8_out: Tensor | None = None,
    q_fp8_scale: float = 1.0,
) -> None:
    """Work on rows qkv [T, heads · D] of q, k, v and, where `num_index_heads`, index q and index k, in place.

    Queries go to `q_out` or, divided by `q_fp8_scale`, to `q_fp8_out`, or both, and index queries to `index_q_out`: their
    place in qkv is left alone then. Keys, values and index keys go into the caches as well, with scale 1, at slots that are
    not negative. `skip_index_branch` leaves the index heads of a row alone, and the index cache.
    """
    tokens, dim = qkv.shape[0], q_norm_weight.numel()
    width = (num_heads + 2 * num_kv_heads + (num_index_heads + 1 if num_index_heads else 0)) * dim
    if qkv.shape[1] != width:
        raise ValueError(f"qkv has rows of {qkv.shape[1]}, wanted {width}: {num_heads} q, {num_kv_heads} kv, index heads")
    if tokens == 0:
        return
    index_heads = 0 if skip_index_branch else num_index_heads
    cached = kv_cache is not None
    queries = 1 if q_fp8_out is None else (2 if q_out is None else 3)
    rows = tiles.head_tile()
    kinds = [num_heads, num_kv_heads] + [num_kv_heads] * cached + ([index_heads, 1] if index_heads else [])
    grid = (sum(triton.cdiv(tokens * heads, rows) for heads in kinds),)
    q_to = qkv if q_out is None else q_out
    q_codes, q_form = (qkv, "plain") if q_fp8_out is None else codes(q_fp8_out)
    iq_to, iq_form, iq_row = qkv[:, (num_heads + 2 * num_kv_heads) * dim :], "plain", qkv.stride(0)
    if index_q_out is not None:
        (iq_to, iq_form), iq_row = codes(index_q_out), index_q_out.stride(0)
    cache, c_form = (qkv, "plain") if kv_cache is None else codes(kv_cache)
    index, i_form = (qkv, "plain") if index_cache is None else codes(index_cache)
    slots = positions if slot_mapping is None else slot_mapping
    qknorm_rope_insert_kernel[grid](
        qkv, qkv.stride(0), cos_sin_cache, cos_sin_cache.stride(0), positions, tokens, eps,
        q_norm_weight, k_norm_weight,
        q_norm_weight if index_q_norm_weight is None else index_q_norm_weight,
        k_norm_weight if index_k_norm_weight is None else index_k_norm_weight,
        q_to, q_to.stride(0), q_codes, q_codes.stride(0), q_fp8_scale, iq_to, iq_row,
        cache, *(cache.stride()[:3] if cached else (0, 0, 0)), slots,
        index, *(index.stride()[:2] if index_cache is not None else (0, 0)),
        slots if index_slot_mapping is None else index_slot_mapping,
        num_heads, num_kv_heads, index_heads, dim, rotary_dim, BLOCK,
        rows, queries, cached, q_form, iq_form, c_form, i_form,
        num_warps=4,
    )  # fmt: skip
