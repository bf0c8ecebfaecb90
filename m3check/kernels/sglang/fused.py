"""SGLang's other way through scoring: one pass over the keys that scores every block and attends to all of them.

A layer whose index head has values (`disable_index_value` off) runs these kernels; none of MiniMax-M3's does. Their scores
are held to the same reference, with the keys in the place of values, and their attention is block-sparse attention
on lists that name every visible block.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from m3check.kernels.sglang.calls import MERGE_DECODE, SELECT_DECODE, SELECT_PREFILL, Calls
from m3check.kernels.sglang.launches import instead, not_launched
from m3check.kernels.sglang.views import page_size, requests, rows, scales, slots
from m3check.types import BLOCK

UNUSED = {"topk": 1, "init_blocks": 0, "local_blocks": 0}
"""Of a selection that is not launched."""


class FusedCalls(Calls):
    """The same ops, scoring and dense attention by the fused kernels."""

    def _value(self, keys: Tensor) -> dict[str, Any]:
        return {"v_cache": keys, "disable_index_value": False}

    def sparse_attn(
        self,
        q: Tensor,
        kv_cache: Tensor,
        topk_idx: Tensor,
        block_table: Tensor,
        cu_seqlens_q: Tensor,
        seq_lens: Tensor,
        prefix_lens: Tensor,
        max_query_len: int,
        sm_scale: float,
        k_scale: Tensor | None = None,
        v_scale: Tensor | None = None,
    ) -> Tensor:
        """[T, Hq, D], query dtype; `topk_idx` names every visible block and is not read."""
        keys, values, table = _caches(q, kv_cache, block_table)
        attend = self._prefill_index.flash_prefill_with_topk_index
        with instead(self._prefill_index, {SELECT_PREFILL: not_launched}):
            out: Tensor = attend(
                q=q,
                k_cache=keys,
                v_cache=values,
                sink=None,
                req_to_token=table,
                slot_ids=requests(seq_lens),
                cu_seqlens=cu_seqlens_q,
                seq_lens=seq_lens,
                prefix_lens=prefix_lens,
                max_seqlen_q=max_query_len,
                max_seqlen_k=table.shape[1],
                block_size_q=1,
                block_size_k=BLOCK,
                sm_scale=sm_scale,
                disable_index_value=False,
                **UNUSED,
                **page_size(attend),
                **scales(k_scale, v_scale),
            )[0]
        return out

    def sparse_attn_decode(
        self,
        q: Tensor,
        kv_cache: Tensor,
        topk_idx: Tensor,
        block_table: Tensor,
        seq_lens: Tensor,
        sm_scale: float,
        decode_query_len: int,
        k_scale: Tensor | None = None,
        v_scale: Tensor | None = None,
    ) -> Tensor:
        """[T, Hq, D], query dtype; `topk_idx` names every visible block and is not read."""
        keys, values, table = _caches(q, kv_cache, block_table)
        attend = self._decode_index.flash_decode_with_topk_idx
        with instead(self._decode_index, {SELECT_DECODE: not_launched, MERGE_DECODE: not_launched}):
            out: Tensor = attend(
                q=q,
                sink=None,
                k_cache=keys,
                v_cache=values,
                req_to_token=table,
                seq_lens=rows(seq_lens, decode_query_len),
                max_seqlen=table.shape[1],
                slot_ids=requests(seq_lens).repeat_interleave(decode_query_len),
                block_size=BLOCK,
                sm_scale=sm_scale,
                disable_index_value=False,
                **UNUSED,
                **page_size(attend),
                **scales(k_scale, v_scale),
            )[0]
        return out


def _caches(q: Tensor, kv_cache: Tensor, block_table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values as slots, and req_to_token."""
    dim = q.shape[-1]
    keys, table = slots(kv_cache[..., :dim], block_table)
    return keys, slots(kv_cache[..., dim:], block_table)[0], table
