"""SGLang's M3 wrappers, called with the keywords of m3check's contract.

Its memory is a pool of slots, one token each, that `req_to_token` maps from a request's positions, and keys and values are
tensors of their own. Both are views here: a slot's number is a multiple of the token stride of the cache it was given, so
no byte is copied and whatever was poisoned stays so. Its wrappers score and select in one call. One op of the two is had by
standing in for the launch of the other: what is launched before, and how, is theirs.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from m3check.kernels.sglang.launches import Stub, instead, launched, not_launched
from m3check.kernels.sglang.views import halves, page_size, requests, rows, scales, slots
from m3check.types import BLOCK

UNSCALED = 0.6931471824645996
"""As fp32: what times 1.4426950409, rounded to fp32, is 1. With this sm_scale scores are plain q·k."""

SELECT_PREFILL = "_topk_index_kernel"
SELECT_DECODE = "_topk_index_partial_kernel"
MERGE_DECODE = "_topk_index_merge_kernel"
NO_SELECTION: Mapping[str, Stub] = {SELECT_DECODE: not_launched, MERGE_DECODE: not_launched}
SCORE_PREFILL = ("_flash_attn_fwd_with_block_score_kernel", "_index_block_score_only_kernel")


class Calls:
    """The wrapper modules of one version; its methods are m3check's ops."""

    def __init__(self, modules: Mapping[str, ModuleType]) -> None:
        """`modules` by their files below the version's tree, without the ending; of indexer_cp only where it is there."""
        self._prefill_index, self._prefill = modules["prefill/flash_with_topk_idx"], modules["prefill/topk_sparse"]
        self._decode_index, self._decode = modules["decode/flash_with_topk_idx"], modules["decode/topk_sparse"]
        self._shared = modules.get("decode/indexer_cp")

    def index_score(
        self,
        idx_q: Tensor,
        index_kv_cache: Tensor,
        block_table: Tensor,
        cu_seqlens_q: Tensor,
        seq_lens: Tensor,
        prefix_lens: Tensor,
        max_query_len: int,
        max_seq_len: int,
    ) -> Tensor:
        """[H, T, blocks(max_seq_len)] fp32: what the wrapper hands to its selection."""
        keys, table = slots(index_kv_cache[:, None], block_table)
        with instead(self._prefill_index, {SELECT_PREFILL: not_launched}) as launches:
            self._index((idx_q, keys, table, cu_seqlens_q, seq_lens, prefix_lens), max_query_len, max_seq_len)
        score: Tensor = launches[SELECT_PREFILL].seen["s_ptr"]
        return score

    def index_topk(
        self,
        score: Tensor,
        cu_seqlens_q: Tensor,
        prefix_lens: Tensor,
        max_query_len: int,
        topk: int,
        init_blocks: int,
        local_blocks: int,
    ) -> Tensor:
        """[H, T, topk] int32: the wrapper's selection, given these scores in place of its own."""
        q = score.new_zeros((score.shape[1], score.shape[0], 16), dtype=torch.bfloat16)
        keys = q.new_zeros((BLOCK, 1, 16))
        table = torch.zeros((prefix_lens.shape[0], BLOCK), dtype=torch.int32, device=score.device)

        def select(arguments: dict[str, Any]) -> dict[str, Any]:
            strides = dict(zip(("stride_s_h", "stride_s_n", "stride_s_k"), score.stride(), strict=True))
            return arguments | strides | {"s_ptr": score}

        stubs: dict[str, Stub] = {**dict.fromkeys(SCORE_PREFILL, not_launched), SELECT_PREFILL: select}
        with instead(self._prefill_index, stubs):
            ids: Tensor = self._index(
                (q, keys, table, cu_seqlens_q, prefix_lens, prefix_lens),
                max_query_len,
                BLOCK,
                topk=topk,
                forced=(init_blocks, local_blocks),
            )[1]
        return ids

    def index_decode_score(
        self,
        idx_q: Tensor,
        index_kv_cache: Tensor,
        block_table: Tensor,
        seq_lens: Tensor,
        max_seq_len: int,
        init_blocks: int,
        local_blocks: int,
        decode_query_len: int,
    ) -> Tensor:
        """[H, T, blocks(max_seq_len)] fp32: what the wrapper hands to its selection."""
        tensors = idx_q, *slots(index_kv_cache[:, None], block_table), seq_lens
        with instead(self._decode_index, NO_SELECTION) as launches:
            self._index_decode(tensors, max_seq_len, decode_query_len, forced=(init_blocks, local_blocks))
        score: Tensor = launches[SELECT_DECODE].seen["s_ptr"]
        return score

    def index_decode(
        self,
        idx_q: Tensor,
        index_kv_cache: Tensor,
        block_table: Tensor,
        seq_lens: Tensor,
        max_seq_len: int,
        topk: int,
        init_blocks: int,
        local_blocks: int,
        decode_query_len: int,
        score_out: Tensor | None = None,
    ) -> Tensor:
        """[H, T, topk] int32; `score_out` receives a copy of the scores of the blocks that each row sees."""
        tensors = idx_q, *slots(index_kv_cache[:, None], block_table), seq_lens
        forced = init_blocks, local_blocks
        with instead(self._decode_index, {SELECT_DECODE: launched}) as launches:
            ids: Tensor = self._index_decode(tensors, max_seq_len, decode_query_len, topk=topk, forced=forced)[1]
        if score_out is not None:
            score = launches[SELECT_DECODE].seen["s_ptr"]
            columns = min(score.shape[2], score_out.shape[2])
            seen = -(-rows(seq_lens, decode_query_len) // BLOCK)
            owned = torch.arange(columns, device=score.device) < seen[:, None]
            into = score_out[..., :columns]
            into.copy_(torch.where(owned, score[..., :columns], into))
        return ids

    def index_decode_cp(
        self,
        idx_q: Tensor,
        index_kv_cache: Tensor,
        block_table: Tensor,
        seq_lens: Tensor,
        max_seq_len: int,
        topk: int,
        init_blocks: int,
        local_blocks: int,
        decode_query_len: int,
        sm_scale: float,
        ranks: int,
    ) -> Tensor:
        """[H, T, topk] int32: each process's candidates of its blocks, then each one's merge for the head that it owns."""
        assert self._shared is not None, "a version without this file is missing this op"
        cp = self._shared
        keys, table = slots(index_kv_cache[:, None], block_table)
        queries, lengths = idx_q.transpose(0, 1).contiguous(), rows(seq_lens, decode_query_len)
        owners = requests(seq_lens).repeat_interleave(decode_query_len)
        candidates = []
        for rank in range(ranks):
            scores = cp.score_local_blocks(
                gathered_q=queries,
                k_cache=keys,
                req_to_token=table,
                slot_ids=owners,
                seq_lens=lengths,
                max_seqlen=max_seq_len,
                rank=rank,
                init_blocks=init_blocks,
                local_blocks=local_blocks,
                sm_scale=sm_scale,
                k_scale=1.0,
                packed_queries=decode_query_len,
            )
            candidates.append(cp.select_local_candidates(scores, lengths, rank, max_seq_len, topk))
        gathered = torch.stack(candidates)
        return torch.cat([cp.merge_candidates(gathered, head) for head in range(ranks)])

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
        """[T, Hq, D], query dtype."""
        keys, values, table = halves(kv_cache, q.shape[-1], block_table)
        out: Tensor = self._prefill.flash_prefill_with_gqa_share_sparse(
            q=q,
            k_cache=keys,
            v_cache=values,
            sink=None,
            req_to_token=table,
            slot_ids=requests(seq_lens),
            topk_idx=topk_idx,
            block_size_q=1,
            block_size_k=BLOCK,
            cu_seqlens=cu_seqlens_q,
            seq_lens=seq_lens,
            prefix_lens=prefix_lens,
            max_seqlen_q=max_query_len,
            sm_scale=sm_scale,
            **scales(k_scale, v_scale),
        )
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
        """[T, Hq, D], query dtype; every query is a request of its own, as the server's verification has it."""
        keys, values, table = halves(kv_cache, q.shape[-1], block_table)
        attend = self._decode.flash_decode_with_gqa_share_sparse
        out: Tensor = attend(
            q=q,
            sink=None,
            k_cache=keys,
            v_cache=values,
            req_to_token=table,
            seq_lens=rows(seq_lens, decode_query_len),
            slot_ids=requests(seq_lens).repeat_interleave(decode_query_len),
            block_size=BLOCK,
            topk_idx=topk_idx,
            sm_scale=sm_scale,
            **page_size(attend),
            **scales(k_scale, v_scale),
        )
        return out

    def _index(
        self,
        tensors: tuple[Tensor, ...],
        max_query_len: int,
        max_seq_len: int,
        *,
        topk: int = 1,
        forced: tuple[int, int] = (0, 0),
        **further: Any,
    ) -> Any:
        """What the prefill wrapper returns: the output of the index head, where it has one, and ids."""
        q, keys, table, cu_seqlens_q, seq_lens, prefix_lens = tensors
        index = self._prefill_index.flash_prefill_with_topk_index
        told = {"sm_scale": UNSCALED, **self._value(keys), **page_size(index), **further}
        return index(
            q=q,
            k_cache=keys,
            sink=None,
            req_to_token=table,
            slot_ids=requests(seq_lens),
            cu_seqlens=cu_seqlens_q,
            seq_lens=seq_lens,
            prefix_lens=prefix_lens,
            max_seqlen_q=max_query_len,
            max_seqlen_k=max_seq_len,
            block_size_q=1,
            block_size_k=BLOCK,
            topk=topk,
            init_blocks=forced[0],
            local_blocks=forced[1],
            **told,
        )

    def _index_decode(
        self,
        tensors: tuple[Tensor, ...],
        max_seq_len: int,
        decode_query_len: int,
        *,
        topk: int = 1,
        forced: tuple[int, int] = (0, 0),
        **further: Any,
    ) -> Any:
        """What the decode wrapper returns, as `_index` says."""
        q, keys, table, seq_lens = tensors
        index = self._decode_index.flash_decode_with_topk_idx
        told = {"sm_scale": UNSCALED, **self._value(keys), **page_size(index), **further}
        return index(
            q=q,
            sink=None,
            k_cache=keys,
            req_to_token=table,
            seq_lens=rows(seq_lens, decode_query_len),
            max_seqlen=max_seq_len,
            slot_ids=requests(seq_lens).repeat_interleave(decode_query_len),
            block_size=BLOCK,
            topk=topk,
            init_blocks=forced[0],
            local_blocks=forced[1],
            **told,
        )

    def _value(self, keys: Tensor) -> dict[str, Any]:
        """What scoring is told of an output of the index head: that there is none, as M3's layers have it."""
        return {"v_cache": None, "disable_index_value": True}
