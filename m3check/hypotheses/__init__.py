"""Named wrong semantics: what a wrong kernel would compute, each the unchanged reference on changed inputs.

A case is worth what it would refuse. For each hypothesis that touches its op, the reference gives the wrong answer, the
answer is rounded as a kernel's would be, and the checks judge it like any other output: red means that the case could have
seen this defect. What equals the right answer bit for bit, or selects blocks of the same scores, is no defect there and
counts for nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from m3check.hypotheses import attention, geometry, insert, latent, logits, scores, tables
from m3check.hypotheses.hypothesis import Hypothesis, Stage, State
from m3check.hypotheses.side import STAGES, Side
from m3check.types import OPS

__all__ = ["BLOCKS", "HYPOTHESES", "Hypothesis", "Side", "Stage", "State", "named", "touching"]

BLOCKS: tuple[Hypothesis, ...] = (
    Hypothesis("score_block_shifted", "score", "a block has the score of the next one", scores.block_shifted, gross=True),
    Hypothesis("score_own_lost", "score", "scores miss the query's own token", geometry.EARLIER),
    Hypothesis("score_next_seen", "score", "scores see one token past the query", geometry.LATER),
    Hypothesis("score_unmasked", "score", "scores see the whole context, the future too", geometry.UNMASKED),
    Hypothesis("score_last_lost", "score", "scores miss the last token of the context", geometry.LAST_LOST),
    Hypothesis("score_drafts_lost", "score", "scores with lengths without the draft tokens", geometry.DRAFTS_LOST),
    Hypothesis("score_key_lost", "score", "one block misses its best key", scores.best_key_lost),
    Hypothesis("score_head_shared", "score", "all index heads score with one head's queries", scores.head_shared),
    Hypothesis("score_scaled", "score", "scores carry the softmax scale", scores.scores_scaled),
    Hypothesis("score_requests", "score", "two requests read each other's index pages", geometry.requests_exchanged),
    Hypothesis("score_dialect", "score", "index keys read in the other fp8 dialect", geometry.other_dialect, codes=True),
    Hypothesis("score_init_lost", "score", "no init blocks in the scores", scores.forcing_lost("init_blocks")),
    Hypothesis("score_local_lost", "score", "no local blocks in the scores", scores.forcing_lost("local_blocks")),
    Hypothesis("select_swapped", "select", "the worst block in place of the best", scores.best_for_worst, gross=True),
    Hypothesis("select_neighbours", "select", "the last block chosen for the first one left out", scores.neighbours),
    Hypothesis("select_smallest", "select", "the smallest scores are selected", scores.smallest_first),
    Hypothesis("select_init_lost", "select", "init blocks are not forced", scores.forcing_lost("init_blocks")),
    Hypothesis("select_local_lost", "select", "local blocks are not forced", scores.forcing_lost("local_blocks")),
    Hypothesis("select_own_lost", "select", "selection sees one block less", geometry.BLOCK_LOST),
    Hypothesis("select_next_seen", "select", "selection sees one block more", geometry.BLOCK_MORE),
    Hypothesis("select_one_less", "select", "one block less than topk", scores.one_less),
    Hypothesis("select_head", "select", "an index head gets its neighbour's selection", scores.heads_rolled),
    Hypothesis("select_shifted", "select", "ids off by one", scores.columns_shifted),
    Hypothesis("block_first_lost", "attend", "every row loses its first block", attention.first_block_lost, gross=True),
    Hypothesis("block_last_lost", "attend", "every row loses its last block", attention.last_block_lost),
    Hypothesis("block_own_lost", "attend", "every row loses its own block", attention.own_block_lost),
    Hypothesis("block_one_lost", "attend", "one row of one KV head loses one block", attention.one_block_lost),
    Hypothesis("block_replaced", "attend", "a block not listed in place of a listed one", attention.block_replaced),
    Hypothesis("block_values", "attend", "keys of a block with the values of the next", attention.values_of_next_block),
    Hypothesis("token_lost", "attend", "one row loses a token of median weight",
               attention.token_lost(attention.median_weight)),
    Hypothesis("token_first_lost", "attend", "one row loses the first token of a block",
               attention.token_lost(attention.first_of_a_block)),
    Hypothesis("own_lost", "attend", "attention misses the query's own token", geometry.EARLIER),
    Hypothesis("next_seen", "attend", "attention sees one token past the query", geometry.LATER),
    Hypothesis("unmasked", "attend", "attention sees the whole context, the future too", geometry.UNMASKED),
    Hypothesis("last_lost", "attend", "attention misses the last token of the context", geometry.LAST_LOST),
    Hypothesis("drafts_lost", "attend", "attention with lengths without the draft tokens", geometry.DRAFTS_LOST),
    Hypothesis("scale_double", "attend", "twice the softmax scale", attention.scaled(2.0), gross=True),
    Hypothesis("scale_percent", "attend", "a softmax scale 1 % too large", attention.scaled(1.01)),
    Hypothesis("scale_dropped", "attend", "no softmax scale", attention.scale_dropped),
    Hypothesis("scale_base", "attend", "2 in place of e as the base of the softmax", attention.scaled(0.6931471805599453)),
    Hypothesis("kv_heads", "attend", "a KV head reads its neighbour's cache", attention.kv_heads_rolled, gross=True),
    Hypothesis("group", "attend", "query heads of a group are exchanged", attention.group_rolled, gross=True),
    Hypothesis("lists", "attend", "a KV head reads its neighbour's id list", attention.lists_rolled),
    Hypothesis("requests", "attend", "two requests read each other's pages", geometry.requests_exchanged),
    Hypothesis("ids_clamped", "attend", "-1 read as block 0, a block out of sight as the own one", attention.ids_clamped),
    Hypothesis("k_scale_dropped", "attend", "k_scale not applied", attention.k_scale_dropped, codes=True),
    Hypothesis("v_scale_dropped", "attend", "v_scale not applied", attention.v_scale_dropped, codes=True),
    Hypothesis("scales_swapped", "attend", "k_scale and v_scale exchanged", attention.scales_swapped, codes=True),
    Hypothesis("scales_of_token", "attend", "scales of the neighbouring token", attention.scales_of_token, codes=True),
    Hypothesis("scales_of_head", "attend", "scales of the neighbouring head", attention.scales_of_head, codes=True),
    Hypothesis("dialect", "attend", "keys and values read in the other fp8 dialect", geometry.other_dialect, codes=True),
)  # fmt: skip
"""Of block-sparse attention."""

HYPOTHESES = (*BLOCKS, *latent.HYPOTHESES, *logits.HYPOTHESES, *insert.HYPOTHESES, *tables.HYPOTHESES)

ONLY: Mapping[str, Callable[[str], bool]] = {  # hypotheses that need more of an op than their stage
    "score_init_lost": lambda op: op == "index_decode_score",  # elsewhere forcing is the selection's
    "score_local_lost": lambda op: op == "index_decode_score",
    "score_drafts_lost": lambda op: OPS[op].phase == "decode",
    "drafts_lost": lambda op: OPS[op].phase == "decode",
    "logits_drafts_lost": lambda op: OPS[op].phase == "decode",
    "table_drafts_lost": lambda op: OPS[op].phase == "decode",
}


def touching(op: str) -> tuple[Hypothesis, ...]:
    """The hypotheses that an op may fall for, in the order of HYPOTHESES; of some ops none are known."""
    return tuple(h for h in HYPOTHESES if h.stage in STAGES.get(op, ()) and ONLY.get(h.name, bool)(op))


def named(name: str) -> Hypothesis:
    """The hypothesis of a name; KeyError for an unknown one."""
    return {h.name: h for h in HYPOTHESES}[name]
