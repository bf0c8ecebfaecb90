"""The pieces of vLLM's path on AMD in plain torch, right and wrong in one way each."""

from __future__ import annotations

import torch

import m3check
from m3check.kernels import vllm_amd, vllm_amd_together
from m3check.types import ODD_SCORES, Profile, Status

TABLE = "sparse_pa_table_decode/q=3x3,kv=1001+2+256,h=1,topk=6"
HOLES = "sparse_pa_table/q=4+2,kv=900+140,h=1,topk=6,ids=holes,layout=pool"
LISTED = "sparse_pa_table_decode/q=1x4,kv=16+17+640+700,h=1,topk=3,ids=short"


def table(mistake="", reverse=False):
    """A builder of tables for decode in plain torch."""

    def sparse_pa_table_decode(topk_idx, block_table, seq_lens, decode_query_len, block_page_stride):
        rows, topk = topk_idx.shape[1:]
        out = torch.zeros(rows, topk * 8, dtype=torch.int32)
        context = torch.zeros(rows, dtype=torch.int32)
        for t in range(rows):
            request = t // decode_query_len
            position = int(seq_lens[request]) - decode_query_len + t % decode_query_len
            if mistake == "length" and position >= 0:
                position = int(seq_lens[request]) - 1
            if position < 0 and mistake != "padded":
                continue
            own = position // 128
            ids = [int(b) for b in topk_idx[0, t] if 0 <= b <= own]
            early = [b for b in ids if b != own][:: -1 if reverse else 1]
            listed = [*early, *([own] if own in ids else [])]
            if mistake == "order":
                listed = ids
            if mistake == "lost":
                listed = listed[1:]
            if mistake == "neighbour" and len(listed) > 1:
                listed[0] = (listed[0] + 1) % own
            stride = 8 if mistake == "stride" else block_page_stride
            cells = [int(block_table[request, b]) * stride + j for b in listed for j in range(8)]
            if mistake == "slot":
                cells[:2] = cells[1::-1] if len(listed) == 1 else cells[:2]
            out[t, : len(cells)] = torch.tensor(cells, dtype=torch.int32)
            if mistake == "stale":
                out[t, len(cells) :] = 77
            if mistake == "request":
                out[t, : len(cells)] = int(block_table[request - 1, 0]) * stride
            inside = position % 128 + 1
            context[t] = 128 * len(early) + (0 if own not in ids else 128 if mistake == "whole" else inside)
            if mistake == "tail" and own not in ids:
                context[t] += inside
        if mistake == "padded":
            context.clamp_(min=1)
        return out, context

    return sparse_pa_table_decode


def prefill(build):
    """The same for prefill, a query at a time."""

    def sparse_pa_table(topk_idx, block_table, query_req_id, query_abs_pos, block_page_stride):
        made = [
            build(topk_idx[:, t : t + 1], block_table[r : r + 1], query_abs_pos[t : t + 1] + 1, 1, block_page_stride)
            for t, r in enumerate(query_req_id.tolist())
        ]
        return torch.cat([rows for rows, _ in made]), torch.cat([lengths for _, lengths in made])

    return sparse_pa_table


def judged(case, kernel, profile=None):
    found = m3check.verify(case, kernel, profile, invariants=False)
    return found.status, {f.check for f in found.findings if f.status is Status.FAILED}


MERGED = Profile(id_order="score", tie_rule="larger_id", odd_scores=ODD_SCORES - {"huge", "infinite"})


def ordered(score):
    """32 bits that sort like the score; NaN lowest, -0 as 0."""
    if score != score:
        return 0
    bits = int(torch.tensor(score + 0.0, dtype=torch.float32).view(torch.int32)) & 0xFFFFFFFF
    return bits ^ (0xFFFFFFFF if bits >> 31 else 0x80000000)


