"""The rows of the catalogue: public defects of sparse-attention kernels, one `Row` each.

A row says where it can show: `interpreted` (on a CPU), `device` (needs a real launch), or `elsewhere`: not in the ops that
m3check runs, with the reason. Edits are of our own kernels; wrappers go around anybody's. Forms that only a real launch
shows stand in `launching`.
"""

from __future__ import annotations

import math

from m3check.mutants.forms import Change, Dropped, Row, Wrap
from m3check.mutants.wrappers import after, attention, caches, calls, given, inserts, scores, selection

SCORING = ("index_score", "index_decode_score", "index_decode")
DECODE_SCORING = ("index_decode_score", "index_decode")
SELECTING = ("index_topk", "index_decode")
ATTENDING = ("sparse_attn", "sparse_attn_decode")
INSERTING = ("qknorm_rope_insert",)

ROWS: tuple[Row, ...] = (
    Row("S1", "mask of keys past seq_len removed in the last partial block", "interpreted", (
        Change("the last query's mask", (
            ("scoring.py", "limit = tl.minimum(position, seq_len - 1)",
             "limit = tl.where(position == seq_len - 1, position | 127, tl.minimum(position, seq_len - 1))"),
            ("scoring.py", ", mask=(key < seq_len)[:, None], other=0)", ")"),
        )),
        Change("every query's mask in its last block", (
            ("scoring.py", "limit = tl.minimum(position, seq_len - 1)", "limit = position | 127"),
            ("scoring.py", ", mask=(key < seq_len)[:, None], other=0)", ")"),
        )),
    )),
    Row("S2", "score row sized by a stale host length", "interpreted", (
        Wrap("max_seq_len 64", ("index_score",), scores.narrow_scores),
    )),
    Row("S3", "score cells of invisible blocks not written, and selection reads them", "interpreted", (
        Change("selection reads every column", (
            ("selection.py", "seen = live[:, None] & (block[None, :] < visible[:, None])",
             "seen = live[:, None] & (block[None, :] < visible[:, None] + 16)"),
        )),
    ), "the contract lets score kernels leave those cells alone, so it is their reader that is made wrong"),
    Row("S4", "page * stride in int32", "interpreted", (
        Change("score kernels", (
            ("scoring.py", "k_at = page * stride_cp + slot * stride_ct",
             "k_at = (page.to(tl.int32) * stride_cp).to(tl.int32) + slot * stride_ct"),
        )),
        Change("attention", (
            ("attention.py", "k_at = page * stride_cp + kv_head * stride_ch + (at % 128) * stride_ct",
             "k_at = (page.to(tl.int32) * stride_cp).to(tl.int32) + kv_head * stride_ch + (at % 128) * stride_ct"),
        )),
    )),
    Row("S6", "one selection for all index heads", "interpreted", (
        Wrap("the largest score of any head", ("index_score",), after(scores.shared_over_heads)),
        Wrap("the first head's ids", SELECTING, after(scores.shared_over_heads)),
    )),
    Row("S8", "index-head norm over all heads", "interpreted", (
        Wrap("one norm for all index heads", INSERTING, inserts.normed_over_all_heads),
    )),
    Row("S9", "index queries rounded twice; cache of layer 0", "interpreted", (
        Wrap("queries through e4m3", SCORING, given(idx_q=scores.rounded_twice)),
        Wrap("index cache of layer 0", SCORING, given(index_kv_cache=caches.first_layer("index_kv_cache"))),
        Wrap("main cache of layer 0", ATTENDING, given(kv_cache=caches.first_layer("kv_cache"))),
    )),
    Row("S11", "a prefill chunk starts its first block's maximum anew", "interpreted", (
        Wrap("earlier keys of that block lost", ("index_score",), given(index_kv_cache=scores.chunk_start_forgotten)),
    )),
    Row("T1", "tie buffer capped; selection by a coarse bin", "interpreted", (
        Wrap("two ties at most", SELECTING, after(selection.few_ties)),
        Change("bins of 20 bits", (
            ("selection.py", "| (order << 24) |", "| ((order >> 20) << 44) |"),
        )),
    )),
    Row("T2", "NaN not canonicalised", "interpreted", (
        Change("NaN ranked by its bits", (
            ("selection.py", "tl.where(score != score, -0x80000000, order) + 0x80000000", "order + 0x80000000"),
        )),
    )),
    Row("T3", "k not clamped to the number of blocks", "interpreted", (
        Wrap("unused slots hold ids", SELECTING, after(selection.garbage_fills)),
    )),
    Row("T5", "forcing of the current block only; cut after sorting by id", "interpreted", (
        Wrap("only the current block", SELECTING,
             given(init_blocks=lambda k: 0, local_blocks=lambda k: min(1, k["local_blocks"]))),
        Wrap("no forced block", SELECTING, given(init_blocks=lambda k: 0, local_blocks=lambda k: 0)),
        Wrap("cut after sorting", SELECTING, selection.cut_after_sort),
    )),
    Row("T7", "row start not subtracted", "interpreted", (
        Wrap("positions count from the batch's first row", ("index_topk",),
             given(prefix_lens=lambda k: k["prefix_lens"] + k["cu_seqlens_q"][:-1])),
    )),
    Row("T9", "state of the previous row survives a short row", "interpreted", (
        Wrap("ids of the row before", SELECTING, after(selection.stale_slots)),
    )),
    Row("T10", "padded rows written over others", "interpreted", (
        Wrap("over the first row", SELECTING, after(selection.padding_over_rows)),
        Wrap("past the last row", SELECTING, after(selection.padding_past_rows)),
    )),
    Row("T11", "-1 emitted early", "interpreted", (
        Wrap("-1 in the first slot of short rows", SELECTING, after(selection.hole_first)),
    )),
    Row("A1", "mask on V dropped, kept on scores", "interpreted", (
        Change("V loaded where nothing is seen", (
            ("attention.py", "page = tl.load(table + block * stride_tc, mask=seen, other=0)",
             "page = tl.load(table + block * stride_tc, mask=block >= 0, other=0)"),
            ("attention.py", "v = tl.load(pointers + D * stride_cd, mask=seen[:, None], other=0)",
             "v = tl.load(pointers + D * stride_cd)"),
        )),
    )),
    Row("A2", "-1 dereferenced, or clamped to page 0", "interpreted", (
        Wrap("-1 is block 0", ATTENDING, given(topk_idx=lambda k: k["topk_idx"].clamp(min=0))),
        Change("no test for negative ids", (
            ("attention.py", "seen = (block >= 0) & (key < kv_len)", "seen = (slot < used) & (key < kv_len)"),
        )),
    )),
    Row("A5", "token-major and head-major ids confused", "interpreted", (
        Wrap("head-major read as token-major", ATTENDING, given(topk_idx=attention.token_major_ids)),
    )),
    Row("A7", "causality: lengths without draft tokens, a mask in the last tile only, top-left alignment", "interpreted", (
        Wrap("lengths without draft tokens", ("sparse_attn_decode", *DECODE_SCORING),
             given(seq_lens=lambda k: (k["seq_lens"] - k["decode_query_len"] + 1).clamp(min=0))),
        Wrap("top-left alignment", ("index_score", "index_topk", "sparse_attn"),
             given(prefix_lens=lambda k: k["prefix_lens"] * 0)),
        Change("prefill queries see the whole request", (
            ("sparse_attn.py", "kv_len = tl.minimum(position + 1, tl.load(seq_lens + request))",
             "kv_len = tl.load(seq_lens + request)"),
        )),
        Change("decode queries see the whole request", (
            ("sparse_attn_decode.py", "- query_len + (token - request * query_len) + 1", "+ 0"),
        )),
    )),
    Row("A8", "a page looked up too rarely; an identity table assumed", "interpreted", (
        Wrap("every second page", (*SCORING, *ATTENDING), given(block_table=caches.repeated_pages)),
        Wrap("identity table", (*SCORING, *ATTENDING), given(block_table=caches.identity_table)),
    )),
    Row("A10", "dense K/V strides assumed", "interpreted", (
        Wrap("dense pages", ATTENDING, given(kv_cache=caches.dense_cache)),
    )),
    Row("A11", "sm_scale baked from the first call, doubled, dropped", "interpreted", (
        Wrap("of the first call", ATTENDING, attention.baked_scale, fresh=True),
        Wrap("doubled", ATTENDING, given(sm_scale=lambda k: 2 * k["sm_scale"])),
        Wrap("dropped", ATTENDING, given(sm_scale=lambda k: 1.0)),
    )),
    Row("A12", "k_scale or v_scale dropped; a token's scale replaced by one for all", "interpreted", (
        Wrap("k_scale dropped", ATTENDING, given(k_scale=lambda k: k["k_scale"] * 0 + 1)),
        Wrap("v_scale dropped", ATTENDING, given(v_scale=lambda k: k["v_scale"] * 0 + 1)),
        Wrap("k_scale for v", ATTENDING, given(v_scale=lambda k: k["k_scale"])),
        Wrap("mean k_scale", ATTENDING, given(k_scale=attention.mean_scale("k_scale"))),
        Wrap("mean v_scale", ATTENDING, given(v_scale=attention.mean_scale("v_scale"))),
    )),
    Row("A13", "fn codes read as fnuz; codes not reinterpreted", "interpreted", (
        Wrap("main cache as fnuz", ATTENDING, given(kv_cache=caches.as_fnuz("kv_cache"))),
        Wrap("index cache as fnuz", SCORING, given(index_kv_cache=caches.as_fnuz("index_kv_cache"))),
        Wrap("main cache as integers", ATTENDING, given(kv_cache=caches.as_numbers("kv_cache", "q"))),
        Wrap("index cache as integers", SCORING, given(index_kv_cache=caches.as_numbers("index_kv_cache", "idx_q"))),
    )),
    Row("A15", "normaliser over twice the lanes", "interpreted", (
        Wrap("half the output", ATTENDING, after(lambda result, k: result.mul_(0.5))),
    )),
    Row("A16", "exp2 without log2 e, or exp with it", "interpreted", (
        Wrap("without log2 e", ATTENDING, given(sm_scale=lambda k: k["sm_scale"] * math.log(2))),
        Wrap("log2 e twice", ATTENDING, given(sm_scale=lambda k: k["sm_scale"] / math.log(2))),
    )),
    Row("M1", "no guard where every partial sum is empty", "interpreted", (
        Change("attention", (
            ("attention.py", "base = tl.where(new_top == float(\"-inf\"), 0.0, new_top)", "base = new_top"),
        )),
        Change("merge", (
            ("sparse_attn_decode.py", "base = tl.where(new_top == float(\"-inf\"), 0.0, new_top)", "base = new_top"),
        )),
        Wrap("NaN in dead rows", ("sparse_attn_decode",), after(attention.dead_rows_nan)),
    ), "a provider whose profile leaves dead rows open has the wrapper noted, not killed"),
    Row("M3", "base of the log-sum-exp differs in the merge", "interpreted", (
        Change("weights of parts by exp", (
            ("sparse_attn_decode.py", "weight = tl.exp2(top - base), tl.exp2(part_top - base)",
             "weight = tl.exp(top - base), tl.exp(part_top - base)"),
        )),
    )),
    Row("M5", "an empty chunk writes zeros to the final output", "interpreted", (
        Change("rows of few blocks are not merged, and the part that has them is the last to run", (
            ("sparse_attn_decode.py", "part = tl.program_id(2).to(tl.int64)",
             "part = tl.num_programs(2).to(tl.int64) - 1 - tl.program_id(2)"),
            ("sparse_attn_decode.py", "    if parts > 1:\n        sums",
             "    split = parts > 1 and block_table.shape[1] > share\n    if split:\n        sums"),
            ("sparse_attn_decode.py", "tiles.power_of_two(topk), parts > 1,", "tiles.power_of_two(topk), split,"),
            ("sparse_attn_decode.py", "    if parts > 1:\n        tile", "    if split:\n        tile"),
        )),
    ), "in the order in which the interpreter runs the programs the result is right: only the race can show"),
    Row("I1", "slot -1 written below the cache", "interpreted", (
        Wrap("the key of a token without a slot", INSERTING, inserts.below_the_cache),
    )),
    Row("I2", "index keys of the last page lost, or written in another dtype", "interpreted", (
        Wrap("index keys of the last page", INSERTING, given(index_slot_mapping=inserts.last_page_lost)),
    )),
    Row("W1", "lengths frozen at capture", "interpreted", (
        Wrap("lengths of the shape's first call", (*DECODE_SCORING, "sparse_attn_decode"), calls.first_lengths, fresh=True),
    ), "here as lengths kept from an earlier call of the same shapes; a captured graph itself needs a device"),
    Row("W3", "two launches in flight share metadata", "device",
        reason="interpreted launches are over when the call returns"),
    Row("W4", "verify rows treated as prefill without a prefix", "interpreted", (
        Wrap("lengths cut to the queries", ("sparse_attn_decode", *DECODE_SCORING), given(seq_lens=calls.without_prefix)),
    )),
    Row("W5", "compile cache key lacks a field", "interpreted", (
        Wrap("forcing and scale of the first call of this shape", (*SELECTING, *ATTENDING), calls.weak_cache_key,
             fresh=True),
    ), "here as figures kept from an earlier call of the same shapes"),
    Row("W7", "dependent-launch wait below the loads of ids and lengths", "interpreted", (
        Dropped("no wait", "gdc_wait"),
    ), "in kernels that launch dependently, which ours do not; lengths that come from the host need no wait"),
)  # fmt: skip
