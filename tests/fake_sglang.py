"""A small SGLang in plain torch, as a source tree and as a wheel: its wrappers and kernels, made from the contract."""

from __future__ import annotations

import textwrap
from pathlib import Path

NEW = "sglang/kernels/ops/attention/minimax_sparse"
OLD = "sglang/srt/layers/attention/minimax_sparse_ops"

UTILS = """
    import inspect
    import torch

    SPARSE_KV_FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)

    class Kernel:
        def __init__(self, function):
            self.function, self.arg_names = function, list(inspect.signature(function).parameters)

        def __getitem__(self, grid):
            return self.function

    def check_sparse_kv_fp8(*tensors):
        pass

    def sparse_out_dtype(q):
        return q.dtype

    def _sort_ids_ascending(ids):
        key = torch.where(ids < 0, 1 << 20, ids).sort(dim=-1).values
        return torch.where(key == 1 << 20, -1, key).to(torch.int32)

    def block_scores(q, keys, sm_scale, forced=None):
        logits = q.float() @ keys.float().T * (torch.tensor(sm_scale) * torch.tensor(1.4426950409))
        return torch.stack([part.amax(1) for part in logits.split(128, dim=1)], dim=1)

    def forced(score, init_blocks, local_blocks):
        score[:, :init_blocks] = 1e30
        if local_blocks:
            score[:, -local_blocks:] = 1e29
        return score

    def best(score, topk):
        ids = torch.full((score.shape[0], topk), -1, dtype=torch.int32)
        taken = score.sort(dim=1, descending=True).indices[:, :topk]
        ids[:, : taken.shape[1]] = taken
        return {sort}(ids)

    def attention(q, k_cache, v_cache, table, ids, seen, sm_scale, k_scale, v_scale):
        group, out = q.shape[0] // k_cache.shape[1], torch.full(q.shape, float("nan"))
        for head in range(q.shape[0]):
            kv = head // group
            blocks = ids[kv][ids[kv] >= 0]
            at = (blocks[:, None] * 128 + torch.arange(128)).flatten()
            slots = table[at[at < seen]].long()
            if len(slots):
                weights = (k_cache[slots, kv].float() @ q[head].float() * sm_scale * k_scale).softmax(0)
                out[head] = weights @ v_cache[slots, kv].float() * v_scale
        return out.to(q.dtype)

    def dense(q, k_cache, v_cache, table, seen, sm_scale, k_scale, v_scale):
        every = torch.arange(-(-seen // 128)).expand(k_cache.shape[1], -1)
        return attention(q, k_cache, v_cache, table, every, seen, sm_scale, k_scale, v_scale)
"""

IMPORTS = """
    import torch
    from sglang.srt.environ import envs
    from sglang.srt.runtime_context import get_platform
    from sglang.srt.utils import is_gfx95_supported, is_xpu
    from ..common.utils import *
    from ..common.utils import _sort_ids_ascending

    HOPPER = get_platform().is_sm90
    ROCM = torch.version.hip is not None
    UNIT = 1.0
"""

