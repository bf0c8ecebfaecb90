"""Every named way to be wrong that a diagnosis tries: the hypotheses that measure the cases' power, and many more.

The list is longer than BLOCKS of hypotheses/__init__.py, since a case need not have been judged by it: a new
line here costs a diagnosis some milliseconds, one there a new power table.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from m3check.hypotheses import BLOCKS, Hypothesis, attention, merging, selected
from m3check.hypotheses import inputs as more
from m3check.hypotheses import memory as misread
from m3check.hypotheses.geometry import Change
from m3check.hypotheses.hypothesis import Stage
from m3check.hypotheses.scene import Scene, Suspect
from m3check.types import Inputs

__all__ = ["SUSPECTS", "touching"]


def _on_problem(change: Change) -> Callable[[Scene], Inputs | None]:
    return lambda scene: change(scene.problem)


def _changed(name: str, stage: Stage, words: str, change: Change, codes: bool = False) -> Suspect:
    return Suspect(name, stage, words, (lambda scene: change(scene.given)) if codes else _on_problem(change))


def _known(h: Hypothesis) -> Suspect:
    assert h.change is not None
    return _changed(h.name, h.stage, h.words, h.change, h.codes)


MISREAD = (
    ("pages_halved", "the page is looked up for every second block only", misread.pages_halved),
    ("identity_of_batch", "an identity page table is assumed, numbered through the batch", misread.identity_of_batch),
    ("identity_of_row", "an identity page table is assumed in every request", misread.identity_of_row),
    ("pages_of_first", "every request reads the pages of the first", misread.first_row),
    ("page_after", "a block reads the page of the next one", misread.column_after),
    ("page_before", "a block reads the page of the one before", misread.column_before),
    ("layer_first", "the cache of another layer, the first of its pool", misread.first_layer),
    ("cache_dense", "the cache is read with strides that follow from its shape", misread.dense),
)

_SHARES = (1, 2, 3, 4, 6, 8, 16)
_JOINS = (
    ("merge_tops_by_e", "parts are weighed by e^ of base-2 maxima", merging.tops_by_e),
    ("merge_lse_by_e", "parts are weighed by e^ of a base-2 log-sum-exp", merging.lse_by_e),
    ("merge_natural", "parts are weighed by 2^ of a natural log-sum-exp", merging.natural_lse),
    ("merge_unweighted", "parts are averaged without weights", merging.unweighted),
    ("merge_own_tops", "parts are not rescaled to a common maximum", merging.not_rescaled),
    ("merge_last_top", "sums are not rescaled when the maximum grows", merging.last_maximum),
)

SUSPECTS: tuple[Suspect, ...] = (
    *(_known(h) for h in BLOCKS),
    # scores
    _changed("score_top_left", "score", "queries stand at the start of their request (no prefix)", more.TOP_LEFT),
    _changed("score_whole_blocks", "score", "scores miss the last, partly filled block", more.WHOLE_BLOCKS),
    _changed("score_block_end", "score", "scores see a query's own block to its end", more.BLOCK_END),
    Suspect("score_past_seen", "score", "scores see the last block to its end, past the last token",
            more.past_seen(last_only=False)),
    Suspect("score_past_seen_last", "score", "the last query sees its block to its end, past the last token",
            more.past_seen(last_only=True)),
    _changed("score_queries_e4m3", "score", "index queries went through e4m3", more.queries_by_e4m3),
    _changed("score_chunk_start", "score", "keys of a chunk's first block that earlier chunks wrote are lost",
             more.chunk_start_lost),
    _changed("score_integers", "score", "fp8 codes of index keys taken as integers", more.as_integers, codes=True),
    Suspect("score_heads_largest", "score", "every index head has the largest score of any", result=more.largest_of_heads),
    Suspect("score_columns_cut", "score", "columns from some block on are never written", result=more.columns_cut),
    *(Suspect(f"score_{name}", "score", words, misread.misread(change)) for name, words, change in MISREAD),
    # selections
    Suspect("select_own_forced", "select", "only the query's own block is forced", selected.forcing(False, True)),
    Suspect("select_none_forced", "select", "no block is forced", selected.forcing(False, False)),
    Suspect("select_local_first", "select", "local blocks are put before the init blocks", selected.local_first),
    Suspect("select_by_value", "select", "forcing by scores of 1e30 and 1e29, which larger scores beat",
            selected.forced_by_value),
    Suspect("select_first_head", "select", "all heads get the first head's selection", selected.first_head),
    Suspect("select_top_left", "select", "queries stand at the start of their request (no prefix)",
            selected.standing(lambda request, i: i)),
    Suspect("select_batch_start", "select", "positions count from the batch's first row",
            selected.standing(lambda request, i: request.position(i) + request.query_start)),
    Suspect("select_drafts_lost", "select", "selection with lengths without the draft tokens",
            selected.standing(lambda request, i: request.position(i) - request.query_len + 1)),
    Suspect("select_unmasked", "select", "selection sees every block of the request",
            selected.standing(lambda request, i: request.kv_len - 1)),
    Suspect("select_every_column", "select", "blocks past the query's own take part in the selection",
            result=selected.every_column(forced=False)),
    Suspect("select_every_column_forced", "select", "blocks past the query's own count as local",
            result=selected.every_column(forced=True)),
    *(Suspect(f"select_bins_{bits}", "select", f"scores compare without their last {bits} bits",
              selected.ranked(selected.binned(bits))) for bits in (8, 12, 13, 16, 18, 20, 22)),
    Suspect("select_nan_first", "select", "NaN outranks every score", selected.ranked(selected.nan_first)),
    Suspect("select_magnitude", "select", "scores compare by their magnitude",
            selected.ranked(lambda s: s.abs().where(s.isfinite(), s))),
    *(Suspect(f"select_ties_{most}", "select", f"of the blocks that tie with the last one taken, {most} are kept",
              result=selected.ties_capped(most)) for most in (1, 2, 4)),
    Suspect("select_cut_sorted", "select", "more than topk are selected, sorted by id, and cut",
            result=selected.cut_after_sort),
    *(Suspect(f"select_tile_{tile}", "select",
              f"blocks come in tiles of {tile}, and only the power of two below topk goes on to the next",
              result=selected.tile_cut(tile)) for tile in (32, 64, 128)),
    Suspect("select_slots_cut", "select", "lists end early, and what they hold are the best blocks",
            result=selected.slots_cut),
    Suspect("select_slots_numbered", "select", "unused slots hold ids instead of -1", result=selected.slots_numbered),
    Suspect("select_row_before", "select", "unused slots hold what the row before had", result=selected.row_before),
    Suspect("select_first_row", "select", "the first row of the batch is overwritten by -1",
            result=selected.first_row_erased),
    Suspect("select_hole_first", "select", "a row that is not full begins with -1", result=selected.hole_first),
    # attention
    _changed("top_left", "attend", "queries stand at the start of their request (no prefix)", more.TOP_LEFT),
    _changed("whole_blocks", "attend", "attention misses the last, partly filled block", more.WHOLE_BLOCKS),
    _changed("block_end", "attend", "attention sees a query's own block to its end", more.BLOCK_END),
    Suspect("past_seen", "attend", "attention sees the last block to its end, past the last token",
            more.past_seen(last_only=False)),
    Suspect("past_seen_last", "attend", "the last query sees its block to its end, past the last token",
            more.past_seen(last_only=True)),
    _changed("scale_base_twice", "attend", "log2 e is applied twice: the logits are 1/ln 2 too large",
             attention.scaled(1 / math.log(2))),
    _changed("scale_squared", "attend", "the softmax scale is applied twice",
             lambda inputs: attention.scaled(inputs.sm_scale)(inputs)),
    _changed("minus_one_is_zero", "attend", "-1 is read as block 0", more.minus_one_is_zero),
    _changed("ids_token_major", "attend", "head-major id lists are read as token-major ones", more.token_major),
    _changed("ids_first_head", "attend", "all heads read the first head's list", more.first_list),
    _changed("keys_for_values", "attend", "keys and values are exchanged", more.keys_for_values),
    _changed("output_halved", "attend", "half the output: the normaliser counts everything twice", more.values_times(0.5)),
    _changed("output_doubled", "attend", "twice the output", more.values_times(2.0)),
    _changed("integers", "attend", "fp8 codes taken as integers", more.as_integers, codes=True),
    _changed("k_scale_mean", "attend", "one k_scale, the mean, for all tokens", more.mean_scale("k_scale"), codes=True),
    _changed("v_scale_mean", "attend", "one v_scale, the mean, for all tokens", more.mean_scale("v_scale"), codes=True),
    _changed("scales_first", "attend", "the scales of a request's first token for all of them", more.one_scale_a_head,
             codes=True),
    _changed("k_scale_for_both", "attend", "k_scale for keys and values", more.scale_for_both("k_scale"), codes=True),
    _changed("v_scale_for_both", "attend", "v_scale for keys and values", more.scale_for_both("v_scale"), codes=True),
    *(_changed(f"slots_first_{n}", "attend", f"only the first {n} slots of a list are attended", more.slots_past(n))
      for n in (1, 2, 4, 8, 16, 32)),
    *(Suspect(name, "attend", words, misread.misread(change)) for name, words, change in MISREAD),
    # the joining of parts
    *(Suspect(f"split_lost_{part + 1}_of_{of}", "attend",
              f"the {'last' if part else 'first'} of {of} splits of a list is lost",
              _on_problem(more.slots_lost(part, of)), merge=True)
      for of in (2, 4, 8) for part in (0, of - 1)),
    *(Suspect(f"split_doubled_{part + 1}_of_{of}", "attend",
              f"the {'last' if part else 'first'} of {of} splits of a list counts twice",
              _on_problem(more.slots_doubled(part, of)), merge=True)
      for of in (2, 4, 8) for part in (0, of - 1)),
    *(Suspect(f"{name}_{share}", "attend", f"{words} (parts of {share} blocks)",
              result=merging.joined(weights, share), merge=True)
      for name, words, weights in _JOINS for share in _SHARES),
    Suspect("empty_dead", "attend", "0/0 in rows that see no block", result=merging.dead_nan),
    *(Suspect(f"empty_first_{share}", "attend", f"NaN where the first {share} slots of a list hold no visible block",
              result=merging.empty_first(share)) for share in (1, 2, 4, 8, 16)),
    *(Suspect(f"empty_any_{share}", "attend", f"NaN where any part of {share} slots holds no visible block",
              result=merging.empty_any(share), merge=True) for share in (1, 2, 3, 4, 8)),
)  # fmt: skip


def touching(stage: Stage) -> tuple[Suspect, ...]:
    """The suspects of one stage, in the order of the list."""
    return tuple(suspect for suspect in SUSPECTS if suspect.stage == stage)
