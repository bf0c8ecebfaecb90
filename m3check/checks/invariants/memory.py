"""Where things lie in memory, and what lies between them, changes no bit of a result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from m3check.checks.invariants.trial import Trial
from m3check.paging import World
from m3check.types import BLOCK, Finding, Status

WORDS = {
    "poison": "memory that no live token owns held large numbers instead of NaN",
    "pages": "the pages were in another order",
    "strides": "the same tensors had other strides",
}


def world_of(fields: Mapping[str, Any], trial: Trial) -> World:
    """The World of an entry; layout `other` is one that the case does not have and the kernel does not refuse."""
    fields, case = dict(fields), trial.inputs.case
    if fields.get("layout") == "other":
        others = (layout for layout in ("pool", "hnd", "nhd") if layout != case.layout)
        fields["layout"] = next((o for o in others if trial.refuses(replace(case, layout=o)) is None), "")
    return World(**fields)


def physical(trial: Trial, entries: Mapping[str, Mapping[str, Any]]) -> list[Finding]:
    """One call with all changes at once; where its result differs, one for each change tells which it was."""
    together = world_of({name: value for fields in entries.values() for name, value in fields.items()}, trial)
    run = trial.call(trial.inputs, together)
    words = "; ".join(WORDS[name] for name in entries)
    finding = trial.same(next(iter(entries)), words, run)
    if finding.status is Status.PASSED:
        return [trial.passed(name) for name in entries]
    if len(entries) == 1:
        return [finding]
    alone = [
        trial.same(name, WORDS[name], trial.call(trial.inputs, world_of(fields, trial))) for name, fields in entries.items()
    ]
    if all(f.status is Status.PASSED for f in alone):  # only all of them together show it
        alone[0] = finding
    return alone


def far_pages(trial: Trial) -> list[Finding]:
    """Page ids so high that page · stride passes 2^31 elements."""
    words = "page ids times their stride passed 2^31 elements"
    return [_in_an_arena(trial, "far_pages", words, World(far=True))]


def far_slots(trial: Trial) -> list[Finding]:
    """Listed slots so high that slot · stride passes 2^31 elements."""
    words = "slots of listed tokens times their stride passed 2^31 elements"
    return [_in_an_arena(trial, "far_slots", words, World(far=True))]


def far_rows(trial: Trial) -> list[Finding]:
    """Rows so far apart that token · stride passes 2^31 elements, which only a kernel that promises it must bear."""
    words = "query tokens times their stride passed 2^31 elements"
    return [trial.unless_promised(_in_an_arena(trial, "far_rows", words, World(far_rows=True)))]


def channels_apart(trial: Trial) -> list[Finding]:
    """Every second element of each row, which only a kernel that promises it must bear."""
    run = trial.call(trial.inputs, World(apart=True))
    finding = trial.same("apart", "channels, ids and score columns were two elements apart", run)
    return [trial.unless_promised(finding)]


def own_buffers(trial: Trial) -> list[Finding]:
    """No buffer for what the kernel can allocate itself."""
    run = trial.call(trial.inputs, World(own_buffers=True))
    return [trial.same("own_buffers", "no buffer was given", run)]


def _in_an_arena(trial: Trial, name: str, words: str, world: World) -> Finding:
    finding = trial.same(name, words, trial.call(trial.inputs, world))
    if trial.setting.evidence == "device":
        torch.cuda.empty_cache()  # other workers share the GPU
    return finding


MILLION = 1 << 20
"""Tokens of M3's longest context."""


def longest(trial: Trial) -> list[Finding]:
    """max_seq_len and block table of a graph that was captured for M3's longest context."""
    world = World(max_seq_len=MILLION, columns=MILLION // BLOCK)
    run = trial.call(trial.inputs, world)
    return [trial.same("longest", f"max_seq_len was {MILLION}", run, bitwise=False)]


DRAFTING = ("index_decode_score", "index_decode", "index_decode_table")
"""Ops that are told the longest query of a captured graph."""


def room(trial: Trial) -> list[Finding]:
    """Limits as of a graph that was captured for longer requests: max_seq_len, max_decode_query_len, wider tables."""
    case = trial.inputs.case
    drafts = max(case.max_query_len, 2 * max(case.query_lens)) if case.op in DRAFTING else 0
    if drafts and trial.refuses(replace(case, max_query_len=drafts)) is not None:
        drafts = 0
    world = World(max_seq_len=case.context + 37 * BLOCK, max_query_len=drafts, columns=case.block_columns + 40)
    change = f"max_seq_len was {world.max_seq_len} instead of {max(case.context, 1)}"
    if world.max_query_len:
        change += f", max_decode_query_len {world.max_query_len}"
    return [trial.same("room", change, trial.call(trial.inputs, world), bitwise=False)]