def exchange(mistake=""):
    """vLLM's exchange of keys in plain torch."""

    def forced(score, block, visible, init_blocks, local_blocks):
        if block >= max(0, visible - local_blocks) and mistake != "forcing":
            return 1e29
        return 1e30 if block < init_blocks else score

    def local_topk_keys(scores, seq_lens, *, topk, rank, world, query_len, global_blocks, init_blocks, local_blocks, out):
        out.zero_()
        for h, t in torch.cartesian_prod(*map(torch.arange, scores.shape[:2])).tolist():
            visible = max(0, -(-(int(seq_lens[t // query_len]) - query_len + t % query_len + 1) // 128))
            keys = []
            for place in range(scores.shape[2]):
                block = place * world + rank
                if block < visible and not (mistake == "last" and rank == world - 1 and place == 0):
                    value = forced(float(scores[h, t, place]), block, visible, init_blocks, local_blocks)
                    named = place if mistake == "own" else block
                    key = 0xFFFFFFFF if mistake == "nan" and value != value else ordered(value)
                    keys.append(1 << 48 | key << 16 | (0xFFFE - named if mistake == "ties" else named + 1))
            best = sorted(keys, reverse=True)[: topk - 1 if mistake == "short" else topk]
            out[h, t, : len(best)] = torch.tensor(best, dtype=torch.int64)
        return out

    def merge_topk_keys(
        keys, topk_idx, seq_lens, *, query_len, init_blocks, local_blocks, attention_block_table=None,
        sparse_block_table_out=None, sparse_context_lens_out=None, block_page_stride=None,
    ):  # fmt: skip
        flat = keys.permute(1, 2, 0, 3).flatten(2)
        best = flat.sort(-1, descending=True).values[..., : topk_idx.shape[-1]]
        block = (best & 0xFFFF).int()
        block = 0xFFFE - block if mistake == "ties" else block - 1
        topk_idx.copy_(block.masked_fill(best == 0, -1))
        if attention_block_table is not None:
            first = (keys[0] & 0xFFFF).int() - 1 if mistake == "first rank" else topk_idx
            lengths = seq_lens - (query_len - 1 if mistake == "drafts" else 0)
            made = table()(
                first, attention_block_table, lengths, query_len, 8 if mistake == "stride" else block_page_stride
            )
            sparse_block_table_out.copy_(made[0])
            sparse_context_lens_out.copy_(made[1])
        return topk_idx

    return {"local_topk_keys": local_topk_keys, "merge_topk_keys": merge_topk_keys}


def selects(mistake=""):
    return vllm_amd.PIECES["index_topk_cp"].composed(exchange(mistake))


def selects_and_writes(mistake=""):
    return vllm_amd.PIECES["index_topk_cp_table"].composed(exchange(mistake))


def scored(mistake=""):
    """Block scores of one rank's blocks, in plain torch."""

    def indexer_context_scores(
        idx_q, cache, block_table, seq_lens, max_seq_len, rank, world, query_len, sm_scale, out=None
    ):
        assert cache.is_contiguous()
        columns = (max_seq_len + 128 * world - 1) // (128 * world)
        scores = out[:, : idx_q.shape[0], :columns].fill_(float("-inf"))
        if mistake == "buffer":
            scores = scores.clone()
        for t in range(idx_q.shape[0]):
            length = int(seq_lens[t // query_len]) - query_len + t % query_len + 1
            for place in range(columns):
                block = place * world + (0 if mistake == "rank" else rank)
                seen = min(128, length - 128 * block) if mistake != "causal" else 128
                if length > 128 * block and seen > 0:
                    keys = cache[int(block_table[t // query_len, block]), :seen].float()
                    best = (idx_q[t].float() @ keys.T).amax(-1) * sm_scale
                    scores[:, t, place] = -best if mistake == "sign" else best
        return scores

    parts = vllm_amd_together.held_to_buffers(exchange() | {"indexer_context_scores": indexer_context_scores})
    return vllm_amd.PIECES["index_decode_cp"].composed({"IndexerCPDecode": layer(parts, mistake)})


def layer(parts, mistake):
    """vLLM's layer of one rank in plain torch."""

    class Layer:
        def __init__(
            self, *, total_heads, rank, world_size, max_tokens, max_seq_len, topk, group, device, head_dim, **forced
        ):
            self.local_heads = max(1, total_heads // world_size)
            self.replicas = max(1, world_size // total_heads)
            self.head_offset = rank // self.replicas * self.local_heads
            self.place, self.limit, self.topk, self.forced = (rank, world_size), max_seq_len, topk, forced
            self.scores = torch.empty(total_heads, max_tokens, -(-max_seq_len // (128 * world_size)))

        def __call__(self, q, cache, table, seq_lens, query_len, out, *, scale):
            every = self.group.all_gather(q.contiguous(), 0).view(self.place[1], *q.shape)[:: self.replicas]
            every = every.permute(1, 0, 2, 3).flatten(1, 2)
            if mistake == "order":
                every = every.flip(1)
            scores = parts["indexer_context_scores"](
                every, cache, table, seq_lens, self.limit, *self.place, query_len, scale, out=self.scores
            )
            keys = torch.empty(*scores.shape[:2], self.topk, dtype=torch.int64)
            rank, world = self.place
            blocks = -(-self.limit // 128)
            parts["local_topk_keys"](
                scores, seq_lens, topk=self.topk, rank=rank, world=world, query_len=query_len, global_blocks=blocks,
                out=keys, **self.forced,
            )  # fmt: skip
            keys = self.group.all_gather(keys, 0).view(world, *keys.shape)
            own = slice(self.head_offset, self.head_offset + self.local_heads)
            parts["merge_topk_keys"](
                keys[:, :1] if mistake == "heads" else keys[:, own], out, seq_lens, query_len=query_len, **self.forced
            )

    return Layer


def fused(mistake=""):
    def index_decode_table(
        idx_q, index_kv_cache, block_table, seq_lens, max_seq_len, topk, init_blocks, local_blocks, num_kv_heads,
        decode_query_len, max_decode_query_len, out, attention_block_table, sparse_block_table_out,
        sparse_context_lens_out, block_page_stride, completion_counter,
    ):  # fmt: skip
        rows = idx_q.shape[0]
        out[:, :rows] = -1
        for t in range(rows):
            r = t // decode_query_len
            length = int(seq_lens[r]) - decode_query_len + t % decode_query_len + 1
            values = []
            for b in range(max(0, -(-length // 128))):
                keys = index_kv_cache[int(block_table[r, b]), : length - 128 * b]
                last = b >= -(-length // 128) - local_blocks
                values.append(
                    1e29 if last else 1e30 if b < init_blocks else float((idx_q[t, 0].float() @ keys.float().T).max())
                )
            best = sorted(range(len(values)), key=lambda b: (-values[b], b))[:topk]
            out[0, t, : len(best)] = torch.tensor(best, dtype=torch.int32)
        read = block_table if mistake == "table" else attention_block_table
        pages_, lengths = table()(out[:, :rows], read, seq_lens, decode_query_len, block_page_stride)
        sparse_block_table_out.copy_(pages_)
        sparse_context_lens_out.copy_(lengths)
        completion_counter.fill_(int(mistake == "counter"))
        return out[:, :rows]

    return index_decode_table


INSERT = "index_insert/q=9+3,kv=300+5,d=32"
REBASE = "page16_rebase/q=9+3,kv=300+130"


def saturated(key, dtype):
    largest = torch.finfo(dtype).max
    return key.float().clamp(-largest, largest).to(dtype)


def cut(key, dtype):
    """Towards zero instead of to nearest."""
    code = saturated(key, dtype)
    return torch.where(code.float().abs() > key.float().abs(), code.view(torch.uint8) - 1, code.view(torch.uint8)).view(
        dtype
    )


def flushed(key, dtype):
    """Numbers below the smallest normal one lost."""
    return saturated(key * (key.abs() >= torch.finfo(dtype).smallest_normal), dtype)


CODES = {
    "cut": cut,
    "flushed": flushed,
    "NaN past the largest": lambda key, dtype: key.float().where(key.abs() <= 448, torch.nan).to(dtype),
    "half away": lambda key, dtype: saturated(key.float() * (1 + 2**-12), dtype),
    "a scale": lambda key, dtype: saturated(key.float() / 1.07, dtype),
}
"""Wrong ways to fp8 codes."""


def inserts(mistake=""):
    def index_insert(index_k, index_cache, index_slot_mapping):
        for t, slot in enumerate(index_slot_mapping.tolist()):
            if slot < 0 and mistake == "stops":
                break
            if slot < 0 and mistake != "padding":
                continue
            if mistake == "neighbour" and slot % 128 < 127:
                slot += 1
            key = index_k[t - 1] if mistake == "key" else index_k[t]
            key = -key.abs() if mistake == "sign" else key
            index_cache[slot // 128, slot % 128] = CODES.get(mistake, saturated)(key, index_cache.dtype)

    return index_insert


def rebases(mistake=""):
    def page16_rebase(slot_mapping, block_table, block_size):
        slots = slot_mapping // block_size * 2 * block_size + slot_mapping % block_size
        if mistake != "padding":
            slots = slots.where(slot_mapping >= 0, slot_mapping)
        if mistake == "twice":
            slots = slot_mapping * 2
        return slots, block_table * (1 if mistake == "table" else 2)

    return page16_rebase
