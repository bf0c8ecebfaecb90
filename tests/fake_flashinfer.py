"""A torch model of flashinfer.msa_ops on SM120, from what flashinfer-python 0.7.2.post1 documents; no provider."""

from __future__ import annotations

import itertools
import math

import torch
from fake_fmha_sm100 import TILE, aligned, attended, tiles


class Model:
    """Right by itself; wrong ones override a step."""

    def limit(self, position: int) -> int:
        """Keys that a query at a position sees."""
        return position + 1

    def page(self, page_table, request: int, block: int) -> int:
        return int(page_table[request, block])

    def bound(self, valid: int) -> int:
        return valid

    def ordered(self, ids):
        return sorted(ids)

    def attends(self, ids: list[int]) -> list[int]:
        return ids

    def scored(self, best):
        """What is written of a block's largest dot product."""
        return best

    def hidden(self):
        """What is written of a block that is not seen."""
        return -math.inf

    def softmax(self, scale):
        return scale

    def scaled(self, out, v_global_scale):
        return out if v_global_scale is None else out * v_global_scale

    def merged(self, partial, lse):
        return ((lse - lse.logsumexp(0)).exp()[..., None] * partial.float()).sum(0)

    def msa_proxy_score(
        self, q, k, cu_seqlens_q, cu_seqlens_k=None, *, page_table=None, seqused_k=None, causal=True, max_seqlen_q=None,
        max_k_tiles=None, output=None, reduce_heads=False, q_offset=None,
    ):  # fmt: skip
        assert causal
        assert cu_seqlens_k is None
        assert q.dtype in (torch.bfloat16, torch.float16, torch.float8_e4m3fn)
        assert k.dtype in (q.dtype, torch.float8_e4m3fn)
        assert k.shape[1:] == (1, TILE, 128)
        assert k.is_contiguous()
        assert aligned(q, k)
        assert page_table.dtype == seqused_k.dtype == cu_seqlens_q.dtype == torch.int32
        assert seqused_k.shape == page_table.shape[:1]
        t, h, _ = q.shape
        starts = cu_seqlens_q.tolist()
        assert max_seqlen_q >= max(b - a for a, b in itertools.pairwise(starts))
        scores = torch.full((h, max_k_tiles, t), self.hidden())
        for request, (first, last) in enumerate(itertools.pairwise(starts)):
            length = int(seqused_k[request])
            for row in range(first, last):
                seen = self.limit(length - (last - first) + row - first)
                for block in range(tiles(min(seen, length)) if seen > 0 else 0):
                    keys = k[self.page(page_table, request, block), 0, : max(0, min(TILE, seen - block * TILE))]
                    scores[:, block, row] = self.scored((q[row].float() @ keys.float().T).amax(-1))
        return scores

    def msa_topk_select(self, max_score, topk, num_valid_pages=None, output=None, force_begin_blocks=0, force_end_blocks=0):
        assert max_score.dtype == torch.float32
        assert max_score.is_contiguous()
        assert topk == 16
        assert 0 <= force_begin_blocks + force_end_blocks <= topk
        h, k, t = max_score.shape
        assert num_valid_pages.dtype == torch.int32
        assert num_valid_pages.shape == (t,)
        assert num_valid_pages.is_contiguous()
        assert output.shape == (t, h, topk)
        assert output.dtype == torch.int32
        beyond = torch.arange(k)[:, None] >= num_valid_pages
        assert max_score.permute(1, 2, 0)[beyond].eq(-math.inf).all(), "the caller sets invalid tiles to -inf"
        for row, head in itertools.product(range(t), range(h)):
            valid = min(max(self.bound(int(num_valid_pages[row])), 0), k)
            marked = max_score[head, :valid, row].clone()
            marked[:force_begin_blocks] = math.inf
            marked[max(0, valid - force_end_blocks) :] = math.inf
            best = marked.nan_to_num(nan=-math.inf).argsort(descending=True, stable=True)[:topk].tolist()
            output[row, head] = torch.tensor(self.ordered(best) + [-1] * (topk - len(best)), dtype=torch.int32)
        return output

    def msa_sparse_attention(
        self, q, k, v, q2k_indices, cu_seqlens_q, cu_seqlens_k=None, causal=False, softmax_scale=None, page_table=None,
        seqused_k=None, v_global_scale=None,
    ):  # fmt: skip
        starts = cu_seqlens_q.tolist()
        rows = [
            (request, int(seqused_k[request]) - (last - first) + i)
            for request, (first, last) in enumerate(itertools.pairwise(starts))
            for i in range(last - first)
        ]
        return self._attended(q, k, v, q2k_indices, rows, page_table, seqused_k, causal, softmax_scale, v_global_scale)

    def msa_sparse_decode_attention(
        self, q, k, v, q2k_indices, *, page_table=None, seqused_k=None, seqlen_q=1, causal=True, softmax_scale=None,
        v_global_scale=None,
    ):  # fmt: skip
        assert q.shape[0] == seqused_k.numel() * seqlen_q
        assert q.shape[1] // k.shape[1] <= 16
        rows = [(r, int(n) - seqlen_q + i) for r, n in enumerate(seqused_k.tolist()) for i in range(seqlen_q)]
        return self._attended(q, k, v, q2k_indices, rows, page_table, seqused_k, causal, softmax_scale, v_global_scale)

    def _attended(self, q, k, v, q2k_indices, rows, page_table, seqused_k, causal, softmax_scale, v_global_scale):
        assert causal
        assert q.is_contiguous()
        assert aligned(q, k, v)
        assert q.dtype in (torch.bfloat16, torch.float16)
        assert k.dtype == v.dtype
        softmax_scale = self.softmax(softmax_scale)
        assert k.dtype in (q.dtype, torch.float8_e4m3fn)
        assert k.shape == v.shape
        assert k.shape[2:] == (TILE, 128)
        assert k.stride() == v.stride()
        assert v.data_ptr() - k.data_ptr() == 128 * k.element_size(), "views split from one packed cache"
        sized = sorted((stride, size) for stride, size in zip(k.stride()[:3], k.shape[:3], strict=True) if size > 1)
        assert all(outer == inner * size for (inner, size), (outer, _) in itertools.pairwise(sized)), "a compact cache"
        assert q2k_indices.dtype == page_table.dtype == seqused_k.dtype == torch.int32
        assert q2k_indices.is_contiguous()
        group = q.shape[1] // k.shape[1]
        out = torch.zeros_like(q)
        for row, (request, position) in enumerate(rows):
            for head in range(k.shape[1]):
                ids = self.attends([b for b in q2k_indices[head, row].tolist() if b >= 0])
                assert ids == sorted(ids), "ascending"
                lanes, parts = slice(head * group, (head + 1) * group), []
                for block in ids:
                    page, seen = self.page(page_table, request, block), self.limit(position) - block * TILE
                    if seen > 0:
                        kv = [x[page, head, : min(seen, TILE)].to(q.dtype) for x in (k, v)]
                        parts.append(attended(q[row, lanes], *kv, softmax_scale))
                if parts:
                    partial, lse = (torch.stack(each) for each in zip(*parts, strict=True))
                    out[row, lanes] = self.scaled(self.merged(partial, lse), v_global_scale).to(out.dtype)
        return out
