"""A torch model of fmha_sm100's interface and of vLLM's kernels beside it, written from what they document; no provider.

`Model()` is right; wrong ones override a step of it. The refusals that the real functions make by assertion are here too,
so that an adapter that calls them wrongly is caught.
"""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import torch
from torch import Tensor

TILE = 128


def aligned(*tensors: Tensor, step: int = 16) -> bool:
    """Rows and base at multiples of `step` bytes, as TMA and 16-byte loads need them; dimensions of size 1 count, too."""
    return all(
        t.stride(-1) == 1 and not t.data_ptr() % step and not any(s * t.element_size() % step for s in t.stride()[:-1])
        for t in tensors
    )


def tiles(tokens: int) -> int:
    return -(-tokens // TILE)


class Model:
    """The functions by their own names, as `Interface.of` takes them."""

    # Steps that wrong models override.

    def laid_out(self, max_score: Tensor, t: int, h: int, k: int) -> Tensor:
        """The buffer as [T, H, K]; both orders are accepted, told apart by their shape."""
        return max_score if tuple(max_score.shape) == (t, h, k) else max_score.permute(2, 0, 1)

    def last_position(self, offset: int, i: int) -> int:
        return offset + i

    def offset_of(self, plan: dict, request: int) -> int:
        return plan["qo_offset"][request]

    def scored(self, blocks: Tensor, sm_scale: float) -> Tensor:
        """What is written of the largest dots [H, blocks], of which -inf is a block that is not seen."""
        return blocks

    def pages_of(self, plan: dict, kv_indices: Tensor, request: int) -> Tensor:
        first, last = plan["kv_page_indptr"][request : request + 2]
        return kv_indices[first:last].long()

    def by_token(self, max_score: Tensor, layout: str) -> Tensor:
        """The scores as [T, H, K]."""
        return max_score if layout == "THK" else max_score.permute(2, 0, 1)

    def ordered(self, ids: Tensor, score: Tensor) -> Tensor:
        return ids.sort().values

    def seen_pages(self, valid: int) -> int:
        return valid

    def padded(self, ids: list[int], topk: int) -> list[int]:
        return ids + [-1] * (topk - len(ids))

    def forced(self, score: Tensor, valid: int, begin: int, end: int) -> Tensor:
        score = score.clone()
        score[:begin] = torch.finfo(torch.float32).max
        score[max(0, valid - end) : valid] = torch.finfo(torch.float32).max
        return score

    def served(self, q2k: Tensor) -> Tensor:
        """Which slots of the id lists count [H, T, topk]."""
        return q2k >= 0

    def counted(self, row_ptr: Tensor) -> Tensor:
        """Where each row of the CSR ends [H, rows + 1]."""
        return row_ptr

    def page(self, page_table: Tensor, request: int, block: int) -> int:
        return int(page_table[request, block])

    def merged(self, partial: Tensor, lse: Tensor) -> Tensor:
        """Partial outputs [blocks, G, D] (bf16) and their log-sum-exps [blocks, G] as one output [G, D] fp32."""
        return ((lse - lse.logsumexp(0)).exp()[..., None] * partial.float()).sum(0)

    def first_page(self, plan: dict, row: int) -> int:
        """Where a row's request begins in the flat page table."""
        return int(plan["kv_page_indptr"][row])

    def decode_scales(self, k_scale: float, v_scale: float) -> tuple[float, float]:
        return k_scale, v_scale

    # The plan and OnlyScore.

    def _fmha_sm100_plan(
        self, qo_segment_lens, kv_segment_lens, num_qo_heads, num_kv_heads=-1, qo_offset=None, num_kv_splits=-1,
        page_size=-1, output_maxscore=False, causal=True,
    ):  # fmt: skip
        assert qo_segment_lens.device.type == kv_segment_lens.device.type == "cpu"
        assert num_kv_heads == 1
        assert causal
        qo, kv = qo_segment_lens.tolist(), kv_segment_lens.tolist()
        natural = tiles(tiles(max(kv))) * TILE
        return {
            "max_k_tiles": natural if num_qo_heads * natural * sum(qo) <= 2**31 and output_maxscore else -1,
            "max_qo_len": max(qo),
            "qo_segment_lens": qo,
            "kv_segment_lens": kv,
            "qo_segment_offsets": [0, *itertools.accumulate(qo)],
            "kv_page_indptr": [0, *itertools.accumulate(tiles(n) for n in kv)],
            "qo_offset": qo_offset.tolist(),
        }

    def _fmha_sm100(
        self, q, k, v, plan, kv_indices=None, output_o=True, output_maxscore=True, sm_scale=None, max_score=None
    ):
        assert not output_o
        assert plan["max_k_tiles"] > 0
        assert q.dtype == k.dtype
        assert q.dtype in (torch.bfloat16, torch.float8_e4m3fn)
        assert k.dim() == 4
        assert k.shape[1:] == (1, TILE, 128)
        assert aligned(q, k, max_score)
        assert kv_indices.dtype == torch.int32
        assert kv_indices.numel() == plan["kv_page_indptr"][-1]
        (t, h, _), width = q.shape, plan["max_k_tiles"]
        assert max_score.dtype == torch.float32
        assert tuple(max_score.shape) in {(h, width, t), (t, h, width)}
        scores = self.laid_out(max_score, t, h, width)
        tile_rows = 128 if plan["max_qo_len"] <= 128 else 256
        for request, length in enumerate(plan["qo_segment_lens"]):
            start, kv = plan["qo_segment_offsets"][request], plan["kv_segment_lens"][request]
            offset = self.offset_of(plan, request)
            keys = k[self.pages_of(plan, kv_indices, request), 0].float().flatten(0, 1)
            for i in range(length):
                reached = min(kv, offset + (i // tile_rows + 1) * tile_rows)  # the macro tile's last row
                dots = q[start + i].float() @ keys[: tiles(reached) * TILE].T
                dots[:, self.last_position(offset, i) + 1 :] = -math.inf
                blocks = dots.nan_to_num(nan=-math.inf, neginf=-math.inf).unflatten(1, (-1, TILE)).amax(-1)
                scores[start + i, :, : blocks.shape[1]] = self.scored(blocks, sm_scale)
        return None, max_score

    # Selection.

    def sparse_topk_select(
        self, max_score, topk, num_valid_pages=None, output=None, force_begin_blocks=0, force_end_blocks=0,
        max_score_layout="HKT", block_table=None,
    ):  # fmt: skip
        assert max_score.dtype == torch.float32
        assert max_score.dim() == 3
        assert max_score.is_contiguous()
        assert topk == 16
        assert force_begin_blocks + force_end_blocks <= topk
        assert block_table is None
        scores = self.by_token(max_score, max_score_layout)
        t, h, k = scores.shape
        assert k < 12288
        assert num_valid_pages.dtype in (torch.int32, torch.int64)
        assert num_valid_pages.shape == (t,)
        assert output.dtype == torch.int32
        assert tuple(output.shape) == (t, h, topk)
        for row in range(t):
            valid = min(self.seen_pages(int(num_valid_pages[row])), k)
            for head in range(h):
                marked = self.forced(scores[row, head, :valid], valid, force_begin_blocks, force_end_blocks)
                best = marked.nan_to_num(nan=-math.inf, neginf=-math.inf).argsort(descending=True, stable=True)[:topk]
                ids = self.ordered(best, marked).tolist()
                output[row, head] = torch.tensor(self.padded(ids, topk), dtype=torch.int32)
        return output

    # Prefill attention.

    def build_k2q_csr(
        self, q2k_indices, cu_seqlens_q, cu_seqlens_k, kv_block_size, *, total_k=None, max_seqlen_k=None,
        max_seqlen_q=None, total_rows=None, qhead_per_kv=1, return_schedule=False,
    ):  # fmt: skip
        assert total_k is not None
        assert kv_block_size == TILE
        assert q2k_indices.dtype == cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
        h, t, topk = q2k_indices.shape
        assert topk in (4, 8, 16, 32)
        assert aligned(q2k_indices)
        assert cu_seqlens_q.shape == cu_seqlens_k.shape
        rows = row_map(cu_seqlens_k)
        assert total_rows >= len(rows)
        assert max_seqlen_k >= max(b - a for a, b in itertools.pairwise(cu_seqlens_k.tolist()))
        row_ptr = torch.zeros(h, total_rows + 1, dtype=torch.int32)
        queries = torch.full((h, t * topk), -1, dtype=torch.int32)
        starts, counts = cu_seqlens_q.tolist(), self.served(q2k_indices)
        for head in range(h):
            listed: dict[int, list[int]] = {}
            for request, (first, last) in enumerate(itertools.pairwise(starts)):
                for row in range(first, last):
                    for slot in counts[head, row].nonzero().flatten().tolist():
                        block = rows.get((request, int(q2k_indices[head, row, slot])))
                        if block is not None:
                            listed.setdefault(block, []).append(row - first)
            flat = []
            for block in range(total_rows):
                flat += listed.get(block, [])
                row_ptr[head, block + 1] = len(flat)
            queries[head, : len(flat)] = torch.tensor(flat, dtype=torch.int32)
        return self.counted(row_ptr), queries, SimpleNamespace(capacity=total_rows)

    def sparse_atten_func(
        self, q, k, v, k2q_row_ptr, k2q_q_indices, topK, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        blk_kv=128, causal=False, softmax_scale=None, page_table=None, seqused_k=None, schedule=None, out=None,
    ):  # fmt: skip
        assert causal
        assert schedule is not None
        assert q.dtype == torch.bfloat16
        assert k.dtype == v.dtype
        assert k.dtype in (torch.bfloat16, torch.float8_e4m3fn)
        assert q.shape[2] == k.shape[3] == v.shape[3] == 128
        group = q.shape[1] // k.shape[1]
        assert group in (1, 2, 4, 8, 16)
        assert topK in (4, 8, 16, 32)
        assert k2q_q_indices.shape[1] >= q.shape[0] * topK
        assert all(t.is_contiguous() for t in (q, out, page_table, cu_seqlens_q, cu_seqlens_k, seqused_k))
        assert aligned(q, k, v, out)
        assert page_table.data_ptr() % 16 == 0
        assert seqused_k.dtype == page_table.dtype == torch.int32
        out.zero_()
        starts, lengths = cu_seqlens_q.tolist(), seqused_k.tolist()
        listed: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for (request, block), row in row_map(cu_seqlens_k).items():
            for head in range(k.shape[1]):
                first, last = k2q_row_ptr[head, row : row + 2].tolist()
                for local in k2q_q_indices[head, first:last].tolist():
                    listed.setdefault((starts[request] + local, head), []).append((request, block))
        for (row, head), blocks in listed.items():
            lanes = slice(head * group, (head + 1) * group)
            request = blocks[0][0]
            position = lengths[request] - (starts[request + 1] - starts[request]) + row - starts[request]
            parts = []
            for _, block in blocks:
                page, seen = self.page(page_table, request, block), position + 1 - block * TILE
                if seen > 0:
                    parts.append(attended(q[row, lanes], k[page, head, :seen], v[page, head, :seen], softmax_scale))
            if parts:
                partial, lse = (torch.stack(each) for each in zip(*parts, strict=True))
                out[row, lanes] = self.merged(partial, lse).to(out.dtype)
        return out

    # vLLM's CuteDSL scoring and CUTLASS decode.

    def minimax_m3_index_decode_score_cutedsl(
        self, idx_q, index_kv_cache, block_table, seq_lens, max_seq_len, init_blocks, local_blocks, num_kv_heads,
        decode_query_len, max_decode_query_len, score_out,
    ):  # fmt: skip
        if idx_q.dtype not in (torch.bfloat16, torch.float8_e4m3fn):
            raise TypeError("bf16 and fp8 e4m3 only")
        assert idx_q.dtype == index_kv_cache.dtype
        t, h, d = idx_q.shape
        assert d == 128
        assert index_kv_cache.shape[1] == TILE
        assert t == block_table.shape[0] * decode_query_len
        assert 1 <= decode_query_len <= max_decode_query_len
        assert h * max_decode_query_len <= 32
        assert aligned(idx_q, index_kv_cache, score_out)
        assert block_table.stride(-1) == 1
        assert seq_lens.is_contiguous()
        for request, length in enumerate(seq_lens.tolist()):
            keys = index_kv_cache[block_table[request, : tiles(length)].long()].float().flatten(0, 1)
            for i in range(decode_query_len if length else 0):
                row = request * decode_query_len + i
                dots = idx_q[row].float() @ keys.T
                dots[:, max(0, self.last_position(length - decode_query_len, i) + 1) :] = -math.inf
                score_out[:, row, : tiles(length)] = (
                    dots.nan_to_num(nan=-math.inf, neginf=-math.inf).unflatten(1, (-1, TILE)).amax(-1)
                )
        return score_out

    class MSACutlassDecodePlanCache:
        """Plans by shape."""

        def __init__(self):
            self.plans = {}

    def refreshed(self, plan: dict, seq_lens: Tensor, decode_query_len: int) -> None:
        lengths = seq_lens.repeat_interleave(decode_query_len)
        plan["kv_segment_lens"].copy_(lengths)
        step = torch.arange(decode_query_len, dtype=torch.int32).repeat(len(seq_lens))
        plan["qo_offset"].copy_(lengths - decode_query_len + step)

    def prepare_decode_metadata(
        self, block_table, seq_lens, seq_lens_cpu, decode_query_len, *, num_q_heads, num_kv_heads, page_size, topk_blocks,
        plan_cache=None,
    ):  # fmt: skip
        assert block_table.dtype == seq_lens.dtype == seq_lens_cpu.dtype == torch.int32
        assert block_table.is_contiguous()
        assert seq_lens.is_contiguous()
        assert seq_lens_cpu.shape == seq_lens.shape == block_table.shape[:1]
        assert (page_size, topk_blocks) == (TILE, 16)
        cache = plan_cache or self.MSACutlassDecodePlanCache()
        key = (len(seq_lens), decode_query_len, block_table.stride(0), num_q_heads, num_kv_heads)
        if key not in cache.plans:
            rows = torch.zeros(len(seq_lens) * decode_query_len, dtype=torch.int32)
            starts = [r * block_table.stride(0) for r in range(len(seq_lens)) for _ in range(decode_query_len)]
            indptr = torch.tensor([*starts, block_table.numel()], dtype=torch.int32)
            info = {"kv_segment_lens": rows, "qo_offset": rows.clone(), "kv_page_indptr": indptr}
            cache.plans[key] = (None, None, None, info)
            Model.refreshed(self, info, seq_lens_cpu, decode_query_len)
        self.refreshed(cache.plans[key][3], seq_lens, decode_query_len)
        return SimpleNamespace(plan=cache.plans[key], page_table=block_table.view(-1))

    def msa_cutlass_sparse_decode(
        self, query_fp8, kv_cache, topk, output, metadata, *, scale, q_scale_float, k_scale_float, v_scale_float
    ):
        assert query_fp8.dtype == kv_cache.dtype == torch.float8_e4m3fn
        t, heads, d = query_fp8.shape
        assert tuple(topk.shape) == (t, kv_cache.shape[1], 16)
        assert all(tensor.is_contiguous() for tensor in (query_fp8, topk, output))
        assert (output.shape, output.dtype) == (query_fp8.shape, torch.bfloat16)
        assert aligned(query_fp8, kv_cache, output)
        assert kv_cache.shape[2:] == (TILE, 2 * d)
        group, plan = heads // kv_cache.shape[1], metadata.plan[3]
        k_scale, v_scale = self.decode_scales(k_scale_float, v_scale_float)
        for row, head in itertools.product(range(t), range(kv_cache.shape[1])):
            first, position = self.first_page(plan, row), int(plan["qo_offset"][row])
            assert position < int(plan["kv_segment_lens"][row])
            ids = topk[row, head][topk[row, head] >= 0].tolist()
            assert ids == sorted(ids), "kv_block_indexes must ascend"
            assert topk[row, head, len(ids) :].eq(-1).all(), "-1 must be at the end"
            lanes = slice(head * group, (head + 1) * group)
            tokens = [(metadata.page_table[first + b], position + 1 - b * TILE) for b in ids]
            kv = [kv_cache[int(page), head, : max(0, min(seen, TILE))].float() for page, seen in tokens]
            kv = torch.cat(kv) if kv else torch.zeros(0, 2 * d)
            if not len(kv):
                continue
            logits = query_fp8[row, lanes].float() @ (kv[:, :d] * k_scale).T * (scale * q_scale_float)
            p = (logits - logits.amax(-1, keepdim=True)).exp()
            held = p.to(torch.float8_e4m3fn).float()  # the weights go through the matrix unit in e4m3
            output[row, lanes] = (held @ (kv[:, d:] * v_scale) / p.sum(-1, keepdim=True)).to(output.dtype)


def row_map(cu_seqlens_k: Tensor) -> dict[tuple[int, int], int]:
    """(request, block) -> row of the CSR: the first blocks of all requests come first, then their second ones, …"""
    counts = [tiles(b - a) for a, b in itertools.pairwise(cu_seqlens_k.tolist())]
    order = [(r, block) for block in range(max(counts, default=0)) for r, n in enumerate(counts) if block < n]
    return {key: row for row, key in enumerate(order)}


def attended(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """One block's output [G, D] bf16 and log-sum-exp [G] of queries [G, D]; fp8 keys and values are widened to bf16."""
    logits = q.float() @ k.to(torch.bfloat16).float().T * scale
    p = (logits - logits.amax(-1, keepdim=True)).exp()
    o = p.to(torch.bfloat16).float() @ v.to(torch.bfloat16).float() / p.sum(-1, keepdim=True)
    return o.to(torch.bfloat16), logits.logsumexp(-1)
