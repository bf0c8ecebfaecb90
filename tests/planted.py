"""A user's file of kernels that compile badly, each in its own way; nobody runs them."""

import torch
import triton
import triton.language as tl


@triton.jit
def double_buffered(q, cache, out, blocks, TILE: tl.constexpr, D: tl.constexpr):
    """128 keys of 128 channels and as many values at a time; with num_stages=3 both are in shared memory twice."""
    rows, channels = tl.arange(0, 16), tl.arange(0, D)
    keys = tl.arange(0, TILE)
    query = tl.load(q + rows[:, None] * D + channels[None, :])
    acc = tl.zeros([16, D], dtype=tl.float32)
    for i in range(blocks):
        page = cache + i * TILE * 2 * D
        k = tl.load(page + keys[None, :] * 2 * D + channels[:, None])
        v = tl.load(page + keys[:, None] * 2 * D + D + channels[None, :])
        p = tl.exp2(tl.dot(query, k))
        acc = tl.dot(p.to(v.dtype), v, acc)
    tl.store(out + rows[:, None] * D + channels[None, :], acc.to(out.dtype.element_ty))


def sparse_attn(
    q, kv_cache, topk_idx, block_table, cu_seqlens_q, seq_lens, prefix_lens, max_query_len, num_kv_heads, sm_scale, output
):
    double_buffered[(1,)](q, kv_cache, output, topk_idx.shape[2], 128, q.shape[2], num_warps=4, num_stages=3)


@triton.jit
def spilling(score, out, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A tile of 16,384 numbers for the threads of one warp, all of them needed twice."""
    at = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    tile = tl.load(score + at)
    tile = tile - tl.max(tile, axis=1)[:, None]
    tile = tile / tl.sum(tl.exp(tile), axis=0)[None, :]
    tl.store(out + at, tile.to(tl.int32))


def index_topk(score, cu_seqlens_q, prefix_lens, max_query_len, topk, init_blocks, local_blocks, out):
    spilling[(1,)](score, out, 128, 128, num_warps=1)


@triton.jit
def storming(idx_q, score, CONTEXT: tl.constexpr):
    at = tl.arange(0, 128)
    tl.store(score + at, tl.load(idx_q + at).to(tl.float32), mask=at < CONTEXT)


def index_score(idx_q, index_kv_cache, block_table, cu_seqlens_q, prefix_lens, max_seq_len):
    score = torch.empty(idx_q.shape[1], idx_q.shape[0], -(-max_seq_len // 128))
    storming[(1,)](idx_q, score, max_seq_len)
    return score


@triton.jit
def helper(x):
    return tl.no_such_function(x)  # the line that a finding must name


@triton.jit
def broken(idx_q, score):
    at = tl.arange(0, 128)
    tl.store(score + at, helper(tl.load(idx_q + at)))


def index_decode_score(
    idx_q, index_kv_cache, block_table, seq_lens, init_blocks, local_blocks, decode_query_len, score_out
):
    broken[(1,)](idx_q, score_out)


@triton.autotune(
    [triton.Config({"TILE": 64}), triton.Config({"TILE": 256}), triton.Config({"TILE": 16384}, num_warps=1)], key=["tokens"]
)
@triton.jit
def tuned(idx_q, out, tokens, TILE: tl.constexpr):
    """One candidate is refused, one has a tile that no warp holds: the autotuner finds both out, and takes the first."""
    tl.static_assert(TILE != 256)
    at = tl.arange(0, TILE)
    tile = tl.load(idx_q + at).to(tl.float32)
    tile = tl.exp(tile - tl.max(tile, axis=0))
    tl.store(out + at, (tile / tl.sum(tile, axis=0)).to(tl.int32), mask=at < tokens)


def index_decode(idx_q, index_kv_cache, block_table, seq_lens, topk, init_blocks, local_blocks, decode_query_len, out):
    tuned[(1,)](idx_q, out, idx_q.shape[0])


def sparse_attn_decode(q, kv_cache, topk_idx, block_table, seq_lens, num_kv_heads, sm_scale, output, decode_query_len):
    storming[(1,)](q, output, 128)
    assert output[0].isfinite().all(), "looked at what a captured launch did not write"
