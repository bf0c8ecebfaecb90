"""SGLang's M3 wrappers, called with the keywords of m3check's contract.

Its memory is a pool of slots, one token each, that `req_to_token` maps from a request's positions, and keys and values are
tensors of their own. Both are views here: a slot's number is a multiple of the token stride of the cache it was given, so
no byte is copied and whatever was poisoned stays so. Its wrappers score and select in one call. One op of the two is had by
standing in for the launch of the other: what is launched before, and how, is theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from inspect import signature
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from m3check.types import BLOCK, M3CheckError

UNSCALED = 0.6931471824645996
"""As fp32: what times 1.4426950409, rounded to fp32, is 1. With this sm_scale scores are plain q·k."""

SELECT_PREFILL = "_topk_index_kernel"
SELECT_DECODE = "_topk_index_partial_kernel"
MERGE_DECODE = "_topk_index_merge_kernel"
SCORE_PREFILL = ("_flash_attn_fwd_with_block_score_kernel", "_index_block_score_only_kernel")


class Calls:
    """The four wrapper modules of one version; its methods are m3check's ops."""

    def __init__(
        self, prefill_index: ModuleType, decode_index: ModuleType, prefill: ModuleType, decode: ModuleType
    ) -> None:
        self._prefill_index, self._prefill = prefill_index, prefill
        self._decode_index, self._decode = decode_index, decode

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
        keys, table = _slots(index_kv_cache[:, None], block_table)
        with _instead(self._prefill_index, {SELECT_PREFILL: _not_launched}) as launches:
            self._index(
                (idx_q, keys, table, cu_seqlens_q, seq_lens, prefix_lens), max_query_len, max_seq_len, topk=1, forced=(0, 0)
            )
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

        stubs: dict[str, Stub] = {**dict.fromkeys(SCORE_PREFILL, _not_launched), SELECT_PREFILL: select}
        with _instead(self._prefill_index, stubs):
            ids: Tensor = self._index(
                (q, keys, table, cu_seqlens_q, prefix_lens, prefix_lens),
                max_query_len,
                BLOCK,
                topk=topk,
                forced=(init_blocks, local_blocks),
            )
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
        with _instead(self._decode_index, {SELECT_DECODE: _not_launched, MERGE_DECODE: _not_launched}) as launches:
            self._index_decode(
                idx_q, index_kv_cache, block_table, seq_lens, max_seq_len, 1, (init_blocks, local_blocks), decode_query_len
            )
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
        with _instead(self._decode_index, {SELECT_DECODE: _launched}) as launches:
            ids: Tensor = self._index_decode(
                idx_q,
                index_kv_cache,
                block_table,
                seq_lens,
                max_seq_len,
                topk,
                (init_blocks, local_blocks),
                decode_query_len,
            )
        if score_out is not None:
            score = launches[SELECT_DECODE].seen["s_ptr"]
            columns = min(score.shape[2], score_out.shape[2])
            seen = -(-_rows(seq_lens, decode_query_len) // BLOCK)
            owned = torch.arange(columns, device=score.device) < seen[:, None]
            into = score_out[..., :columns]
            into.copy_(torch.where(owned, score[..., :columns], into))
        return ids

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
        dim = q.shape[-1]
        keys, table = _slots(kv_cache[..., :dim], block_table)
        values, _ = _slots(kv_cache[..., dim:], block_table)
        out: Tensor = self._prefill.flash_prefill_with_gqa_share_sparse(
            q=q,
            k_cache=keys,
            v_cache=values,
            sink=None,
            req_to_token=table,
            slot_ids=_requests(seq_lens),
            topk_idx=topk_idx,
            block_size_q=1,
            block_size_k=BLOCK,
            cu_seqlens=cu_seqlens_q,
            seq_lens=seq_lens,
            prefix_lens=prefix_lens,
            max_seqlen_q=max_query_len,
            sm_scale=sm_scale,
            **_scales(k_scale, v_scale),
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
        dim = q.shape[-1]
        keys, table = _slots(kv_cache[..., :dim], block_table)
        values, _ = _slots(kv_cache[..., dim:], block_table)
        attend = self._decode.flash_decode_with_gqa_share_sparse
        out: Tensor = attend(
            q=q,
            sink=None,
            k_cache=keys,
            v_cache=values,
            req_to_token=table,
            seq_lens=_rows(seq_lens, decode_query_len),
            slot_ids=_requests(seq_lens).repeat_interleave(decode_query_len),
            block_size=BLOCK,
            topk_idx=topk_idx,
            sm_scale=sm_scale,
            **_page_size(attend),
            **_scales(k_scale, v_scale),
        )
        return out

    def _index(
        self, tensors: tuple[Tensor, ...], max_query_len: int, max_seq_len: int, *, topk: int, forced: tuple[int, int]
    ) -> Any:
        q, keys, table, cu_seqlens_q, seq_lens, prefix_lens = tensors
        index = self._prefill_index.flash_prefill_with_topk_index
        return index(
            q=q,
            k_cache=keys,
            v_cache=None,
            sink=None,
            req_to_token=table,
            slot_ids=_requests(seq_lens),
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
            sm_scale=UNSCALED,
            disable_index_value=True,
            **_page_size(index),
        )[1]

    def _index_decode(
        self,
        idx_q: Tensor,
        index_kv_cache: Tensor,
        block_table: Tensor,
        seq_lens: Tensor,
        max_seq_len: int,
        topk: int,
        forced: tuple[int, int],
        decode_query_len: int,
    ) -> Any:
        keys, table = _slots(index_kv_cache[:, None], block_table)
        index = self._decode_index.flash_decode_with_topk_idx
        return index(
            q=idx_q,
            sink=None,
            k_cache=keys,
            v_cache=None,
            req_to_token=table,
            seq_lens=_rows(seq_lens, decode_query_len),
            max_seqlen=max_seq_len,
            slot_ids=_requests(seq_lens).repeat_interleave(decode_query_len),
            block_size=BLOCK,
            topk=topk,
            init_blocks=forced[0],
            local_blocks=forced[1],
            sm_scale=UNSCALED,
            disable_index_value=True,
            **_page_size(index),
        )[1]


# Memory as SGLang has it.


def _slots(cache: Tensor, block_table: Tensor) -> tuple[Tensor, Tensor]:
    """A cache [pages, heads, 128, D] as slots [S, heads, D], and req_to_token [R, columns · 128] int32; no key is copied.

    Slot s is what lies s token strides after the first token, so a page's tokens are neighbours, and slots between pages
    (other heads, layers, values) exist and are nobody's.
    """
    page, head, token, channel = cache.stride()
    if page % token:
        raise M3CheckError(f"pages lie {page} elements apart, which is no multiple of the {token} between tokens")
    slots = page // token
    view = cache.as_strided(
        ((cache.shape[0] - 1) * slots + BLOCK, cache.shape[1], cache.shape[3]),
        (token, head, channel),
        cache.storage_offset(),
    )
    table = block_table[..., None] * slots + torch.arange(BLOCK, dtype=torch.int32, device=block_table.device)
    return view, table.flatten(1)


def _requests(seq_lens: Tensor) -> Tensor:
    """[R] int64: the row of req_to_token of each request."""
    return torch.arange(seq_lens.shape[0], device=seq_lens.device)


def _rows(seq_lens: Tensor, query_len: int) -> Tensor:
    """[R · query_len] int32: the tokens that each query sees, 0 for a padded one."""
    ahead = torch.arange(1 - query_len, 1, dtype=torch.int32, device=seq_lens.device)
    return (seq_lens[:, None] + ahead).clamp(min=0).flatten()


def _scales(k_scale: Tensor | None, v_scale: Tensor | None) -> dict[str, float]:
    """Scales as the numbers that SGLang takes; none where there are none, since early versions take none."""
    given = {"k_scale": k_scale, "v_scale": v_scale}
    return {name: float(scale) for name, scale in given.items() if scale is not None}


def _page_size(function: Callable[..., Any]) -> dict[str, int]:
    return {"page_size": BLOCK} if "page_size" in signature(function).parameters else {}


# Standing in for a launch.

Stub = Callable[[dict[str, Any]], "dict[str, Any] | None"]
"""Takes the arguments of a launch by name; gives those to launch with, or None for no launch."""


def _not_launched(arguments: dict[str, Any]) -> None:
    return None


def _launched(arguments: dict[str, Any]) -> dict[str, Any]:
    return arguments


class _Launcher:
    """Stands in a module for a Triton kernel, and remembers the arguments of its last launch by name."""

    def __init__(self, kernel: Any, stub: Stub) -> None:
        self._kernel, self._stub = kernel, stub
        self.seen: dict[str, Any] = {}

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def call(*places: Any, **keywords: Any) -> None:
            names = self._kernel.arg_names[: len(places)]
            self.seen = dict(zip(names, places, strict=True)) | keywords
            arguments = self._stub(dict(self.seen))
            if arguments is not None:
                # By place where the wrapper passes by place: autotuners know arguments by their places.
                by_place = [arguments.pop(name) for name in names]
                self._kernel[grid](*by_place, **arguments)

        return call


@contextmanager
def _instead(module: ModuleType, stubs: Mapping[str, Stub]) -> Iterator[dict[str, _Launcher]]:
    """Stand in for kernels of a module, where it has them; gives what stands there, by the kernel's name."""
    real = {name: getattr(module, name) for name in stubs if hasattr(module, name)}
    there = {name: _Launcher(kernel, stubs[name]) for name, kernel in real.items()}
    try:
        for name, launcher in there.items():
            setattr(module, name, launcher)
        yield there
    finally:
        for name, kernel in real.items():
            setattr(module, name, kernel)