PREFILL_INDEX = """
    @Kernel
    def _flash_attn_fwd_with_block_score_kernel(q_ptr, k_cache_ptr, score_ptr, req_to_token_ptr, cu_seqlens, seq_lens,
                                                prefix_lens, slot_ids, sm_scale, v_cache_ptr, o_ptr, k_scale, v_scale):
        for b, sid in enumerate(slot_ids.tolist()):
            keys = k_cache_ptr[req_to_token_ptr[sid, : seq_lens[b]].long(), 0]
            for i, t in enumerate(range(cu_seqlens[b], cu_seqlens[b + 1])):
                found = block_scores(q_ptr[t], keys[: prefix_lens[b] + i + 1], sm_scale)
                score_ptr[:, t, : found.shape[1]] = found
                if o_ptr is not None:
                    seen = int(prefix_lens[b]) + i + 1
                    o_ptr[t] = dense(q_ptr[t], k_cache_ptr, v_cache_ptr, req_to_token_ptr[sid], seen, sm_scale,
                                     k_scale, v_scale)

    @Kernel
    def _topk_index_kernel(s_ptr, ti_ptr, cu_seqlens, prefix_lens, topk, init_blocks, local_blocks,
                           stride_s_h, stride_s_n, stride_s_k):
        assert s_ptr.stride() == (stride_s_h, stride_s_n, stride_s_k)
        for b, prefix in enumerate(prefix_lens.tolist()):
            for i, t in enumerate(range(cu_seqlens[b], cu_seqlens[b + 1])):
                score = s_ptr[:, t, : (prefix + i + 128) // 128].clone()
                ti_ptr[:, t] = best(forced(score, init_blocks, local_blocks), topk)

    def flash_prefill_with_topk_index(q, k_cache, v_cache, sink, req_to_token, slot_ids, cu_seqlens, seq_lens, prefix_lens,
                                      max_seqlen_q, max_seqlen_k, block_size_q, block_size_k, topk, init_blocks,
                                      local_blocks, sm_scale, disable_index_value{page}{scales}):
        {check}
        out = None if disable_index_value else torch.empty_like(q)
        score = torch.full((q.shape[1], q.shape[0], -(-max_seqlen_k // 128)), float("-inf"))
        _flash_attn_fwd_with_block_score_kernel[(1,)](q, k_cache, score, req_to_token, cu_seqlens, seq_lens, prefix_lens,
                                                      slot_ids, sm_scale, v_cache, out, {given})
        ids = torch.full((q.shape[1], q.shape[0], topk), -1, dtype=torch.int32)
        _topk_index_kernel[(1,)](score, ids, cu_seqlens, prefix_lens, topk, init_blocks, local_blocks, *score.stride())
        return out, ids
"""

DECODE_INDEX = """
    @Kernel
    def _topk_index_partial_kernel(s_ptr, ti_partial_ptr, seq_lens, topk):
        for b, seen in enumerate(seq_lens.tolist()):
            ti_partial_ptr[:, b] = best(s_ptr[:, b, : -(-seen // 128)], topk)

    @Kernel
    def _topk_index_merge_kernel(ti_partial_ptr, ti_final_ptr):
        ti_final_ptr.copy_(ti_partial_ptr)

    def flash_decode_with_topk_idx(q, sink, k_cache, v_cache, req_to_token, seq_lens, max_seqlen, slot_ids, block_size,
                                   topk, init_blocks, local_blocks, sm_scale, disable_index_value{page}{scales}):
        assert not envs.SGLANG_OPT_USE_MINIMAX_DECODE_TOPK_RADIX.get()
        score = torch.full((q.shape[1], q.shape[0], -(-max_seqlen // 128)), float("nan"))
        out = None if disable_index_value else torch.full(q.shape, float("nan"), dtype=q.dtype)
        for b, seen in enumerate(seq_lens.tolist()):
            if out is not None:
                out[b] = dense(q[b], k_cache, v_cache, req_to_token[slot_ids[b]], seen, sm_scale, {given})
            if seen:
                keys = k_cache[req_to_token[slot_ids[b], :seen].long(), 0]
                found = forced(block_scores(q[b], keys, sm_scale), init_blocks, local_blocks)
                score[:, b, : found.shape[1]] = found
        partial, ids = torch.full((2, q.shape[1], q.shape[0], topk), -1, dtype=torch.int32)
        _topk_index_partial_kernel[(1,)](score, partial, seq_lens, topk)
        _topk_index_merge_kernel[(1,)](partial, ids)
        return out, ids, None
"""

INDEXER_CP = """
    def score_local_blocks(gathered_q, k_cache, req_to_token, slot_ids, seq_lens, max_seqlen, rank, init_blocks,
                           local_blocks, sm_scale, k_scale, packed_queries):
        world, batch, _ = gathered_q.shape
        scores = torch.full((world, batch, -(-max_seqlen // 128)), float("-inf"))
        for b, seen in enumerate(seq_lens.tolist()):
            if seen:
                keys = k_cache[req_to_token[slot_ids[b], :seen].long(), 0]
                found = forced(block_scores(gathered_q[:, b], keys, sm_scale), init_blocks, local_blocks)
                scores[:, b, : found.shape[1]] = found
        return scores[..., rank::world]

    def select_local_candidates(scores, seq_lens, rank, max_seqlen, topk):
        padded = torch.nn.functional.pad(scores, (0, topk), value=float("-inf"))
        best_scores, at = padded.topk(topk)
        return torch.stack([best_scores.double(), (at * scores.shape[0] + rank).double()])

    def merge_candidates(gathered_keys, head):
        scores, ids = gathered_keys[:, :, head].transpose(0, 1).movedim(1, 2).flatten(2)
        best_scores, at = scores.topk(gathered_keys.shape[-1])
        return _sort_ids_ascending(torch.where(best_scores.isinf(), -1, ids.gather(1, at)).long())[None]
"""

PREFILL = """
    def flash_prefill_with_gqa_share_sparse(q, k_cache, v_cache, sink, req_to_token, slot_ids, topk_idx, block_size_q,
                                            block_size_k, cu_seqlens, seq_lens, prefix_lens, max_seqlen_q,
                                            sm_scale{scales}):
        out = torch.empty(q.shape, dtype=q.dtype)
        for b, sid in enumerate(slot_ids.tolist()):
            for i, t in enumerate(range(cu_seqlens[b], cu_seqlens[b + 1])):
                out[t] = attention(q[t], k_cache, v_cache, req_to_token[sid], topk_idx[:, t], int(prefix_lens[b]) + i + 1,
                                   sm_scale, {given})
        return out
"""

DECODE = """
    def flash_decode_with_gqa_share_sparse(q, sink, k_cache, v_cache, req_to_token, seq_lens, slot_ids, block_size,
                                           topk_idx, sm_scale{page}{scales}):
        rows = zip(slot_ids.tolist(), seq_lens.tolist(), strict=True)
        return torch.stack([attention(q[b], k_cache, v_cache, req_to_token[sid], topk_idx[:, b], seen, sm_scale, {given})
                            for b, (sid, seen) in enumerate(rows)])
"""


def files(*, old: bool = False) -> dict[str, str]:
    """The kernel files by their path in a wheel; the `old` ones take no scales, no page size and no fp8 index cache."""
    tree = OLD if old else NEW
    choices = {
        "page": "" if old else ", page_size=1",
        "scales": "" if old else ", k_scale=None, v_scale=None",
        "given": "1.0, 1.0" if old else "1.0 if k_scale is None else k_scale, 1.0 if v_scale is None else v_scale",
        "check": "pass" if old else "check_sparse_kv_fp8(q, k_cache), sparse_out_dtype(q), _sort_ids_ascending",
        "sort": "" if old else "_sort_ids_ascending",
    }
    texts = {
        "common/utils": UTILS,
        "prefill/flash_with_topk_idx": IMPORTS + PREFILL_INDEX,
        "decode/flash_with_topk_idx": IMPORTS + DECODE_INDEX,
        "prefill/topk_sparse": IMPORTS + PREFILL,
        "decode/topk_sparse": IMPORTS + DECODE,
        **({} if old else {"decode/indexer_cp": IMPORTS + INDEXER_CP}),
    }
    for name, value in choices.items():
        texts = {stem: text.replace(f"{{{name}}}", value) for stem, text in texts.items()}
    return {
        "sglang/__init__.py": "raise RuntimeError('sglang itself was executed')\n",
        f"{tree}/__init__.py": "raise RuntimeError('a package of sglang was executed')\n",
        **{f"{tree}/{stem}.py": textwrap.dedent(text) for stem, text in texts.items()},
    }


def tree(folder: Path, contents: dict[str, str]) -> Path:
    """Write files below a folder, which is returned."""
    from fake_vllm import tree

    return tree(folder, contents)
